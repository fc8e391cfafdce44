"""Corrections: the policy acts, and the expert says at every look what it would have done.

DAgger (Ross et al. 2011). The states are those that the policy itself gets into, so that what is
learned from them fits what it will meet. A set of corrections is a set of demonstrations on disk;
in part of the chunks the expert acts instead, so that later phases are seen too.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from sim_training.demonstrations import DT_S, MANIFEST, Entry, Manifest, Settings
from sim_training.evaluation import Policy, PolicySource
from sim_training.randomisation import generator
from sim_training.seeds import FIRST_EVALUATION_SEED
from sim_training.tasks import load_task
from sim_training.workers import map_seeds
from simplevla.errors import ConfigError
from simplevla.files import sha256_file, write_atomic
from simplevla.trial import FailureCode

log = logging.getLogger(__name__)

_MIXTURE_KEY = 200
_LOST = (FailureCode.DROPPED, FailureCode.NOT_UPRIGHT)


def collect_corrections(
    out: Path,
    settings: Settings,
    seeds: Sequence[int],
    source: PolicySource,
    *,
    expert_share: float,
    workers: int = 1,
) -> Manifest:
    """Let a policy try the episodes ``seeds`` and write what the expert would have done in each.

    Episodes are kept whether they succeed or not, up to the action limit or until the object lies.

    Args:
        settings: as of the demonstrations; ``perturbation_m`` has no part here.
        source: makes the policy, once in every process.
        expert_share: probability with which a chunk is the expert's.

    Raises:
        ConfigError: a seed belongs to evaluation, or ``out`` holds a set already.
    """
    if not all(0 <= seed < FIRST_EVALUATION_SEED for seed in seeds):
        raise ConfigError(
            f"seeds from {FIRST_EVALUATION_SEED} up are kept for evaluation",
            "choose lower seeds to train on",
        )
    if (out / MANIFEST).exists():
        raise ConfigError(f"{out} holds demonstrations already", "choose another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for entry in map_seeds(_Job(out, settings, source, expert_share), seeds, workers):
        entries.append(entry)
        if len(entries) % 10 == 0:
            log.info("%d of %d episodes corrected", len(entries), len(seeds))
    manifest = Manifest(
        settings=settings,
        instruction=load_task(settings.task).instruction,
        dt_s=DT_S,
        tried=len(seeds),
        episodes=tuple(sorted(entries, key=lambda entry: entry.seed)),
    )
    write_atomic(out / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return manifest


@dataclass(frozen=True)
class _Job:
    """What a process needs to know to correct a policy."""

    out: Path
    settings: Settings
    source: PolicySource
    expert_share: float

    def __call__(self) -> AbstractContextManager[Callable[[int], Entry]]:
        return _Corrector(self.out, self.settings, self.source(), self.expert_share)


class _Corrector:
    """One world, one policy and the expert that corrects it."""

    def __init__(self, out: Path, settings: Settings, policy: Policy, expert_share: float) -> None:
        from sim_training.expert import Expert
        from sim_training.world import World

        task = load_task(settings.task)
        self._out, self._settings, self._policy, self._share = out, settings, policy, expert_share
        self._world = World(settings.embodiment, task, randomisation=settings.randomisation)
        self._expert = Expert(self._world, task)

    def __enter__(self) -> _Corrector:
        return self

    def __exit__(self, *_: object) -> None:
        self._world.close()

    def __call__(self, seed: int) -> Entry:
        """Return the entry of the episode ``seed``."""
        from sim_training.episode import observe, play

        world, settings = self._world, self._settings
        world.reset(seed)
        rng = generator(seed, _MIXTURE_KEY)
        images, states, labels, objects = [], [], [], []
        done, success = 0, False
        while done < world.task.step_limit and not success and world.failure() not in _LOST:
            observation = observe(world, settings.cameras, done - 1)
            plan = self._expert.plan(settings.chunk_length)
            executed = plan if rng.random() < self._share else self._policy.act(observation).actions
            for start in range(0, len(plan), settings.observe_every):
                images.append([world.render(camera) for camera in settings.cameras])
                states.append(world.positions())
                labels.append(self._expert.plan(settings.chunk_length) if start else plan)
                objects.append([world.object_pose(p.name)[:3, 3] for p in world.placements])
                played = play(world, executed[start : start + settings.observe_every], DT_S)
                done, success = done + played.actions, played.success
                if success:
                    break
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
        log.debug("episode %d: success %s after %d actions", seed, success, done)
        return Entry(name, sha256_file(self._out / name), seed, len(states), done, world.strategy())
