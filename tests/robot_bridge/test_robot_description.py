"""The robot's description: one URDF of arms and cameras whose links stand where our kinematics has them."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import msgspec
import numpy as np
import pytest

from robot_bridge.robot_description import LinkFrames, fixed_frames, robot_description
from simplevla.embodiment import Embodiment, Pose, load_embodiment
from simplevla.errors import KinematicsError
from simplevla.kinematics.chain import arm_chain
from simplevla.session_record import to_matrix

ROBOT = load_embodiment("piper_dual")


def parsed(robot: Embodiment) -> ET.Element:
    return ET.fromstring(robot_description(robot))  # noqa: S314 (our own)


def test_a_link_has_one_parent_and_the_world_is_the_root():
    urdf = parsed(ROBOT)
    links = [link.attrib["name"] for link in urdf.findall("link")]
    children = [joint.find("child").attrib["link"] for joint in urdf.findall("joint")]
    assert len(set(links)) == len(links)
    assert sorted(children) == sorted(set(links) - {"world"})
    assert {"left_base_link", "right_tool", ROBOT.cameras[0].frame} <= set(links)
    joints = {joint.attrib["name"]: joint for joint in urdf.findall("joint")}
    assert len(joints) == len(urdf.findall("joint"))
    assert set(ROBOT.names()) <= set(joints)  # so that joint states move it
    materials = [material.attrib["name"] for material in urdf.findall("material")]
    assert len(set(materials)) == len(materials)
    mimics = [mimic.attrib["joint"] for mimic in urdf.iter("mimic")]
    assert sorted(mimics) == ["left_gripper"] * 2 + ["right_gripper"] * 2


def test_links_stand_where_the_kinematics_has_them():
    random = np.random.default_rng(3)
    lower, upper = ROBOT.position_limits()
    values = random.uniform(lower, upper)
    frames = LinkFrames(robot_description(ROBOT)).at(dict(zip(ROBOT.names(), values, strict=True)))
    parents = {child: (parent, pose) for (parent, child), pose in frames.items()}

    def on_base(link: str, base: str) -> np.ndarray:
        pose = np.eye(4)
        while link != base:
            link, step = parents[link]
            pose = step @ pose
        return pose

    for arm, part in ROBOT.slices():
        base = f"{arm.name}_base_link"
        tool = on_base(f"{arm.name}_{arm.tool_link}", base)
        np.testing.assert_allclose(tool, arm_chain(arm).forward(values[part][:-1]), atol=1e-9)
        fingers = [on_base(f"{arm.name}_finger{i}", base)[:3, 3] for i in (1, 2)]
        assert np.linalg.norm(fingers[0] - fingers[1]) == pytest.approx(values[part][-1], abs=1e-6)


def test_bases_and_cameras_are_where_the_embodiment_has_them():
    moved = Pose(xyz_m=(1.0, 2.0, 3.0), rpy_rad=(0.1, 0.2, 0.3))
    arms = (msgspec.structs.replace(ROBOT.arms[0], base=moved), *ROBOT.arms[1:])
    robot = msgspec.structs.replace(ROBOT, arms=arms)
    frames = fixed_frames(robot)
    assert frames["left_base_link"] == moved
    camera = ROBOT.cameras[0]
    np.testing.assert_allclose(to_matrix(frames[camera.frame]), camera.pose_in_world(), atol=1e-9)
    urdf = parsed(robot)
    (stands,) = [j for j in urdf.findall("joint") if j.find("child").attrib["link"] == "left_base_link"]
    assert stands.find("origin").attrib == {"xyz": "1.0 2.0 3.0", "rpy": "0.1 0.2 0.3"}


def test_an_arm_without_its_urdf_is_one_clear_error():
    arms = (msgspec.structs.replace(ROBOT.arms[0], urdf="none.urdf"),)
    with pytest.raises(KinematicsError, match=r"none\.urdf cannot be read"):
        robot_description(msgspec.structs.replace(ROBOT, arms=arms))
