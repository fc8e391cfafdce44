"""The robot a policy is for: arms with limits, grippers, cameras, rates. No serial numbers here.

The vector of a robot's state or of one action is, arm by arm, the arm's joints (rad) and then its
gripper's total opening (m): 14 values for two Pipers, 7 for one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from simplevla.config import Config, load_yaml
from simplevla.errors import EmbodimentError
from simplevla.files import share_dir

Positive = Annotated[float, Meta(gt=0)]
Vec3 = tuple[float, float, float]


class Pose(Config):
    """A rigid transform: position in m, and roll, pitch, yaw in rad (fixed axes, as in URDF)."""

    xyz_m: Vec3
    rpy_rad: Vec3 = (0.0, 0.0, 0.0)


class Joint(Config):
    """One revolute joint and its limits."""

    name: str
    lower_rad: float
    upper_rad: float
    max_velocity_rad_s: Positive
    max_acceleration_rad_s2: Positive


class Gripper(Config):
    """A parallel gripper, described by its total opening between the fingers."""

    stroke_m: Positive
    max_velocity_m_s: Positive
    max_acceleration_m_s2: Positive


class Arm(Config):
    """One arm, its base in the world frame, and where it rests between trials.

    Attributes:
        urdf: file below ``urdf/``; its link names are the frames.
        tool_link: URDF link whose frame end-effector poses and deltas refer to (the grasp point;
            x is the approach direction, y the direction in which the fingers close).
        home_rad: joint positions between trials, rad.
        home_gripper_m: gripper opening between trials, m.
    """

    name: str
    urdf: str
    base: Pose
    tool_link: str
    joints: Annotated[tuple[Joint, ...], Meta(min_length=1)]
    gripper: Gripper
    home_rad: tuple[float, ...]
    home_gripper_m: float


class Camera(Config):
    """A colour camera: pinhole intrinsics in pixels, and where it nominally stands in the world.

    Attributes:
        frame: tf frame of the optical centre (x right, y down, z forward; REP-103).
        position_m, look_at_m: nominal pose in the world frame; image "up" is towards world +z,
        roll_rad: unless it is turned by this about the direction of view, clockwise as it looks.
    """

    name: str
    width: Annotated[int, Meta(ge=16, le=4096)]
    height: Annotated[int, Meta(ge=16, le=4096)]
    rate_hz: Positive
    fx: Positive
    fy: Positive
    cx: Positive
    cy: Positive
    frame: str
    position_m: Vec3
    look_at_m: Vec3
    roll_rad: float = 0.0

    def pose_in_world(self) -> NDArray[np.float64]:
        """Return the (4, 4) nominal pose of the optical frame (x right, y down, z ahead), m."""
        position = np.asarray(self.position_m, dtype=np.float64)
        ahead = np.asarray(self.look_at_m, dtype=np.float64) - position
        ahead /= np.linalg.norm(ahead)
        level = _level(ahead)
        below = np.cross(ahead, level)
        sine, cosine = np.sin(self.roll_rad), np.cos(self.roll_rad)
        matrix = np.eye(4)
        matrix[:3, 0] = cosine * level + sine * below
        matrix[:3, 1] = cosine * below - sine * level
        matrix[:3, 2] = ahead
        matrix[:3, 3] = position
        return matrix

    def at(self, pose: NDArray[np.float64]) -> Camera:
        """Return this camera with its optical frame at ``pose`` (4, 4) in the world, m."""
        ahead, position = pose[:3, 2], pose[:3, 3]
        level = _level(ahead)
        roll = np.arctan2(pose[:3, 0] @ np.cross(ahead, level), pose[:3, 0] @ level)
        return msgspec.structs.replace(
            self,
            position_m=tuple(position.tolist()),
            look_at_m=tuple((position + ahead).tolist()),
            roll_rad=float(roll),
        )


class Embodiment(Config):
    """Everything about the robot that a policy, a server and a bridge must agree on."""

    name: str
    description: str
    arms: Annotated[tuple[Arm, ...], Meta(min_length=1)]
    cameras: Annotated[tuple[Camera, ...], Meta(min_length=1)]
    control_rate_hz: Positive

    def __post_init__(self) -> None:
        for arm in self.arms:
            if len(arm.home_rad) != len(arm.joints):
                raise ValueError(
                    f"arm {arm.name}: home_rad has {len(arm.home_rad)} values for {len(arm.joints)} joints"
                )
            for joint, home in zip(arm.joints, arm.home_rad, strict=True):
                if not joint.lower_rad <= home <= joint.upper_rad:
                    raise ValueError(
                        f"arm {arm.name}: home of {joint.name} is {home}, outside "
                        f"[{joint.lower_rad}, {joint.upper_rad}] rad"
                    )
            if not 0 <= arm.home_gripper_m <= arm.gripper.stroke_m:
                raise ValueError(f"arm {arm.name}: home_gripper_m is outside [0, stroke_m]")
        for kind, names in (
            ("arm", [arm.name for arm in self.arms]),
            ("camera", [camera.name for camera in self.cameras]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"two {kind}s have the same name: {', '.join(names)}")

    @property
    def dimension(self) -> int:
        """Length D of a state or an action vector."""
        return sum(len(arm.joints) + 1 for arm in self.arms)

    def slices(self) -> list[tuple[Arm, slice]]:
        """Return each arm with the slice of a (D,) vector that holds its joints and its gripper."""
        out, start = [], 0
        for arm in self.arms:
            out.append((arm, slice(start, start + len(arm.joints) + 1)))
            start += len(arm.joints) + 1
        return out

    def names(self) -> list[str]:
        """Return the D names in order: ``left_joint1`` ... ``left_gripper``, ``right_joint1`` ..."""
        return [
            f"{arm.name}_{name}"
            for arm in self.arms
            for name in [*(joint.name for joint in arm.joints), "gripper"]
        ]

    def home(self) -> NDArray[np.float64]:
        """Return the (D,) rest position; rad and m."""
        return np.array([v for arm in self.arms for v in [*arm.home_rad, arm.home_gripper_m]])

    def position_limits(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (D,) lower and (D,) upper position limits; rad and m."""
        lower = [v for a in self.arms for v in [*(j.lower_rad for j in a.joints), 0.0]]
        upper = [v for a in self.arms for v in [*(j.upper_rad for j in a.joints), a.gripper.stroke_m]]
        return np.array(lower), np.array(upper)

    def velocity_limits(self) -> NDArray[np.float64]:
        """Return (D,) velocity limits; rad/s and m/s."""
        return np.array(
            [
                v
                for a in self.arms
                for v in [*(j.max_velocity_rad_s for j in a.joints), a.gripper.max_velocity_m_s]
            ]
        )

    def acceleration_limits(self) -> NDArray[np.float64]:
        """Return (D,) acceleration limits; rad/s2 and m/s2."""
        return np.array(
            [
                v
                for a in self.arms
                for v in [*(j.max_acceleration_rad_s2 for j in a.joints), a.gripper.max_acceleration_m_s2]
            ]
        )

    def camera(self, name: str) -> Camera:
        """Return the camera called ``name``.

        Raises:
            EmbodimentError: there is none.
        """
        for camera in self.cameras:
            if camera.name == name:
                return camera
        known = ", ".join(c.name for c in self.cameras)
        raise EmbodimentError(f"{self.name} has no camera {name!r}", f"its cameras are: {known}")


def _level(ahead: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the (3,) horizontal unit vector to the right of one who looks ``ahead`` (3,)."""
    right = np.array([ahead[1], -ahead[0], 0.0])
    length = float(np.hypot(*right[:2]))
    return right / length if length > 1e-9 else np.array([1.0, 0.0, 0.0])


def load_embodiment(name: str) -> Embodiment:
    """Return the embodiment in ``config/embodiment/<name>.yaml``, or in a file if ``name`` ends in .yaml.

    Raises:
        EmbodimentError: no such embodiment ships.
        ConfigError: the file breaks the schema.
    """
    if name.endswith(".yaml"):
        return load_yaml(Path(name), Embodiment)
    folder = share_dir() / "config/embodiment"
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in known:
        raise EmbodimentError(f"unknown embodiment {name!r}", f"choose one of: {', '.join(known)}")
    return load_yaml(folder / f"{name}.yaml", Embodiment)


def require_same(have: Embodiment, want: Embodiment, *, have_is: str, want_is: str) -> None:
    """Check that two parts speak of one robot: same arms, joints, limits and camera streams.

    Nominal poses and free text may differ (calibration moves them), what fills a vector or an
    image may not.

    Raises:
        EmbodimentError: they differ; the message names the first difference.
    """
    for label, pick in (
        ("state names", lambda e: e.names()),
        ("position limits", lambda e: [x.tolist() for x in e.position_limits()]),
        ("tool links", lambda e: [(a.urdf, a.tool_link) for a in e.arms]),
        ("cameras", lambda e: [(c.name, c.width, c.height) for c in e.cameras]),
    ):
        if pick(have) != pick(want):
            raise EmbodimentError(
                f"wrong embodiment: {have_is} is {have.name!r} and {want_is} is {want.name!r}; "
                f"{label} differ: {pick(have)} against {pick(want)}",
                f"use the embodiment {want.name!r} on both sides, or another bundle",
            )
