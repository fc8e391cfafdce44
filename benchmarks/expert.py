"""How often the scripted expert masters each task, and how: python -m benchmarks.expert [--episodes 40].

Nothing is rendered and nothing is learned. Episodes 0 up to --episodes - 1 are tried with each task and
each robot; the table gives success with its 95 % Wilson interval, the strategy of the successes as told
from contacts, and the mean number of actions of a success.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from sim_training.demonstrations import DT_S
from sim_training.episode import play
from sim_training.expert import Expert
from sim_training.randomisation import Randomisation
from sim_training.tasks import load_task, task_names
from sim_training.world import World
from simplevla.cli import whole_number
from simplevla.embodiment import load_embodiment
from simplevla.intervals import wilson
from simplevla.trial import FailureCode

_EMBODIMENTS = ("piper_dual", "piper_single")
_CHUNK = 5


@dataclass
class Tally:
    """What became of the episodes of one task with one robot."""

    strategies: Counter[str] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)

    def line(self) -> str:
        """Return the figures as text."""
        done = len(self.actions)
        how = ", ".join(f"{name} {count}" for name, count in sorted(self.strategies.items()))
        mean = f"{np.mean(self.actions):.1f} actions" if done else "-"
        failed = f"; failed: {', '.join(map(str, self.failed))}" if self.failed else ""
        return f"{wilson(done, done + len(self.failed))}; {how}; {mean}{failed}"


def main() -> None:
    """Try the episodes and print one line for each task and robot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--episodes", type=whole_number(1, 10_000), default=40)
    parser.add_argument("--task", choices=task_names(), action="append", help="default: every task")
    parser.add_argument("--randomise", default="none", metavar="NAMES", help="as simplevla evaluate has it")
    args = parser.parse_args()
    randomisation = Randomisation.of(args.randomise.split(","))
    for name in args.task or task_names():
        for embodiment in _EMBODIMENTS:
            with World(
                load_embodiment(embodiment), load_task(name), randomisation=randomisation, render=False
            ) as world:
                tally = Tally()
                for seed in range(args.episodes):
                    attempt(world, seed, tally)
            print(f"{name:<16} {embodiment:<13} {tally.line()}", flush=True)


def attempt(world: World, seed: int, tally: Tally) -> None:
    """Let the expert try the episode ``seed`` and note what became of it."""
    world.reset(seed)
    expert, done, success = Expert(world, world.task), 0, False
    while done < world.task.step_limit and not success and world.failure() is not FailureCode.DROPPED:
        played = play(world, expert.plan(_CHUNK), DT_S)
        done, success = done + played.actions, played.success
    if success:
        tally.strategies[world.strategy().value] += 1
        tally.actions.append(done)
    else:
        tally.failed.append(seed)


if __name__ == "__main__":
    main()
