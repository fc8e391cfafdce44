"""A camera's lens, from many pictures of the board."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.camera import CameraModel
from calibration.detection import Detection
from calibration.intrinsics import calibrate_intrinsics
from calibration.settings import Settings
from simplevla.session_record import Check


def measure_lens(
    detections: Sequence[Detection], settings: Settings, told: CameraModel, camera: str
) -> tuple[CameraModel, Check]:
    """Return the lens that explains the pictures best, and the check of it.

    Args:
        detections: of pictures that cover the whole image, the board near and far and tilted.
        settings: the board and the limits.
        told: what the camera says of its lens; size of the pictures, and what to compare with.
        camera: its name.

    Raises:
        CalibrationError: the pictures give no trustworthy answer.
    """
    found = calibrate_intrinsics(detections, settings.board, told.width, told.height)
    off = max(abs(found.camera.fx / told.fx - 1), abs(found.camera.fy / told.fy - 1))
    figures = {
        "held_out_px": float(found.held_out_px),
        "focal_off_percent": 100 * off,
        "coverage": float(found.coverage),
    }
    return found.camera, settings.judge(f"intrinsics {camera}", figures)
