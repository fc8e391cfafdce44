"""What a session record does beyond being kept: poses and lenses reach the embodiment, history grows."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from simplevla.embodiment import Pose, load_embodiment
from simplevla.errors import RecordError
from simplevla.session_record import (
    Check,
    Lens,
    SessionRecord,
    calibrated,
    load_history,
    save_session_record,
    to_matrix,
    to_pose,
)

DUAL = load_embodiment("piper_dual")


def record(**changes):
    """Return a record of the dual rig."""
    one = SessionRecord(
        created_ns=10**18, embodiment="piper_dual", serials={}, checks=(Check(name="all", passed=True),)
    )
    return msgspec.structs.replace(one, **changes)


angle = st.floats(-1.2, 1.2)


@given(st.tuples(angle, angle, angle), st.tuples(angle, angle, angle))
def test_a_pose_and_its_matrix_are_the_same(xyz, rpy):
    pose = Pose(xyz_m=xyz, rpy_rad=rpy)
    matrix = to_matrix(pose)
    np.testing.assert_allclose(to_matrix(to_pose(matrix)), matrix, atol=1e-9)
    np.testing.assert_allclose(matrix[:3, :3], Rotation.from_euler("xyz", rpy).as_matrix(), atol=1e-12)


@given(st.tuples(angle, angle, angle), st.tuples(angle, angle, angle))
def test_a_camera_stands_where_the_record_says_with_its_roll(xyz, rpy):
    pose = Pose(xyz_m=xyz, rpy_rad=rpy)
    camera = calibrated(DUAL, record(camera_in_world={"head": pose})).camera("head")
    np.testing.assert_allclose(camera.pose_in_world(), to_matrix(pose), atol=1e-7)


def test_a_camera_that_looks_straight_down_has_a_pose():
    straight_down = np.diag([1.0, -1.0, -1.0, 1.0])
    np.testing.assert_allclose(DUAL.camera("head").at(straight_down).pose_in_world(), straight_down)


def test_the_nominal_pose_looks_at_what_it_is_to_look_at():
    camera = DUAL.camera("head")
    seen = np.linalg.inv(camera.pose_in_world()) @ [*camera.look_at_m, 1.0]
    np.testing.assert_allclose(seen[:2], 0, atol=1e-12)
    assert seen[2] > 0.5
    above = np.linalg.inv(camera.pose_in_world()) @ [*np.add(camera.look_at_m, (0, 0, 0.1)), 1.0]
    assert above[1] < 0  # image up is towards world +z


def test_bases_and_lenses_are_taken_and_what_was_not_measured_stays():
    base = Pose(xyz_m=(0.31, -0.35, 0.75), rpy_rad=(0.0, 0.0, 1.57))
    lens = Lens(width=640, height=480, fx=610, fy=612, cx=322, cy=241)
    placed = calibrated(DUAL, record(base_in_world={"right": base}, lenses={"head": lens}))
    assert placed.arms[0].base == DUAL.arms[0].base
    assert placed.arms[1].base == base
    head = placed.camera("head")
    assert (head.fx, head.fy, head.cx, head.cy) == (305, 306, 161, 120.5)
    assert head.position_m == DUAL.camera("head").position_m
    assert calibrated(DUAL, None) is DUAL


def test_a_lens_of_another_shape_is_refused():
    lens = Lens(width=1280, height=720, fx=900, fy=900, cx=640, cy=360)
    with pytest.raises(RecordError, match="1280x720, which does not scale to 320x240"):
        calibrated(DUAL, record(lenses={"head": lens}))


def test_history_is_kept_in_order_and_older_schemas_are_left_out(tmp_path):
    path = tmp_path / "session.json"
    for created_ns in (3 * 10**18, 10**18, 2 * 10**18):
        save_session_record(record(created_ns=created_ns), path)
    (tmp_path / "session_history" / f"{5:019d}.json").write_text('{"schema": 1}')
    (tmp_path / "session_history" / "notes.json").write_text("{}")
    assert [one.created_ns for one in load_history(path)] == [10**18, 2 * 10**18, 3 * 10**18]
    assert load_history(tmp_path / "none.json") == []


def test_the_slowest_arm_decides_the_command_delay():
    one = record(delays_s={"left_command": 0.04, "right_command": 0.06, "head_stamp": 0.02})
    assert one.command_delay_s(DUAL) == 0.06
    assert one.stamp_offset_s("head") == 0.02
    assert record().command_delay_s(DUAL) == record().stamp_offset_s("head") == 0.0
