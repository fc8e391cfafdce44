"""How far the arms are from the table and from each other, cheap enough to ask 200 times a second.

Each arm is drawn as spheres along its links and each gripper as the corners of its fingers and of its
rail. The table is the plane on which the task stands. Sizes are those of ``urdf/piper.urdf``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from robot_bridge.limits import Cause, Vector
from simplevla.embodiment import Arm, Embodiment
from simplevla.kinematics.chain import arm_chain

TABLE_TOP_M = 0.74  # RoboTwin's table, in the world frame

_FINGER_TIP_M = 0.0158  # how far the fingers reach beyond the grasp point
_FINGER_HALF_WIDTH_M = 0.011
_FINGER_THICKNESS_M = 0.018
_RAIL_AHEAD_M = -0.052  # the rail's front face, from the grasp point
_RAIL_HALF_LENGTH_M = 0.061
_RAIL_HALF_WIDTH_M = 0.022
_LINK_RADIUS_M = 0.055  # covers every link's cross-section
_GRIPPER_RADIUS_M = 0.065  # covers the rail and open fingers
_CARRIED_RADIUS_M = 0.02
_SPACING_M = 0.06
_ROUNDING_M = 1e-9


@dataclass(frozen=True)
class Margins:
    """Distances that are kept free, m."""

    table_m: float = 0.005
    arms_m: float = 0.02


class Workspace:
    """Judges poses for :class:`~robot_bridge.limits.Limiter`: the table and the other arm."""

    def __init__(
        self,
        embodiment: Embodiment,
        *,
        table_top_m: float = TABLE_TOP_M,
        margins: Margins | None = None,
        carried: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        """Prepare the arms' geometry.

        Args:
            embodiment: the robot.
            table_top_m: height of the table in the world frame, m.
            margins: distances to keep.
            carried: {arm: (N, 3) points of a thing in its gripper, in its tool frame, m}; close enough
                together that spheres of 2 cm cover it.

        Raises:
            KinematicsError: an arm's model is missing or does not fit.
        """
        carried = carried or {}
        self._arms = [(_ArmShape(arm, carried.get(arm.name)), part) for arm, part in embodiment.slices()]
        self._table_top_m = table_top_m
        self._margins = margins or Margins()

    def unsafe(self, stop: Vector, now: Vector) -> list[tuple[Cause, slice]]:
        """Return what must hold, by cause; see :class:`~robot_bridge.limits.Clearance`."""
        found: list[tuple[Cause, slice]] = []
        poses = [(shape, part, shape.frames(stop[part])) for shape, part in self._arms]
        for shape, part, frames in poses:
            height = shape.lowest(frames, stop[part.stop - 1]) - self._table_top_m
            if height < self._margins.table_m and height < self._height(shape, now[part]) - _ROUNDING_M:
                found.append((Cause.TABLE, part))
        for (a, part_a, frames_a), (b, part_b, frames_b) in combinations(poses, 2):
            gap = _gap(a, frames_a, b, frames_b)
            if gap < self._margins.arms_m:
                gap_now = _gap(a, a.frames(now[part_a]), b, b.frames(now[part_b]))
                if gap < gap_now - _ROUNDING_M:
                    found += [(Cause.ARMS, part_a), (Cause.ARMS, part_b)]
        return found

    def heights(self, positions: Vector) -> list[float]:
        """Return each gripper's height above the table at ``positions`` (D,), lowest point, m."""
        return [self._height(shape, positions[part]) for shape, part in self._arms]

    def gap(self, positions: Vector) -> float:
        """Return the smallest distance between two arms at ``positions`` (D,), m; inf for one arm."""
        poses = [(shape, shape.frames(positions[part])) for shape, part in self._arms]
        return min((_gap(*a, *b) for a, b in combinations(poses, 2)), default=np.inf)

    def spheres(self, positions: Vector) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (S, 3) centres and (S,) radii of the spheres that cover all arms' links, m."""
        found = [shape.links(shape.frames(positions[part])) for shape, part in self._arms]
        return np.concatenate(found), np.concatenate([shape.link_radii for shape, _ in self._arms])

    def _height(self, shape: _ArmShape, positions: Vector) -> float:
        return shape.lowest(shape.frames(positions), positions[-1]) - self._table_top_m


class _ArmShape:
    """One arm as spheres and corners in the world frame."""

    def __init__(self, arm: Arm, carried: NDArray[np.float64] | None = None) -> None:
        chain = arm_chain(arm)
        self._base = np.eye(4)
        self._base[:3, :3] = Rotation.from_euler("xyz", arm.base.rpy_rad).as_matrix()
        self._base[:3, 3] = arm.base.xyz_m
        self._parts = np.stack([chain.constant, chain.sine, chain.cosine])
        self._tail = chain.tail
        self._blend, self.link_radii = self._spheres()
        points = np.zeros((0, 3)) if carried is None else carried
        self._carried = np.concatenate([points, np.ones((len(points), 1))], axis=1)
        self.radii = np.concatenate([self.link_radii, np.full(len(points), _CARRIED_RADIUS_M)])

    def frames(self, positions: Vector) -> NDArray[np.float64]:
        """Return (n + 2, 4, 4) base, joint and tool frames in the world at ``positions`` (n + 1,)."""
        joints = positions[:-1]
        weights = np.stack([np.ones_like(joints), np.sin(joints), np.cos(joints)])
        steps = (weights[:, :, None, None] * self._parts).sum(axis=0)
        frames = np.empty((len(joints) + 2, 4, 4))
        frames[0] = pose = self._base
        for i, step in enumerate(steps):
            frames[i + 1] = pose = pose @ step
        frames[-1] = pose @ self._tail
        return frames

    def lowest(self, frames: NDArray[np.float64], opening_m: float) -> float:
        """Return the height in the world of the lowest point of fingers, rail and what is carried, m."""
        x, y, z, height = frames[-1, 2].tolist()
        y, z = abs(y), abs(z)  # corners lie on both sides of the tool's x axis
        tip = x * _FINGER_TIP_M - y * (opening_m / 2 + _FINGER_THICKNESS_M) - z * _FINGER_HALF_WIDTH_M
        rail = x * _RAIL_AHEAD_M - y * _RAIL_HALF_LENGTH_M - z * _RAIL_HALF_WIDTH_M
        lowest: float = height + min(tip, rail)
        if len(self._carried):
            lowest = min(lowest, float((self._carried @ frames[-1, 2]).min()))
        return lowest

    def centres(self, frames: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (S, 3) the spheres' centres in the world, of links and of what is carried, m."""
        return np.concatenate([self.links(frames), (self._carried @ frames[-1].T)[:, :3]])

    def links(self, frames: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (S, 3) the centres of the links' spheres alone, m."""
        centres: NDArray[np.float64] = self._blend @ frames[:, :3, 3]
        return centres

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


def _gap(a: _ArmShape, frames_a: NDArray[np.float64], b: _ArmShape, frames_b: NDArray[np.float64]) -> float:
    between = a.centres(frames_a)[:, None] - b.centres(frames_b)[None]
    distance = np.sqrt((between**2).sum(axis=-1))
    return float((distance - a.radii[:, None] - b.radii[None]).min())
