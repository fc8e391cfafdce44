"""Pictures of a task's things and arms in random places: where things are, seen from the camera.

An image encoder learns from them before any demonstration. They show no actions: things stand, lie in
the air and are held by chance alone, so that nothing is said about what to do. Half of the scenes are
drawn at the camera's own size and resampled as a policy does, half directly at the network's size as
rollouts do, so that an encoder treats both alike.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from scipy.spatial.transform import Rotation
from torch import Tensor

from sim_training.randomisation import Randomisation, generator
from sim_training.seeds import FIRST_EVALUATION_SEED
from sim_training.tasks import load_task
from sim_training.workers import map_seeds
from sim_training.world import World
from simplevla.config import Config
from simplevla.embodiment import Arm, Camera, Embodiment
from simplevla.errors import ConfigError
from simplevla.files import write_atomic
from simplevla.kinematics.chain import arm_chain
from simplevla.policy.config import NetworkConfig
from simplevla.policy.resample import Resample

Array = NDArray[np.float64]

_KEY = 300
_STAYED, _JITTER_M = 0.6, 0.03  # a thing near the place where its episode began, or on the way to another
_LIFTED, _LIFT_M, _TILT_RAD = 0.3, 0.09, 0.12
_APART_M = 0.01
_AT_HOME, _AT_THING, _BESIDE_M = 0.35, 0.35, 0.04
_OWN_SIDE_M = 0.3
_REACH_M = ((-0.15, 0.15), (0.15, 0.50), (0.0, 0.25))  # of a tool, from its arm's base, z from the table
_TURN_RAD = 0.08
_TRIES = 20


class PictureSettings(Config, frozen=True, kw_only=True):
    """How many pictures to draw: ``poses`` of each of ``scenes`` scenes, seeds from ``first_seed`` on."""

    scenes: Annotated[int, Meta(ge=2)] = 500
    poses: Annotated[int, Meta(ge=1)] = 16
    first_seed: Annotated[int, Meta(ge=0, lt=FIRST_EVALUATION_SEED)] = 5000
    workers: Annotated[int, Meta(ge=1)] = 1


@dataclass(frozen=True)
class Pictures:
    """N pictures and where the task's things were.

    Attributes:
        images: (N, n_cameras, 3, h, w) uint8 at the network's size.
        objects: (N, objects, 3) float32 foot of each thing in the order of the task; world frame, m.
        episodes: (N,) int64 which scene each is of.
    """

    images: Tensor
    objects: Tensor
    episodes: NDArray[np.int64]

    def __len__(self) -> int:
        """Return N."""
        return len(self.images)


def draw_pictures(
    settings: PictureSettings,
    task: str,
    embodiment: Embodiment,
    cameras: tuple[str, ...],
    network: NetworkConfig,
    randomisation: Randomisation | None = None,
) -> Pictures:
    """Return pictures for the network; the same settings give the same pictures.

    Raises:
        ConfigError: the seeds reach into those for evaluation.
    """
    last = settings.first_seed + settings.scenes
    if last > FIRST_EVALUATION_SEED:
        raise ConfigError(
            f"the scenes {settings.first_seed} to {last - 1} reach into those for evaluation",
            f"draw fewer, or begin earlier: seeds below {FIRST_EVALUATION_SEED} are for training",
        )
    seen = tuple(embodiment.camera(name) for name in cameras)
    watched = msgspec.structs.replace(embodiment, cameras=seen)
    job = _Job(task, watched, network, randomisation or Randomisation.none(), settings.poses)
    images, objects = zip(*map_seeds(job, range(settings.first_seed, last), settings.workers), strict=True)
    return Pictures(
        torch.from_numpy(np.concatenate(images)),
        torch.from_numpy(np.concatenate(objects)),
        np.repeat(np.arange(settings.scenes), settings.poses),
    )


def save_pictures(pictures: Pictures, path: Path) -> None:
    """Write pictures to one file, whole or not at all."""
    tensors = {
        "images": pictures.images.contiguous(),
        "objects": pictures.objects.contiguous(),
        "episodes": torch.from_numpy(pictures.episodes),
    }
    write_atomic(path, save(tensors))


def load_pictures(path: Path) -> Pictures:
    """Return the pictures at ``path``.

    Raises:
        ConfigError: it cannot be read or holds no pictures.
    """
    try:
        tensors = load_file(path)
        return Pictures(tensors["images"], tensors["objects"], tensors["episodes"].numpy())
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(f"{path} holds no pictures: {error}", "remove it to draw them again") from error


def small_camera(camera: Camera, network: NetworkConfig) -> Camera:
    """Return the camera that sees at the network's size what the network keeps of ``camera``'s picture."""
    sizes = network.sizes
    side = float(np.sqrt(sizes.crop_area))
    x, y = sizes.image_width / (side * camera.width), sizes.image_height / (side * camera.height)
    return msgspec.structs.replace(
        camera,
        width=sizes.image_width,
        height=sizes.image_height,
        fx=camera.fx * x,
        fy=camera.fy * y,
        cx=(camera.cx - camera.width * (1 - side) / 2) * x,
        cy=(camera.cy - camera.height * (1 - side) / 2) * y,
    )


def with_small_cameras(embodiment: Embodiment, network: NetworkConfig) -> Embodiment:
    """Return ``embodiment`` with every camera as :func:`small_camera` makes it."""
    return msgspec.structs.replace(
        embodiment, cameras=tuple(small_camera(camera, network) for camera in embodiment.cameras)
    )


@dataclass(frozen=True, eq=False)
class _Job:
    """What a process needs to know to draw scenes."""

    task: str
    embodiment: Embodiment
    network: NetworkConfig
    randomisation: Randomisation
    poses: int

    def __call__(
        self,
    ) -> AbstractContextManager[Callable[[int], tuple[NDArray[np.uint8], NDArray[np.float32]]]]:
        return _Photographer(self)


class _Photographer:
    """Two worlds in one process: one seen at full size, one at the network's."""

    def __init__(self, job: _Job) -> None:
        torch.set_num_threads(1)
        task = load_task(job.task)
        small = with_small_cameras(job.embodiment, job.network)
        self._poses = job.poses
        self._worlds = [World(e, task, randomisation=job.randomisation) for e in (small, job.embodiment)]
        sizes = job.network.sizes
        self._resample = Resample(
            (job.network.frame_height, job.network.frame_width),
            (sizes.image_height, sizes.image_width),
            sizes.crop_area,
        )

    def __enter__(self) -> _Photographer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for world in self._worlds:
            world.close()

    def __call__(self, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return (poses, cameras, 3, h, w) pictures of the scene ``seed`` and their places."""
        world = self._worlds[seed % 2]
        world.reset(seed)
        rng = generator(seed, _KEY)
        images, objects = [], []
        for _ in range(self._poses):
            _scatter(world, rng)
            images.append(np.stack([world.render(camera.name) for camera in world.embodiment.cameras]))
            objects.append([world.object_position(p.name) for p in world.placements])
        return self._at_network_size(np.stack(images), small=seed % 2 == 0), np.array(objects, np.float32)

    def _at_network_size(self, frames: NDArray[np.uint8], *, small: bool) -> NDArray[np.uint8]:
        if small:
            return np.ascontiguousarray(frames.transpose(0, 1, 4, 2, 3))
        resampled: Tensor = self._resample(torch.from_numpy(frames))
        return (resampled * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _scatter(world: World, rng: np.random.Generator) -> None:
    """Put things and arms anywhere."""
    places: list[Array] = []
    starts = [np.array(placement.xy_m) for placement in world.placements]
    for placement, start in zip(world.placements, starts, strict=True):
        radii = [placement.asset.radius_m + p.asset.radius_m for p in world.placements]
        for _ in range(_TRIES):
            towards = starts[int(rng.integers(len(starts)))]
            way = 0.0 if rng.random() < _STAYED else rng.uniform()
            xy = start + way * (towards - start) + rng.normal(0, _JITTER_M, 2)
            if all(
                np.linalg.norm(xy - place[:2]) > radius + _APART_M
                for place, radius in zip(places, radii, strict=False)
            ):
                break
        pose = np.eye(4)
        pose[:3, 3] = [*xy, world.table_top_m]
        turn = Rotation.from_euler("z", rng.uniform(-np.pi, np.pi))
        if not placement.fixed and rng.random() < _LIFTED:
            pose[2, 3] += rng.uniform(0, _LIFT_M)
            turn = Rotation.from_rotvec(rng.normal(0, _TILT_RAD, 3)) * turn
        pose[:3, :3] = turn.as_matrix()
        world.set_object_pose(placement.name, pose)
        places.append(pose[:3, 3])
    joints = [_arm_somewhere(arm, places, world, rng) for arm in world.embodiment.arms]
    world.place_arms(np.concatenate(joints))


def _arm_somewhere(arm: Arm, places: list[Array], world: World, rng: np.random.Generator) -> Array:
    """Return an arm at home, at one of ``places`` on its side, or anywhere in reach: joints and opening."""
    opening = rng.uniform(0.25, 1.0) * arm.gripper.stroke_m
    kind = rng.random()
    if kind < _AT_HOME:
        return np.append(np.array(arm.home_rad), opening)
    base = np.array(arm.base.xyz_m)
    near = [place for place in places if abs(place[0] - base[0]) < _OWN_SIDE_M]
    if near and kind < _AT_HOME + _AT_THING:
        wanted = near[int(rng.integers(len(near)))] + rng.normal(0, _BESIDE_M, 3)
        wanted[2] += rng.uniform(0, 0.1)
    else:
        low, high = np.array(_REACH_M).T
        wanted = np.array([base[0], base[1], world.table_top_m]) + rng.uniform(low, high)
    wanted[2] = max(wanted[2], world.table_top_m + 0.01)
    chain = arm_chain(arm)
    pose = chain.forward(arm.home_rad)
    to_base = Rotation.from_euler("xyz", arm.base.rpy_rad).inv()
    pose[:3, 3] = to_base.apply(wanted - base)
    pose[:3, :3] = Rotation.from_rotvec(rng.normal(0, _TURN_RAD, 3)).as_matrix() @ pose[:3, :3]
    limits = np.array([[joint.lower_rad, joint.upper_rad] for joint in arm.joints]).T
    reached = chain.inverse_nearest(pose, arm.home_rad, *limits)
    return np.append(reached, opening)
