"""How far the arms are from the table, from each other and from themselves, for asking 200 times a second.

Each arm is drawn as in :mod:`simplevla.kinematics.arm_shape`. The table is the plane on which the task
stands.

No point of an arm moves farther than its joints' turns times its distance from their axes. A way that was
found to keep so much more distance than it must vouches for those near it, which are most: only what leaves
that neighbourhood is measured anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from robot_bridge.capsules import segment_distances
from robot_bridge.limits import Cause, Vector
from simplevla.embodiment import Embodiment
from simplevla.kinematics.arm_shape import TABLE_MARGIN_M, ArmShape

TABLE_TOP_M = 0.74  # RoboTwin's table, in the world frame

_ROUNDING_M = 1e-9

# What may meet of one arm. Neighbours touch, and the forearm meets the column with its wrist first.
_SELF_PAIRS = ((0, 3), (0, 4), (1, 3), (1, 4))


@dataclass(frozen=True)
class Margins:
    """Distances that are kept free, m."""

    table_m: float = TABLE_MARGIN_M
    arms_m: float = 0.02
    self_m: float = 0.005


@dataclass(frozen=True)
class Box:
    """Where the tools may be, in the world frame, m: the lowest and the highest corner."""

    low_m: tuple[float, float, float]
    high_m: tuple[float, float, float]

    def excess(self, points: NDArray[np.float64]) -> float:
        """Return how far the worst of (..., 3) points lies outside along one axis, m; negative inside."""
        return float(np.maximum(np.subtract(self.low_m, points), np.subtract(points, self.high_m)).max())


@dataclass(frozen=True)
class _Group:
    """Capsules that shall not meet: which, of all arms' in a row, and who holds if they come too close.

    Attributes:
        first, second: (P,) indices of the capsules of each pair.
        reach_m: (P,) sum of their radii.
        margin_m: to keep free over that.
        cause: how the event is named.
        parts: of the arms that hold.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    reach_m: NDArray[np.float64]
    margin_m: float
    cause: Cause
    parts: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class _Vouched:
    """A way that was measured, (K, D), and what it keeps beyond the margins, m; not positive: no more.

    Attributes:
        alone_m: (A,) of each arm: over the table, within the box, and from itself.
        together_m: between any two arms.
    """

    way: Vector
    alone_m: NDArray[np.float64]
    together_m: float


class Workspace:
    """Judges poses for :class:`~robot_bridge.limits.Limiter`: table, other arm, the arm itself, a box.

    For one thread.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        *,
        table_top_m: float = TABLE_TOP_M,
        margins: Margins | None = None,
        box: Box | None = None,
        carried: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        """Prepare the arms' geometry.

        Args:
            embodiment: the robot.
            table_top_m: height of the table in the world frame, m.
            margins: distances to keep.
            box: where the tools may be; anywhere by default.
            carried: {arm: (N, 3) points of a thing in its gripper, in its tool frame, m}; close enough
                together that spheres of 2 cm cover it.

        Raises:
            KinematicsError: an arm's model is missing or does not fit.
        """
        carried = carried or {}
        self._arms = [(ArmShape(arm, carried.get(arm.name)), part) for arm, part in embodiment.slices()]
        self._table_top_m = table_top_m
        self._margins = margins or Margins()
        self._box = box
        self._groups = self._pair_up()
        self._first = np.concatenate([group.first for group in self._groups])
        self._second = np.concatenate([group.second for group in self._groups])
        self._reach_m = np.concatenate([group.reach_m for group in self._groups])
        self._starts = np.cumsum([0, *(len(group.first) for group in self._groups[:-1])])
        self._margins_m = np.array([group.margin_m for group in self._groups])
        self._travel = np.zeros((embodiment.dimension, len(self._arms)))
        for i, (shape, part) in enumerate(self._arms):
            self._travel[part, i] = shape.travel
        self._vouched: _Vouched | None = None

    def unsafe(self, way: Vector, now: Vector) -> list[tuple[Cause, slice]]:
        """Return what must hold, by cause; see :class:`~robot_bridge.limits.Clearance`."""
        if self._vouched is not None and self._vouches(self._vouched, way):
            return []
        found: list[tuple[Cause, slice]] = []
        frames = self._frames(way)
        spare_m = []
        for (shape, part), poses in zip(self._arms, frames, strict=True):
            rows = np.moveaxis(poses[..., 2, :], -2, 0)
            height = float(shape.lowest(rows, way[..., part.stop - 1]).min()) - self._table_top_m
            spare_m.append(height - self._margins.table_m)
            if height < self._margins.table_m and height < self._height(shape, now[part]) - _ROUNDING_M:
                found.append((Cause.TABLE, part))
            if self._box is not None:
                excess = self._box.excess(poses[..., -1, :3, 3])
                spare_m[-1] = min(spare_m[-1], -excess)
                if excess > 0 and excess > _ROUNDING_M + self._box.excess(
                    shape.frames(now[part])[-1, :3, 3]
                ):
                    found.append((Cause.WORKSPACE, part))
        gaps = self._gaps(frames)
        between_m = gaps - self._margins_m
        alone_m = np.minimum(spare_m, between_m[: len(self._arms)])
        self._vouched = _Vouched(
            way.copy(), alone_m, float(between_m[len(self._arms) :].min(initial=np.inf))
        )
        close = [i for i, group in enumerate(self._groups) if gaps[i] < group.margin_m]
        if close:
            gaps_now = self._gaps(self._frames(now))
            for i in close:
                if gaps[i] < gaps_now[i] - _ROUNDING_M:
                    found += [(self._groups[i].cause, part) for part in self._groups[i].parts]
        return found

    def heights(self, positions: Vector) -> list[float]:
        """Return each arm's height above the table at ``positions`` (D,), lowest point, m."""
        return [self._height(shape, positions[part]) for shape, part in self._arms]

    def gap(self, positions: Vector) -> float:
        """Return the smallest distance between two arms at ``positions`` (D,), m; inf for one arm."""
        return self._smallest(Cause.ARMS, positions)

    def self_gap(self, positions: Vector) -> float:
        """Return the smallest distance of an arm from itself at ``positions`` (D,), m."""
        return self._smallest(Cause.SELF, positions)

    def spheres(self, positions: Vector) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (S, 3) centres and (S,) radii of the spheres that cover all arms' links, m."""
        found = [shape.links(shape.frames(positions[part])) for shape, part in self._arms]
        return np.concatenate(found), np.concatenate([shape.link_radii for shape, _ in self._arms])

    def _vouches(self, known: _Vouched, way: Vector) -> bool:
        """Return whether ``way`` is so near to what is known that it keeps every distance, too."""
        if way.shape != known.way.shape:
            return False
        strays_m = np.abs(way - known.way) @ self._travel
        return bool(
            (strays_m < known.alone_m).all() and strays_m.sum(axis=-1).max(initial=0.0) < known.together_m
        )

    def _height(self, shape: ArmShape, positions: Vector) -> float:
        return float(shape.heights(positions)) - self._table_top_m

    def _frames(self, positions: Vector) -> list[NDArray[np.float64]]:
        return [shape.frames(positions[..., part]) for shape, part in self._arms]

    def _gaps(self, frames: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Return (G,) the smallest distance within each group, over all poses."""
        ends = [shape.capsules(poses) for (shape, _), poses in zip(self._arms, frames, strict=True)]
        starts, stops = (np.concatenate(each, axis=-2) for each in zip(*ends, strict=True))
        pairs = (starts, self._first), (stops, self._first), (starts, self._second), (stops, self._second)
        distances = segment_distances(*(ends[..., which, :].reshape(-1, 3) for ends, which in pairs))
        nearest = distances.reshape(-1, len(self._first)).min(axis=0)
        gaps: NDArray[np.float64] = np.minimum.reduceat(nearest - self._reach_m, self._starts)
        return gaps

    def _smallest(self, cause: Cause, positions: Vector) -> float:
        gaps = self._gaps(self._frames(positions)).tolist()
        return min(
            (gap for gap, group in zip(gaps, self._groups, strict=True) if group.cause is cause),
            default=np.inf,
        )

    def _pair_up(self) -> list[_Group]:
        """Return what shall not meet: each arm with itself, and each two arms, with what they carry."""
        radii = np.concatenate([shape.radii for shape, _ in self._arms])
        offsets = np.cumsum([0, *(len(shape.radii) for shape, _ in self._arms)])
        groups = []
        for offset, (_, part) in zip(offsets, self._arms, strict=False):
            first, second = (np.array(_SELF_PAIRS) + offset).T
            reach = radii[first] + radii[second]
            groups.append(_Group(first, second, reach, self._margins.self_m, Cause.SELF, (part,)))
        for a, b in combinations(range(len(self._arms)), 2):
            rows, columns = np.arange(*offsets[a : a + 2]), np.arange(*offsets[b : b + 2])
            first, second = np.repeat(rows, len(columns)), np.tile(columns, len(rows))
            parts = (self._arms[a][1], self._arms[b][1])
            reach = radii[first] + radii[second]
            groups.append(_Group(first, second, reach, self._margins.arms_m, Cause.ARMS, parts))
        return groups
