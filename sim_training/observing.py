"""``simplevla observe``: record what a policy sees while it works in simulation.

A compiled engine is held against the network it was made of on such observations
(``simplevla compile --observations``), because made-up pictures are nothing that a robot shows.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simplevla.cli import Command, choice_or_only, require_choice, whole_number
from simplevla.files import write_atomic

if TYPE_CHECKING:
    from sim_training.evaluation import Policy
    from simplevla.action_chunk import ActionChunk
    from simplevla.observation import Observation

_EPILOG = """\
Lets the policy try episodes, greedily, until it was asked COUNT times, and writes what it saw: an .npz
file with state (N, D) float32, image/<camera> (N, H, W, 3) uint8 and instruction (N,) text. Same bundle,
seed and machine: same file.

examples:
  simplevla observe bundles/move_can_pot --count 500 --out recorded.npz
  simplevla compile bundles/move_can_pot --observations recorded.npz
"""


def record_observations(policy: Policy, task: str, *, count: int, seed: int) -> list[Observation]:
    """Return the first ``count`` observations that ``policy`` is asked about.

    Args:
        policy: answers; what it sees next follows from its answers.
        task: name of the task.
        count: how many.
        seed: of the first episode; the next has the next one.
    """
    from sim_training.evaluation import Bench
    from sim_training.randomisation import Randomisation

    watched = _Watched(policy)
    with Bench(watched, task, Randomisation.of(["none"])) as bench:
        while len(watched.seen) < count:
            bench.run(seed)
            seed += 1
    return watched.seen[:count]


def save_observations(path: Path, observations: Sequence[Observation]) -> None:
    """Write observations of the same cameras as one ``.npz`` file, whole or not at all."""
    arrays: dict[str, Any] = {
        "state": np.stack([observation.state for observation in observations]),
        "instruction": np.array([observation.instruction for observation in observations]),
    }
    for camera in observations[0].images:
        arrays[f"image/{camera}"] = np.stack([observation.images[camera] for observation in observations])
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    write_atomic(path, data.getvalue())


class _Watched:
    """A policy, and what it was asked about."""

    def __init__(self, policy: Policy) -> None:
        self.id, self.embodiment, self.cameras = policy.id, policy.embodiment, policy.cameras
        self.seen: list[Observation] = []
        self._policy = policy

    def act(self, observation: Observation) -> ActionChunk:
        self.seen.append(observation)
        return self._policy.act(observation)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the policy bundle")
    parser.add_argument("--task", help="task to try (default: the bundle's, if it has one alone)")
    parser.add_argument(
        "--count", type=whole_number(1, 10_000), default=500, help="how many observations (default: 500)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0, 2**31 - 1), default=60_000,
        help="seed of the first episode (default: 60000)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="file to write")


def _observe(args: argparse.Namespace) -> int:
    from sim_training.evaluation import BundleSource
    from sim_training.tasks import task_names

    if args.task is not None:
        require_choice("task", args.task, task_names())
    policy = BundleSource(args.bundle)()
    task = choice_or_only("task of this bundle", args.task, policy.tasks)
    observations = record_observations(policy, task, count=args.count, seed=args.seed)
    save_observations(args.out, observations)
    print(f"written {args.out}: {len(observations)} observations")
    return 0


OBSERVE = Command("record what a policy sees in simulation, to check engines on", _configure, _observe)
