"""What the twin's metal is really like, as nobody knows it of real metal: for testing calibration and more.

A camera that stands elsewhere, joints whose zero is off and that follow more slowly, cables and clocks
that are late, noise, and a board that hangs in a gripper or lies on the table. All of it lies behind the
drivers, which see a robot that is not quite what its embodiment says.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from simplevla.config import Config
from simplevla.embodiment import Embodiment, Pose
from simplevla.errors import ConfigError

TABLE = "table"
EMPTY_TABLE = "empty_table"  # the scene in which nothing stands and nothing is to be done

Delay = Annotated[float, Meta(ge=0.0, le=1.0)]
Offset = Annotated[float, Meta(ge=-1.0, le=1.0)]
SixJoints = tuple[float, float, float, float, float, float]
Noise = Annotated[float, Meta(ge=0.0, le=0.1)]
Frequency = Annotated[float, Meta(ge=1.0, le=500.0)]
Damping = Annotated[float, Meta(ge=0.05, le=10.0)]
Side = Annotated[float, Meta(gt=0.0, le=2.0)]


class Plate(Config):
    """A flat picture in the scene, such as a printed calibration board. It collides with nothing.

    Attributes:
        picture: an image file.
        size_m: width and height of the whole picture.
        holder: the arm whose tool holds it, or ``table``.
        pose: of its top left corner in the tool's frame, or in the world: x right, y down, z into
            the paper.
    """

    picture: str
    size_m: tuple[Side, Side]
    holder: str
    pose: Pose


class JointResponse(Config):
    """How an arm's joints follow their set points: x'' = f^2 (set - x) - 2 d f x'.

    Attributes:
        frequencies_rad_s: f of each joint.
        dampings: d of each joint; 1 is critical.
    """

    frequencies_rad_s: tuple[Frequency, Frequency, Frequency, Frequency, Frequency, Frequency]
    dampings: tuple[Damping, Damping, Damping, Damping, Damping, Damping]


class Metal(Config):
    """How the metal differs from the embodiment; what is left out is as the embodiment says.

    Attributes:
        camera_in_world: {camera: pose of its optical frame in the world}.
        joint_zeros_rad: {arm: what each joint reports where it truly is at zero}.
        command_delays_s: {arm: how long a frame takes to reach it}.
        feedback_delays_s: {arm: how long a frame takes from it}.
        jitters_s: {arm: each frame takes up to this much longer, at random}.
        noises_rad: {arm: standard deviation of what it reports of its joints}.
        responses: {arm: how its joints follow their set points}; ``simplevla twin fit`` finds them.
        stamp_offsets_s: {camera: how much later than its exposure a picture is stamped}.
        deliveries_s: {camera: how long a picture takes at least from its exposure to the host}.
        plate: what is shown to the cameras.
    """

    camera_in_world: dict[str, Pose] = msgspec.field(default_factory=dict)
    joint_zeros_rad: dict[str, SixJoints] = msgspec.field(default_factory=dict)
    command_delays_s: dict[str, Delay] = msgspec.field(default_factory=dict)
    feedback_delays_s: dict[str, Delay] = msgspec.field(default_factory=dict)
    jitters_s: dict[str, Delay] = msgspec.field(default_factory=dict)
    noises_rad: dict[str, Noise] = msgspec.field(default_factory=dict)
    responses: dict[str, JointResponse] = msgspec.field(default_factory=dict)
    stamp_offsets_s: dict[str, Offset] = msgspec.field(default_factory=dict)
    deliveries_s: dict[str, Delay] = msgspec.field(default_factory=dict)
    plate: Plate | None = None

    def check(self, embodiment: Embodiment) -> None:
        """Check that every camera and every arm that is named exists.

        Raises:
            ConfigError: one does not.
        """
        arms = {arm.name for arm in embodiment.arms}
        cameras = {camera.name for camera in embodiment.cameras}
        for known, named in (
            (arms, self.joint_zeros_rad),
            (arms, self.command_delays_s),
            (arms, self.feedback_delays_s),
            (arms, self.jitters_s),
            (arms, self.noises_rad),
            (arms, self.responses),
            (cameras, self.camera_in_world),
            (cameras, self.stamp_offsets_s),
            (cameras, self.deliveries_s),
            (arms | {TABLE}, {self.plate.holder: 0} if self.plate else {}),
        ):
            for name in named:
                if name not in known:
                    raise ConfigError(
                        f"unknown part {name!r}", f"choose one of: {', '.join(sorted(known))}"
                    )

    def zeros(self, arm: str) -> NDArray[np.float64]:
        """Return (7,) what is added to the true positions of an arm in what it reports; rad and m."""
        return np.array([*self.joint_zeros_rad.get(arm, (0.0,) * 6), 0.0])

    def altered(self, changes: Metal) -> Metal:
        """Return this with what ``changes`` names; parts that it leaves out stay."""
        merged = {}
        for name, value in msgspec.structs.asdict(self).items():
            new = getattr(changes, name)
            merged[name] = {**value, **new} if isinstance(value, dict) else new or value
        return msgspec.structs.replace(self, **merged)
