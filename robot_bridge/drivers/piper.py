"""An AgileX Piper on its CAN bus, through the vendor's piper_sdk.

What the SDK leaves to its caller is settled here:

* One reader. The SDK's parser runs in this driver's own thread, and a state is published only when
  the three joint frames of one cycle came in order, so no reader sees half of two poses.
* One sender. The SDK encodes into one shared buffer, so every send is made under one lock.
* Age, not ``isOk()``. On silence the SDK keeps its last values for ever; a state carries its age.
* Integers. The bus counts 0.001 deg and 0.001 mm; rounding happens here and nowhere else.

What the vendor's words do to the arm: *enable* powers the motors at the present pose. *Stop* is the
arm's damped descent; afterwards it ignores commands until a reset. *Disable* and *reset* cut the
motors' power: **the arm drops**. Nothing here does either by itself, and :meth:`PiperDriver.close`
leaves the arm holding its last setpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from robot_bridge.limits import SafeSetpoint
from robot_bridge.rig import TWIN_BUS, CanPort
from simplevla.embodiment import Arm
from simplevla.errors import EmbodimentError, MissingExtraError, UnavailableError

if TYPE_CHECKING:
    import can

logger = logging.getLogger(__name__)

JOINTS = 6
MAX_GRIPPER_EFFORT_NM = 5.0  # the range of frame 0x159

_STATUS, _JOINTS_12, _JOINTS_34, _JOINTS_56, _GRIPPER = 0x2A1, 0x2A5, 0x2A6, 0x2A7, 0x2A8
_LOW_SPEED, _FIRMWARE = range(0x261, 0x267), 0x4AF
_FIRMWARE_PATIENCE_S = 0.2
_CYCLE_S = 0.004  # the joint frames come every 5 ms; three frames of one cycle lie closer than this
_ALL_MOTORS = 7
_MODE_AGAIN_S = 0.1
_MAX_LAG_S = 1.0  # a larger difference between a frame's stamp and the clock is a clock that jumped

_CAN_CONTROL, _TEACHING, _LEADER = 0x01, 0x02, 0x06
_MOVE_J = 0x01
_ARM_STATUS = {
    0x00: "normal",
    0x01: "emergency stop",
    0x02: "no solution",
    0x03: "singularity",
    0x04: "target beyond a limit",
    0x05: "joint communication lost",
    0x06: "joint brake not released",
    0x07: "collision",
    0x08: "overspeed while taught by hand",
    0x09: "joint in an abnormal state",
    0x0A: "other fault",
    0x0B: "recording by hand",
    0x0C: "replaying a recording",
    0x0D: "replay paused",
    0x0E: "controller too hot",
    0x0F: "release resistor too hot",
}
_TEACH_FAULT = {
    _TEACHING: "taught by hand: commands are ignored; leave it with the button on the arm",
    _LEADER: "leader of a pair: commands are ignored; set it as a follower and power it up again",
}
_MOTOR_FAULT = (
    "supply voltage low",
    "motor too hot",
    "driver over-current",
    "driver too hot",
    "collision protection",
    "driver fault",
    None,
    "stalled",
)
_GRIPPER_FAULT = (
    "supply voltage low",
    "motor too hot",
    "driver over-current",
    "driver too hot",
    "sensor fault",
    "driver fault",
    None,
    None,
)
_ENABLED_BIT = 1 << 6


@dataclass(frozen=True)
class ArmState:
    """What the arm says of itself, all from one feedback cycle.

    Attributes:
        position: (7,) six joints in rad and the gripper's total opening in m.
        velocity: (7,) rad/s and m/s.
        effort: (7,) N·m at joints and gripper motor.
        stamp_ns: when the joint frames arrived, ns of the system clock.
        age_s: how long ago that was when this state was asked for.
        enabled: whether all six joint motors and the gripper are powered.
        stopped: whether the arm is in its emergency stop.
        status: the arm's own word for its state, ``normal`` when it is well.
        faults: what is wrong, in plain words; empty when nothing is.
    """

    position: NDArray[np.float64]
    velocity: NDArray[np.float64]
    effort: NDArray[np.float64]
    stamp_ns: int
    age_s: float
    enabled: bool
    stopped: bool
    status: str
    faults: tuple[str, ...]


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
        UnavailableError: on entering, the bus cannot be opened, is in use by another driver of this
            process, or nothing is heard of the arm.
        EmbodimentError: the arm has not six joints.
        MissingExtraError: piper_sdk is not installed.
    """

    _open_channels: ClassVar[set[tuple[str, str]]] = set()
    _registry: ClassVar[threading.Lock] = threading.Lock()

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
        self._send_lock = threading.Lock()
        self._news = threading.Condition()
        self._closing = threading.Event()
        self._reader: threading.Thread | None = None
        self._sdk: Any = None
        self._claimed = False
        self._latest: tuple[ArmState, float] | None = None  # with its time on the monotonic clock
        self._sent: tuple[int, ...] | None = None
        self._forget()

    def __enter__(self) -> PiperDriver:
        key = (self.can.interface, self.can.channel)
        with self._registry:
            if key in self._open_channels:
                raise UnavailableError(
                    f"arm {self.arm.name}: {self._where} is already open in this process",
                    "give each arm a bus of its own, and one driver",
                )
            self._open_channels.add(key)
            self._claimed = True
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
        if self._claimed:
            with self._registry:
                self._open_channels.discard((self.can.interface, self.can.channel))
            self._claimed = False

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
        counts = _to_counts(setpoint.positions[part] + self._zeros)
        return _from_counts(counts) - self._zeros if self._command(counts) else None

    def hold(self) -> NDArray[np.float64] | None:
        """Send the last setpoint again; see :meth:`send`. None also if none was sent yet."""
        counts = self._sent
        done = self._command(counts)
        return None if counts is None or not done else _from_counts(counts) - self._zeros

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
        opening = _to_counts(self.state().position)[JOINTS]
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
        start = self._firmware.find(b"S-V")
        return "" if start < 0 else self._firmware[start : start + 8].decode("ascii", "replace")

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
        self._stop_sent = self._armed = False
        self._joint_frames = 0
        self._cycle_start_s = 0.0
        self._motors_seen: set[int] = set()
        self._motors_heard_s = 0.0
        self._status_seen = self._gripper_seen = False
        self._codes: tuple[int, ...] = ()
        self._faults: tuple[str, ...] = ()
        self._mode_sent_s = 0.0
        self._firmware = b""

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
        self._hold_sdk_objects()
        can = self.can
        try:
            self._sdk.CreateCanBus(can.channel, can.interface, can.bitrate, judge_flag=False)
        except Exception as error:
            raise self._no_bus(str(error)) from error
        bus = self._sdk.GetCanBus().recv_bus
        if bus is None:
            raise self._no_bus("python-can could not open it")
        self._reader = threading.Thread(
            target=self._read, args=(bus,), name=f"piper-{self.arm.name}", daemon=True
        )
        self._reader.start()
        # The SDK's own threads are not started: they outlive DisconnectPort.
        self._sdk.ConnectPort(can_init=False, piper_init=True, start_thread=False)
        if not self._wait(lambda: self._latest is not None, self._connect_timeout_s):
            raise UnavailableError(
                f"arm {self.arm.name}: nothing heard on {self._where} within {self._connect_timeout_s:g} s",
                self._remedy,
            )
        if not self._wait(lambda: bool(self.firmware), _FIRMWARE_PATIENCE_S):
            with self._send_lock:  # the answer may have come before the reader listened
                self._sdk.SearchPiperFirmwareVersion()
        if self.state().enabled:
            self._armed = True
            self._command_measured()
        logger.info("arm %s: connected on %s", self.arm.name, self._where)

    def _no_bus(self, why: str) -> UnavailableError:
        return UnavailableError(
            f"arm {self.arm.name}: the bus {self._where} cannot be opened ({why})", self._remedy
        )

    def _hold_sdk_objects(self) -> None:
        """Keep the SDK's feedback objects: its getters always return these same mutable ones."""
        self._joint_state = self._sdk.GetArmJointMsgs().joint_state
        self._gripper_state = self._sdk.GetArmGripperMsgs().gripper_state
        self._arm_status = self._sdk.GetArmStatus().arm_status
        high, low = self._sdk.GetArmHighSpdInfoMsgs(), self._sdk.GetArmLowSpdInfoMsgs()
        self._high = [getattr(high, f"motor_{i + 1}") for i in range(JOINTS)]
        self._low = [getattr(low, f"motor_{i + 1}") for i in range(JOINTS)]

    def _require_commandable(self) -> None:
        state = self.state()
        if state.age_s > 0.5:
            raise UnavailableError(
                f"arm {self.arm.name}: silent for {state.age_s:.1f} s on {self._where}",
                "check the arm's power and the CAN cable",
            )
        mode = int(self._arm_status.ctrl_mode)
        if mode in _TEACH_FAULT:
            raise UnavailableError(f"arm {self.arm.name} is {_TEACH_FAULT[mode]}", "then enable it again")
        if state.stopped or self._stop_sent:
            raise UnavailableError(
                f"arm {self.arm.name} is in its emergency stop",
                "support the arm, for a reset cuts its power; then reset it and enable it",
            )

    def _command_measured(self) -> None:
        self._mode_sent_s = float("-inf")
        self._command(_to_counts(self.state().position + self._zeros))

    def _command(self, counts: tuple[int, ...] | None) -> bool:
        """Send joints and gripper, and the mode where it is needed; return whether that was done.

        It is not done without power asked for, and after a stop; then the stop is repeated until the
        arm reports it.
        """
        with self._send_lock:
            if self._sdk is None:
                raise UnavailableError(f"arm {self.arm.name}: the driver is closed", "open it again")
            if self._stop_sent:
                if self._latest is not None and not self._latest[0].stopped:
                    self._sdk.EmergencyStop(1)
                return False
            if counts is None or not self._armed:
                return False
            now_s = time.monotonic()
            if not self._listens() and now_s - self._mode_sent_s > _MODE_AGAIN_S:
                self._mode_sent_s = now_s
                self._sdk.ModeCtrl(_CAN_CONTROL, _MOVE_J, self._speed_percent, 0)
            self._sdk.JointCtrl(*counts[:JOINTS])
            self._sdk.GripperCtrl(counts[JOINTS], self._gripper_effort, 1, 0)
            self._sent = counts
            return True

    def _listens(self) -> bool:
        """Whether the arm follows joint commands, or cannot be asked to without a person."""
        mode = int(self._arm_status.ctrl_mode)
        return mode in _TEACH_FAULT or (mode == _CAN_CONTROL and int(self._arm_status.mode_feed) == _MOVE_J)

    def _wait_enabled(self, timeout_s: float) -> bool:
        """Wait for the motors to report anew; return whether all of them are on."""
        asked_s = time.monotonic()
        return self._wait(lambda: self._motors_heard_s > asked_s, timeout_s) and self.state().enabled

    def _wait(self, done: Callable[[], bool], timeout_s: float) -> bool:
        with self._news:
            return self._news.wait_for(done, timeout_s)

    def _read(self, bus: can.BusABC) -> None:
        """Take frames until the driver closes. A bus that fails shows as a state that ages."""
        complained = False
        while not self._closing.is_set():
            try:
                message = bus.recv(timeout=0.05)
                if message is not None:
                    self._take(message)
                    complained = False
            except Exception as error:  # any back end of python-can, any malformed frame
                if not complained:
                    logger.warning("arm %s: %s: %s", self.arm.name, self._where, error)
                complained = True
                self._closing.wait(0.01)

    def _take(self, message: can.Message) -> None:
        if message.is_error_frame or message.is_extended_id or message.is_remote_frame or message.dlc != 8:
            return
        self._sdk.ParseCANFrame(message)
        frame = message.arbitration_id
        if frame == _JOINTS_12:
            self._joint_frames, self._cycle_start_s = 1, message.timestamp
        elif frame == _JOINTS_34:
            self._joint_frames = 2 if self._joint_frames == 1 else 0
        elif frame == _JOINTS_56:
            whole = self._joint_frames == 2 and 0 <= message.timestamp - self._cycle_start_s < _CYCLE_S
            self._joint_frames = 0
            if whole and self._status_seen and self._gripper_seen and len(self._motors_seen) == JOINTS:
                self._publish(message.timestamp)
        elif frame == _STATUS:
            self._status_seen = True
        elif frame == _GRIPPER:
            self._gripper_seen = True
        elif frame == _FIRMWARE:  # kept here: the SDK empties its own copy just after it asked
            self._firmware = (self._firmware + bytes(message.data))[-64:]
        elif frame in _LOW_SPEED:
            self._motors_seen.add(frame)
            if frame == _LOW_SPEED[-1]:
                with self._news:
                    self._motors_heard_s = time.monotonic()

    def _publish(self, stamp_s: float) -> None:
        heard_s = time.monotonic()
        lag_s = time.time() - stamp_s  # a frame may have waited in the kernel's queue
        if 0 < lag_s < _MAX_LAG_S:
            heard_s -= lag_s
        joints, previous = self._joint_state, self._latest
        counts = (
            joints.joint_1,
            joints.joint_2,
            joints.joint_3,
            joints.joint_4,
            joints.joint_5,
            joints.joint_6,
            self._gripper_state.grippers_angle,
        )
        position = _from_counts(counts) - self._zeros
        velocity = np.array([motor.motor_speed for motor in self._high] + [0.0]) * 1e-3
        if previous is not None:
            before, before_s = previous
            velocity[JOINTS] = (position[JOINTS] - before.position[JOINTS]) / max(heard_s - before_s, 1e-3)
        effort = 1e-3 * np.array(
            [motor.effort for motor in self._high] + [self._gripper_state.grippers_effort]
        )
        faults = self._decode_faults()
        status = int(self._arm_status.arm_status)
        state = ArmState(
            position=position,
            velocity=velocity,
            effort=effort,
            stamp_ns=round(stamp_s * 1e9),
            age_s=0.0,
            enabled=self._enabled(),
            stopped=status == 0x01,
            status=_ARM_STATUS.get(status, f"unknown ({status:#04x})"),
            faults=faults,
        )
        for array in (position, velocity, effort):
            array.setflags(write=False)
        with self._news:
            self._latest = (state, heard_s)
            self._news.notify_all()

    def _enabled(self) -> bool:
        motors = all(motor.foc_status_code & _ENABLED_BIT for motor in self._low)
        return motors and bool(self._gripper_state.status_code & _ENABLED_BIT)

    def _decode_faults(self) -> tuple[str, ...]:
        status = self._arm_status
        mode, arm_status, error_bits = int(status.ctrl_mode), int(status.arm_status), status.err_code
        gripper_bits = self._gripper_state.status_code
        motor_bits = tuple(motor.foc_status_code for motor in self._low)
        codes = (mode, arm_status, error_bits, gripper_bits, *motor_bits)
        if codes != self._codes:
            self._codes = codes
            self._faults = describe_faults(mode, arm_status, error_bits, gripper_bits, motor_bits)
            if self._faults:
                logger.warning("arm %s: %s", self.arm.name, "; ".join(self._faults))
        return self._faults


def describe_faults(
    mode: int, arm_status: int, error_bits: int, gripper_bits: int, motor_bits: tuple[int, ...]
) -> tuple[str, ...]:
    """Return what is wrong, in plain words.

    Args:
        mode: byte 0 of frame 0x2A1.
        arm_status: byte 1 of frame 0x2A1.
        error_bits: bytes 6 and 7 of frame 0x2A1.
        gripper_bits: byte 6 of frame 0x2A8.
        motor_bits: byte 5 of frames 0x261 to 0x266.
    """
    faults = [_TEACH_FAULT[mode]] if mode in _TEACH_FAULT else []
    if arm_status != 0:
        faults.append(_ARM_STATUS.get(arm_status, f"unknown arm status {arm_status:#04x}"))
    for joint in range(JOINTS):
        if error_bits & (1 << (8 + joint)):
            faults.append(f"joint {joint + 1} beyond its limit")
        if error_bits & (1 << joint):
            faults.append(f"joint {joint + 1} does not answer its controller")
    for joint, bits in enumerate(motor_bits):
        faults += [f"joint {joint + 1}: {word}" for word in _named(bits, _MOTOR_FAULT)]
    faults += [f"gripper: {word}" for word in _named(gripper_bits, _GRIPPER_FAULT)]
    return tuple(faults)


def _named(bits: int, names: tuple[str | None, ...]) -> list[str]:
    return [name for bit, name in enumerate(names) if name and bits & (1 << bit)]


def _to_counts(positions: NDArray[np.float64]) -> tuple[int, ...]:
    """Convert (7,) rad and m to the bus's 0.001 deg and 0.001 mm, nearest whole number."""
    if positions.shape != (JOINTS + 1,) or not np.isfinite(positions).all():
        raise ValueError(f"a Piper takes {JOINTS + 1} finite values, not {positions}")
    joints = np.rint(np.degrees(positions[:JOINTS]) * 1000)
    return (*(int(value) for value in joints), int(np.rint(positions[JOINTS] * 1e6)))


def _from_counts(counts: tuple[int, ...]) -> NDArray[np.float64]:
    """Convert the bus's counts to (7,) rad and m."""
    positions = np.array(counts, dtype=np.float64) * 1e-6
    positions[:JOINTS] = np.radians(positions[:JOINTS] * 1e3)
    return positions
