"""The table's clearance in simulation: what would come to rest too low brakes, as before a robot's bus.

Without it a policy learns ways that a robot's limits then refuse it: pressing a bell from so low that the
fingers would touch the table.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simplevla.embodiment import Embodiment
from simplevla.kinematics.arm_shape import TABLE_MARGIN_M, ArmShape
from simplevla.motion import MotionLimits, braked, way_to_rest

Array = NDArray[np.float64]

_ROUNDING_M = 1e-9


class TableClearance:
    """Judges the setpoints of many robots at once by the rule of ``robot_bridge``'s limits.

    Attributes:
        limits: how the robot may move.

    Raises:
        KinematicsError: an arm's model is missing or does not fit.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        self.limits = MotionLimits.of(embodiment)
        self._arms = [(ArmShape(arm), part) for arm, part in embodiment.slices()]

    def endangers(self, start: Array, path: Array, dt_s: float, table_top_m: float) -> bool:
        """Return whether a robot on its path would somewhere brake too late to keep clear of the table.

        Args:
            start: (D,) where it is, at rest.
            path: (T, D) its setpoints from there, one every ``dt_s``.
            table_top_m: height of the table in the world.
        """
        before = np.concatenate([start[None], path[:-1]])
        velocity = (path - before) / dt_s
        # No point moves farther than its joints turn, times its distance from their axes.
        turns = np.abs(velocity) * (dt_s + np.abs(velocity) / (2 * self.limits.acceleration))
        lowest = table_top_m + TABLE_MARGIN_M
        for shape, part in self._arms:
            near = shape.heights(before[..., part]) - turns[:, part] @ shape.travel < lowest
            way = way_to_rest(self.limits, before[near], velocity[near], dt_s)
            if near.any() and float(shape.heights(way[..., part]).min()) < lowest:
                return True
        return False

    def kept(
        self, position: Array, velocity: Array, wanted: Array, dt_s: float, table_top_m: Array
    ) -> Array:
        """Return (N, D) with which velocities to go on: those wanted, or braked where an arm came too low.

        Args:
            position, velocity: (N, D) of the last setpoints.
            wanted: (N, D) velocities of the next.
            dt_s: time between two.
            table_top_m: (N,) heights of the tables in the world.
        """
        chosen = wanted.copy()
        way = way_to_rest(self.limits, position, wanted, dt_s)
        for shape, part in self._arms:
            lowest = shape.heights(way[..., part]).min(axis=0)
            low = lowest < table_top_m + TABLE_MARGIN_M
            if low.any():
                # Who is too low may come up.
                low &= lowest < shape.heights(position[:, part]) - _ROUNDING_M
                chosen[low, part] = braked(self.limits, velocity, dt_s)[low, part]
        return chosen
