"""What a Piper says of itself: frames in, whole states out.

The vendor's SDK decodes each frame into objects that it goes on changing; joints come in three frames.
A state is made only when the three frames of one cycle came in order, and is a copy, so that no reader
sees half of two poses.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robot_bridge.drivers.piper_faults import (
    EMERGENCY_STOP,
    ENABLED_BIT,
    JOINTS,
    describe_faults,
    describe_status,
    must_hold,
)

if TYPE_CHECKING:
    import can

logger = logging.getLogger(__name__)

_STATUS, _JOINTS_12, _JOINTS_34, _JOINTS_56, _GRIPPER = 0x2A1, 0x2A5, 0x2A6, 0x2A7, 0x2A8
_LOW_SPEED, _GRIPPER_RANGE, _FIRMWARE = range(0x261, 0x267), 0x47E, 0x4AF
_CYCLE_S = 0.004  # the joint frames come every 5 ms; three frames of one cycle lie closer than this
_MAX_LAG_S = 1.0  # a larger difference between a frame's stamp and the clock is a clock that jumped
_MAX_TURN_RAD = np.pi  # beyond this no joint of a Piper can be: a frame that was damaged
_MAX_OPENING_M = 0.2
_MAX_SPEED_RAD_S, _MAX_SPEED_M_S = 15.0, 2.0  # three times what a joint can: a frame that was damaged
_MAX_DOUBTED = 5  # cycles in a row; then the arm was really moved
_VERSION = re.compile(r"S-V(\d+)\.(\d+)-(\d+)")


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
        must_hold: whether, because of a fault, the arm cannot be trusted to follow.
        motor_c, driver_c: (6,) temperatures of motors and of their drivers, degC.
        current_a: (6,) motor currents, A.
        supply_v: the lowest voltage that a motor sees, V.
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
    must_hold: bool
    motor_c: NDArray[np.float64]
    driver_c: NDArray[np.float64]
    current_a: NDArray[np.float64]
    supply_v: float


class Feedback:
    """Turns an arm's frames into states; used by one thread.

    Args:
        sdk: the vendor's interface, which decodes frames into objects of its own.
        name: the arm's, for the log.

    Attributes:
        zeros: (7,) what each joint reports where it truly is at zero; rad, m.
        gripper_range_m: the stroke that the arm says its gripper is set to; None until it says so.
        motors_heard_s: when all motors last reported, on the monotonic clock.
        doubted: cycles that were left out because a joint cannot have moved so far, since the start.
    """

    def __init__(self, sdk: Any, name: str) -> None:
        self.zeros = np.zeros(JOINTS + 1)
        self.gripper_range_m: float | None = None
        self.motors_heard_s = 0.0
        self.doubted = 0
        self._sdk = sdk
        self._name = name
        self._joints_seen = 0
        self._cycle_start_s = 0.0
        self._motors_seen: set[int] = set()
        self._status_seen = self._gripper_seen = False
        self._codes: tuple[int, ...] = ()
        self._faults: tuple[str, ...] = ()
        self._must_hold = False
        self._firmware = b""
        self._doubted_in_a_row = 0
        self._last: tuple[NDArray[np.float64], float] | None = None  # reported position, when
        # The SDK's getters always return these same objects.
        self._joint_state = sdk.GetArmJointMsgs().joint_state
        self._gripper_state = sdk.GetArmGripperMsgs().gripper_state
        self._arm_status = sdk.GetArmStatus().arm_status
        self._range = sdk.GetGripperTeachingPendantParamFeedback()
        high, low = sdk.GetArmHighSpdInfoMsgs(), sdk.GetArmLowSpdInfoMsgs()
        self._high = [getattr(high, f"motor_{i + 1}") for i in range(JOINTS)]
        self._low = [getattr(low, f"motor_{i + 1}") for i in range(JOINTS)]

    @property
    def firmware(self) -> str:
        """The arm's firmware, such as ``S-V1.8-2``; empty if it did not say."""
        start = self._firmware.find(b"S-V")
        return "" if start < 0 else self._firmware[start : start + 8].decode("ascii", "replace")

    @property
    def control_mode(self) -> int:
        """Byte 0 of frame 0x2A1."""
        return int(self._arm_status.ctrl_mode)

    @property
    def move_mode(self) -> int:
        """Byte 2 of frame 0x2A1."""
        return int(self._arm_status.mode_feed)

    def take(self, message: can.Message) -> tuple[ArmState, float] | None:
        """Take one frame; return the state that it completes and its time on the monotonic clock."""
        if message.is_error_frame or message.is_extended_id or message.is_remote_frame or message.dlc != 8:
            return None
        self._sdk.ParseCANFrame(message)
        frame = message.arbitration_id
        if frame == _JOINTS_12:
            self._joints_seen, self._cycle_start_s = 1, message.timestamp
        elif frame == _JOINTS_34:
            self._joints_seen = 2 if self._joints_seen == 1 else 0
        elif frame == _JOINTS_56:
            whole = self._joints_seen == 2 and 0 <= message.timestamp - self._cycle_start_s < _CYCLE_S
            self._joints_seen = 0
            if whole and self._status_seen and self._gripper_seen and len(self._motors_seen) == JOINTS:
                return self._state(message.timestamp)
        elif frame == _STATUS:
            self._status_seen = True
        elif frame == _GRIPPER:
            self._gripper_seen = True
        elif frame == _FIRMWARE:  # kept here: the SDK empties its own copy just after it asked
            self._firmware = (self._firmware + bytes(message.data))[-64:]
        elif frame == _GRIPPER_RANGE:
            said = self._range.arm_gripper_teaching_param_feedback.max_range_config
            self.gripper_range_m = said * 1e-3 if said else None
        elif frame in _LOW_SPEED:
            self._motors_seen.add(frame)
            if frame == _LOW_SPEED[-1]:
                self.motors_heard_s = time.monotonic()
        return None

    def _state(self, stamp_s: float) -> tuple[ArmState, float] | None:
        heard_s = time.monotonic()
        lag_s = time.time() - stamp_s  # a frame may have waited in the kernel's queue
        if 0 < lag_s < _MAX_LAG_S:
            heard_s -= lag_s
        joints = self._joint_state
        counts = (
            joints.joint_1,
            joints.joint_2,
            joints.joint_3,
            joints.joint_4,
            joints.joint_5,
            joints.joint_6,
            self._gripper_state.grippers_angle,
        )
        reported = from_counts(counts)
        gap_s = max(heard_s - self._last[1], 1e-3) if self._last else 1.0
        if not self._credible(reported, gap_s):
            return None
        velocity = np.array([motor.motor_speed for motor in self._high] + [0.0]) * 1e-3
        if self._last is not None:
            velocity[JOINTS] = (reported[JOINTS] - self._last[0][JOINTS]) / gap_s
        self._last = (reported, heard_s)
        self._decode_faults()
        status, low = int(self._arm_status.arm_status), self._low
        state = ArmState(
            position=reported - self.zeros,
            velocity=velocity,
            effort=1e-3
            * np.array([motor.effort for motor in self._high] + [self._gripper_state.grippers_effort]),
            stamp_ns=round(stamp_s * 1e9),
            age_s=0.0,
            enabled=all(motor.foc_status_code & ENABLED_BIT for motor in low)
            and bool(self._gripper_state.status_code & ENABLED_BIT),
            stopped=status == EMERGENCY_STOP,
            status=describe_status(status),
            faults=self._faults,
            must_hold=self._must_hold,
            motor_c=np.array([motor.motor_temp for motor in low], dtype=np.float64),
            driver_c=np.array([motor.foc_temp for motor in low], dtype=np.float64),
            current_a=1e-3 * np.array([motor.current for motor in self._high], dtype=np.float64),
            supply_v=0.1 * min(motor.vol for motor in low),
        )
        for value in vars(state).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
        return state, heard_s

    def _credible(self, reported: NDArray[np.float64], gap_s: float) -> bool:
        """Return whether the arm can be there: a damaged frame must not look like a moved arm.

        CAN's own checksum lets a damaged frame through once in a very long time; an adapter or a cable
        box may do it more often. What persists is believed.
        """
        possible = (np.abs(reported[:JOINTS]) <= _MAX_TURN_RAD).all() and abs(
            reported[JOINTS]
        ) <= _MAX_OPENING_M
        if possible and self._last is not None and self._doubted_in_a_row < _MAX_DOUBTED:
            moved = np.abs(reported - self._last[0])
            slack_rad, slack_m = 0.02, 0.005  # what rounding, noise and the jitter of arrival may add
            possible = (moved[:JOINTS] <= _MAX_SPEED_RAD_S * gap_s + slack_rad).all() and moved[
                JOINTS
            ] <= _MAX_SPEED_M_S * gap_s + slack_m
        if not possible:
            self.doubted += 1
            self._doubted_in_a_row += 1
            if self._doubted_in_a_row == 1:
                logger.warning("arm %s: it cannot be where a frame says; the frame is left out", self._name)
            return False
        self._doubted_in_a_row = 0
        return True

    def _decode_faults(self) -> None:
        status = self._arm_status
        mode, arm_status, error_bits = self.control_mode, int(status.arm_status), status.err_code
        gripper_bits = self._gripper_state.status_code
        motor_bits = tuple(motor.foc_status_code for motor in self._low)
        codes = (mode, arm_status, error_bits, gripper_bits, *motor_bits)
        if codes != self._codes:
            self._codes = codes
            faults = describe_faults(mode, arm_status, error_bits, gripper_bits, motor_bits)
            self._must_hold = must_hold(mode, arm_status, error_bits, gripper_bits, motor_bits)
            if faults and faults != self._faults:
                logger.warning("arm %s: %s", self._name, "; ".join(faults))
            self._faults = faults


def version(firmware: str) -> tuple[int, int, int] | None:
    """Return the numbers of a firmware such as ``S-V1.8-2``, None if it is not named so."""
    found = _VERSION.match(firmware)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def to_counts(positions: NDArray[np.float64]) -> tuple[int, ...]:
    """Convert (7,) rad and m to the bus's 0.001 deg and 0.001 mm, nearest whole number.

    Raises:
        ValueError: they are not seven finite values.
    """
    if positions.shape != (JOINTS + 1,) or not np.isfinite(positions).all():
        raise ValueError(f"a Piper takes {JOINTS + 1} finite values, not {positions}")
    joints = np.rint(np.degrees(positions[:JOINTS]) * 1000)
    return (*(int(value) for value in joints), int(np.rint(positions[JOINTS] * 1e6)))


def from_counts(counts: tuple[int, ...]) -> NDArray[np.float64]:
    """Convert the bus's counts to (7,) rad and m."""
    positions = np.array(counts, dtype=np.float64) * 1e-6
    positions[:JOINTS] = np.radians(positions[:JOINTS] * 1e3)
    return positions
