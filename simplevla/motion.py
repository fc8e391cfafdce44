"""How a setpoint may move: towards what is wanted, within position, velocity and acceleration limits.

One rule for the limits before the bus and for the simulated arms, so that a policy is trained and
evaluated with the motion that the robot will make of its actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simplevla.embodiment import Embodiment

Vector = NDArray[np.float64]

FOLLOWING_DELAY_S = 1 / 30  # how late a simulated joint follows a setpoint that moves steadily

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


def approach(
    limits: MotionLimits, position: Vector, velocity: Vector, before: Vector, wanted: Vector, dt_s: float
) -> Approach:
    """Return how to go on from ``position`` and ``velocity`` so as to meet a moving target.

    The error is closed relative to the target, no faster than the acceleration limit can brake again,
    so a step is approached without overshoot and a moving target without lag. A joint that covers d
    while braking from v with a satisfies v dt + v^2 / (2 a) <= d, whence
    v <= a (sqrt(dt^2 + 2 d / a) - dt); the same bound towards a position limit keeps it reachable
    without crossing it, tick after tick.

    Args:
        position, velocity: (D,) of the last setpoint.
        before, wanted: (D,) where the target was and is; finite.
        dt_s: time since the last setpoint, s.
    """
    limit, a = limits.velocity, limits.acceleration
    target = np.clip(wanted, limits.lower, limits.upper)
    moving = (target - np.clip(before, limits.lower, limits.upper)) / dt_s
    jumped = np.abs(moving) > limit * _ROUNDING
    moving = np.where(jumped, 0.0, moving)
    error = target - moving * dt_s - position
    ideal = moving + np.sign(error) * stoppable(np.abs(error), a, dt_s)
    free = np.clip(ideal, -limit, limit)
    free = np.clip(free, velocity - a * dt_s, velocity + a * dt_s)
    bounded = np.clip(
        free, -stoppable(position - limits.lower, a, dt_s), stoppable(limits.upper - position, a, dt_s)
    )
    late = np.abs(position + bounded * dt_s - target) > _EVENT
    too_far = (np.abs(target - wanted) > _EVENT) | (late & (np.abs(bounded - free) * dt_s > _EVENT))
    too_fast = late & ~too_far & (jumped | (np.abs(ideal) > limit * _ROUNDING))
    return Approach(bounded, too_far, too_fast, late & ~too_far & ~too_fast)


def stoppable(distance: Vector, acceleration: Vector, dt_s: float) -> Vector:
    """Return (D,) the largest speed of one tick after which braking ends within ``distance``."""
    return acceleration * (np.sqrt(dt_s**2 + 2 * np.maximum(distance, 0.0) / acceleration) - dt_s)
