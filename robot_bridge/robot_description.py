"""The whole robot as one URDF: every arm of an embodiment at its base, every camera where it stands.

Links and joints have the arm's name before theirs (``left_link1``), so that joint states move them. One
value moves both fingers, as it does in joint states: ``left_gripper`` is the total opening, and each
finger's joint mimics half of it.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from simplevla.embodiment import Embodiment, Pose
from simplevla.errors import KinematicsError
from simplevla.files import share_dir
from simplevla.session_record import to_pose

WORLD = "world"
_NAMED = {"link": "name", "joint": "name", "parent": "link", "child": "link", "mimic": "joint"}
Matrix = NDArray[np.float64]


def robot_description(embodiment: Embodiment) -> str:
    """Return the URDF (XML) of ``embodiment``, its root link being ``world``.

    Raises:
        KinematicsError: a URDF of an arm is missing or broken.
    """
    robot = ET.Element("robot", name=embodiment.name)
    ET.SubElement(robot, "link", name=WORLD)
    for arm in embodiment.arms:
        part = _arm_urdf(arm.urdf)
        names = {joint.attrib["name"]: joint for joint in part.iter("joint")}
        root = _root_link(part)
        for element in part.iter():
            key = _NAMED.get(element.tag)
            if key in element.attrib:
                element.set(key, f"{arm.name}_{element.attrib[key]}")
        fingers = [joint for joint in names.values() if joint.get("type") == "prismatic"]
        _drive_fingers(robot, f"{arm.name}_gripper", f"{arm.name}_{root}", arm.gripper.stroke_m, fingers)
        robot.extend(part)
        _fix(robot, f"{arm.name}_{root}", arm.base)
    for camera in embodiment.cameras:
        ET.SubElement(robot, "link", name=camera.frame)
        _fix(robot, camera.frame, to_pose(camera.pose_in_world()))
    materials: set[str] = set()
    for material in robot.findall("material"):  # each arm brings the same ones
        if material.attrib["name"] in materials:
            robot.remove(material)
        materials.add(material.attrib["name"])
    ET.indent(robot)
    return ET.tostring(robot, encoding="unicode")


def fixed_frames(embodiment: Embodiment) -> dict[str, Pose]:
    """Return {frame: its pose in the world} of the arms' bases and of the cameras."""
    bases = {f"{arm.name}_{_root_link(_arm_urdf(arm.urdf))}": arm.base for arm in embodiment.arms}
    return bases | {c.frame: to_pose(c.pose_in_world()) for c in embodiment.cameras}


class LinkFrames:
    """Where the links of a description stand on their parents, for given joint values."""

    def __init__(self, description: str) -> None:
        """Read a URDF that :func:`robot_description` has made."""
        self._joints = [
            joint
            for joint in ET.fromstring(description).findall("joint")  # noqa: S314 (our own)
            if _attribute(joint, "parent", "link") != WORLD
        ]

    def at(self, positions: Mapping[str, float]) -> dict[tuple[str, str], Matrix]:
        """Return {(parent, child): (4, 4) pose of the child on its parent} of every link of the arms.

        Args:
            positions: {joint: rad or m}; a joint that is not named is at zero, or follows what it mimics.
        """
        return {
            (_attribute(joint, "parent", "link"), _attribute(joint, "child", "link")): _joint_pose(
                joint, _value(joint, positions)
            )
            for joint in self._joints
        }


@lru_cache(maxsize=8)
def _urdf_text(name: str) -> bytes:
    path = share_dir() / "urdf" / name
    try:
        return path.read_bytes()
    except OSError as error:
        raise KinematicsError(f"{path} cannot be read: {error.strerror}", "check the embodiment") from error


def _arm_urdf(name: str) -> ET.Element:
    return ET.fromstring(_urdf_text(name))  # noqa: S314 (our own shipped files)


def _root_link(part: ET.Element) -> str:
    children = {_attribute(joint, "child", "link") for joint in part.findall("joint")}
    (root,) = [link.attrib["name"] for link in part.findall("link") if link.attrib["name"] not in children]
    return root


def _drive_fingers(
    robot: ET.Element, name: str, base: str, stroke_m: float, fingers: list[ET.Element]
) -> None:
    """Add the joint that stands for the gripper's total opening; the fingers share it."""
    link = f"{name}_opening"  # a joint needs a link of its own; nothing hangs on this one
    ET.SubElement(robot, "link", name=link)
    joint = ET.SubElement(robot, "joint", name=name, type="prismatic")
    ET.SubElement(joint, "parent", link=base)
    ET.SubElement(joint, "child", link=link)
    ET.SubElement(joint, "axis", xyz="1 0 0")
    limits = {"lower": "0", "upper": str(stroke_m), "effort": "10", "velocity": "1"}
    ET.SubElement(joint, "limit", limits)
    for finger in fingers:
        for old in finger.findall("mimic"):
            finger.remove(old)
        ET.SubElement(finger, "mimic", joint=name, multiplier=str(1 / len(fingers)))


def _fix(robot: ET.Element, link: str, pose: Pose) -> None:
    joint = ET.SubElement(robot, "joint", name=f"{link}_stands", type="fixed")
    ET.SubElement(joint, "parent", link=WORLD)
    ET.SubElement(joint, "child", link=link)
    numbers = {"xyz": pose.xyz_m, "rpy": pose.rpy_rad}
    ET.SubElement(joint, "origin", {key: " ".join(map(repr, value)) for key, value in numbers.items()})


def _value(joint: ET.Element, positions: Mapping[str, float]) -> float:
    mimic = joint.find("mimic")
    if mimic is None:
        return positions.get(joint.attrib["name"], 0.0)
    factor, offset = float(mimic.get("multiplier", "1")), float(mimic.get("offset", "0"))
    return factor * positions.get(mimic.attrib["joint"], 0.0) + offset


def _joint_pose(joint: ET.Element, value: float) -> Matrix:
    pose = np.eye(4)
    origin = joint.find("origin")
    if origin is not None:
        pose[:3, :3] = Rotation.from_euler("xyz", _numbers(origin.get("rpy"))).as_matrix()
        pose[:3, 3] = _numbers(origin.get("xyz"))
    axis_element = joint.find("axis")
    axis = _numbers("1 0 0" if axis_element is None else axis_element.get("xyz"))
    moved = np.eye(4)
    if joint.get("type") == "prismatic":
        moved[:3, 3] = value * axis
    elif joint.get("type") != "fixed":
        moved[:3, :3] = Rotation.from_rotvec(value * axis).as_matrix()
    return np.asarray(pose @ moved)


def _numbers(text: str | None) -> NDArray[np.float64]:
    return np.array([float(word) for word in (text or "0 0 0").split()])


def _attribute(element: ET.Element, tag: str, key: str) -> str:
    child = element.find(tag)
    if child is None:
        raise KinematicsError(f"joint {element.get('name')!r} has no <{tag}>", "correct the URDF")
    return child.attrib[key]
