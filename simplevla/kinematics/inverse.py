"""Joint positions that bring a tool where it is wanted: Levenberg-Marquardt within joint limits.

A server solves ten of these for each answer and a simulator thousands a second. An arm has so few
joints that an array library spends its time on being called: poses and errors are plain floats
here, and NumPy solves the linear system alone. A pose is the twelve floats of the upper three rows
of its (4, 4) matrix, row by row; m and rad.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan2, cos, sin, sqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

Array: TypeAlias = NDArray[np.float64]
Pose: TypeAlias = tuple[float, ...]

POSITION_TOLERANCE_M = 1e-4
ROTATION_TOLERANCE_RAD = float(np.deg2rad(0.1))
_CONVERGED = 1e-8  # weighted error (m) below which another iteration changes nothing that matters
_RESTARTS = 48
_MAX_STEP = 0.5  # rad or m; larger steps would jump to another posture
_QUICK = (40, 1e-4)  # most iterations, and the relative gain below which the search ends
_THOROUGH = (150, 1e-6)  # the same where it must not give up early
_LEAST_DAMPING, _MOST_DAMPING = 1e-9, 1e2  # m2
_DAMPING_GAIN = 1e-2  # first damping over the squared error
_ROTATION_WEIGHT_M = 0.2  # how many metres of position error one radian of rotation counts as
_POSITION_FIRST_WEIGHT_M = 0.01  # the same where position comes first: 0.5 rad shift it by ~0.1 mm
_HALF_TURN_SINE = 1e-4


@dataclass(frozen=True)
class Reach:
    """Joint positions, and how far the tool is from where it was wanted.

    Attributes:
        place: the tool's pose and the joints' axes there.
        cost: norm of the position error (m) and the weighted rotation error.
    """

    place: Place
    cost: float
    position_error_m: float
    rotation_error_rad: float

    @property
    def q(self) -> Array:
        """(n,) joint positions."""
        return np.array(self.place.q)

    @property
    def reached(self) -> bool:
        """Whether the pose is met within 0.1 mm and 0.1 deg."""
        return (
            self.position_error_m <= POSITION_TOLERANCE_M
            and self.rotation_error_rad <= ROTATION_TOLERANCE_RAD
        )


@dataclass(frozen=True)
class Place:
    """Where a chain's joints and tool are.

    Attributes:
        q: n joint positions.
        joints: each joint's axis (3) and a point on it (3), in the root frame.
        tool: the tool's pose.
    """

    q: Sequence[float]
    joints: Sequence[tuple[float, ...]]
    tool: Pose


class Linkage:
    """A chain of joints that turn about, or slide along, the z axes of their own frames."""

    def __init__(self, steps: Sequence[Array], sliding: Sequence[bool], tail: Array) -> None:
        """Prepare the chain.

        Args:
            steps: n (4, 4) transforms from each joint's frame to the next one's, before it moves.
            sliding: n times, whether a joint slides.
            tail: (4, 4) transform from the last joint's frame to the tool.
        """
        self._steps = [flat(step) for step in steps]
        self._sliding = [bool(slides) for slides in sliding]
        self._tail = flat(tail)

    def at(self, q: Sequence[float]) -> Place:
        """Return where joints and tool are at ``q``."""
        pose = self._steps[0]
        joints = []
        for index, (value, slides) in enumerate(zip(q, self._sliding, strict=True)):
            if index:
                pose = times(pose, self._steps[index])
            xx, yx, zx, px, xy, yy, zy, py, xz, yz, zz, pz = pose
            if slides:
                px, py, pz = px + value * zx, py + value * zy, pz + value * zz
            else:
                s, c = sin(value), cos(value)
                xx, yx = c * xx + s * yx, c * yx - s * xx
                xy, yy = c * xy + s * yy, c * yy - s * xy
                xz, yz = c * xz + s * yz, c * yz - s * xz
            joints.append((zx, zy, zz, px, py, pz))
            pose = (xx, yx, zx, px, xy, yy, zy, py, xz, yz, zz, pz)
        return Place(q, joints, times(pose, self._tail))

    def columns(self, place: Place, rotation_weight_m: float = 1.0) -> Array:
        """Return (n, 6) the Jacobian's columns: linear, then angular times the weight; root frame."""
        x, y, z = place.tool[3], place.tool[7], place.tool[11]
        w = rotation_weight_m
        rows = []
        for (ax, ay, az, px, py, pz), slides in zip(place.joints, self._sliding, strict=True):
            if slides:
                rows.append((ax, ay, az, 0.0, 0.0, 0.0))
                continue
            dx, dy, dz = x - px, y - py, z - pz
            rows.append((ay * dz - az * dy, az * dx - ax * dz, ax * dy - ay * dx, w * ax, w * ay, w * az))
        return np.array(rows)


@dataclass(frozen=True)
class Limits:
    """Lower and upper limits of n joints; rad or m."""

    lower: Sequence[float]
    upper: Sequence[float]

    @classmethod
    def of(cls, lower: ArrayLike, upper: ArrayLike) -> Limits:
        """Return the limits that two (n,) arrays give."""
        return cls(np.asarray(lower, np.float64).tolist(), np.asarray(upper, np.float64).tolist())

    def clip(self, q: Sequence[float]) -> list[float]:
        """Return the nearest positions within the limits."""
        return [
            min(max(value, low), high) for value, low, high in zip(q, self.lower, self.upper, strict=True)
        ]

    def spread(self, count: int) -> list[list[float]]:
        """Return ``count`` positions spread over the limits, the same at every call."""
        part = np.random.default_rng(0).random((count, len(self.lower)))
        low, high = np.array(self.lower), np.array(self.upper)
        positions: list[list[float]] = (low + part * (high - low)).tolist()
        return positions


def best_reach(linkage: Linkage, target: Pose, seed: Sequence[float], limits: Limits) -> Reach:
    """Return the best answer found from ``seed`` and, while it misses, from positions elsewhere."""
    best = _search(linkage, target, linkage.at(limits.clip(seed)), limits, _ROTATION_WEIGHT_M, _THOROUGH)
    for start in limits.spread(_RESTARTS):
        if best.reached:
            break
        found = _search(linkage, target, linkage.at(start), limits, _ROTATION_WEIGHT_M, _THOROUGH)
        best = min(best, found, key=lambda reach: reach.cost)
    return best


def nearest_reach(linkage: Linkage, target: Pose, start: Place, limits: Limits) -> Reach:
    """Return the answer found from ``start`` alone, which must lie within the limits.

    Where position and rotation cannot both be met, position comes first.
    """
    best = _search(linkage, target, start, limits, _ROTATION_WEIGHT_M, _QUICK)
    if not best.reached:
        best = _search(linkage, target, best.place, limits, _POSITION_FIRST_WEIGHT_M, _QUICK)
    return best


def _search(
    linkage: Linkage, target: Pose, start: Place, limits: Limits, weight_m: float, effort: tuple[int, float]
) -> Reach:
    """Return the local minimum of the weighted error that is found from ``start``.

    Levenberg-Marquardt on the error twist; a joint at a limit that the descent would push through it
    is left out of the step (projected, as in Bertsekas 1982). The damping begins with the squared
    error (Yamashita and Fukushima 2001), so that it is strong far away and soon gone near by.
    """
    iterations, least_gain = effort
    place = start
    error = _error(target, place.tool)
    cost = _cost(error, weight_m)
    damping = max(_DAMPING_GAIN * cost * cost, _LEAST_DAMPING)
    system: tuple[Array, Array] | None = None
    for _ in range(iterations):
        if cost < _CONVERGED or damping > _MOST_DAMPING:
            break
        if system is None:
            columns = linkage.columns(place, weight_m)
            weighted = np.array((*error[:3], *(weight_m * value for value in error[3:])))
            system = columns @ columns.T, columns @ weighted
        trial = linkage.at(limits.clip(_stepped(place.q, *system, damping, limits)))
        trial_error = _error(target, trial.tool)
        trial_cost = _cost(trial_error, weight_m)
        if trial_cost >= cost:
            damping *= 10
            continue
        last = cost - trial_cost < least_gain * cost
        place, error, cost, system = trial, trial_error, trial_cost, None
        damping = max(damping / 10, _LEAST_DAMPING)
        if last:
            break
    x, y, z, u, v, w = error
    return Reach(place, cost, sqrt(x * x + y * y + z * z), sqrt(u * u + v * v + w * w))


def _stepped(
    q: Sequence[float], normal: Array, descent: Array, damping: float, limits: Limits
) -> list[float]:
    """Return ``q`` after one damped step along ``descent``."""
    damped = normal.copy()
    damped.ravel()[:: len(q) + 1] += damping
    slope = descent.tolist()
    free = [
        not ((value <= low and down < 0) or (value >= high and down > 0))
        for value, low, high, down in zip(q, limits.lower, limits.upper, slope, strict=True)
    ]
    if all(free):
        step = np.linalg.solve(damped, descent).tolist()
    elif any(free):
        part = np.zeros(len(q))
        part[free] = np.linalg.solve(damped[np.ix_(free, free)], descent[free])
        step = part.tolist()
    else:
        return list(q)
    longest = max(map(abs, step))
    scale = min(1.0, _MAX_STEP / longest) if longest else 1.0
    return [value + scale * change for value, change in zip(q, step, strict=True)]


def _error(target: Pose, pose: Pose) -> Pose:
    """Return the translation (3, m) and the rotation vector (3, rad, root frame) from pose to target."""
    a, b, c, x, d, e, f, y, g, h, i, z = pose
    ta, tb, tc, tx, td, te, tf, ty, tg, th, ti, tz = target
    # The antisymmetric part and the trace of target pose^T, without the product itself.
    u = 0.5 * (tg * d + th * e + ti * f - td * g - te * h - tf * i)
    v = 0.5 * (ta * g + tb * h + tc * i - tg * a - th * b - ti * c)
    w = 0.5 * (td * a + te * b + tf * c - ta * d - tb * e - tc * f)
    cosine = 0.5 * (ta * a + tb * b + tc * c + td * d + te * e + tf * f + tg * g + th * h + ti * i - 1.0)
    sine = sqrt(u * u + v * v + w * w)
    if sine <= _HALF_TURN_SINE and cosine <= 0:
        u, v, w = rotation_vector(_rotation(target) @ _rotation(pose).T).tolist()
    elif sine > 1e-12:
        scale = atan2(sine, cosine) / sine
        u, v, w = scale * u, scale * v, scale * w
    return tx - x, ty - y, tz - z, u, v, w


def _cost(error: Pose, weight_m: float) -> float:
    x, y, z, u, v, w = error
    return sqrt(x * x + y * y + z * z + weight_m * weight_m * (u * u + v * v + w * w))


def rotation_vector(rotation: Array) -> Array:
    """Return the (3,) rotation vector, rad, of a (3, 3) rotation; its length is at most pi."""
    sine = 0.5 * np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    length = sqrt(float(sine @ sine))
    cosine = 0.5 * (rotation[0, 0] + rotation[1, 1] + rotation[2, 2] - 1.0)
    if length > _HALF_TURN_SINE or cosine > 0:
        return sine * (np.arctan2(length, cosine) / length if length > 1e-12 else 1.0)
    return Rotation.from_matrix(rotation).as_rotvec()  # near half a turn the sine loses the axis


def flat(matrix: ArrayLike) -> Pose:
    """Return the twelve floats of a (4, 4) transform."""
    return tuple(np.asarray(matrix, np.float64)[:3].ravel().tolist())


def square(pose: Pose) -> Array:
    """Return the (4, 4) transform of twelve floats."""
    return np.array((*pose, 0.0, 0.0, 0.0, 1.0)).reshape(4, 4)


def times(left: Pose, right: Pose) -> Pose:
    """Return the product of two transforms."""
    a, b, c, x, d, e, f, y, g, h, i, z = left
    p, q, r, k, s, t, u, m, v, w, o, n = right
    return (
        a * p + b * s + c * v,
        a * q + b * t + c * w,
        a * r + b * u + c * o,
        a * k + b * m + c * n + x,
        d * p + e * s + f * v,
        d * q + e * t + f * w,
        d * r + e * u + f * o,
        d * k + e * m + f * n + y,
        g * p + h * s + i * v,
        g * q + h * t + i * w,
        g * r + h * u + i * o,
        g * k + h * m + i * n + z,
    )


def turn(vector: Sequence[float]) -> Pose:
    """Return the rotation by a rotation vector (3), rad (Rodrigues' formula)."""
    x, y, z = vector
    angle = sqrt(x * x + y * y + z * z)
    c = cos(angle)
    s, k = (sin(angle) / angle, (1.0 - c) / angle**2) if angle > 1e-8 else (1.0, 0.5)
    xy, xz, yz = k * x * y, k * x * z, k * y * z
    return (
        c + k * x * x, xy - s * z, xz + s * y, 0.0,
        xy + s * z, c + k * y * y, yz - s * x, 0.0,
        xz - s * y, yz + s * x, c + k * z * z, 0.0,
    )  # fmt: skip


def _rotation(pose: Pose) -> Array:
    return np.array(pose).reshape(3, 4)[:, :3]
