"""Serial kinematics of one arm, read from its URDF: forward, Jacobian, inverse.

Poses are (4, 4) homogeneous transforms of the tool link in the frame of the URDF's root link, m;
joint vectors are (n,), rad (m for a prismatic joint), in the order from the root to the tool.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from simplevla.embodiment import Arm
from simplevla.errors import KinematicsError
from simplevla.files import share_dir
from simplevla.kinematics.inverse import Array, Limits, Linkage, best_reach, flat, nearest_reach, square


def arm_chain(arm: Arm) -> Chain:
    """Return the chain of ``arm`` from its base to its tool link; read once and kept.

    Raises:
        KinematicsError: the URDF is missing or broken, or its joints are not the arm's.
    """
    chain = _shipped_chain(arm.urdf, arm.tool_link)
    names = tuple(joint.name for joint in arm.joints)
    if chain.joint_names != names:
        raise KinematicsError(
            f"arm {arm.name} has the joints {', '.join(names)}, "
            f"but {arm.urdf} leads to {arm.tool_link} over {', '.join(chain.joint_names)}",
            "name the joints as the URDF does, in the order from the base to the tool",
        )
    return chain


@dataclass(frozen=True, eq=False)
class Chain:
    """A serial chain of n moving joints, ready to be evaluated.

    The transform of joint i and all fixed ones before it is ``constant[i] + f sine[i] + g cosine[i]``
    with f, g = sin q, cos q of a revolute joint (Rodrigues' formula) and q, 0 of a prismatic one, so
    that nothing is multiplied at run time that does not depend on q.

    Attributes:
        joint_names: names of the n joints from the root to the tool.
        constant, sine, cosine: (n, 4, 4).
        axes: (n, 3) joint axes in the frames that the transforms lead to.
        prismatic: (n,) whether a joint slides.
        tail: (4, 4) fixed transform from the last joint to the tool.
    """

    joint_names: tuple[str, ...]
    constant: Array
    sine: Array
    cosine: Array
    axes: Array
    prismatic: NDArray[np.bool_]
    tail: Array

    @classmethod
    def from_urdf(cls, path: Path, tool_link: str) -> Chain:
        """Return the chain from the root link of the URDF at ``path`` to ``tool_link``.

        Raises:
            KinematicsError: the file is missing or no URDF, or no chain of revolute, continuous,
                prismatic and fixed joints leads to the link.
        """
        try:
            root = ET.fromstring(path.read_bytes())  # noqa: S314 (our own shipped files)
        except OSError as error:
            raise KinematicsError(f"{path} cannot be read: {error.strerror}", "check the path") from error
        except ET.ParseError as error:
            raise KinematicsError(f"{path} is not XML: {error}", "correct the file") from error
        try:
            return cls._from_joints(_joints_to(root, tool_link))
        except (KeyError, ValueError, AttributeError) as error:
            raise KinematicsError(f"{path}, link {tool_link!r}: {error}", "correct the URDF") from error

    @classmethod
    def _from_joints(cls, joints: list[ET.Element]) -> Chain:
        names: list[str] = []
        parts: list[tuple[Array, Array, Array]] = []
        axes: list[Array] = []
        prismatic: list[bool] = []
        fixed = np.eye(4)
        for joint in joints:
            fixed = fixed @ _origin(joint)
            kind = joint.attrib["type"]
            if kind == "fixed":
                continue
            if kind not in ("revolute", "continuous", "prismatic"):
                raise ValueError(f"joint {joint.attrib['name']!r} is {kind}, which no chain can hold")
            axis = _unit_axis(joint)
            k0, k1, k2 = _prismatic_parts(axis) if kind == "prismatic" else _revolute_parts(axis)
            parts.append((fixed @ k0, fixed @ k1, fixed @ k2))
            names.append(joint.attrib["name"])
            axes.append(axis)
            prismatic.append(kind == "prismatic")
            fixed = np.eye(4)
        if not names:
            raise ValueError("no moving joint leads to it")
        constant, sine, cosine = (np.array(part) for part in zip(*parts, strict=True))
        return cls(tuple(names), constant, sine, cosine, np.array(axes), np.array(prismatic), tail=fixed)

    def forward(self, q: ArrayLike) -> Array:
        """Return the (4, 4) pose of the tool at joint positions ``q`` (n,)."""
        return square(self.linkage.at(_floats(q)).tool)

    def jacobian(self, q: ArrayLike) -> Array:
        """Return the (6, n) Jacobian of the tool at ``q`` (n,): linear, then angular, root frame."""
        return self.linkage.columns(self.linkage.at(_floats(q))).T

    def inverse(self, target: ArrayLike, seed: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> Array:
        """Return joint positions (n,) within the limits that put the tool at ``target``.

        The solution lies near ``seed`` where there is one to be found from there; otherwise the
        search starts again from other positions within the limits, always the same ones.

        Args:
            target: (4, 4) pose of the tool in the root frame.
            seed: (n,) where to start, such as the present position.
            lower: (n,) lower joint limits.
            upper: (n,) upper joint limits.

        Raises:
            KinematicsError: no solution within 0.1 mm and 0.1 deg was found; the message gives the
                residual of the best one.
        """
        best = best_reach(self.linkage, flat(target), _floats(seed), Limits.of(lower, upper))
        if not best.reached:
            raise KinematicsError(
                f"pose out of reach: the best solution is {1e3 * best.position_error_m:.1f} mm and "
                f"{np.rad2deg(best.rotation_error_rad):.1f} deg away",
                "choose a pose inside the arm's workspace and joint limits",
            )
        return best.q

    def inverse_nearest(
        self, target: ArrayLike, seed: ArrayLike, lower: ArrayLike, upper: ArrayLike
    ) -> Array:
        """Return joint positions (n,) within the limits that come as near to ``target`` as was found.

        Takes what :meth:`inverse` takes, never raises, and searches from ``seed`` alone, so that the
        answer moves with the target and never jumps to another posture. Where position and rotation
        cannot both be met, position comes first.
        """
        limits = Limits.of(lower, upper)
        start = self.linkage.at(limits.clip(_floats(seed)))
        return nearest_reach(self.linkage, flat(target), start, limits).q

    @cached_property
    def linkage(self) -> Linkage:
        """The same chain in plain floats, every joint's axis its own frame's z axis."""
        steps, turned = [], np.eye(4)
        still = np.where(self.prismatic[:, None, None], self.constant, self.constant + self.cosine)
        for fixed, axis in zip(still, self.axes, strict=True):
            back, turned = turned.T, np.eye(4)
            turned[:3, :3] = Rotation.align_vectors(axis, [0.0, 0.0, 1.0])[0].as_matrix()
            steps.append(back @ fixed @ turned)
        return Linkage(steps, self.prismatic.tolist(), turned.T @ self.tail)


def _floats(values: ArrayLike) -> list[float]:
    floats: list[float] = np.asarray(values, dtype=np.float64).tolist()
    return floats


@lru_cache(maxsize=32)
def _shipped_chain(urdf: str, tool_link: str) -> Chain:
    inside = PurePosixPath(urdf)
    if inside.is_absolute() or ".." in inside.parts:
        raise KinematicsError(f"the URDF {urdf!r} is not below urdf/", "name a file that ships in urdf/")
    return Chain.from_urdf(share_dir() / "urdf" / inside, tool_link)


def _joints_to(robot: ET.Element, tool_link: str) -> list[ET.Element]:
    """Return the joint elements from the root link to ``tool_link``."""
    above = {_child(joint, "child").attrib["link"]: joint for joint in robot.findall("joint")}
    if tool_link not in above:
        raise ValueError(f"no joint leads to it; links with a joint: {', '.join(above)}")
    path: list[ET.Element] = []
    link = tool_link
    while link in above:
        if len(path) > len(above):
            raise ValueError("the joints form a loop")
        path.append(above[link])
        link = _child(above[link], "parent").attrib["link"]
    return path[::-1]


def _child(element: ET.Element, tag: str) -> ET.Element:
    child = element.find(tag)
    if child is None:
        raise ValueError(f"<{element.tag} name={element.attrib.get('name')!r}> has no <{tag}>")
    return child


def _origin(joint: ET.Element) -> Array:
    origin = joint.find("origin")
    pose = np.eye(4)
    if origin is not None:
        pose[:3, :3] = Rotation.from_euler("xyz", _vector(origin, "rpy")).as_matrix()
        pose[:3, 3] = _vector(origin, "xyz")
    return pose


def _unit_axis(joint: ET.Element) -> Array:
    axis = joint.find("axis")
    vector = np.array([1.0, 0.0, 0.0]) if axis is None else _vector(axis, "xyz")
    if not np.linalg.norm(vector):
        raise ValueError(f"joint {joint.attrib['name']!r} has the axis 0 0 0")
    return vector / np.linalg.norm(vector)


def _vector(element: ET.Element, attribute: str) -> Array:
    vector = np.array([float(word) for word in element.attrib.get(attribute, "0 0 0").split()])
    if vector.shape != (3,) or not np.isfinite(vector).all():
        raise ValueError(f"<{element.tag} {attribute}={element.attrib[attribute]!r}> is not three numbers")
    return vector


def _revolute_parts(axis: Array) -> tuple[Array, Array, Array]:
    """Return K0, K1, K2 (4, 4) with rotation(axis, q) = K0 + sin q K1 + cos q K2 (Rodrigues)."""
    x, y, z = axis
    k0, k1, k2 = np.zeros((3, 4, 4))
    k0[:3, :3] = np.outer(axis, axis)
    k0[3, 3] = 1.0
    k1[:3, :3] = [[0, -z, y], [z, 0, -x], [-y, x, 0]]
    k2[:3, :3] = np.eye(3) - np.outer(axis, axis)
    return k0, k1, k2


def _prismatic_parts(axis: Array) -> tuple[Array, Array, Array]:
    """Return K0, K1, K2 (4, 4) with translation(q axis) = K0 + q K1 + 0 K2."""
    k1 = np.zeros((4, 4))
    k1[:3, 3] = axis
    return np.eye(4), k1, np.zeros((4, 4))
