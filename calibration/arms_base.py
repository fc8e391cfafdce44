"""Where one arm's base stands from the other's: through a camera that both know, and by touching.

Either way gives a pose with a covariance, and the two must agree: the camera's way does not know of a
wrong tool length, and the touching way does not know of a lens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from calibration.faults import (
    DegenerateMotionError,
    InconsistentDataError,
    SwappedArmsError,
    TooFewPosesError,
)
from calibration.geometry import Array, difference, exp_rotation, hat, inverse, transform
from calibration.hand_eye import HandEye
from simplevla.errors import CalibrationError

_AGREE_CHI2 = 22.46  # of 6 degrees of freedom, exceeded once in a thousand
_LEAST_SPREAD_M = 0.03
_MOST_MISFIT = 4.0  # times the deviation that touching is given
_SWAPPED_M = 0.1


@dataclass(frozen=True, eq=False)
class BasePose:
    """The right base in the left one.

    Attributes:
        pose: (4, 4), m.
        covariance: (6, 6) of a change in the left base: translation (m), rotation vector (rad).
    """

    pose: Array
    covariance: Array


@dataclass(frozen=True)
class Agreement:
    """How far two ways of finding one pose are apart.

    Attributes:
        chi2: their difference in units of both covariances, 6 degrees of freedom.
    """

    distance_m: float
    angle_rad: float
    chi2: float

    @property
    def agree(self) -> bool:
        """Whether the difference is what the covariances let expect."""
        return self.chi2 < _AGREE_CHI2


def base_to_base(left: HandEye, right: HandEye) -> BasePose:
    """Return the right base in the left one from one camera that stands still and has seen both arms.

    Raises:
        CalibrationError: one of them is of a camera that rides on its gripper.
    """
    if {left.setup, right.setup} != {"eye-to-hand"}:
        raise CalibrationError("a camera on a gripper is in no base", "use a camera that stands still")
    camera_in_left, camera_in_right = left.camera_pose, right.camera_pose
    pose = camera_in_left @ inverse(camera_in_right)
    # The right base's change is the left camera's, and the right camera's turned and seen from the left.
    lever = pose[:3, 3] - camera_in_left[:3, 3]
    by_left = np.eye(6)
    by_left[:3, 3:] = -hat(lever)
    by_right = np.zeros((6, 6))
    by_right[:3, :3] = by_right[3:, 3:] = -pose[:3, :3]
    by_right[:3, 3:] = hat(lever) @ pose[:3, :3]
    covariance = by_left @ left.covariance @ by_left.T + by_right @ right.covariance @ by_right.T
    return BasePose(pose, covariance)


def base_to_base_by_touch(points_left: ArrayLike, points_right: ArrayLike, *, std_m: float) -> BasePose:
    """Return the right base in the left one from points that both grippers touched.

    Args:
        points_left, points_right: (N, 3) the same points in each arm's base, m.
        std_m: how far off a touched point is, each coordinate.

    Raises:
        TooFewPosesError: fewer than three points.
        DegenerateMotionError: they lie in a line, or within centimetres.
        InconsistentDataError: they do not fit each other.
    """
    left, right = np.asarray(points_left, dtype=np.float64), np.asarray(points_right, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 2 or left.shape[1:] != (3,) or len(left) < 3:
        raise TooFewPosesError(
            f"{len(left)} touched points, at least 3 are needed, each in both bases", "touch more points"
        )
    about_left, about_right = left - left.mean(0), right - right.mean(0)
    spread = np.linalg.svd(about_left, compute_uv=False) / np.sqrt(len(left))
    if spread[1] < _LEAST_SPREAD_M:
        raise DegenerateMotionError(
            f"the touched points lie in a line or too near each other ({1e3 * spread[1]:.0f} mm across)",
            "touch points 0.1 m and more apart, not in a line",
        )
    u, _, vt = np.linalg.svd(about_left.T @ about_right)  # Kabsch 1976
    turn = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt
    pose = transform(turn, left.mean(0) - turn @ right.mean(0))
    misfit = float(np.sqrt(np.sum((about_left - about_right @ turn.T) ** 2) / (3 * len(left) - 6)))
    if misfit > _MOST_MISFIT * std_m * np.sqrt(2):
        raise InconsistentDataError(
            f"the touched points do not fit each other: {1e3 * misfit:.1f} mm are left",
            "touch each point with both grippers' tips, in the same order; check the tools' lengths",
        )
    # A change (t, w) of the pose moves point p by t + w x (p - origin).
    rows = np.concatenate([np.tile(np.eye(3), (len(left), 1, 1)), -hat(left - pose[:3, 3])], axis=2)
    information = (np.swapaxes(rows, 1, 2) @ rows).sum(0) / (2 * std_m**2)
    return BasePose(pose, np.linalg.inv(information))


def agreement(first: BasePose, second: BasePose) -> Agreement:
    """Return how far two independent ways are apart."""
    step = difference(first.pose, second.pose)
    chi2 = float(step @ np.linalg.solve(first.covariance + second.covariance, step))
    return Agreement(float(np.linalg.norm(step[:3])), float(np.linalg.norm(step[3:])), chi2)


def combine(first: BasePose, second: BasePose) -> BasePose:
    """Return the mean of two independent ways, each weighed by what it knows."""
    one, two = np.linalg.inv(first.covariance), np.linalg.inv(second.covariance)
    covariance = np.linalg.inv(one + two)
    step = covariance @ one @ difference(first.pose, second.pose)
    turn = exp_rotation(step[3:]) @ second.pose[:3, :3]
    return BasePose(transform(turn, second.pose[:3, 3] + step[:3]), covariance)


def require_arms_not_swapped(found: BasePose, nominal: Array) -> None:
    """Raise SwappedArmsError if the bases stand as if left were right.

    Args:
        found: right base in left base.
        nominal: (4, 4) where it should be, within a few centimetres, m.
    """
    as_named = np.linalg.norm(found.pose[:3, 3] - nominal[:3, 3])
    as_swapped = np.linalg.norm(found.pose[:3, 3] - inverse(nominal)[:3, 3])
    if as_named > _SWAPPED_M and as_swapped < as_named:
        raise SwappedArmsError(
            f"the right base was found {1e3 * as_named:.0f} mm from where it should be, and "
            f"{1e3 * as_swapped:.0f} mm from where it would be with the arms swapped",
            "swap the arms' CAN channels in the rig, or the samples' names",
        )
