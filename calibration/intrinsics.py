"""A camera's intrinsics from views of the board (Zhang 2000, by OpenCV), with what they are worth.

How much of the distortion model the views can carry is decided by views that are left out of the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.board import Board
from calibration.camera import CameraModel
from calibration.detection import Detection, coverage, mirrored
from calibration.faults import (
    DegenerateMotionError,
    InconsistentDataError,
    MirroredBoardError,
    TooFewPosesError,
)
from calibration.geometry import Array

LEAST_VIEWS = 6

_FOLDS = 5
_GAIN = 0.995  # a larger model must lower the held-out error by this factor
_OUTLIER = 3.0  # times the median error of the views
_MOST_RMS_PX = 2.0
_UNDETERMINED = 0.05  # of the focal length
_LEAST_TURN_RAD = float(
    np.deg2rad(12.0)
)  # frontal views hide the focal length, and OpenCV's std does not say so
_NO_TANGENT, _NO_K3 = cv2.CALIB_ZERO_TANGENT_DIST, cv2.CALIB_FIX_K3
MODELS = {
    "pinhole": _NO_TANGENT | _NO_K3 | cv2.CALIB_FIX_K1 | cv2.CALIB_FIX_K2,
    "k1": _NO_TANGENT | _NO_K3 | cv2.CALIB_FIX_K2,
    "k1 k2": _NO_TANGENT | _NO_K3,
    "k1 k2 p1 p2": _NO_K3,
    "k1 k2 p1 p2 k3": 0,
}


@dataclass(frozen=True, eq=False)
class Intrinsics:
    """Intrinsics that were found.

    Attributes:
        std: (9,) standard deviations in the order of :data:`calibration.camera.INTRINSICS`.
        model: which parameters of the distortion are not zero; a key of ``MODELS``.
        rms_px: of the views in the fit; held_out_px: of views left out of it.
        coverage: which part of the picture has held a corner, 0 to 1.
        outliers: indices of views that were left out because they do not fit.
    """

    camera: CameraModel
    std: Array
    model: str
    rms_px: float
    held_out_px: float
    coverage: float
    outliers: tuple[int, ...]

    def figures(self) -> dict[str, float]:
        """Return the figures by which the intrinsics are judged."""
        return {
            "rms_px": self.rms_px,
            "held_out_px": self.held_out_px,
            "coverage": self.coverage,
            "focal_std_px": float(np.max(self.std[:2])),
            "centre_std_px": float(np.max(self.std[2:4])),
            "outliers": float(len(self.outliers)),
        }


def calibrate_intrinsics(
    detections: Sequence[Detection], board: Board, width: int, height: int
) -> Intrinsics:
    """Return the intrinsics of the camera that took the views.

    Args:
        detections: the corners of each view.
        board: what was shown.
        width, height: of the pictures, px.

    Raises:
        TooFewPosesError: fewer than ``LEAST_VIEWS`` views.
        MirroredBoardError: the corners run the other way round.
        DegenerateMotionError: the views do not determine the focal length: all from the front.
        InconsistentDataError: the views fit no camera.
    """
    if len(detections) < LEAST_VIEWS:
        raise TooFewPosesError(
            f"{len(detections)} views of the board, at least {LEAST_VIEWS} are needed",
            "take 12 or more all over the picture, the board tilted by 20 to 45 deg in several directions",
        )
    if any(mirrored(detection, board) for detection in detections):
        raise MirroredBoardError(
            "the corners run the other way round: they are mirrored", "do not flip pictures"
        )
    points = board.corners_m().astype(np.float32)
    views = [(points[d.ids], d.corners_px.astype(np.float32)) for d in detections]
    size = (width, height)
    errors = _fit(views, size, MODELS["k1 k2"]).view_px
    kept = np.flatnonzero(errors < _OUTLIER * max(float(np.median(errors)), 0.05)).tolist()
    good = [views[i] for i in kept]
    if len(good) < LEAST_VIEWS:
        raise InconsistentDataError(
            "most views fit no camera", "check board.yaml, and that pictures are sharp"
        )
    model, held_out = _choose(good, size)
    fit = _fit(good, size, MODELS[model])
    if fit.rms_px > _MOST_RMS_PX:
        raise InconsistentDataError(
            f"the views fit no camera: the corners are off by {fit.rms_px:.1f} px",
            "check board.yaml, and that the board is flat and the pictures are sharp",
        )
    if fit.std[:2].max() > _UNDETERMINED * fit.camera.fx or not width / 8 < fit.camera.fx < 20 * width:
        raise DegenerateMotionError(
            f"the views leave the focal length open: {fit.camera.fx:.0f} +- {fit.std[0]:.0f} px",
            "tilt the board by 20 to 45 deg about different axes",
        )
    if fit.turn_rad < _LEAST_TURN_RAD:
        raise DegenerateMotionError(
            f"the board turned by {np.rad2deg(fit.turn_rad):.0f} deg at most between views, "
            "which leaves the focal length open",
            "tilt the board by 20 to 45 deg about different axes",
        )
    return Intrinsics(
        fit.camera,
        fit.std,
        model,
        fit.rms_px,
        held_out,
        coverage([detections[i] for i in kept], fit.camera),
        tuple(sorted(set(range(len(views))) - set(kept))),
    )


View = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class _Fit:
    camera: CameraModel
    std: Array
    rms_px: float
    view_px: Array
    turn_rad: float  # largest angle between the board's normals of any two views


def _fit(views: Sequence[View], size: tuple[int, int], flags: int) -> _Fit:
    points, pixels = [v[0] for v in views], [v[1] for v in views]
    try:
        found: Any = cv2.calibrateCameraExtended(points, pixels, size, np.eye(3), np.zeros(5), flags=flags)
    except cv2.error as error:
        raise InconsistentDataError(
            "the views fit no camera", "tilt the board, and check board.yaml"
        ) from error
    rms, matrix, distortion, turns, _, std, _, errors = found
    values = np.concatenate(
        [[matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]], distortion.ravel()[:5]]
    )
    if not np.isfinite(values).all() or min(values[:2]) <= 0:
        raise InconsistentDataError("the views fit no camera", "tilt the board, and check board.yaml")
    camera = CameraModel.of_values(values, *size)
    normals = np.array([cv2.Rodrigues(turn)[0][:, 2] for turn in turns])
    turn_rad = float(np.arccos(np.clip(normals @ normals.T, -1, 1)).max())
    return _Fit(
        camera, np.asarray(std, np.float64).ravel()[:9], float(rms), np.asarray(errors).ravel(), turn_rad
    )


def _choose(views: Sequence[View], size: tuple[int, int]) -> tuple[str, float]:
    """Return the smallest model that no larger one betters on views left out, and its error there, px."""
    best, least = "", np.inf
    for name, flags in MODELS.items():
        error = _held_out(views, size, flags)
        if not best or error < _GAIN * least:
            best, least = name, error
    return best, float(least)


def _held_out(views: Sequence[View], size: tuple[int, int], flags: int) -> float:
    squares, count = 0.0, 0
    for fold in range(_FOLDS):
        camera = _fit([v for i, v in enumerate(views) if i % _FOLDS != fold], size, flags).camera
        for points, pixels in views[fold::_FOLDS]:
            matrix, coefficients = camera.matrix(), camera.coefficients()
            _, turn, shift = cv2.solvePnP(points, pixels, matrix, coefficients)
            seen, _ = cv2.projectPoints(points, turn, shift, matrix, coefficients)
            squares += float(np.sum((np.asarray(seen)[:, 0] - pixels) ** 2))
            count += len(points)
    return float(np.sqrt(squares / count))
