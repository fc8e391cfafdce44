"""The only door to the bus: every setpoint that a driver may send is made here.

Pure functions of (last setpoint and velocity, wanted, measured, elapsed time), so that each rule can
be tested for any sequence of inputs. Where a violation has a safe nearest setpoint it is clamped
(position, velocity, acceleration, jerk, the gripper's torque); where it has none (table, other arm, the
arm itself, the edge of the workspace, a blocked joint, what cannot be read) the arm holds, which means
that it brakes as hard as allowed and then stays. On doubt the arm holds. Every change is named in the
setpoint's events and counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import InitVar, dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simplevla.embodiment import Embodiment
from simplevla.errors import SimplevlaError
from simplevla.motion import MotionLimits, approach, braked, way_to_rest

Vector = NDArray[np.float64]

_DOOR = object()
_GRIP_SLACK = 1.25
_SAME = 1e-12  # rad or m: rounding, snapped away so that an allowed setpoint is passed on bit by bit


class LimitsError(SimplevlaError):
    """The arms stand where no setpoint is allowed."""

    code = "outside_limits"


class Cause(str, Enum):
    """Why a setpoint is not what was wanted."""

    SHAPE = "shape"
    NOT_FINITE = "not_finite"
    TIMING = "timing"
    FEEDBACK = "feedback"
    TRACKING = "tracking"
    POSITION = "position"
    VELOCITY = "velocity"
    ACCELERATION = "acceleration"
    JERK = "jerk"
    GRIP = "grip"
    WORKSPACE = "workspace"
    STALE = "stale"  # no fresh trajectory within its bound; these three are the control loop's
    FAULT = "fault"
    STOP = "stop"
    TABLE = "table"
    ARMS = "arms"
    SELF = "self"


@dataclass(frozen=True)
class LimitEvent:
    """One cause and the joint it acts on; an arm's name where it concerns the arm, else empty."""

    cause: Cause
    joint: str = ""


@dataclass(frozen=True)
class SafeSetpoint:
    """A setpoint that passed the limits. Only :class:`Limiter` can make one.

    Attributes:
        positions: (D,) float64, read-only, in the embodiment's order; rad and m.
        events: what was changed, and why; empty where the wanted setpoint passed as it was.
        gripper_effort_nm: torque that no gripper's motor may exceed on the way there, N·m.
    """

    positions: Vector
    events: tuple[LimitEvent, ...] = ()
    gripper_effort_nm: float = 1.0
    door: InitVar[object] = None

    def __post_init__(self, door: object) -> None:
        if door is not _DOOR:
            raise TypeError("a SafeSetpoint is made by Limiter.admit alone")
        self.positions.setflags(write=False)


class Clearance(Protocol):
    """Judges poses by what the arms could hit."""

    def unsafe(self, way: Vector, now: Vector) -> list[tuple[Cause, slice]]:
        """Return the part of the vector that must hold, by cause, if the arms would go this way to rest.

        Args:
            way: (K, D) poses on the way on which the arms would brake, the last one where they rest.
            now: (D,) the last setpoint; a pose that is too close already may be left, not deepened.
        """
        ...


@dataclass(frozen=True)
class Tolerances:
    """Bounds that are about trust in the feedback and about force, not about the embodiment.

    Attributes:
        tracking_rad: a setpoint may lead the measured joint by this much; an arm that is blocked
            further is not pushed on. Grippers are free: they are blocked whenever they hold a thing.
        start_rad, start_m: how far outside its limits a joint may stand when the arms start.
        longest_s: elapsed time that one setpoint may cover; a longer stall is caught up, not jumped.
        gripper_effort_nm: torque that a gripper's motor may exert; a gripper that is measured to exert a
            quarter more is not closed further.
    """

    tracking_rad: float = 0.5
    start_rad: float = 0.1
    start_m: float = 0.005
    longest_s: float = 0.02
    gripper_effort_nm: float = 1.0


class Limiter:
    """Turns what is wanted into what is safe, one tick after another.

    Guarantees, for any sequence of inputs: every setpoint is finite and within the position limits;
    from one to the next neither the velocity nor the acceleration limit is exceeded, so that the arms
    can always brake before a position limit. Jerk is limited too, except while an arm brakes for its
    safety: to hold, and before a position limit. A trajectory that respects the limits passes unchanged.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        clearance: Clearance | None = None,
        tolerances: Tolerances | None = None,
    ) -> None:
        self.counts: Counter[Cause] = Counter()  # setpoints that each cause has changed
        self._names = embodiment.names()
        self._limits = MotionLimits.of(embodiment)
        self._is_gripper = np.zeros(len(self._names), dtype=bool)
        self._arm_names: dict[int, str] = {}
        for arm, part in embodiment.slices():
            self._is_gripper[part.stop - 1] = True
            self._arm_names[part.start] = arm.name
        self._clearance = clearance
        self._tolerances = tolerances or Tolerances()
        self._start_slack = np.where(self._is_gripper, self._tolerances.start_m, self._tolerances.start_rad)
        self._position: Vector | None = None
        self._velocity: Vector = np.zeros(len(self._names))
        self._acceleration: Vector = np.zeros(len(self._names))
        self._last_wanted: Vector = np.zeros(len(self._names))

    @property
    def position(self) -> Vector | None:
        """The last setpoint (D,), None before the first."""
        return self._position

    @property
    def resting(self) -> bool:
        """Whether the last setpoint was the same as the one before."""
        return not self._velocity.any()

    def leads(self, measured: Vector) -> float:
        """Return how far the last setpoint is from the measured joints (D,), at the most, rad."""
        assert self._position is not None
        return float(np.abs(self._position - measured)[~self._is_gripper].max())

    def rest(self) -> Vector:
        """Return (D,) where the setpoint comes to rest if it brakes now; zeros before a start."""
        if self._position is None:
            return np.zeros_like(self._limits.lower)
        distance = self._velocity * np.abs(self._velocity) / (2 * self._limits.acceleration)
        return np.clip(self._position + distance, self._limits.lower, self._limits.upper)

    def reset(self, measured: ArrayLike) -> SafeSetpoint:
        """Start, at rest, from the measured pose (D,) and return it as the first setpoint.

        Raises:
            LimitsError: the pose is unknown, or a joint stands well outside its limits.
        """
        pose = np.asarray(measured, dtype=np.float64)
        if pose.shape != self._limits.lower.shape or not np.isfinite(pose).all():
            raise LimitsError("the measured pose is not known", "check that every arm sends feedback")
        lower, upper = self._limits.lower, self._limits.upper
        start = np.clip(pose, lower, upper)
        far = np.flatnonzero(np.abs(start - pose) > self._start_slack)
        if far.size:
            places = ", ".join(
                f"{self._names[i]} at {pose[i]:.3f} (limits {lower[i]:.3f} to {upper[i]:.3f})" for i in far
            )
            raise LimitsError(
                f"outside its position limits: {places}", "move the arm by hand, then enable it again"
            )
        self._position = start
        self._velocity = np.zeros_like(start)
        self._acceleration = np.zeros_like(start)
        self._last_wanted = start
        return SafeSetpoint(start.copy(), (), self._tolerances.gripper_effort_nm, _DOOR)

    def admit(
        self, wanted: ArrayLike, measured: ArrayLike, dt_s: float, effort: ArrayLike | None = None
    ) -> SafeSetpoint:
        """Return the safe setpoint nearest to ``wanted`` that can follow the last one after ``dt_s``.

        The first call starts from the measured pose, whatever is wanted (see :meth:`reset`).

        Args:
            wanted: (D,) where the policy wants the joints now; rad and m. May be anything.
            measured: (D,) measured positions; rad and m.
            dt_s: time since the last setpoint, s.
            effort: (D,) measured efforts; N·m. Without them grippers are not judged by their torque.

        Raises:
            LimitsError: on the first call, if the arms stand outside their limits.
        """
        if self._position is None:
            return self.reset(measured)
        if not (np.isfinite(dt_s) and dt_s > 0):
            return self._setpoint(self._position, [LimitEvent(Cause.TIMING)])
        dt = min(float(dt_s), self._tolerances.longest_s)
        brake = braked(self._limits, self._velocity, dt)
        target, doubt = self._readable(wanted)
        feedback = np.asarray(measured, dtype=np.float64)
        if feedback.shape != self._limits.lower.shape or not np.isfinite(feedback).all():
            doubt.append(LimitEvent(Cause.FEEDBACK))
        if doubt:
            return self._hold(brake, dt, doubt)
        velocity, events = self._towards(target, dt)
        free = velocity.copy()
        self._hold_blocked(velocity, brake, feedback, events)
        self._hold_gripping(velocity, brake, effort, events)
        self._hold_unsafe(velocity, brake, dt, events)
        held = velocity != free
        position = self._advance(velocity, dt)
        inside = np.clip(target, self._limits.lower, self._limits.upper)
        position = np.where(np.abs(position - inside) < _SAME, inside, position)
        setpoint = self._issue(position, dt, events)
        self._acceleration[held] = 0.0  # or a joint that braked at once would have to swing back
        self._last_wanted = target
        return setpoint

    def _readable(self, wanted: ArrayLike) -> tuple[Vector, list[LimitEvent]]:
        """Return ``wanted`` as a vector, and why it cannot be followed, if it cannot."""
        try:
            target = np.asarray(wanted, dtype=np.float64)
        except (TypeError, ValueError):
            return self._limits.lower, [LimitEvent(Cause.SHAPE)]
        if target.shape != self._limits.lower.shape:
            return target, [LimitEvent(Cause.SHAPE)]
        bad = np.flatnonzero(~np.isfinite(target))
        return target, [LimitEvent(Cause.NOT_FINITE, self._names[i]) for i in bad]

    def _towards(self, wanted: Vector, dt: float) -> tuple[Vector, list[LimitEvent]]:
        """Return the velocity (D,) with which to approach ``wanted``, and what limited it."""
        assert self._position is not None
        step = approach(
            self._limits, self._position, self._velocity, self._last_wanted, wanted, dt, self._acceleration
        )
        events = [
            LimitEvent(cause, self._names[i])
            for cause, mask in (
                (Cause.POSITION, step.too_far),
                (Cause.VELOCITY, step.too_fast),
                (Cause.ACCELERATION, step.too_hard),
                (Cause.JERK, step.too_rough),
            )
            for i in np.flatnonzero(mask)
        ]
        return step.velocity, events

    def _hold_blocked(
        self, velocity: Vector, brake: Vector, measured: Vector, events: list[LimitEvent]
    ) -> None:
        """Hold joints whose setpoint leads the measured position too far and would lead it further."""
        assert self._position is not None
        lead = self._position - measured
        blocked = (np.abs(lead) > self._tolerances.tracking_rad) & (lead * velocity > 0) & ~self._is_gripper
        if blocked.any():
            velocity[blocked] = brake[blocked]
            events += [LimitEvent(Cause.TRACKING, self._names[i]) for i in np.flatnonzero(blocked)]

    def _hold_gripping(
        self, velocity: Vector, brake: Vector, effort: ArrayLike | None, events: list[LimitEvent]
    ) -> None:
        """Do not close a gripper further that is measured to exert more than it may."""
        if effort is None:
            return
        felt = np.abs(np.asarray(effort, dtype=np.float64))
        strong = self._is_gripper & (felt > _GRIP_SLACK * self._tolerances.gripper_effort_nm)
        strong &= velocity < 0
        if strong.any():
            velocity[strong] = np.maximum(brake[strong], velocity[strong])
            events += [LimitEvent(Cause.GRIP, self._names[i]) for i in np.flatnonzero(strong)]

    def _hold_unsafe(self, velocity: Vector, brake: Vector, dt: float, events: list[LimitEvent]) -> None:
        """Brake what would otherwise come to rest too close to the table, to the other arm or to itself."""
        if self._clearance is None:
            return
        assert self._position is not None
        way = way_to_rest(self._limits, self._position, velocity, dt)
        for cause, part in self._clearance.unsafe(way, self._position):
            velocity[part] = brake[part]
            events.append(LimitEvent(cause, self._arm_names.get(part.start, "")))

    def _advance(self, velocity: Vector, dt: float) -> Vector:
        assert self._position is not None
        return np.clip(self._position + velocity * dt, self._limits.lower, self._limits.upper)

    def _hold(self, brake: Vector, dt: float, events: list[LimitEvent]) -> SafeSetpoint:
        assert self._position is not None
        position = self._advance(brake, dt)
        self._last_wanted = position
        setpoint = self._issue(position, dt, events)
        self._acceleration[:] = 0.0
        return setpoint

    def _issue(self, position: Vector, dt: float, events: list[LimitEvent]) -> SafeSetpoint:
        assert self._position is not None
        velocity = (position - self._position) / dt
        self._acceleration = (velocity - self._velocity) / dt
        self._position, self._velocity = position, velocity
        return self._setpoint(position, events)

    def _setpoint(self, position: Vector, events: list[LimitEvent]) -> SafeSetpoint:
        self.counts.update({event.cause for event in events})
        return SafeSetpoint(position.copy(), tuple(events), self._tolerances.gripper_effort_nm, _DOOR)
