"""Rigid transforms, many at a time: (..., 4, 4) homogeneous matrices, m and rad.

Small changes are (..., 6): translation first, then a rotation vector.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]


def transform(rotation: ArrayLike, translation: ArrayLike) -> Array:
    """Return (..., 4, 4) from (..., 3, 3) rotations and (..., 3) translations."""
    turn, shift = np.asarray(rotation, dtype=np.float64), np.asarray(translation, dtype=np.float64)
    out = np.zeros((*np.broadcast_shapes(turn.shape[:-2], shift.shape[:-1]), 4, 4))
    out[..., :3, :3], out[..., :3, 3], out[..., 3, 3] = turn, shift, 1.0
    return out


def shifted(translation: ArrayLike) -> Array:
    """Return the (4, 4) transform that only moves by (3,), m."""
    return transform(np.eye(3), translation)


def inverse(pose: Array) -> Array:
    """Return the inverse of (..., 4, 4) rigid transforms."""
    turn = np.swapaxes(pose[..., :3, :3], -1, -2)
    return transform(turn, -(turn @ pose[..., :3, 3, None])[..., 0])


def hat(vector: Array) -> Array:
    """Return (..., 3, 3) matrices with ``hat(a) @ b = a x b``."""
    x, y, z = np.moveaxis(vector, -1, 0)
    zero = np.zeros_like(x)
    return np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)


def exp_rotation(vector: Array) -> Array:
    """Return (..., 3, 3) rotations by (..., 3) rotation vectors, rad."""
    flat = Rotation.from_rotvec(vector.reshape(-1, 3)).as_matrix()
    return flat.reshape(*vector.shape[:-1], 3, 3)


def log_rotation(rotation: Array) -> Array:
    """Return (..., 3) rotation vectors, rad, of (..., 3, 3) rotations."""
    flat = Rotation.from_matrix(rotation.reshape(-1, 3, 3)).as_rotvec()
    return flat.reshape(*rotation.shape[:-2], 3)


def moved(pose: Array, change: Array) -> Array:
    """Return ``pose`` after a small ``change`` (6,) seen from the frame in which it is given."""
    return transform(exp_rotation(change[..., 3:]) @ pose[..., :3, :3], pose[..., :3, 3] + change[..., :3])


def difference(found: Array, true: Array) -> Array:
    """Return (..., 6) the change that :func:`moved` makes of ``true`` to reach ``found``."""
    turn = log_rotation(found[..., :3, :3] @ np.swapaxes(true[..., :3, :3], -1, -2))
    return np.concatenate([found[..., :3, 3] - true[..., :3, 3], turn], axis=-1)


def require_rigid(matrix: ArrayLike) -> Array:
    """Return ``matrix`` as a (4, 4) rigid transform, its rotation made exactly orthonormal.

    Raises:
        ValueError: it is no rigid transform: wrong shape, not finite, scaled, mirrored or sheared.
    """
    pose = np.asarray(matrix, dtype=np.float64)
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise ValueError(f"not 4x4 finite numbers but {pose.shape}")
    turn = pose[:3, :3]
    if np.abs(turn @ turn.T - np.eye(3)).max() > 1e-3 or np.linalg.det(turn) < 0:
        raise ValueError("its upper left 3x3 is no rotation")
    if np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-9:
        raise ValueError("its last row is not 0 0 0 1")
    u, _, vt = np.linalg.svd(turn)
    return transform(u @ vt, pose[:3, 3])
