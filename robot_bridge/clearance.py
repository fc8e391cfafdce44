"""How far the arms are from the table, from each other and from themselves, for asking 200 times a second.

Each arm is drawn as capsules along its links, and each gripper also as the corners of its fingers and of
its rail. The table is the plane on which the task stands. Sizes are those of ``urdf/piper.urdf``.

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
from scipy.spatial.transform import Rotation

from robot_bridge.capsules import segment_distances
from robot_bridge.limits import Cause, Vector
from simplevla.embodiment import Arm, Embodiment
from simplevla.errors import KinematicsError
from simplevla.kinematics.chain import arm_chain

TABLE_TOP_M = 0.74  # RoboTwin's table, in the world frame

_FINGER_TIP_M = 0.0158  # how far the fingers reach beyond the grasp point
_FINGER_HALF_WIDTH_M = 0.011
_FINGER_THICKNESS_M = 0.018
_RAIL_AHEAD_M = -0.052  # the rail's front face, from the grasp point
_RAIL_HALF_LENGTH_M = 0.061
_RAIL_HALF_WIDTH_M = 0.022
_LINK_RADIUS_M = 0.055  # of the spheres; covers every link's cross-section
_GRIPPER_RADIUS_M = 0.065  # covers the rail and open fingers
_CARRIED_RADIUS_M = 0.02
_SPACING_M = 0.06
_ROUNDING_M = 1e-9

# A Piper's capsules: the frames whose origins they join (0 is the base, 7 the tool), and their radii, m.
# Column, upper arm, forearm, wrist, gripper.
_JOINTS = 6
_START, _END = [0, 2, 3, 4, 6], [2, 3, 4, 6, 7]
_RADII_M = (0.076, 0.047, 0.065, 0.048, 0.066)
_LOW_M = {
    3: 0.045,
    4: 0.048,
    6: 0.03,
}  # elbow, wrist and flange: frames and how far the arm reaches below them
# What may meet of one arm. Neighbours touch, and the forearm meets the column with its wrist first.
_SELF_PAIRS = ((0, 3), (0, 4), (1, 3), (1, 4))


@dataclass(frozen=True)
class Margins:
    """Distances that are kept free, m."""

    table_m: float = 0.005
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
        self._arms = [(_ArmShape(arm, carried.get(arm.name)), part) for arm, part in embodiment.slices()]
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
            height = shape.lowest(poses, way[..., part.stop - 1]) - self._table_top_m
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

    def _height(self, shape: _ArmShape, positions: Vector) -> float:
        return shape.lowest(shape.frames(positions), positions[-1]) - self._table_top_m

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


class _ArmShape:
    """One arm as capsules, spheres and corners in the world frame."""

    def __init__(self, arm: Arm, carried: NDArray[np.float64] | None = None) -> None:
        chain = arm_chain(arm)
        if len(arm.joints) != _JOINTS:
            raise KinematicsError(f"arm {arm.name} has {len(arm.joints)} joints", "a Piper has six")
        self._base = np.eye(4)
        self._base[:3, :3] = Rotation.from_euler("xyz", arm.base.rpy_rad).as_matrix()
        self._base[:3, 3] = arm.base.xyz_m
        self._parts = np.stack([chain.constant, chain.sine, chain.cosine])
        self._tail = chain.tail
        self._blend, self.link_radii = self._spheres()
        points = np.zeros((0, 3)) if carried is None else carried
        self._carried = np.concatenate([points, np.ones((len(points), 1))], axis=1)
        self.radii = np.concatenate([_RADII_M, np.full(len(points), _CARRIED_RADIUS_M)])
        self.travel = self._travel()

    def frames(self, positions: Vector) -> NDArray[np.float64]:
        """Return (..., n + 2, 4, 4) base, joint and tool frames in the world; positions (..., n + 1)."""
        joints = positions[..., :-1]
        weights = np.stack([np.ones_like(joints), np.sin(joints), np.cos(joints)])
        steps = np.einsum("k...n,knij->n...ij", weights, self._parts)
        frames = np.empty((*joints.shape[:-1], joints.shape[-1] + 2, 4, 4))
        frames[..., 0, :, :] = pose = self._base
        for i, step in enumerate(steps):
            frames[..., i + 1, :, :] = pose = pose @ step
        frames[..., -1, :, :] = pose @ self._tail
        return frames

    def lowest(self, frames: NDArray[np.float64], opening_m: NDArray[np.float64]) -> float:
        """Return the height of the lowest point that moves, with what is carried, over all poses, m."""
        x, y, z, height = np.moveaxis(frames[..., -1, 2, :], -1, 0)
        y, z = np.abs(y), np.abs(z)  # corners lie on both sides of the tool's x axis
        tip = x * _FINGER_TIP_M - y * (opening_m / 2 + _FINGER_THICKNESS_M) - z * _FINGER_HALF_WIDTH_M
        rail = x * _RAIL_AHEAD_M - y * _RAIL_HALF_LENGTH_M - z * _RAIL_HALF_WIDTH_M
        lowest = float(np.min(height + np.minimum(tip, rail)))
        for frame, radius in _LOW_M.items():
            lowest = min(lowest, float(frames[..., frame, 2, 3].min()) - radius)
        if len(self._carried):
            lowest = min(lowest, float((frames[..., -1, 2, :] @ self._carried.T).min()))
        return lowest

    def capsules(self, frames: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (..., M, 3) where the capsules of links and of what is carried start and end, m."""
        origins = frames[..., :3, 3]
        points = (self._carried @ np.swapaxes(frames[..., -1, :, :], -1, -2))[..., :3]
        return (
            np.concatenate([origins[..., _START, :], points], axis=-2),
            np.concatenate([origins[..., _END, :], points], axis=-2),
        )

    def links(self, frames: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (S, 3) the centres of the links' spheres alone, m."""
        centres: NDArray[np.float64] = self._blend @ frames[:, :3, 3]
        return centres

    def _travel(self) -> NDArray[np.float64]:
        """Return (n + 1,) how far a point moves at the most as a joint turns, m/rad, and as fingers do."""
        lengths = np.linalg.norm(self._parts[..., :3, 3], axis=-1).sum(axis=0)
        rail = np.hypot(np.hypot(_RAIL_AHEAD_M, _RAIL_HALF_LENGTH_M), _RAIL_HALF_WIDTH_M)
        beyond = max(rail, float(np.linalg.norm(self._carried[:, :3], axis=1).max(initial=0.0)))
        after = np.cumsum(lengths[::-1])[::-1] + np.linalg.norm(self._tail[:3, 3]) + beyond
        return np.append(after, 1.0)

    def _spheres(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (S, n + 2) weights that put spheres between the frames' origins, and (S,) radii, m."""
        origins = self.frames(np.zeros(self._parts.shape[1] + 1))[:, :3, 3]
        rows, radii = [], []
        for i, length in enumerate(np.linalg.norm(np.diff(origins, axis=0), axis=1)):
            count = int(np.ceil(length / _SPACING_M))
            for s in np.arange(1, count + 1) / max(count, 1):
                row = np.zeros(len(origins))
                row[i], row[i + 1] = 1 - s, s
                rows.append(row)
                radii.append(_GRIPPER_RADIUS_M if i == len(origins) - 2 else _LINK_RADIUS_M)
        return np.array(rows), np.array(radii)
