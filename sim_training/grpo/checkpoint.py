"""Checkpoints of a run of reinforcement learning: whole folders, nothing pickled.

``iteration-000012`` holds what twelve iterations left: the policy's weights and optimizer, the groups
that wait, and the few numbers that the loop carries over. All else follows from seed and iteration.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sim_training.grpo.algorithm import Group
from sim_training.grpo.experience import Episode, Trajectory
from simplevla.errors import ConfigError
from simplevla.files import whole_directory

log = logging.getLogger(__name__)

STATE = "state.json"
WAITING = "waiting.safetensors"
_NAME = re.compile(r"iteration-(\d{6})")
_KEPT = 2
_ARRAYS = ("seen", "proprio", "bins", "log_probs")


@dataclass
class Progress:
    """What the loop carries from one iteration to the next.

    Attributes:
        iteration: the next one.
        elapsed_s: time spent so far, over restarts.
        ready: groups that are worth learning from and were too many for an update.
        failed: groups that failed altogether and will be sampled once more.
        regions: {region: recent success}, for the curriculum.
        best: the most successes in a greedy evaluation so far.
    """

    iteration: int = 0
    elapsed_s: float = 0.0
    ready: list[Group] = field(default_factory=list)
    failed: list[Group] = field(default_factory=list)
    regions: dict[str, float] = field(default_factory=dict)
    best: int = -1


class _State(msgspec.Struct, forbid_unknown_fields=True):
    iteration: int
    elapsed_s: float
    regions: dict[str, float]
    best: int
    ready: list[list[dict[str, Any]]]
    failed: list[list[dict[str, Any]]]


def save_checkpoint(folder: Path, progress: Progress, save_policy: Callable[[Path], None]) -> Path:
    """Write a checkpoint, whole or not at all, and remove all but the last two; return its path.

    Args:
        save_policy: writes the policy's files into the folder that it is given.
    """
    path = folder / f"iteration-{progress.iteration:06d}"
    for left in (path, *folder.glob(".iteration-*")):  # by an attempt that was killed
        shutil.rmtree(left, ignore_errors=True)
    arrays: dict[str, NDArray[Any]] = {}
    described = {
        name: [[_describe(t, arrays) for t in group] for group in groups]
        for name, groups in (("ready", progress.ready), ("failed", progress.failed))
    }
    state = _State(
        iteration=progress.iteration,
        elapsed_s=progress.elapsed_s,
        regions=progress.regions,
        best=progress.best,
        **described,
    )
    with whole_directory(path) as scratch:
        save_policy(scratch)
        save_file(arrays, scratch / WAITING)
        (scratch / STATE).write_bytes(msgspec.json.encode(state))
    for old in checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, oldest first."""
    found = [path for path in folder.glob("iteration-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found)


def load_progress(path: Path) -> Progress:
    """Return what the loop carried when the checkpoint at ``path`` was written.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        state = msgspec.json.decode((path / STATE).read_bytes(), type=_State)
        arrays = load_file(path / WAITING)
        ready, failed = (
            [[_restore(entry, arrays) for entry in group] for group in groups]
            for groups in (state.ready, state.failed)
        )
    except (OSError, msgspec.MsgspecError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the checkpoint {path} cannot be read: {str(error).splitlines()[0]}",
            "remove it: training goes on from the one before",
        ) from error
    log.info("going on from iteration %d of %s", state.iteration, path)
    return Progress(state.iteration, state.elapsed_s, ready, failed, state.regions, state.best)


def _describe(trajectory: Trajectory, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Return the trajectory's plain values after adding its arrays, under the name it gives as "row"."""
    row = str(len(arrays))  # no two alike: each adds some
    for name in _ARRAYS:
        value = getattr(trajectory, name)
        if value is not None:
            arrays[f"{row}/{name}"] = value
    return {
        "row": row,
        "episode": list(trajectory.episode),
        "prompt": trajectory.prompt,
        "actions": trajectory.actions,
        "success": trajectory.success,
        "strategy": trajectory.strategy,
        "region": trajectory.region,
        "failure": trajectory.failure,
        "version": trajectory.version,
    }


def _restore(entry: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Trajectory:
    values = dict(entry)
    row = values.pop("row")
    seed, member = values.pop("episode")
    held: dict[str, Any] = {name: arrays.get(f"{row}/{name}") for name in _ARRAYS}
    if any(held[name] is None for name in _ARRAYS[:-1]):
        raise KeyError(f"{WAITING} lacks a trajectory")
    return Trajectory(episode=Episode(seed, member), **held, **values)
