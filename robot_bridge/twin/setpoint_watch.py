"""Watches what is sent to an emulated arm, and says which setpoint breaks a limit.

It reads the CAN frames with a decoder of its own and knows of the limits only what the embodiment says:
neither the driver, nor the limiter, nor the emulator's decoder has a part in its judgement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from robot_bridge.twin.can_bus import CanFrame
from simplevla.embodiment import Arm

_JOINT_IDS, _GRIPPER_ID, _ENABLE_ID = (0x155, 0x156, 0x157), 0x159, 0x471
_MAX_EFFORT = 5000
_RAD, _M = math.radians(1e-3), 1e-6  # one count
_THERE = 3  # counts: a setpoint this near to where the arm stands starts a new course
_LONGEST = 4  # ticks: who is late by more catches up no faster than this


@dataclass
class SetpointWatch:
    """Reads one arm's command frames, setpoint after setpoint.

    A setpoint is the frames 155, 156, 157 and 159 in a row. Positions may never leave the limits by more
    than one count. From one to the next, the time that passed is taken from ``clock``; velocity,
    acceleration and jerk are recomputed from the decoded counts, with what rounding to whole counts may
    add to each difference. Motors that are powered, and a setpoint where the arm stands already, begin a
    new course from rest: neither moves anything.

    Args:
        arm: whose limits hold.
        clock: returns which tick of the sender it is, a whole number of ``period_s``; None judges
            positions alone.
        pose: returns where the arm stands, six joints in rad and the opening in m.
        period_s: the sender's period.
        max_effort: of the gripper, 0.001 N·m.
        ramp_s: where given, the acceleration takes this long to its limit: jerk is judged too.

    Attributes:
        setpoints: how many came.
        incomplete: setpoints of which a frame was missing.
        violations: what was wrong, one line each.
        worst: the largest share of each limit that was used.
    """

    arm: Arm
    clock: Callable[[], int] | None = None
    pose: Callable[[], Sequence[float]] | None = None
    period_s: float = 0.005
    max_effort: int = 1000
    ramp_s: float | None = None
    setpoints: int = 0
    incomplete: int = 0
    violations: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("position", "velocity", "acceleration", "jerk"), 0.0)
    )

    def __post_init__(self) -> None:
        joints, gripper = self.arm.joints, self.arm.gripper
        self._lower = [*(j.lower_rad for j in joints), 0.0]
        self._upper = [*(j.upper_rad for j in joints), gripper.stroke_m]
        self._speed = [*(j.max_velocity_rad_s for j in joints), gripper.max_velocity_m_s]
        self._force = [*(j.max_acceleration_rad_s2 for j in joints), gripper.max_acceleration_m_s2]
        self._count = [_RAD] * len(joints) + [_M]
        self._part: list[int] = []
        self._expects = _JOINT_IDS[0]
        self._stood: Sequence[float] | None = None
        self._last: list[int] | None = None
        self._last_tick = 0
        self._velocity: list[float] = []
        self._acceleration: list[float] | None = None
        self._rounding: list[float] = []

    def begin(self) -> None:
        """Take note that the next setpoint begins a new course, from rest."""
        self._last = None

    def __call__(self, frame: CanFrame) -> None:
        """Take one frame that was sent to the arm."""
        if frame.id == _ENABLE_ID:
            self.begin()
        if frame.id not in (*_JOINT_IDS, _GRIPPER_ID):
            return
        if frame.id != self._expects:
            self._part, self._expects = [], _JOINT_IDS[0]
            self.incomplete += 1
            if frame.id != self._expects:
                return
        data = frame.data
        if len(data) != 8:
            self._blame(f"frame {frame.id:#x} has {len(data)} bytes")
            return
        if frame.id == _JOINT_IDS[0] and self.pose is not None:
            self._stood = self.pose()  # before it hears the rest
        first = int.from_bytes(data[:4], "big", signed=True)
        if frame.id == _GRIPPER_ID:
            effort = int.from_bytes(data[4:6], "big")
            if effort > min(self.max_effort, _MAX_EFFORT):
                self._blame(f"gripper effort {effort}")
            if data[6] & 1:  # the gripper is meant to move
                self._judge([*self._part, first])
            self._part, self._expects = [], _JOINT_IDS[0]
            return
        self._part += [first, int.from_bytes(data[4:], "big", signed=True)]
        self._expects = (*_JOINT_IDS, _GRIPPER_ID)[_JOINT_IDS.index(frame.id) + 1]

    def _judge(self, counts: list[int]) -> None:
        self.setpoints += 1
        for i, count in enumerate(counts):
            at, one = count * self._count[i], self._count[i]
            middle = (self._lower[i] + self._upper[i]) / 2
            self._note("position", abs(at - middle) / ((self._upper[i] - self._lower[i]) / 2 + one))
            if not self._lower[i] - one <= at <= self._upper[i] + one:
                self._blame(f"{self._name(i)} at {at:.5f}")
        if self.clock is None:
            return
        tick, last = self.clock(), self._last
        pause = tick - self._last_tick
        ticks = min(pause, _LONGEST)
        self._last_tick, self._last = tick, counts
        if last is None or ((pause > _LONGEST or self._jumps(counts, last)) and self._stands_at(counts)):
            self._velocity, self._acceleration = [0.0] * len(counts), None
            self._rounding = [0.0] * len(counts)
        elif ticks > 0:
            self._judge_motion(counts, last, ticks)
        elif counts != last:
            self._blame("two setpoints in one tick")

    def _jumps(self, counts: Sequence[int], last: Sequence[int]) -> bool:
        """Return whether the step is one that no moving arm makes."""
        reach = [v * self.period_s + one for v, one in zip(self._speed, self._count, strict=True)]
        steps = (abs(a - b) * one for a, b, one in zip(counts, last, self._count, strict=True))
        return any(step > far for step, far in zip(steps, reach, strict=True))

    def _stands_at(self, counts: Sequence[int]) -> bool:
        if self._stood is None:
            return False
        there = (value / one for value, one in zip(self._stood, self._count, strict=True))
        return all(abs(count - at) <= _THERE for count, at in zip(counts, there, strict=True))

    def _judge_motion(self, counts: Sequence[int], last: Sequence[int], ticks: int) -> None:
        if not any(self._velocity):  # it may have waited at rest for some ticks, and then set out
            steps = [abs(a - b) * one for a, b, one in zip(counts, last, self._count, strict=True)]
            ticks = next((n for n in range(1, ticks) if self._may_set_out(steps, n)), ticks)
        dt_s = ticks * self.period_s
        rounding = [one / dt_s for one in self._count]  # half a count at either end
        before, self._rounding = self._rounding, rounding
        velocity = [(a - b) * one / dt_s for a, b, one in zip(counts, last, self._count, strict=True)]
        acceleration = [(v - u) / dt_s for v, u in zip(velocity, self._velocity, strict=True)]
        for i, v in enumerate(velocity):
            self._within("velocity", i, abs(v), self._speed[i] + rounding[i])
            spread = (rounding[i] + before[i]) / dt_s
            self._within("acceleration", i, abs(acceleration[i]), self._force[i] + spread)
            if self.ramp_s is not None and self._acceleration is not None:
                jerk = abs(acceleration[i] - self._acceleration[i]) / dt_s
                limit = self._force[i] / self.ramp_s
                self._within("jerk", i, jerk, limit + 4 * rounding[i] / dt_s**2)
        self._velocity, self._acceleration = velocity, acceleration

    def _may_set_out(self, steps: Sequence[float], ticks: int) -> bool:
        """Return whether an arm at rest may make these steps in so many ticks."""
        dt_s = ticks * self.period_s
        return all(
            step <= force * dt_s**2 + 2 * one
            for step, force, one in zip(steps, self._force, self._count, strict=True)
        )

    def _within(self, what: str, i: int, value: float, limit: float) -> None:
        self._note(what, value / limit)
        if value > limit * (1 + 1e-9):
            self._blame(f"{self._name(i)}: {what} {value:.4f}, at most {limit:.4f}")

    def _note(self, what: str, share: float) -> None:
        self.worst[what] = max(self.worst[what], share)

    def _name(self, i: int) -> str:
        return f"joint{i + 1}" if i < len(self.arm.joints) else "gripper"

    def _blame(self, what: str) -> None:
        if len(self.violations) < 100:
            self.violations.append(f"setpoint {self.setpoints} of {self.arm.name}: {what}")
