"""What may differ from episode to episode beside the placement, each behind a switch of its own.

Every switch draws from a generator of its own, made from the episode's seed and the switch's fixed
number. So a seed always means the same, and turning one switch on or off changes no other draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from sim_training.assets import Asset, Colour, clutter
from sim_training.splits import Scenes
from simplevla.cli import require_choice
from simplevla.config import Config, build
from simplevla.embodiment import Embodiment
from simplevla.motion import FOLLOWING_DELAY_S
from simplevla.session_record import SessionRecord

Delay = Annotated[float, Meta(ge=0.0, le=1.0)]

PLACEMENT_KEY = 0
_KEYS = {"textures": 1, "lights": 2, "camera": 3, "table_height": 4, "clutter": 5, "physics": 6,
    "actuation": 7, "latency": 8,
}  # fmt: skip
_TEXTURE_PIXELS = 64


class Randomisation(Config):
    """Which properties of the scene are drawn anew for each episode.

    Attributes:
        textures: colours and patterns of the table and the wall.
        lights: colour of each light.
        camera: pose of each camera, by up to 1 cm and 1.5 deg an axis.
        table_height: the table, 0 to 3 cm lower (RoboTwin's range).
        clutter: up to six things that have no part in the task.
        physics: masses by 0.7 to 1.4 and friction coefficients by 0.7 to 1.3.
        actuation: setpoints reach the drives 0 to 60 ms late, whose stiffness is 0.8 to 1.2 of its own.
        latency: 40 to 160 ms pass between a look and the first action that answers it, in which the
            arms rest. The real stack measures 87 ms from the exposure to the bus.
        scenes: which of the task's scenes occur; ``seen`` leaves out what the splits hold out.
        setpoint_delay_s, look_delay_s: what a robot's calibration found, the least that there is of each;
            see :meth:`measured`.
    """

    textures: bool = False
    lights: bool = False
    camera: bool = False
    table_height: bool = False
    clutter: bool = False
    physics: bool = False
    actuation: bool = False
    latency: bool = False
    scenes: Scenes = Scenes.ALL
    setpoint_delay_s: Delay = 0.0
    look_delay_s: Delay = 0.0

    @classmethod
    def none(cls) -> Randomisation:
        """Return the plain scene."""
        return cls()

    @classmethod
    def all(cls) -> Randomisation:
        """Return everything switched on."""
        return cls.of(tuple(_KEYS))

    @classmethod
    def of(cls, names: Sequence[str], scenes: str = "all") -> Randomisation:
        """Return the switches in ``names`` on, the others off; ``all`` and ``none`` are names too.

        Raises:
            ConfigError: a name is unknown.
        """
        require_choice("scenes", scenes, [part.value for part in Scenes])
        for name in names:
            require_choice("randomisation", name, [*_KEYS, "all", "none"])
        on = _KEYS if "all" in names else [name for name in names if name != "none"]
        return build({"scenes": scenes, **dict.fromkeys(on, True)}, cls, source="randomisation")

    def measured(self, record: SessionRecord, embodiment: Embodiment) -> Randomisation:
        """Return the same for a simulator that is as late as ``record`` says the robot is.

        Pictures are as old as they are on the robot, and setpoints take effect as late as there beyond what
        simulated joints are late anyway.
        """
        return msgspec.structs.replace(
            self,
            setpoint_delay_s=max(0.0, record.command_delay_s(embodiment) - FOLLOWING_DELAY_S),
            look_delay_s=record.delivery_s(embodiment),
        )

    def names(self) -> list[str]:
        """Return the switches that are on."""
        return [name for name in _KEYS if getattr(self, name)]


@dataclass(frozen=True, eq=False)
class Surface:
    """Paint of a large surface: (H, W, 3) uint8 sRGB, or one plain colour."""

    colour: Colour
    texture: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class CameraShift:
    """By how much a camera is off its nominal pose: m, and rad about its own axes."""

    xyz_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rpy_rad: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Stray:
    """A thing that has no part in the task, and where it stands: (x, y) in m and yaw in rad."""

    asset: Asset
    xy_m: tuple[float, float]
    yaw_rad: float


@dataclass(frozen=True, eq=False)
class Variation:
    """What was drawn for one episode; the defaults are the plain scene.

    Attributes:
        light_colours: of the directional light and the two point lights, each relative to plain white.
        cameras: one shift a camera, in the embodiment's order.
        strays: candidates for clutter; those that stand in the task's way are left out.
        setpoint_delay_s: how long after it was set a drive target takes effect.
        drive_gain: factor on the stiffness of the joints' drives.
        think_s: how long the policy and the network take to answer a look.
    """

    table: Surface
    wall: Surface
    light_colours: tuple[Colour, Colour, Colour]
    cameras: tuple[CameraShift, ...]
    table_height_m: float
    strays: tuple[Stray, ...]
    mass_factor: float
    friction_factor: float
    setpoint_delay_s: float
    drive_gain: float
    think_s: float


def generator(seed: int, key: int) -> np.random.Generator:
    """Return the generator of one purpose in the episode ``seed``."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key,)))


def draw(randomisation: Randomisation, seed: int, *, cameras: int) -> Variation:
    """Return the variation of the episode ``seed``; what is switched off stays plain.

    Args:
        randomisation: the switches.
        seed: of the episode.
        cameras: how many cameras the embodiment has.
    """

    def rng(switch: str) -> np.random.Generator | None:
        return generator(seed, _KEYS[switch]) if getattr(randomisation, switch) else None

    white: Colour = (1.0, 1.0, 1.0)
    textures, lights, camera = rng("textures"), rng("lights"), rng("camera")
    height, physics, things = rng("table_height"), rng("physics"), rng("clutter")
    actuation, latency = rng("actuation"), rng("latency")
    return Variation(
        table=_surface(textures) if textures else Surface((0.80, 0.79, 0.77)),
        wall=_surface(textures) if textures else Surface((0.93, 0.90, 0.86)),
        light_colours=(
            (_colour(lights, 0.35, 1.35), _colour(lights, 0.35, 1.35), _colour(lights, 0.35, 1.35))
            if lights
            else (white, white, white)
        ),
        cameras=tuple(_camera_shift(camera) if camera else CameraShift() for _ in range(cameras)),
        table_height_m=float(height.uniform(-0.03, 0.0)) if height else 0.0,
        strays=_strays(things) if things else (),
        mass_factor=float(physics.uniform(0.7, 1.4)) if physics else 1.0,
        friction_factor=float(physics.uniform(0.7, 1.3)) if physics else 1.0,
        setpoint_delay_s=max(
            randomisation.setpoint_delay_s, float(actuation.uniform(0.0, 0.06)) if actuation else 0.0
        ),
        drive_gain=float(actuation.uniform(0.8, 1.2)) if actuation else 1.0,
        think_s=max(randomisation.look_delay_s, float(latency.uniform(0.04, 0.16)) if latency else 0.0),
    )


def _colour(rng: np.random.Generator, low: float, high: float) -> Colour:
    red, green, blue = rng.uniform(low, high, 3)
    return float(red), float(green), float(blue)


def _surface(rng: np.random.Generator) -> Surface:
    """Return two colours mixed by smooth noise, stripes or checks."""
    first, second = rng.uniform(0.15, 0.95, (2, 3))
    size = _TEXTURE_PIXELS
    y, x = np.mgrid[0:size, 0:size] / size
    kind = int(rng.integers(3))
    period, phase = int(rng.integers(2, 9)), rng.uniform(0, 1)
    if kind == 0:
        waves = [
            np.sin(2 * np.pi * (rng.integers(1, 7) * x + rng.integers(1, 7) * y + rng.uniform()))
            for _ in range(5)
        ]
        mix = 0.5 + 0.5 * np.mean(waves, axis=0) / 0.6
    elif kind == 1:
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * (period * x + phase))
    else:
        mix = ((np.floor(period * x) + np.floor(period * y)) % 2).astype(float)
    mix = np.clip(mix, 0, 1)[..., None]
    texture = np.round(255 * (mix * first + (1 - mix) * second)).astype(np.uint8)
    mean = texture.reshape(-1, 3).mean(axis=0) / 255
    return Surface((float(mean[0]), float(mean[1]), float(mean[2])), texture)


def _camera_shift(rng: np.random.Generator) -> CameraShift:
    x, y, z = rng.uniform(-0.01, 0.01, 3)
    roll, pitch, yaw = rng.uniform(-1, 1, 3) * np.deg2rad(1.5)
    return CameraShift((float(x), float(y), float(z)), (float(roll), float(pitch), float(yaw)))


def _strays(rng: np.random.Generator) -> tuple[Stray, ...]:
    kinds = clutter()
    return tuple(
        Stray(
            kinds[int(rng.integers(len(kinds)))],
            (float(rng.uniform(-0.54, 0.54)), float(rng.uniform(-0.30, 0.30))),
            float(rng.uniform(-np.pi, np.pi)),
        )
        for _ in range(int(rng.integers(4, 13)))
    )
