"""A lens is found from views of the board, and views that cannot show it are named."""

import numpy as np
import pytest

from calibration.board import DEFAULT_BOARD
from calibration.camera import CameraModel, load_camera, save_camera
from calibration.detection import Detection
from calibration.faults import DegenerateMotionError, MirroredBoardError, TooFewPosesError
from calibration.geometry import exp_rotation, transform
from calibration.intrinsics import calibrate_intrinsics

TRUE = CameraModel(
    width=640, height=480, fx=611, fy=608, cx=322.3, cy=236.1, distortion=(0.08, -0.15, 0.001, -0.0005, 0.0)
)


def seen(count, *, tilt_rad=0.6, noise_px=0.1, seed=0):
    rng = np.random.default_rng(seed)
    points = DEFAULT_BOARD.corners_m() - [0.09, 0.075, 0]
    found = []
    while len(found) < count:
        turn = exp_rotation(np.array([*rng.uniform(-tilt_rad, tilt_rad, 2), rng.uniform(-1, 1)]))
        depth = rng.uniform(0.25, 0.4)
        pose = transform(turn, np.array([*rng.uniform(-0.3, 0.3, 2) * depth, depth]))
        pixels = TRUE.project(points @ pose[:3, :3].T + pose[:3, 3])
        if ((pixels > 0) & (pixels < [640, 480])).all():
            found.append(Detection(np.arange(len(points)), pixels + rng.normal(0, noise_px, pixels.shape)))
    return found


def test_the_lens_is_found_as_well_as_is_said():
    found = calibrate_intrinsics(seen(16), DEFAULT_BOARD, 640, 480)
    wrong = np.abs(found.camera.values() - TRUE.values())
    assert (wrong[:4] < 4 * found.std[:4]).all()
    assert found.std[:4].max() < 3
    assert found.held_out_px == pytest.approx(0.14, rel=0.3)  # both coordinates of 0.1 px
    assert found.coverage > 0.6
    pixels = TRUE.project([[0.1, 0.08, 0.4], [-0.15, 0.1, 0.5]])
    assert np.abs(found.camera.project([[0.1, 0.08, 0.4], [-0.15, 0.1, 0.5]]) - pixels).max() < 1.5


def test_a_view_that_does_not_fit_is_left_out():
    views = seen(14)
    rng = np.random.default_rng(1)
    views[5] = Detection(views[5].ids, views[5].corners_px + rng.normal(0, 6, views[5].corners_px.shape))
    assert calibrate_intrinsics(views, DEFAULT_BOARD, 640, 480).outliers == (5,)


def test_few_and_mirrored_views_are_named():
    with pytest.raises(TooFewPosesError):
        calibrate_intrinsics(seen(4), DEFAULT_BOARD, 640, 480)
    flipped = [Detection(d.ids, d.corners_px * [-1, 1] + [639, 0]) for d in seen(8)]
    with pytest.raises(MirroredBoardError):
        calibrate_intrinsics(flipped, DEFAULT_BOARD, 640, 480)


@pytest.mark.parametrize("seed", range(3))
def test_views_from_the_front_alone_are_refused(seed):
    with pytest.raises(DegenerateMotionError, match="focal length open"):
        calibrate_intrinsics(seen(12, tilt_rad=0.01, seed=seed), DEFAULT_BOARD, 640, 480)


def test_a_camera_survives_its_file(tmp_path):
    save_camera(TRUE, tmp_path / "camera.yaml")
    assert load_camera(tmp_path / "camera.yaml") == TRUE
