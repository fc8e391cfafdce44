"""The embodiments that ship, and what a broken one is told."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from simplevla.embodiment import Embodiment, load_embodiment, require_same
from simplevla.errors import ConfigError, EmbodimentError
from simplevla.files import share_dir
from simplevla.kinematics import arm_chain, tool_poses

DUAL, SINGLE = load_embodiment("piper_dual"), load_embodiment("piper_single")


@pytest.mark.parametrize(("embodiment", "dimension"), [(DUAL, 14), (SINGLE, 7)])
def test_every_vector_has_one_value_per_name(embodiment: Embodiment, dimension: int):
    assert embodiment.dimension == dimension
    assert len(set(embodiment.names())) == dimension
    lower, upper = embodiment.position_limits()
    home = embodiment.home()
    for vector in (lower, upper, home, embodiment.velocity_limits(), embodiment.acceleration_limits()):
        assert vector.shape == (dimension,)
        assert np.isfinite(vector).all()
    assert (lower < upper).all()
    assert ((lower <= home) & (home <= upper)).all()
    assert (embodiment.velocity_limits() > 0).all()
    assert (embodiment.acceleration_limits() > 0).all()
    parts = [part for _, part in embodiment.slices()]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(dimension))


def test_names_run_arm_by_arm():
    joints = [f"joint{i}" for i in range(1, 7)]
    assert DUAL.names() == [f"{arm}_{name}" for arm in ("left", "right") for name in [*joints, "gripper"]]
    assert SINGLE.names() == [f"right_{name}" for name in [*joints, "gripper"]]


@pytest.mark.parametrize("embodiment", [DUAL, SINGLE])
def test_the_arms_have_their_kinematics_and_stand_apart_from_the_table(embodiment: Embodiment):
    for arm in embodiment.arms:
        assert arm_chain(arm).joint_names == tuple(joint.name for joint in arm.joints)
        height_m = arm.base.xyz_m[2] + tool_poses(embodiment.home(), embodiment)[arm.name][2, 3]
        assert height_m > 0.74 + 0.1


def test_the_head_camera_sees_the_table():
    camera = DUAL.camera("head")
    assert (camera.width, camera.height) == (320, 240)
    half_fov_rad = np.arctan(camera.width / 2 / camera.fx)
    assert 2 * np.rad2deg(half_fov_rad) == pytest.approx(55.8, abs=0.5)
    assert camera.look_at_m[2] == 0.74
    with pytest.raises(EmbodimentError, match="no camera 'wrist' -> its cameras are: head"):
        DUAL.camera("wrist")


def test_the_single_arm_is_the_right_one_of_the_two():
    assert SINGLE.arms[0] == DUAL.arms[1]
    assert SINGLE.cameras == DUAL.cameras


def test_an_unknown_name_lists_the_known():
    with pytest.raises(EmbodimentError, match=r"'panda' -> choose one of: piper_dual, piper_single"):
        load_embodiment("panda")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("control_rate_hz: 200", "control_rate_hz: 0", r"\$\.control_rate_hz"),
        ("control_rate_hz: 200", "control_rate_hz: fast", r"\$\.control_rate_hz"),
        ("control_rate_hz: 200", "speed: 200", "speed|control_rate_hz"),
        ("    tool_link: tool\n", "", r"tool_link.*\$\.arms\[0\]"),
        ("upper_rad: 1.7453292519943295", "upper_rad: wide", r"\$\.arms\[0\]\.joints\[3\]\.upper_rad"),
        ("width: 320", "width: 3.5", r"\$\.cameras\[0\]\.width"),
        ("home_rad: [0, ", "home_rad: [", "home_rad has 5 values for 6 joints"),
        ("home_rad: [0, ", "home_rad: [9, ", "home of joint1 is 9"),
        ("home_gripper_m: 0.07", "home_gripper_m: 0.08", "home_gripper_m is outside"),
        ("  - name: left", "  - name: right", "two arms have the same name"),
        ("name: piper_dual", "name: [", "is not YAML"),
    ],
)
def test_a_broken_file_is_named_with_its_key(tmp_path: Path, old: str, new: str, message: str):
    good = (share_dir() / "config/embodiment/piper_dual.yaml").read_text()
    assert old in good
    path = tmp_path / "mine.yaml"
    path.write_text(good.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        load_embodiment(str(path))
    assert str(path) in str(caught.value)
    assert caught.value.remedy


def test_a_file_of_ones_own_is_read(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text((share_dir() / "config/embodiment/piper_single.yaml").read_text())
    assert load_embodiment(str(path)) == SINGLE
    with pytest.raises(ConfigError, match="cannot be read"):
        load_embodiment(str(tmp_path / "absent.yaml"))


def test_two_sides_may_differ_in_words_and_poses_alone():
    camera = msgspec.structs.replace(DUAL.cameras[0], position_m=(0.0, -0.5, 1.3))
    moved = msgspec.structs.replace(DUAL, description="the one in the corner", cameras=(camera,))
    require_same(moved, DUAL, have_is="the bundle", want_is="the robot")

    with pytest.raises(EmbodimentError, match="the bundle is 'piper_single' and the robot is 'piper_dual'"):
        require_same(SINGLE, DUAL, have_is="the bundle", want_is="the robot")
    larger = msgspec.structs.replace(DUAL.cameras[0], width=640)
    with pytest.raises(EmbodimentError, match="cameras differ"):
        require_same(msgspec.structs.replace(DUAL, cameras=(larger,)), DUAL, have_is="a", want_is="b")
    tighter = msgspec.structs.replace(DUAL.arms[0].joints[0], upper_rad=1.0)
    arm = msgspec.structs.replace(DUAL.arms[0], joints=(tighter, *DUAL.arms[0].joints[1:]))
    with pytest.raises(EmbodimentError, match="position limits differ"):
        require_same(
            msgspec.structs.replace(DUAL, arms=(arm, DUAL.arms[1])), DUAL, have_is="a", want_is="b"
        )
