"""The shape of an arm: how low it reaches, and what of it may meet what else.

It is drawn as capsules along its links, its gripper also as the corners of its fingers and of its rail.
Sizes are those of ``urdf/piper.urdf``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from simplevla.embodiment import Arm
from simplevla.errors import KinematicsError
from simplevla.kinematics.chain import arm_chain
from simplevla.kinematics.inverse import Array

TABLE_MARGIN_M = 0.005  # what is kept free between an arm and the table, on a robot and in simulation

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

# A Piper's capsules: the frames whose origins they join (0 is the base, 7 the tool), and their radii, m.
# Column, upper arm, forearm, wrist, gripper.
_JOINTS = 6
_START, _END = [0, 2, 3, 4, 6], [2, 3, 4, 6, 7]
_RADII_M = (0.076, 0.047, 0.065, 0.048, 0.066)
# Elbow, wrist and flange: their frames, and how far the arm reaches below them.
_LOW_M = {3: 0.045, 4: 0.048, 6: 0.03}


class ArmShape:
    """One arm as capsules, spheres and corners in the world frame."""

    def __init__(self, arm: Arm, carried: Array | None = None) -> None:
        chain = arm_chain(arm)
        if len(arm.joints) != _JOINTS:
            raise KinematicsError(f"arm {arm.name} has {len(arm.joints)} joints", "a Piper has six")
        self._base = np.eye(4)
        self._base[:3, :3] = Rotation.from_euler("xyz", arm.base.rpy_rad).as_matrix()
        self._base[:3, 3] = arm.base.xyz_m
        self._parts = np.stack([chain.constant, chain.sine, chain.cosine])
        self._rows = np.concatenate([chain.constant, chain.sine, chain.cosine], axis=-1)
        self._tail = chain.tail
        self._blend, self.link_radii = self._spheres()
        points = np.zeros((0, 3)) if carried is None else carried
        self._carried = np.concatenate([points, np.ones((len(points), 1))], axis=1)
        self.radii = np.concatenate([_RADII_M, np.full(len(points), _CARRIED_RADIUS_M)])
        self.travel = self._travel()

    def frames(self, positions: Array) -> Array:
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

    def heights(self, positions: Array) -> Array:
        """Return (...) how high the lowest point that moves is in the world, m; positions (..., n + 1)."""
        # The third rows of all frames, without the rest of them: that is a quarter of the work.
        flat = positions.reshape(-1, positions.shape[-1]).T
        sine, cosine = np.sin(flat)[..., None], np.cos(flat)[..., None]
        row = np.broadcast_to(self._base[2], (flat.shape[1], 4))
        rows = [row]
        for i, parts in enumerate(self._rows):
            terms = row @ parts
            row = terms[:, :4] + sine[i] * terms[:, 4:8] + cosine[i] * terms[:, 8:]
            rows.append(row)
        lowest = self.lowest([*rows, row @ self._tail], flat[-1])
        return lowest.reshape(positions.shape[:-1])

    def lowest(self, rows: Sequence[Array] | Array, opening_m: Array) -> Array:
        """Return (...) the height of the lowest point that moves, with what is carried, m.

        Args:
            rows: n + 2 arrays (..., 4), the third rows of :meth:`frames`.
            opening_m: (...) the gripper's.
        """
        x, y, z, height = np.moveaxis(rows[-1], -1, 0)
        y, z = np.abs(y), np.abs(z)  # corners lie on both sides of the tool's x axis
        tip = x * _FINGER_TIP_M - y * (opening_m / 2 + _FINGER_THICKNESS_M) - z * _FINGER_HALF_WIDTH_M
        rail = x * _RAIL_AHEAD_M - y * _RAIL_HALF_LENGTH_M - z * _RAIL_HALF_WIDTH_M
        lowest: Array = height + np.minimum(tip, rail)
        for frame, radius in _LOW_M.items():
            lowest = np.minimum(lowest, rows[frame][..., 3] - radius)
        if len(self._carried):
            lowest = np.minimum(lowest, (rows[-1] @ self._carried.T).min(axis=-1))
        return lowest

    def capsules(self, frames: Array) -> tuple[Array, Array]:
        """Return (..., M, 3) where the capsules of links and of what is carried start and end, m."""
        origins = frames[..., :3, 3]
        points = (self._carried @ np.swapaxes(frames[..., -1, :, :], -1, -2))[..., :3]
        return (
            np.concatenate([origins[..., _START, :], points], axis=-2),
            np.concatenate([origins[..., _END, :], points], axis=-2),
        )

    def links(self, frames: Array) -> Array:
        """Return (S, 3) the centres of the links' spheres alone, m."""
        centres: Array = self._blend @ frames[:, :3, 3]
        return centres

    def _travel(self) -> Array:
        """Return (n + 1,) how far a point moves at the most as a joint turns, m/rad, and as fingers do."""
        lengths = np.linalg.norm(self._parts[..., :3, 3], axis=-1).sum(axis=0)
        rail = np.hypot(np.hypot(_RAIL_AHEAD_M, _RAIL_HALF_LENGTH_M), _RAIL_HALF_WIDTH_M)
        beyond = max(rail, float(np.linalg.norm(self._carried[:, :3], axis=1).max(initial=0.0)))
        after = np.cumsum(lengths[::-1])[::-1] + np.linalg.norm(self._tail[:3, 3]) + beyond
        return np.append(after, 1.0)

    def _spheres(self) -> tuple[Array, Array]:
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
