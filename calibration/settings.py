"""What calibration uses and demands: ``config/calibration.yaml``, typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from calibration.board import Board
from simplevla.config import Config, load_yaml
from simplevla.embodiment import Embodiment, Pose
from simplevla.errors import ConfigError
from simplevla.files import share_dir
from simplevla.session_record import Check

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1, le=200)]


class LatencyMotion(Config):
    """How an arm swings to show its delays: one joint, sinusoidally about where it is.

    Attributes:
        amplitude_rad, period_s, cycles: of the swing; it swells and fades within the first and the
            last cycle.
    """

    joint: str
    amplitude_rad: Annotated[float, Meta(gt=0, le=0.5)]
    period_s: Annotated[float, Meta(ge=0.5, le=10)]
    cycles: Annotated[int, Meta(ge=3, le=30)]


class Settings(Config):
    """See ``config/calibration.yaml``.

    Attributes:
        board: the board that the arms hold.
        mount: about where its top left corner is in the tool frame.
        on_table: about where it lies for the scene's step, in the world.
        latency: how an arm swings to show its delays.
        limits: {check: {figure: largest value}}.
        board_thickness_m: how far above the table its face is when it lies there.
        stream_scale: size of the pictures as a multiple of what the policy sees.
        stream_rate_hz: how many of them a second.
        poses, check_poses: that an arm shows the board in, for a calibration and for a quick check.
        pictures: that are averaged at each pose.
        settle_s: stillness before the first of them.
        speed: of the limits, between poses.
        clearance_m: that planned poses keep free over the limiter's own margins.
        seed: of the planned poses.
    """

    board: Board
    mount: Pose
    on_table: Pose
    latency: LatencyMotion
    limits: dict[str, dict[str, float]]
    board_thickness_m: Annotated[float, Meta(ge=0, le=0.05)] = 0.0
    stream_scale: Annotated[int, Meta(ge=1, le=4)] = 2
    stream_rate_hz: Positive = 6.0
    poses: Count = 14
    check_poses: Count = 8
    pictures: Count = 2
    settle_s: Annotated[float, Meta(ge=0, le=10)] = 0.4
    speed: Annotated[float, Meta(gt=0, le=1)] = 0.5
    clearance_m: Annotated[float, Meta(ge=0, le=0.2)] = 0.03
    seed: Annotated[int, Meta(ge=0)] = 0

    def judge(self, check: str, figures: dict[str, float]) -> Check:
        """Return the check ``check`` of ``figures``: passed if there are limits and none is exceeded.

        A check is named by its kind and what it was made of, such as ``hand_eye head right``.

        Raises:
            ConfigError: the settings have no limits for it.
        """
        kind = check.partition(" ")[0]
        limits = self.limits.get(kind)
        if limits is None:
            raise ConfigError(f"limits.{kind} is missing", "add it, as config/calibration.yaml has it")
        used = {name: limit for name, limit in limits.items() if name in figures}
        # `not <=` so that a figure that is no number fails.
        failed = [name for name, limit in used.items() if not figures[name] <= limit]
        return Check(name=check, passed=bool(used) and not failed, figures=figures, limits=used)

    def streamed(self, embodiment: Embodiment) -> Embodiment:
        """Return ``embodiment`` with its cameras as calibration streams them."""
        k = self.stream_scale
        cameras = tuple(
            msgspec.structs.replace(
                camera,
                width=k * camera.width,
                height=k * camera.height,
                fx=k * camera.fx,
                fy=k * camera.fy,
                cx=k * camera.cx,
                cy=k * camera.cy,
                rate_hz=self.stream_rate_hz,
            )
            for camera in embodiment.cameras
        )
        return msgspec.structs.replace(embodiment, cameras=cameras)


def load_settings(path: Path | None = None) -> Settings:
    """Return the settings in ``path``, or those that ship.

    Raises:
        ConfigError: the file is missing or breaks the schema.
    """
    return load_yaml(path or share_dir() / "config/calibration.yaml", Settings)
