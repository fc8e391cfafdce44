"""An AgileX Piper on its CAN bus, through the vendor's piper_sdk.

What the SDK leaves to its caller is settled here:

* One reader. The SDK's parser runs in this driver's own thread, and a state is published only when
  it is whole (:mod:`robot_bridge.drivers.piper_feedback`).
* One sender. The SDK encodes into one shared buffer, so every send is made under one lock.
* Age, not ``isOk()``. On silence the SDK keeps its last values for ever; a state carries its age.
* A bus that fails, because its adapter was unplugged or its link went down, is opened again.
* Integers. The bus counts 0.001 deg and 0.001 mm; rounding happens here and nowhere else.

What the vendor's words do to the arm:

=========  ==================================================================================
enable     powers the motors; the driver commands the present pose first, so nothing moves
stop       the arm's damped descent, motors on; afterwards it ignores commands until a reset
disable    cuts the motors' power: **the arm drops**
reset      clears a stop or a fault, and cuts the motors' power: **the arm drops**
=========  ==================================================================================

Nothing here disables or resets by itself, and :meth:`PiperDriver.close` leaves the arm holding its
last setpoint. An arm that is guided by hand or leads another ignores commands; nothing is sent to it
then, and it must be enabled again afterwards, so that it does not jump back to an older setpoint.

Joints are counted in one of two ways (Denavit-Hartenberg conventions of the vendor): older arms count
joints 2 and 3 from a zero that lies 2 deg elsewhere. The rig says which (``dh`` of its CAN port);
states and setpoints are always in the newer one, which ``urdf/piper.urdf`` describes.
"""

from __future__ import annotations

import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robot_bridge.drivers.claim import claim
from robot_bridge.drivers.piper_faults import JOINTS, TEACH_FAULT
from robot_bridge.drivers.piper_feedback import ArmState, Feedback, from_counts, to_counts, version
from robot_bridge.limits import SafeSetpoint
from robot_bridge.rig import TWIN_BUS, CanPort
from simplevla.embodiment import Arm
from simplevla.errors import EmbodimentError, MissingExtraError, UnavailableError

if TYPE_CHECKING:
    import can

logger = logging.getLogger(__name__)

MAX_GRIPPER_EFFORT_NM = 5.0  # the range of frame 0x159
OLDEST_FIRMWARE = (1, 5, 2)  # the SDK speaks protocol V2 with this and newer ones (its own README)
SILENT_S = 0.5

_PATIENCE_S = 0.2  # for the answer to a question
_ALL_MOTORS = 7
_MODE_AGAIN_S = 0.1
_BROKEN_S, _REOPEN_S = 0.3, 0.5
_CAN_CONTROL, _MOVE_J = 0x01, 0x01
_GRIPPER_PARAMETERS = 4
_STROKE_SLACK_M = 1e-3
# theta = q - 174.22 deg and q - 100.78 deg on older arms, q - 172.22 and q - 102.78 on newer ones
# (piper_sdk's C_PiperForwardKinematics): what an older arm reports where a newer one reports zero.
_OLD_DH_ZEROS = np.radians([0.0, 2.0, -2.0, 0.0, 0.0, 0.0])


class PiperDriver:
    """One arm. A context manager: the bus is open inside the ``with`` block.

    Opening sends no motion unless the arm is already enabled; then the pose it has is commanded, so
    that no older target is left in it. Motors stay as they are until :meth:`enable`.

    Args:
        arm: the arm of the embodiment; six joints and a gripper.
        can: its bus.
        speed_percent: the arm's own speed limit on the way to a setpoint, percent of its maximum.
        gripper_effort_nm: torque with which the gripper closes, N·m.
        connect_timeout_s: how long to wait for the first complete feedback.
        zeros_rad: (6,) what each joint reports where it truly is at zero, as calibration found; states
            and setpoints are true positions, and the arm is spoken to in its own.

    Raises:
        UnavailableError: on entering, the bus cannot be opened, is in use by another driver on this
            machine, or nothing is heard of the arm.
        EmbodimentError: the arm has not six joints, or says that its gripper opens less far.
        MissingExtraError: piper_sdk is not installed.
    """

    def __init__(
        self,
        arm: Arm,
        can: CanPort,
        *,
        speed_percent: int = 100,
        gripper_effort_nm: float = 1.0,
        connect_timeout_s: float = 2.0,
        zeros_rad: Sequence[float] | None = None,
    ) -> None:
        if len(arm.joints) != JOINTS:
            raise EmbodimentError(f"arm {arm.name} has {len(arm.joints)} joints", "a Piper has six")
        if not 1 <= speed_percent <= 100 or not 0 < gripper_effort_nm <= MAX_GRIPPER_EFFORT_NM:
            raise ValueError(f"speed_percent {speed_percent} or gripper_effort_nm {gripper_effort_nm}")
        self.arm = arm
        self.can = can
        self._speed_percent = speed_percent
        self._gripper_effort = round(gripper_effort_nm * 1000)
        self._connect_timeout_s = connect_timeout_s
        self._zeros = np.zeros(JOINTS + 1)
        self._zeros[:JOINTS] = 0.0 if zeros_rad is None else np.asarray(zeros_rad, dtype=np.float64)
        if can.dh == "old":
            self._zeros[:JOINTS] += _OLD_DH_ZEROS
        self._send_lock = threading.Lock()
        self._news = threading.Condition()
        self._closing = threading.Event()
        self._reader: threading.Thread | None = None
        self._sdk: Any = None
        self._claim: socket.socket | None = None
        self._feedback: Feedback | None = None
        self._latest: tuple[ArmState, float] | None = None  # with its time on the monotonic clock
        self._sent: tuple[int, ...] | None = None
        self._forget()

    def __enter__(self) -> PiperDriver:
        self._claim = claim(self.can)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the bus and end the reader. The arm goes on holding the last setpoint, motors on."""
        self._closing.set()
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        if self._sdk is not None:
            with self._send_lock:
                self._sdk.DisconnectPort()
                self._sdk = None
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def state(self) -> ArmState:
        """Return the newest whole state; its ``age_s`` says whether it still means anything."""
        latest = self._latest
        if latest is None:
            raise UnavailableError(f"arm {self.arm.name}: the driver is not open", "open it first")
        state, heard_s = latest
        return dataclasses.replace(state, age_s=time.monotonic() - heard_s)

    def enable(self, timeout_s: float = 5.0) -> None:
        """Power the motors at the pose that is measured now, the gripper included. Nothing moves.

        Raises:
            UnavailableError: feedback is stale, the arm is stopped or taught by hand, or the motors
                do not report that they are on within ``timeout_s``.
        """
        self._require_commandable()
        deadline = time.monotonic() + timeout_s
        self._armed = True
        self._command_measured()
        while not self._stop_sent:
            with self._send_lock:
                self._sdk.EnableArm(_ALL_MOTORS)  # EnablePiper() would return the state of before
            self._command_measured()
            if self._wait_enabled(0.2):
                break
            if time.monotonic() > deadline:
                self._armed = False
                faults = ", ".join(self.state().faults) or "the arm names no fault"
                raise UnavailableError(
                    f"arm {self.arm.name}: motors did not come on within {timeout_s:g} s ({faults})",
                    "check the arm's power supply and its emergency-stop button",
                )
        self._require_commandable()
        logger.info("arm %s: enabled", self.arm.name)

    def send(self, setpoint: SafeSetpoint, part: slice) -> NDArray[np.float64] | None:
        """Send this arm's part of a setpoint, joints and gripper.

        Args:
            setpoint: what the limits let through, (D,) rad and m.
            part: the slice of the (D,) vector that is this arm's.

        Returns:
            (7,) what was really sent after rounding to the bus's units, rad and m; None if nothing
            was sent because the arm is stopped or was not enabled.

        Raises:
            TypeError: ``setpoint`` did not come from the limits.
            ValueError: it does not have seven finite values at ``part``.
        """
        if not isinstance(setpoint, SafeSetpoint):
            raise TypeError(f"only a SafeSetpoint may reach the bus, not {type(setpoint).__name__}")
        counts = to_counts(setpoint.positions[part] + self._zeros)
        effort = min(self._gripper_effort, round(setpoint.gripper_effort_nm * 1000))
        return from_counts(counts) - self._zeros if self._command(counts, effort) else None

    def hold(self) -> NDArray[np.float64] | None:
        """Send the last setpoint again; see :meth:`send`. None also if none was sent yet."""
        counts = self._sent
        done = self._command(counts)
        return None if counts is None or not done else from_counts(counts) - self._zeros

    def stop(self) -> None:
        """Stop now: the arm's own damped descent, motors on. From here on nothing else is sent.

        Safe to call from any thread and as often as wanted. Until the arm reports that it is stopped,
        every :meth:`send` and :meth:`hold` repeats the stop, so that a lost frame is made up for.
        To move again: :meth:`reset` with the arm supported, then :meth:`enable`.
        """
        self._stop_sent = True
        with self._send_lock:
            if self._sdk is not None:
                self._sdk.EmergencyStop(1)
        logger.warning("arm %s: stop sent", self.arm.name)

    def disable(self) -> None:
        """Cut the motors' power: **the arm drops**. Only for a person, with the arm supported."""
        opening = to_counts(self.state().position)[JOINTS]
        with self._send_lock:
            self._armed = False
            self._sent = None
            self._sdk.DisableArm(_ALL_MOTORS)
            self._sdk.GripperCtrl(opening, self._gripper_effort, 0, 0)
        logger.warning("arm %s: disable sent, its motors have no power", self.arm.name)

    def reset(self) -> None:
        """Clear a stop or a fault: cuts power, **the arm drops**. Only for a person, as above."""
        with self._send_lock:
            self._armed = self._stop_sent = False
            self._sent = None
            self._sdk.EmergencyStop(2)
        logger.warning("arm %s: reset sent, its motors have no power", self.arm.name)

    @property
    def firmware(self) -> str:
        """The arm's firmware, such as ``S-V1.8-2``; empty if it did not say."""
        return self._feedback.firmware if self._feedback else ""

    @property
    def doubted(self) -> int:
        """How many feedback cycles were left out because the arm cannot have been there."""
        return self._feedback.doubted if self._feedback else 0

    @property
    def _where(self) -> str:
        return f"{self.can.interface} {self.can.channel}"

    @property
    def _remedy(self) -> str:
        if self.can.interface == TWIN_BUS:
            return "start the twin: simplevla twin"
        link = f"ip link set {self.can.channel} up type can bitrate {self.can.bitrate}"
        return f"check the arm's power and the CAN adapter and cable, then: {link}"

    def _forget(self) -> None:
        self._latest = None
        self._sent = None
        self._stop_sent = self._armed = self._broken = False
        self._mode_sent_s = 0.0

    def _connect(self) -> None:
        try:
            from piper_sdk import C_PiperInterface_V2, LogLevel
        except ImportError as error:
            raise MissingExtraError("piper_sdk", "robot") from error
        self._forget()
        self._closing.clear()
        # The SDK keeps one instance a name; a driver that is opened again gets the same one back.
        self._sdk = C_PiperInterface_V2(
            self.can.channel, judge_flag=False, can_auto_init=False, logger_level=LogLevel.SILENT
        )
        self._feedback = feedback = Feedback(self._sdk, self.arm.name)
        feedback.zeros = self._zeros
        self._reader = threading.Thread(
            target=self._read, args=(self._open_bus(),), name=f"piper-{self.arm.name}", daemon=True
        )
        self._reader.start()
        # The SDK's own threads are not started: they outlive DisconnectPort.
        self._sdk.ConnectPort(can_init=False, piper_init=True, start_thread=False)
        if not self._wait(lambda: self._latest is not None, self._connect_timeout_s):
            raise UnavailableError(
                f"arm {self.arm.name}: nothing heard on {self._where} within {self._connect_timeout_s:g} s",
                self._remedy,
            )
        self._check_firmware(feedback)
        self._check_gripper(feedback)
        if self.state().enabled:
            self._armed = True
            self._command_measured()
        logger.info("arm %s: connected on %s", self.arm.name, self._where)

    def _open_bus(self) -> can.BusABC:
        """Return a newly opened bus.

        Raises:
            UnavailableError: it cannot be opened.
        """
        port = self.can
        try:
            self._sdk.CreateCanBus(port.channel, port.interface, port.bitrate, judge_flag=False)
        except Exception as error:  # whatever a back end of python-can raises
            raise self._no_bus(str(error)) from error
        bus: can.BusABC | None = self._sdk.GetCanBus().recv_bus
        if bus is None:
            raise self._no_bus("python-can could not open it")
        return bus

    def _check_firmware(self, feedback: Feedback) -> None:
        """Ask which firmware the arm has; an older one than the SDK speaks with is refused."""
        if not self._wait(lambda: bool(feedback.firmware), _PATIENCE_S):
            with self._send_lock:  # the answer may have come before the reader listened
                self._sdk.SearchPiperFirmwareVersion()
            self._wait(lambda: bool(feedback.firmware), _PATIENCE_S)
        found = version(feedback.firmware)
        if found is None:
            logger.warning("arm %s does not name its firmware (%r)", self.arm.name, feedback.firmware)
        elif found < OLDEST_FIRMWARE:
            raise UnavailableError(
                f"arm {self.arm.name} has firmware {feedback.firmware}, which speaks another protocol",
                "bring it to S-V1.5-2 or a newer one with the vendor's tool",
            )

    def _check_gripper(self, feedback: Feedback) -> None:
        """Compare the stroke that the arm has been told its gripper has with the embodiment's."""
        with self._send_lock:
            self._sdk.ArmParamEnquiryAndConfig(param_enquiry=_GRIPPER_PARAMETERS)
        self._wait(lambda: feedback.gripper_range_m is not None, _PATIENCE_S)
        said, stroke = feedback.gripper_range_m, self.arm.gripper.stroke_m
        if said is None:
            logger.warning("arm %s does not say how far its gripper opens", self.arm.name)
        elif said < stroke - _STROKE_SLACK_M:
            raise EmbodimentError(
                f"arm {self.arm.name}: its gripper is set to open {said * 1e3:.0f} mm, and the embodiment "
                f"says {stroke * 1e3:.0f} mm",
                "set the gripper's range with the vendor's tool, or correct gripper.stroke_m",
            )
        elif said > stroke + _STROKE_SLACK_M:
            logger.warning(
                "arm %s: its gripper is set to open %.0f mm; the embodiment uses %.0f mm of them",
                self.arm.name,
                said * 1e3,
                stroke * 1e3,
            )

    def _no_bus(self, why: str) -> UnavailableError:
        return UnavailableError(
            f"arm {self.arm.name}: the bus {self._where} cannot be opened ({why})", self._remedy
        )

    def _require_commandable(self) -> None:
        state = self.state()
        if state.age_s > SILENT_S:
            raise UnavailableError(
                f"arm {self.arm.name}: silent for {state.age_s:.1f} s on {self._where}",
                "check the arm's power and the CAN cable",
            )
        if taught := self._taught():
            raise UnavailableError(f"arm {self.arm.name} is {taught}", "then enable it again")
        if state.stopped or self._stop_sent:
            raise UnavailableError(
                f"arm {self.arm.name} is in its emergency stop",
                "support the arm, for a reset cuts its power; then reset it and enable it",
            )

    def _command_measured(self) -> None:
        self._mode_sent_s = float("-inf")
        self._command(to_counts(self.state().position + self._zeros))

    def _command(self, counts: tuple[int, ...] | None, effort: int | None = None) -> bool:
        """Send joints and gripper, and the mode where it is needed; return whether that was done.

        It is not done without power asked for, on a broken bus, while the arm is guided by hand, and
        after a stop; then the stop is repeated until the arm reports it.
        """
        with self._send_lock:
            if self._sdk is None or self._feedback is None:
                raise UnavailableError(f"arm {self.arm.name}: the driver is closed", "open it again")
            if self._broken:
                return False
            if self._stop_sent:
                if self._latest is not None and not self._latest[0].stopped:
                    self._sdk.EmergencyStop(1)
                return False
            if self._armed and self._taught():
                self._armed = False
            if counts is None or not self._armed:
                return False
            now_s = time.monotonic()
            listens = (self._feedback.control_mode, self._feedback.move_mode) == (_CAN_CONTROL, _MOVE_J)
            if not listens and now_s - self._mode_sent_s > _MODE_AGAIN_S:
                self._mode_sent_s = now_s
                self._sdk.ModeCtrl(_CAN_CONTROL, _MOVE_J, self._speed_percent, 0)
            self._sdk.JointCtrl(*counts[:JOINTS])
            self._sdk.GripperCtrl(counts[JOINTS], effort or self._gripper_effort, 1, 0)
            self._sent = counts
            return True

    def _taught(self) -> str:
        """Return why a person must come before the arm follows commands; empty if it does."""
        return TEACH_FAULT.get(self._feedback.control_mode, "") if self._feedback else ""

    def _wait_enabled(self, timeout_s: float) -> bool:
        """Wait for the motors to report anew; return whether all of them are on."""
        asked_s, feedback = time.monotonic(), self._feedback
        assert feedback is not None
        return self._wait(lambda: feedback.motors_heard_s > asked_s, timeout_s) and self.state().enabled

    def _wait(self, done: Callable[[], bool], timeout_s: float) -> bool:
        with self._news:
            return self._news.wait_for(done, timeout_s)

    def _read(self, bus: can.BusABC | None) -> None:
        """Take frames until the driver closes. A bus that fails shows as a state that ages."""
        failing_since_s: float | None = None
        while not self._closing.is_set():
            if bus is None:
                bus = self._reopen()
                continue
            try:
                message = bus.recv(timeout=0.05)
                failing_since_s = None
                if message is not None:
                    self._take(message)
            except Exception as error:  # any back end of python-can, any malformed frame
                now_s = time.monotonic()
                if failing_since_s is None:
                    failing_since_s = now_s
                    logger.warning("arm %s: %s: %s", self.arm.name, self._where, error)
                if now_s - failing_since_s > _BROKEN_S:
                    failing_since_s, bus = None, None
                self._closing.wait(0.01)

    def _reopen(self) -> can.BusABC | None:
        """Open a bus that fails anew, as after its adapter was plugged in again; None if that fails."""
        with self._send_lock:
            if not self._broken:
                self._broken = True  # nothing is sent meanwhile
                logger.error("arm %s: %s is gone; %s", self.arm.name, self._where, self._remedy)
            self._sdk.DisconnectPort()
        if self._closing.wait(_REOPEN_S):
            return None
        with self._send_lock:
            try:
                bus = self._open_bus()
            except UnavailableError as error:
                logger.debug("%s", error)
                return None
            self._sdk.ConnectPort(can_init=False, piper_init=True, start_thread=False)
            self._broken = False
        logger.warning("arm %s: %s is open again", self.arm.name, self._where)
        return bus

    def _take(self, message: can.Message) -> None:
        assert self._feedback is not None
        state = self._feedback.take(message)
        if state is not None:
            with self._news:
                self._latest = state
                self._news.notify_all()
