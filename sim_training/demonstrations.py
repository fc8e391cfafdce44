"""Demonstrations: the scripted expert's episodes, as files that training reads.

A set is a folder with ``demonstrations.json`` and one ``.npz`` an episode. Only successful episodes
are kept; the manifest says how many were tried. With a perturbation, what is executed strays from
the expert's plan by seeded noise while the labels stay the plan (DART, Laskey et al. 2017), so that
the set also shows how to come back.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from sim_training.randomisation import Randomisation, generator
from sim_training.seeds import FIRST_EVALUATION_SEED
from sim_training.tasks import load_task
from sim_training.workers import map_seeds
from simplevla.embodiment import Embodiment
from simplevla.errors import ConfigError, RecordError
from simplevla.files import sha256_file, write_atomic
from simplevla.trial import FailureCode, Strategy

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

SCHEMA = 1
MANIFEST = "demonstrations.json"
DT_S = 0.1

_LOST = (FailureCode.DROPPED, FailureCode.NOT_UPRIGHT)
_NOISE_KEY = 100
_ROTATION_RAD_PER_M = 4.0
_GRIPPER_PER_M = 0.4


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a set is collected.

    Attributes:
        task: name of the task.
        cameras: cameras whose pictures are kept, in this order.
        chunk_length: K, how many targets a label has and after how many the expert looks again.
        observe_every: after how many actions a sample is taken; a divisor of ``chunk_length``.
        perturbation_m: standard deviation that a tool strays by during a chunk, at most; each
            episode draws its own between 0 and this.
        randomisation: what differs between scenes.
    """

    task: str
    embodiment: Embodiment
    cameras: tuple[str, ...]
    chunk_length: Annotated[int, Meta(ge=1, le=100)] = 5
    observe_every: Annotated[int, Meta(ge=1, le=100)] = 5
    perturbation_m: Annotated[float, Meta(ge=0, le=0.05)] = 0.0
    randomisation: Randomisation = Randomisation()


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kept episode."""

    file: Annotated[str, Meta(pattern=r"^episode_\d+\.npz$")]
    sha256: str
    seed: int
    samples: int
    actions: int
    strategy: Strategy


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a set holds.

    Attributes:
        instruction: the task's canonical instruction.
        tried: episodes that were tried, of which ``episodes`` succeeded.
    """

    settings: Settings
    instruction: str
    dt_s: float
    tried: int
    episodes: tuple[Entry, ...]
    schema: int = SCHEMA


@dataclass(frozen=True, eq=False)
class Demonstration:
    """One episode of T samples.

    Attributes:
        images: (T, cameras, H, W, 3) uint8 RGB.
        states: (T, D) float32 measured positions; rad and m.
        targets: (T, K, D) float32 the expert's next absolute targets from each sample on.
        objects: (T, objects, 3) float32 where the task's things stand, in the order in which the task
            places them; world frame, m. Training an encoder may use it, a policy never sees it.
    """

    images: NDArray[np.uint8]
    states: NDArray[np.float32]
    targets: NDArray[np.float32]
    objects: NDArray[np.float32]
    instruction: str
    seed: int
    strategy: Strategy


def collect(
    out: Path,
    settings: Settings,
    seeds: Sequence[int],
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Let the expert try the episodes ``seeds`` and write those it masters to the folder ``out``.

    Args:
        out: folder; made if it is not there.
        settings: what to collect.
        seeds: episodes to try, all below ``FIRST_EVALUATION_SEED``.
        workers: processes; with 1 everything happens in this one.
        progress: called with (episodes tried, episodes kept) after each episode.

    Raises:
        ConfigError: the settings contradict themselves, a seed belongs to evaluation, or ``out``
            holds a set already.
    """
    _check(settings, seeds)
    if (out / MANIFEST).exists():
        raise ConfigError(f"{out} holds demonstrations already", "choose another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    job = _Job(out, settings)
    for tried, entry in enumerate(map_seeds(job, seeds, workers), start=1):
        if entry is not None:
            entries.append(entry)
        if progress is not None:
            progress(tried, len(entries))
    manifest = Manifest(
        settings=settings,
        instruction=load_task(settings.task).instruction,
        dt_s=DT_S,
        tried=len(seeds),
        episodes=tuple(sorted(entries, key=lambda entry: entry.seed)),
    )
    write_atomic(out / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    logger.info("kept %d of %d episodes in %s", len(entries), len(seeds), out)
    return manifest


class DemonstrationSet:
    """A set on disk, checked as it is read.

    Raises:
        RecordError: the folder holds no set, or one of another schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            raw = (path / MANIFEST).read_bytes()
            self.manifest = msgspec.json.decode(raw, type=Manifest)
        except OSError as error:
            raise RecordError(
                f"{path} holds no demonstrations: {error.strerror}", "collect them first"
            ) from error
        except msgspec.DecodeError as error:
            raise RecordError(f"{path / MANIFEST}: {error}", "collect the demonstrations again") from error
        if self.manifest.schema != SCHEMA:
            raise RecordError(
                f"{path} has schema {self.manifest.schema}, not {SCHEMA}",
                "collect the demonstrations again",
            )

    def __len__(self) -> int:
        return len(self.manifest.episodes)

    def __iter__(self) -> Iterator[Demonstration]:
        return (self.load(i) for i in range(len(self)))

    def load(self, index: int) -> Demonstration:
        """Return the episode at ``index``.

        Raises:
            RecordError: its file is missing, altered or not what the manifest says.
        """
        entry, settings = self.manifest.episodes[index], self.manifest.settings
        path, remedy = self.path / entry.file, "collect the demonstrations again"
        try:
            if sha256_file(path) != entry.sha256:
                raise RecordError(f"{path} was altered", remedy)
            with np.load(path, allow_pickle=False) as data:
                images, states, targets = data["images"], data["states"], data["targets"]
                objects = data["objects"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise RecordError(f"{path} cannot be read: {error}", remedy) from error
        camera = settings.embodiment.camera(settings.cameras[0])
        n, d = entry.samples, settings.embodiment.dimension
        want = (
            ((n, len(settings.cameras), camera.height, camera.width, 3), np.uint8),
            ((n, d), np.float32),
            ((n, settings.chunk_length, d), np.float32),
            ((n, *objects.shape[1:2], 3), np.float32),
        )
        for array, (shape, kind) in zip((images, states, targets, objects), want, strict=True):
            if array.shape != shape or array.dtype != kind:
                raise RecordError(
                    f"{path}: {array.dtype} {array.shape} instead of {np.dtype(kind)} {shape}", remedy
                )
        return Demonstration(
            images, states, targets, objects, self.manifest.instruction, entry.seed, entry.strategy
        )


def _check(settings: Settings, seeds: Sequence[int]) -> None:
    load_task(settings.task)
    sizes = {(c.height, c.width) for c in map(settings.embodiment.camera, settings.cameras)}
    if len(sizes) != 1:
        raise ConfigError("the cameras of one set must have one picture size", "choose other cameras")
    if settings.chunk_length % settings.observe_every:
        raise ConfigError(
            f"observe_every {settings.observe_every} does not divide chunk_length {settings.chunk_length}",
            "choose a divisor",
        )
    if len(set(seeds)) != len(seeds):
        raise ConfigError("a seed occurs twice", "give each seed once")
    for seed in seeds:
        if not 0 <= seed < FIRST_EVALUATION_SEED:
            raise ConfigError(
                f"seed {seed} is not for training: {FIRST_EVALUATION_SEED} and above are for evaluation",
                f"choose seeds from 0 to {FIRST_EVALUATION_SEED - 1}",
            )


@dataclass(frozen=True)
class _Job:
    """What a process needs to know to record episodes."""

    out: Path
    settings: Settings

    def __call__(self) -> AbstractContextManager[Callable[[int], Entry | None]]:
        return _Recorder(self.out, self.settings)


class _Recorder:
    """Records episodes in one world."""

    def __init__(self, out: Path, settings: Settings) -> None:
        from sim_training.expert import Expert
        from sim_training.world import World

        self._out, self._settings = out, settings
        task = load_task(settings.task)
        self._world = World(settings.embodiment, task, randomisation=settings.randomisation)
        self._expert = Expert(self._world, task)

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._world.close()

    def __call__(self, seed: int) -> Entry | None:
        """Return the entry of the episode ``seed``, or None if the expert failed."""
        from sim_training.episode import play

        settings, world = self._settings, self._world
        world.reset(seed)
        rng = generator(seed, _NOISE_KEY)
        strength = rng.uniform(0, settings.perturbation_m) if settings.perturbation_m else 0.0
        images, states, labels, objects = [], [], [], []
        actions, success = 0, False
        while actions < world.task.step_limit and not success:
            plan = self._expert.plan(settings.chunk_length)
            executed = plan + _noise(rng, strength, world, len(plan)) if strength else plan
            for start in range(0, len(plan), settings.observe_every):
                images.append([world.render(camera) for camera in settings.cameras])
                states.append(world.positions())
                objects.append([world.object_pose(p.name)[:3, 3] for p in world.placements])
                labels.append(self._expert.plan(settings.chunk_length) if start else plan)
                played = play(world, executed[start : start + settings.observe_every], DT_S)
                actions, success = actions + played.actions, played.success
                if success:
                    break
            if world.failure() in _LOST:
                return None
        if not success:
            return None
        name = f"episode_{seed:06d}.npz"
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            images=np.array(images, dtype=np.uint8),
            states=np.array(states, dtype=np.float32),
            targets=np.array(labels, dtype=np.float32),
            objects=np.array(objects, dtype=np.float32),
        )
        write_atomic(self._out / name, buffer.getvalue())
        return Entry(name, sha256_file(self._out / name), seed, len(states), actions, world.strategy())


def _noise(rng: np.random.Generator, strength_m: float, world: Any, k: int) -> Array:
    """Return (K, D) additions to a chunk's targets that lead every tool astray, further each action.

    Each tool ends about ``strength_m`` beside its way, turned by a few degrees, its gripper a little
    more or less open.
    """
    from simplevla.kinematics.chain import arm_chain

    total = np.zeros(world.embodiment.dimension)
    positions = world.positions()
    for arm, part in world.embodiment.slices():
        twist = rng.normal(0, strength_m, 6) * [1, 1, 1, *[_ROTATION_RAD_PER_M] * 3]
        jacobian = arm_chain(arm).jacobian(positions[part][:-1])
        damped = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 1e-4 * np.eye(6))
        total[part] = [*(damped @ twist), rng.normal(0, _GRIPPER_PER_M * strength_m)]
    ramp: Array = np.arange(1, k + 1) / k
    return ramp[:, None] * total
