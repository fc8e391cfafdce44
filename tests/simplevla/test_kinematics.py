"""The arm's kinematics against the vendor's figures, SAPIEN, calculus and themselves."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from simplevla.embodiment import Arm, load_embodiment
from simplevla.errors import KinematicsError
from simplevla.files import share_dir
from simplevla.kinematics import Chain, arm_chain, rotation_vector

URDF = share_dir() / "urdf/piper.urdf"
EMBODIMENT = load_embodiment("piper_single")
ARM: Arm = EMBODIMENT.arms[0]
LOWER, UPPER = (limits[:6] for limits in EMBODIMENT.position_limits())
FLANGE = Chain.from_urdf(URDF, "link6")
TOOL = arm_chain(ARM)

joints = st.lists(st.floats(0, 1), min_size=6, max_size=6).map(
    lambda part: LOWER + np.array(part) * (UPPER - LOWER)
)
inner_joints = st.lists(st.floats(0.05, 0.95), min_size=6, max_size=6).map(
    lambda part: LOWER + np.array(part) * (UPPER - LOWER)
)


def modified_dh(q: np.ndarray) -> np.ndarray:
    """Return the pose of joint 6's frame by the vendor's modified DH table of the newer arms."""
    a = np.array([0, 0, 285.03, -21.98, 0, 0]) / 1e3
    alpha = np.deg2rad([0, -90, 0, 90, -90, 90])
    d = np.array([123, 0, 0, 250.75, 0, 91]) / 1e3
    offset = np.deg2rad([0, -172.22, -102.78, 0, 0, 0])
    pose = np.eye(4)
    for i in range(6):
        link, joint = np.eye(4), np.eye(4)
        link[:3, :3] = Rotation.from_euler("x", alpha[i]).as_matrix()
        link[0, 3] = a[i]
        joint[:3, :3] = Rotation.from_euler("z", q[i] + offset[i]).as_matrix()
        joint[2, 3] = d[i]
        pose = pose @ link @ joint
    return pose


def separation(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the distance (m) and the angle (rad) between two poses."""
    return (
        float(np.linalg.norm(a[:3, 3] - b[:3, 3])),
        float(np.linalg.norm(rotation_vector(a[:3, :3] @ b[:3, :3].T))),
    )


def test_zero_pose_is_the_vendors():
    vendor = np.eye(4)
    vendor[:3, 3] = np.array([56.128, 0, 213.266]) / 1e3
    vendor[:3, :3] = Rotation.from_euler("xyz", [0, 85, 0], degrees=True).as_matrix()
    distance_m, angle_rad = separation(FLANGE.forward(np.zeros(6)), vendor)
    assert distance_m < 1e-4
    assert angle_rad < np.deg2rad(0.01)


@given(joints)
@settings(deadline=None, max_examples=60)
def test_forward_is_the_vendors_dh_table(q):
    distance_m, angle_rad = separation(FLANGE.forward(q), modified_dh(q))
    assert distance_m < 2e-4
    assert angle_rad < np.deg2rad(0.02)


@pytest.fixture
def sapien_arm(tmp_path: Path):
    """The arm in a SAPIEN scene that computes physics alone, so that no renderer is needed."""
    sapien = pytest.importorskip("sapien")
    physics_only = tmp_path / "piper.urdf"
    physics_only.write_text(re.sub(r"<visual>.*?</visual>", "", URDF.read_text(), flags=re.DOTALL))
    scene = sapien.Scene([sapien.physx.PhysxCpuSystem()])
    loader = scene.create_urdf_loader()
    loader.fix_root_link = True
    return scene, loader.load(str(physics_only))


def test_forward_is_sapiens(sapien_arm):
    _, arm = sapien_arm
    assert [joint.name for joint in arm.get_active_joints()] == [f"joint{i}" for i in range(1, 9)]
    np.testing.assert_allclose(
        [joint.limits[0] for joint in arm.get_active_joints()[:6]],
        np.stack([LOWER, UPPER], axis=1),
        atol=1e-6,
    )
    rng = np.random.default_rng(3)
    for opening in (0.0, 0.02, 0.07):
        q = rng.uniform(LOWER, UPPER)
        arm.set_qpos(np.append(q, [opening / 2, opening / 2]).astype(np.float32))
        links = {link.name: link.entity_pose.to_transformation_matrix() for link in arm.links}
        distance_m, angle_rad = separation(TOOL.forward(q), links["tool"])
        assert distance_m < 1e-5
        assert angle_rad < 1e-4
        # Seen from the tool, the fingers stand on either side along y, as far apart as the opening.
        in_tool = {
            name: np.linalg.inv(links["tool"]) @ links[name][:, 3] for name in ("finger1", "finger2")
        }
        assert in_tool["finger2"][1] - in_tool["finger1"][1] == pytest.approx(opening, abs=1e-5)


def test_links_do_not_touch_each_other_where_the_arm_works(sapien_arm):
    scene, arm = sapien_arm
    home = np.array(ARM.home_rad)
    target = TOOL.forward(home)
    poses = [home, np.zeros(6)]
    for target[:3, 3] in ([x, y, z] for x in (0.3, 0.5) for y in (-0.2, 0.2) for z in (0.02, 0.19)):
        poses.append(TOOL.inverse_nearest(target, home, LOWER, UPPER))
    for q in poses:
        for opening in (0.01, 0.07):
            arm.set_qpos(np.append(q, [opening / 2, opening / 2]).astype(np.float32))
            arm.set_qvel(np.zeros(8, dtype=np.float32))
            scene.step()
            touching = {
                tuple(body.entity.name for body in contact.bodies)
                for contact in scene.get_contacts()
                if any(point.separation < 0 for point in contact.points)
            }
            assert not touching


def test_a_wrist_bent_into_the_base_does_touch(sapien_arm):
    """So that the test above could fail: bending joint 5 down at zero drives the wrist into the base."""
    scene, arm = sapien_arm
    arm.set_qpos(np.array([0, 0, 0, 0, 1.2, 0, 0.035, 0.035], dtype=np.float32))
    scene.step()
    assert any(point.separation < 0 for contact in scene.get_contacts() for point in contact.points)


def test_urdf_limits_are_the_embodiments():
    robot = ET.fromstring(URDF.read_bytes())  # noqa: S314 (our own file)
    limits = {
        joint.attrib["name"]: joint.find("limit").attrib
        for joint in robot.iter("joint")
        if joint.attrib["type"] != "fixed" and joint.find("limit") is not None
    }
    for joint in ARM.joints:
        limit = limits[joint.name]
        assert float(limit["lower"]) == pytest.approx(joint.lower_rad)
        assert float(limit["upper"]) == pytest.approx(joint.upper_rad)
        assert float(limit["velocity"]) == joint.max_velocity_rad_s
    assert sum(float(limits[finger]["upper"]) for finger in ("joint7", "joint8")) == ARM.gripper.stroke_m


@given(joints)
@settings(deadline=None, max_examples=40)
def test_jacobian_is_the_derivative(q):
    step = 1e-6
    jacobian = TOOL.jacobian(q)
    for i in range(6):
        before, after = TOOL.forward(q - step * np.eye(6)[i]), TOOL.forward(q + step * np.eye(6)[i])
        linear = (after[:3, 3] - before[:3, 3]) / (2 * step)
        angular = rotation_vector(after[:3, :3] @ before[:3, :3].T) / (2 * step)
        np.testing.assert_allclose(jacobian[:, i], np.concatenate([linear, angular]), atol=1e-7)


@given(inner_joints, st.lists(st.floats(-0.05, 0.05), min_size=6, max_size=6))
@settings(deadline=None, max_examples=100)
def test_inverse_undoes_forward_from_near_by(q, shift):
    target = TOOL.forward(q)
    found = TOOL.inverse(target, q + np.array(shift), LOWER, UPPER)
    assert ((found >= LOWER) & (found <= UPPER)).all()
    distance_m, angle_rad = separation(TOOL.forward(found), target)
    assert distance_m < 1e-4
    assert angle_rad < np.deg2rad(0.1)


def test_inverse_undoes_forward_from_far_away():
    """From home nearly every pose that can be reached is found, over restarts where need be."""
    rng = np.random.default_rng(5)
    missed = 0
    for q in rng.uniform(LOWER, UPPER, (100, 6)):
        target = TOOL.forward(q)
        try:
            found = TOOL.inverse(target, np.array(ARM.home_rad), LOWER, UPPER)
        except KinematicsError:
            missed += 1
            continue
        assert ((found >= LOWER) & (found <= UPPER)).all()
        distance_m, angle_rad = separation(TOOL.forward(found), target)
        assert distance_m < 1e-4
        assert angle_rad < np.deg2rad(0.1)
    assert missed <= 1


def test_inverse_returns_the_seed_when_it_is_there_already():
    q = np.array([0.2, 1.0, -0.9, 0.1, 0.5, -0.3])
    np.testing.assert_allclose(TOOL.inverse(TOOL.forward(q), q, LOWER, UPPER), q, atol=1e-9)


def test_inverse_says_how_far_it_missed():
    target = TOOL.forward(np.array(ARM.home_rad))
    target[:3, 3] = [2.0, 0.0, 0.3]
    with pytest.raises(KinematicsError, match=r"out of reach.* mm and .* deg"):
        TOOL.inverse(target, np.array(ARM.home_rad), LOWER, UPPER)


def test_nearest_keeps_the_position_where_only_the_rotation_is_out_of_reach():
    home = np.array(ARM.home_rad)
    target = TOOL.forward(home)
    backwards = Rotation.from_euler("y", 100, degrees=True).as_matrix()  # joint 5 cannot bend that far
    target[:3, :3] = backwards @ target[:3, :3]
    found = TOOL.inverse_nearest(target, home, LOWER, UPPER)
    distance_m, angle_rad = separation(TOOL.forward(found), target)
    assert distance_m < 2e-3
    assert 0.1 < angle_rad < np.deg2rad(100)


@given(
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    st.lists(st.floats(-3.1, 3.1), min_size=3, max_size=3),
    st.lists(st.floats(-7, 7), min_size=6, max_size=6),
)
@settings(deadline=None, max_examples=60)
def test_nearest_answers_within_limits_and_gains_on_the_seed(position, rotvec, seed):
    target = np.eye(4)
    target[:3, 3] = position
    target[:3, :3] = Rotation.from_rotvec(rotvec).as_matrix()
    found = TOOL.inverse_nearest(target, seed, LOWER, UPPER)
    assert ((found >= LOWER) & (found <= UPPER)).all()
    start = np.clip(seed, LOWER, UPPER)
    before, after = (separation(TOOL.forward(q), target) for q in (start, found))
    # First both errors fall together, a radian counting as 0.2 m; then position at 0.01 m a radian.
    assert after[0] <= np.hypot(before[0], 0.2 * before[1]) + 0.01 * np.pi


def test_the_home_tilt_can_be_held_over_the_table():
    """The tool reaches the table's working area at home's orientation, as the embodiment promises."""
    home = np.array(ARM.home_rad)
    start = TOOL.forward(home)
    approach = start[:3, 0]
    assert np.rad2deg(np.arccos(-approach[2])) == pytest.approx(32, abs=0.1)
    assert abs(start[:3, 1]) == pytest.approx([0, 1, 0], abs=1e-4)
    table_z = -0.01
    assert start[:3, 3] == pytest.approx([0.22, 0, table_z + 0.20], abs=1e-3)
    reached = []
    for height in (0.03, 0.12, 0.20):
        for x in (0.30, 0.42, 0.55):
            for y in (-0.20, 0.0, 0.20):
                end = np.array([x, y, table_z + height])
                q = home
                for part in np.linspace(0, 1, 13)[1:]:
                    target = start.copy()
                    target[:3, 3] = (1 - part) * start[:3, 3] + part * end
                    q = TOOL.inverse_nearest(target, q, LOWER, UPPER)
                distance_m, angle_rad = separation(TOOL.forward(q), target)
                reached.append(distance_m < 1e-4 and angle_rad < np.deg2rad(0.1))
    assert sum(reached) >= len(reached) - 2  # the farthest, highest two corners are out of reach


@given(
    st.lists(st.floats(-1, 1), min_size=3, max_size=3).filter(lambda v: np.linalg.norm(v) > 1e-3),
    st.floats(0, np.pi),
)
@settings(max_examples=200)
def test_rotation_vector_undoes_the_exponential(axis, angle):
    rotation = Rotation.from_rotvec(angle * np.array(axis) / np.linalg.norm(axis)).as_matrix()
    vector = rotation_vector(rotation)
    assert np.linalg.norm(vector) <= np.pi + 1e-9
    np.testing.assert_allclose(Rotation.from_rotvec(vector).as_matrix(), rotation, atol=1e-7)


def test_a_sliding_joint_moves_along_its_axis():
    finger = Chain.from_urdf(URDF, "finger1")
    assert finger.joint_names[-1] == "joint7"
    closed, open_ = finger.forward(np.zeros(7)), finger.forward(np.append(np.zeros(6), 0.035))
    assert np.linalg.norm(open_[:3, 3] - closed[:3, 3]) == pytest.approx(0.035)
    np.testing.assert_allclose(
        finger.jacobian(np.zeros(7))[:, 6], [*(open_[:3, 3] - closed[:3, 3]) / 0.035, 0, 0, 0], atol=1e-9
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<robot", "not XML"),
        ("<robot name='r'/>", "no joint leads to it"),
        (
            "<robot><joint name='j' type='fixed'><parent link='a'/><child link='tool'/></joint></robot>",
            "no moving joint",
        ),
        (
            "<robot><joint name='j' type='planar'><parent link='a'/><child link='tool'/></joint></robot>",
            "'j' is planar",
        ),
        ("<robot><joint name='j' type='revolute'><child link='tool'/></joint></robot>", "no <parent>"),
        (
            "<robot><joint name='j' type='fixed'><parent link='tool'/><child link='tool'/></joint></robot>",
            "loop",
        ),
        (
            "<robot><joint name='j' type='revolute'><parent link='a'/><child link='tool'/>"
            "<axis xyz='0 0'/></joint></robot>",
            "three numbers",
        ),
    ],
)
def test_a_broken_urdf_is_named(tmp_path: Path, text: str, message: str):
    path = tmp_path / "robot.urdf"
    path.write_text(text)
    with pytest.raises(KinematicsError, match=message) as caught:
        Chain.from_urdf(path, "tool")
    assert "robot.urdf" in str(caught.value)


def test_a_missing_urdf_is_named(tmp_path: Path):
    with pytest.raises(KinematicsError, match=r"absent\.urdf cannot be read"):
        Chain.from_urdf(tmp_path / "absent.urdf", "tool")


@pytest.mark.parametrize("urdf", ["../urdf/piper.urdf", "/etc/passwd"])
def test_an_arm_cannot_name_a_file_elsewhere(urdf):
    with pytest.raises(KinematicsError, match="not below urdf/"):
        arm_chain(msgspec.structs.replace(ARM, urdf=urdf))


def test_an_arm_must_name_the_urdfs_joints():
    renamed = (msgspec.structs.replace(ARM.joints[0], name="shoulder"), *ARM.joints[1:])
    with pytest.raises(KinematicsError, match="shoulder"):
        arm_chain(msgspec.structs.replace(ARM, joints=renamed))
