"""How a setpoint may move: towards what is wanted, within position, velocity and acceleration limits.

One rule for the limits before the bus and for the simulated arms, so that a policy is trained and
evaluated with the motion that the robot will make of its actions. Before the bus jerk is limited too:
there the acceleration takes ``RAMP_S`` from zero to its limit, which the simulation leaves out, for its
arms follow a setpoint later than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simplevla.embodiment import Embodiment

Vector = NDArray[np.float64]

FOLLOWING_DELAY_S = 1 / 30  # how late a simulated joint follows a setpoint that moves steadily
RAMP_S = 0.01  # the jerk limit is the acceleration limit over this
# Shares of the time to rest at which a way is judged: the same distance lies between each two of them.
# With four, arms that pass each other at full speed came closer between two of them than at either.
_WAY = 1 - np.sqrt(np.linspace(1, 0, 13))
_EASE = 1.5  # ramps by which braking begins earlier, so that a step is approached without overshoot

_EVENT = 1e-6  # rad or m: float32 targets may lie this far outside a limit without being an event
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True, eq=False)
class MotionLimits:
    """Limits of a (D,) vector in the embodiment's order; rad and m, and these over s and s2."""

    lower: Vector
    upper: Vector
    velocity: Vector
    acceleration: Vector

    @classmethod
    def of(cls, embodiment: Embodiment) -> MotionLimits:
        """Return the limits of a robot."""
        lower, upper = embodiment.position_limits()
        return cls(lower, upper, embodiment.velocity_limits(), embodiment.acceleration_limits())


class Approach(NamedTuple):
    """The next velocity of each element (D,), and which limit kept it from what was wanted, (D,) each."""

    velocity: Vector
    too_far: NDArray[np.bool_]
    too_fast: NDArray[np.bool_]
    too_hard: NDArray[np.bool_]
    too_rough: NDArray[np.bool_]


def approach(
    limits: MotionLimits,
    position: Vector,
    velocity: Vector,
    before: Vector,
    wanted: Vector,
    dt_s: float,
    acceleration: Vector | None = None,
) -> Approach:
    """Return how to go on from ``position`` and ``velocity`` so as to meet a moving target.

    The error is closed relative to the target, no faster than the acceleration limit can brake again,
    so a step is approached without overshoot and a moving target without lag. A joint that covers d
    while braking from v with a satisfies v dt + v^2 / (2 a) <= d, whence
    v <= a (sqrt(dt^2 + 2 d / a) - dt); the same bound towards a position limit keeps it reachable
    without crossing it, tick after tick. With v for d, the acceleration a for v and the jerk limit for a,
    the same bound lets the acceleration be zero when the velocity limit is reached.

    Args:
        position, velocity: (D,) of the last setpoint.
        before, wanted: (D,) where the target was and is; finite.
        dt_s: time since the last setpoint, s.
        acceleration: (D,) of the last setpoint, to limit jerk as well; braking before a position limit
            may exceed it.
    """
    limit, a = limits.velocity, limits.acceleration
    target = _between(wanted, limits.lower, limits.upper)
    moving = (target - _between(before, limits.lower, limits.upper)) / dt_s
    jumped = np.abs(moving) > limit * _ROUNDING
    moving = np.where(jumped, 0.0, moving)
    error = target - moving * dt_s - position
    ease_s = 0.0 if acceleration is None else _EASE * RAMP_S
    ideal = moving + np.sign(error) * stoppable(np.abs(error), a, dt_s + ease_s)
    if acceleration is not None:  # the rest of a small error at once, where the jerk limit lets that end
        there, change = moving + error / dt_s, a / RAMP_S * dt_s
        first, second = (there - velocity) / dt_s, (moving - there) / dt_s
        small = np.abs(first - acceleration) <= change
        small &= (np.abs(second - first) <= change) & (np.abs(second) <= change)
        ideal = np.where(small, there, ideal)
    hard = _between(ideal, -limit, limit)
    hard = _between(hard, velocity - a * dt_s, velocity + a * dt_s)
    free = hard if acceleration is None else _eased(limits, velocity, acceleration, hard, dt_s)
    bounded = _between(
        free, -stoppable(position - limits.lower, a, dt_s), stoppable(limits.upper - position, a, dt_s)
    )
    late = np.abs(position + bounded * dt_s - target) > _EVENT
    too_far = (np.abs(target - wanted) > _EVENT) | (late & (np.abs(bounded - free) * dt_s > _EVENT))
    too_fast = late & ~too_far & (jumped | (np.abs(ideal) > limit * _ROUNDING))
    too_hard = late & ~too_far & ~too_fast & (np.abs(hard - ideal) * dt_s > _EVENT)
    return Approach(bounded, too_far, too_fast, too_hard, late & ~too_far & ~too_fast & ~too_hard)


def _eased(
    limits: MotionLimits, velocity: Vector, acceleration: Vector, wanted: Vector, dt_s: float
) -> Vector:
    """Return the velocity (D,) nearest to ``wanted`` that keeps within the jerk limit."""
    jerk = limits.acceleration / RAMP_S
    highest = stoppable(limits.velocity - velocity, jerk, dt_s)
    lowest = -stoppable(limits.velocity + velocity, jerk, dt_s)
    lowest = np.maximum(lowest, np.maximum(acceleration - jerk * dt_s, -limits.acceleration))
    highest = np.minimum(highest, np.minimum(acceleration + jerk * dt_s, limits.acceleration))
    eased = velocity + dt_s * _between((wanted - velocity) / dt_s, lowest, highest)
    return _between(eased, -limits.velocity, limits.velocity)


def stoppable(distance: Vector, acceleration: Vector, dt_s: float) -> Vector:
    """Return (D,) the largest speed of one tick after which braking ends within ``distance``."""
    return acceleration * (np.sqrt(dt_s**2 + 2 * np.maximum(distance, 0.0) / acceleration) - dt_s)


def braked(limits: MotionLimits, velocity: Vector, dt_s: float) -> Vector:
    """Return (..., D) the velocity after a tick of braking as hard as is allowed."""
    step = limits.acceleration * dt_s
    return velocity - np.clip(velocity, -step, step)


def way_to_rest(limits: MotionLimits, position: Vector, velocity: Vector, dt_s: float) -> Vector:
    """Return (K, ..., D) where joints are if they move on with ``velocity`` for a tick, then brake to rest.

    Joints that rest sooner wait for the others: what lies between may be nearer to something than
    either end.

    Args:
        position: (..., D) of the last setpoint.
        velocity: (..., D) of the next tick.
        dt_s: how long a tick is, s.
    """
    lasts = np.abs(velocity) / limits.acceleration
    longest = lasts.max(axis=-1, keepdims=True)
    times = np.minimum(np.multiply.outer(_WAY, longest), lasts)
    braking = np.sign(velocity) * limits.acceleration
    after = np.clip(position + velocity * dt_s, limits.lower, limits.upper)
    way: Vector = np.clip(after + velocity * times - braking * times**2 / 2, limits.lower, limits.upper)
    return way


def _between(values: Vector, low: Vector, high: Vector) -> Vector:
    """Return ``values`` brought between the others; np.clip costs three times as much on few values."""
    between: Vector = np.minimum(np.maximum(values, low), high)
    return between
