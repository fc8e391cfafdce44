"""Poses that show the board: clear of table and other arm, in sight, reached one after another."""

import msgspec
import numpy as np
import pytest

from calibration.settings import Settings, load_settings
from calibration.viewing import Viewing, plate_points
from robot_bridge.clearance import Workspace
from simplevla.embodiment import load_embodiment
from simplevla.errors import ConfigError

SETTINGS = load_settings()
DUAL = SETTINGS.streamed(load_embodiment("piper_dual"))
RIGHT = DUAL.arms[1]
# Found by trying: the board high over the table before the right arm, facing the camera.
SHOWING = np.array([0.1, 1.81, -1.44, 0.31, 1.1, -2.04])


def viewing(settings: Settings = SETTINGS) -> Viewing:
    return Viewing(DUAL, RIGHT, DUAL.cameras[0].pose_in_world(), settings)


def test_the_plate_is_covered_by_points():
    points = plate_points(SETTINGS)
    width, height = SETTINGS.board.size_m
    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    assert spread[2] < 1e-9  # flat
    assert np.ptp(points @ [0, 1, 0]) == pytest.approx(width + 0.02)
    assert len(points) >= width * height / 0.03**2


def test_a_pose_near_home_is_clear_and_one_through_the_table_is_not():
    here = viewing()
    assert here.clear(np.array(RIGHT.home_rad))
    assert not here.clear(np.array([0.0, 2.2, -0.9, 0.0, 1.0, 0.0]))


def test_the_board_itself_is_kept_off_the_table():
    """A pose that the empty gripper may take, and the board in it may not."""
    empty = Workspace(DUAL)
    low = None
    for lift in np.linspace(0.9, 2.0, 60):
        joints = np.array([0.0, lift, -0.7, 0.0, 0.9, np.pi / 2])
        positions = viewing().whole(joints)
        if empty.heights(positions)[1] > 0.04 and not viewing().clear(joints):
            low = joints
    assert low is not None


def test_poses_beyond_a_limit_are_not_allowed():
    beyond = SHOWING.copy()
    beyond[0] = RIGHT.joints[0].upper_rad - 0.01
    assert viewing().allowed(SHOWING)
    assert not viewing().allowed(beyond)


def test_a_link_before_the_camera_hides_the_board():
    workspace = Workspace(DUAL, carried={"right": plate_points(SETTINGS)})
    here = viewing()
    centres, _ = workspace.spheres(here.whole(SHOWING))
    through_the_elbow = np.eye(4)
    tool = here._base @ here._chain.forward(SHOWING)
    board = tool[:3, :3] @ here._corners[-1] + tool[:3, 3]
    elbow = centres[len(centres) // 2 + 4]
    through_the_elbow[:3, 3] = elbow + 0.5 * (elbow - board)
    hidden = Viewing(DUAL, RIGHT, through_the_elbow, SETTINGS)
    assert here._in_sight(SHOWING)
    assert not hidden._in_sight(SHOWING)


def test_a_route_takes_each_pose_once_and_nearest_first():
    here = viewing()
    home = np.array(RIGHT.home_rad)
    near, far = home.copy(), home.copy()
    near[0], far[0] = near[0] + 0.1, far[0] + 0.4
    route = here.route(home, [far, near])
    assert [pose.tolist() for pose in route] == [near.tolist(), far.tolist()]


def test_a_route_leaves_out_what_cannot_be_reached():
    here = viewing()
    home = np.array(RIGHT.home_rad)
    under_the_table = np.array([0.0, 2.2, -0.9, 0.0, 1.0, 0.0])
    assert here.route(home, [under_the_table]) == []


@pytest.mark.parametrize(
    ("figures", "passed"),
    [
        ({"moved_mm": 1.0, "turned_deg": 0.1, "held_out_px": 0.3}, True),
        ({"moved_mm": 5.0, "turned_deg": 0.1, "held_out_px": 0.3}, False),
        ({"moved_mm": float("nan"), "turned_deg": 0.1, "held_out_px": 0.3}, False),
        ({"something_else": 0.0}, False),
    ],
)
def test_a_check_passes_only_within_every_limit(figures, passed):
    check = SETTINGS.judge("check head right", figures)
    assert check.passed is passed
    assert set(check.limits) <= set(figures)


def test_a_check_without_limits_is_an_error_that_names_them():
    with pytest.raises(ConfigError, match=r"limits\.colour is missing"):
        SETTINGS.judge("colour head", {"hue": 1.0})


def test_streams_are_scaled_with_their_lens():
    camera = DUAL.cameras[0]
    assert (camera.width, camera.height, camera.fx, camera.cx) == (640, 480, 605.0, 320.0)
    assert camera.pose_in_world() == pytest.approx(load_embodiment("piper_dual").cameras[0].pose_in_world())


def test_settings_are_checked_where_they_enter(tmp_path):
    text = msgspec.yaml.encode(msgspec.structs.replace(SETTINGS, speed=3.0))
    (tmp_path / "calibration.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match="speed"):
        load_settings(tmp_path / "calibration.yaml")
