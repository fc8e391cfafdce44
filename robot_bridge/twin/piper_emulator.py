"""A Piper as its CAN bus shows it: takes command frames, moves drive targets, gives feedback frames.

No clock, socket or physics in here: time, frames and the joints' motion are passed in, so that a test
can be the bus and a few lines of arithmetic can be the physics. In the twin the physics is SAPIEN.

What is emulated: motor power, the control mode, joint moves with the arm's own speed limit, the
gripper, the damped stop that only a reset clears, the teach button, faults of motors and joints,
queries, and the feedback cycle. What is not: gravity on an arm without power (it stays where it is),
MIT and Cartesian moves, motor currents, and heat that nobody injected.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robot_bridge.twin import piper_frames as frames
from robot_bridge.twin.can_bus import CanFrame
from simplevla.embodiment import Arm
from simplevla.kinematics.chain import arm_chain

logger = logging.getLogger(__name__)

_STANDBY, _CAN_CONTROL, _TEACHING, _MOVE_J = 0, 1, 2, 1
_NORMAL, _EMERGENCY_STOP, _BEYOND_LIMIT, _JOINT_LOST, _RECORDING = 0x00, 0x01, 0x04, 0x05, 0x0B
_LIMIT_SLACK_RAD = 2e-4  # a target that only rounding put beyond a limit is no fault
_REACHED = 2e-3  # rad or m
_GRIPPER = frames.JOINTS
_GRIPPER_N_M_PER_M = 100.0  # how the reported gripper effort grows with the distance still to close


@dataclass(frozen=True)
class FeedbackRates:
    """How often each group of frames is sent, Hz.

    A real arm sends status, joints, gripper, end pose and the fast motor frames at 200 Hz and the slow
    motor frames at 40 Hz, 3040 frames a second (:data:`VENDOR_RATES`). Python spends about 30 us on
    reading each, so that by default the fast motor frames come more slowly here, and the end pose, which
    the driver does not read, never (0).
    """

    pose_hz: float = 200.0
    motor_high_hz: float = 50.0
    motor_low_hz: float = 40.0
    end_pose_hz: float = 0.0


VENDOR_RATES = FeedbackRates(motor_high_hz=200.0, end_pose_hz=200.0)


class PiperEmulator:
    """One arm with its gripper; vectors are (7,): six joints in rad, opening in m.

    Args:
        arm: limits and speeds of the arm.
        position: (7,) where it stands at the start, motors off.
        rates: how often it gives feedback.
        firmware: what it answers to a firmware query.
        gripper_range_m: the stroke that it has been told its gripper has; the arm's by default.

    Attributes:
        zeros: (7,) how far off its true positions are what it reports and what it is told; rad, m.
        stuck: joints (from 0; 6 is the gripper) that do not move whatever their drives want.
        lost_joints: joints that do not answer the arm's controller.
        motor_faults: {joint: fault bits of its motor}, as frames 0x261 to 0x266 have them.
        motor_c: temperature of the motors, degC.
    """

    def __init__(
        self,
        arm: Arm,
        position: NDArray[np.float64],
        *,
        rates: FeedbackRates | None = None,
        firmware: str = "S-V1.8-2",
        gripper_range_m: float | None = None,
    ) -> None:
        self.arm = arm
        self.stuck: set[int] = set()
        self.lost_joints: set[int] = set()
        self.motor_faults: dict[int, int] = {}
        self.motor_c = 30
        self._gripper_range_m = arm.gripper.stroke_m if gripper_range_m is None else gripper_range_m
        self._status = _NORMAL  # a fault that was injected
        self.firmware = firmware
        self.rates = rates or FeedbackRates()
        self.zeros = np.zeros_like(position)
        joints = arm.joints
        self._lower = np.array([*(j.lower_rad for j in joints), 0.0])
        self._upper = np.array([*(j.upper_rad for j in joints), arm.gripper.stroke_m])
        self._speed = np.array([*(j.max_velocity_rad_s for j in joints), arm.gripper.max_velocity_m_s])
        self._braking = np.array(
            [*(j.max_acceleration_rad_s2 for j in joints), arm.gripper.max_acceleration_m_s2]
        )
        self._powered = np.zeros(_GRIPPER + 1, dtype=bool)
        self._control = self._move = 0
        self._speed_fraction = 1.0
        self._stopped = False
        self._beyond = 0
        self._effort_limit = 0
        self._position = position.copy()
        self._velocity = np.zeros_like(position)
        self._drive = position.copy()
        self._wanted = position.copy()
        self._next_s = dict.fromkeys(("pose", "high", "low", "end"), 0.0)
        self._chain = arm_chain(arm) if self.rates.end_pose_hz else None

    def receive(self, frame: CanFrame) -> list[CanFrame]:
        """Take one frame from the bus; return the frames that answer it."""
        command = frames.decode_command(frame)
        answer: CanFrame | None = None
        match command:
            case frames.JointPair(first, counts):
                self._want_joints(first, counts)
            case frames.GripperCommand():
                self._want_gripper(command)
            case frames.Mode():
                if self._control != _TEACHING:  # only the button on the arm ends teaching
                    self._control, self._move = command.control, command.move
                self._speed_fraction = min(command.speed_percent, 100) / 100
                answer = frames.acknowledge_frame(frame.id)
            case frames.Stop(reset):
                self._reset() if reset else self._stop()
                answer = frames.acknowledge_frame(frame.id)
            case frames.Enable(motors, on):
                self._power(np.array(motors), on)
                answer = frames.acknowledge_frame(frame.id)
            case frames.LimitQuery(motor, acceleration):
                answer = self._limit_frame(motor, acceleration)
            case frames.ParameterQuery(what):
                answer = frames.parameter_frame(what, self._gripper_range_m)
            case frames.FirmwareQuery():
                answer = frames.firmware_frame(self.firmware)
            case None:
                logger.debug("arm %s does not know frame %#x", self.arm.name, frame.id)
        return [answer] if answer else []

    def advance(
        self, dt_s: float, position: NDArray[np.float64], velocity: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Let ``dt_s`` pass; return the (7,) targets of the drives.

        Args:
            dt_s: time since the last call, s.
            position: (7,) where the joints are now, rad and m.
            velocity: (7,) how they move, rad/s and m/s.
        """
        self._position, self._velocity = position, velocity
        if self._control == _TEACHING:  # a hand moves it, and the drives give way
            self._drive[:_GRIPPER] = position[:_GRIPPER]
            self._wanted[:_GRIPPER] = position[:_GRIPPER]
        follow = self._powered.copy()
        follow[list(self.stuck | self.lost_joints)] = False
        follow[:_GRIPPER] &= self._control == _CAN_CONTROL and self._move == _MOVE_J
        if self._stopped:
            follow[:] = False
        reach = self._speed * dt_s
        reach[:_GRIPPER] *= self._speed_fraction
        step = np.clip(self._wanted - self._drive, -reach, reach)
        self._drive[follow] += step[follow]
        return self._drive.copy()

    def feedback(
        self, now_s: float, lag_s: float = 0.0, noise: NDArray[np.float64] | None = None
    ) -> list[CanFrame]:
        """Return the feedback frames that are due.

        Args:
            now_s: time on any steady clock, s.
            lag_s: how much older the joints last seen are; they are carried on by their velocity.
            noise: (7,) is added to what is reported, rad and m.
        """
        out: list[CanFrame] = []
        seen = self._position + self._velocity * lag_s + self.zeros
        if noise is not None:
            seen = seen + noise
        counts = [int(c) for c in np.rint(np.degrees(seen[:_GRIPPER]) * 1000)]
        if self._due("pose", now_s, self.rates.pose_hz):
            out.append(self._status_frame())
            out += frames.joint_frames(counts)
            opening = max(0, round(float(seen[_GRIPPER]) * 1e6))
            out.append(
                frames.gripper_frame(opening, self._gripper_effort(), enabled=bool(self._powered[_GRIPPER]))
            )
        if self._due("high", now_s, self.rates.motor_high_hz):
            speeds = np.rint(self._velocity[:_GRIPPER] * 1000)
            out += [frames.motor_high_frame(i, int(speeds[i]), 0, counts[i]) for i in range(frames.JOINTS)]
        if self._due("low", now_s, self.rates.motor_low_hz):
            out += [
                frames.motor_low_frame(
                    i,
                    volts=24.0,
                    driver_c=30,
                    motor_c=self.motor_c,
                    enabled=bool(self._powered[i]),
                    flags=self.motor_faults.get(i, 0),
                )
                for i in range(frames.JOINTS)
            ]
        if self._chain is not None and self._due("end", now_s, self.rates.end_pose_hz):
            flange = self._chain.forward(seen[:_GRIPPER]) @ np.linalg.inv(self._chain.tail)
            out += frames.end_pose_frames(flange)
        return out

    def teach(self, on: bool) -> None:
        """Press the teach button: the arm gives way to a hand; pressed again, it is in standby."""
        self._control, self._move = (_TEACHING if on else _STANDBY), 0

    def press_stop(self) -> None:
        """Stop as by the button on the arm's base: the same damped stop as over the bus."""
        self._stop()

    def lose_power(self) -> None:
        """Switch every motor off; the arm goes on talking, as with a blown drive fuse."""
        self._power(np.arange(_GRIPPER + 1), False)

    def report(self, arm_status: int) -> None:
        """Report this arm status (byte 1 of 0x2A1) instead of a normal one; 0 ends that."""
        self._status = arm_status

    def place(self, position: NDArray[np.float64]) -> None:
        """Take note that the arm was put somewhere else; it now wants to be there, powered or not."""
        self._position = position.copy()
        self._velocity = np.zeros_like(position)
        self._drive = position.copy()
        self._wanted = position.copy()

    def _want_joints(self, first: int, counts: tuple[int, int]) -> None:
        if self._stopped:
            return
        pair = slice(first, first + 2)
        wanted = np.radians(np.array(counts) * 1e-3) - self.zeros[pair]
        inside = np.clip(wanted, self._lower[pair], self._upper[pair])
        for joint, over in enumerate(np.abs(wanted - inside) > _LIMIT_SLACK_RAD, start=first):
            bit = 1 << (8 + joint)
            self._beyond = self._beyond | bit if over else self._beyond & ~bit
        self._wanted[pair] = inside

    def _want_gripper(self, command: frames.GripperCommand) -> None:
        if self._stopped or command.set_zero:
            return
        self._power(np.array([_GRIPPER]), command.enable)
        self._effort_limit = command.effort
        self._wanted[_GRIPPER] = np.clip(command.opening * 1e-6, 0.0, self._upper[_GRIPPER])

    def _power(self, motors: NDArray[np.int64], on: bool) -> None:
        """Switch motors; one that comes on starts from where it is, one that goes off stays there."""
        changed = motors[self._powered[motors] != on]
        self._powered[changed] = on
        self._drive[changed] = self._position[changed]

    def _stop(self) -> None:
        """Come to rest as fast as the joints may brake, motors on, deaf to commands until a reset."""
        if not self._stopped:
            way = self._velocity * np.abs(self._velocity) / (2 * self._braking)
            self._drive = np.clip(self._position + way, self._lower, self._upper)
            self._stopped = True

    def _reset(self) -> None:
        self._power(np.arange(_GRIPPER + 1), False)
        self._stopped = False
        self._control = self._move = 0
        self._beyond = 0

    def _status_frame(self) -> CanFrame:
        lost = sum(1 << joint for joint in self.lost_joints)
        status = next(
            (
                code
                for code, holds in (
                    (_EMERGENCY_STOP, self._stopped),
                    (self._status, self._status != _NORMAL),
                    (_JOINT_LOST, lost),
                    (_RECORDING, self._control == _TEACHING),
                    (_BEYOND_LIMIT, self._beyond),
                )
                if holds
            ),
            _NORMAL,
        )
        moving = bool((np.abs(self._drive - self._position)[:_GRIPPER] > _REACHED).any())
        errors = self._beyond | lost
        return frames.status_frame(self._control, status, self._move, moving=moving, errors=errors)

    def _limit_frame(self, motor: int, acceleration: bool) -> CanFrame:
        if acceleration:
            return frames.acceleration_limit_frame(motor, float(self._braking[motor]))
        upper, lower = np.degrees([self._upper[motor], self._lower[motor]])
        return frames.joint_limit_frame(motor, upper, lower, float(self._speed[motor]))

    def _gripper_effort(self) -> int:
        push = (self._drive - self._position)[_GRIPPER] * _GRIPPER_N_M_PER_M * 1000
        return int(np.clip(push, -self._effort_limit, self._effort_limit))

    def _due(self, group: str, now_s: float, rate_hz: float) -> bool:
        """Keep the average rate; after a pause go on from now instead of catching up in a burst."""
        if not rate_hz:
            return False
        period_s = 1 / rate_hz
        if now_s < self._next_s[group] - period_s / 4:
            return False
        on_time = now_s - self._next_s[group] < period_s
        self._next_s[group] = (self._next_s[group] if on_time else now_s) + period_s
        return True
