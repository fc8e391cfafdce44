"""What each way of executing chunks does to success, in simulation: python -m benchmarks.chunk_execution.

A world of SAPIEN is stepped at its own rate; the bridge's modes, player and limits drive it exactly as
they drive the arms (:mod:`robot_bridge.replay`), the bundle's network answers in this process, and each
answer takes a random time in the world's clock while the world goes on. No DDS, no server, no camera's
delay: that is what trials on the twin are for. The same seeds for every mode; the latencies of an
episode follow from its seed.

    python -m benchmarks.chunk_execution --episodes 200 --seed 20000 --report results/chunk_execution.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robot_bridge.execution_modes import ChunkPlan, DelayEstimate, Execution, ExecutionMode
from robot_bridge.replay import SimulatedArms, execute, seam_steps
from sim_training.evaluation import BundlePolicy
from sim_training.tasks import load_task
from sim_training.world import PHYSICS_DT_S, World
from simplevla.bundle import load_bundle
from simplevla.cli import whole_number
from simplevla.files import share_dir, write_atomic
from simplevla.intervals import wilson
from simplevla.observation import Observation

Array = NDArray[np.float64]

_TELL_EVERY = 50
_MODES = [mode.value for mode in ExecutionMode]


class ArmsInWorld(SimulatedArms):
    """Player and limits in front of the arms of a simulated world."""

    def __init__(self, world: World) -> None:
        super().__init__(world.embodiment, world.targets(), PHYSICS_DT_S)
        self._world = world
        self.success = False

    def measured(self) -> Array:
        """Return (D,) what the world's arms measure."""
        return self._world.positions()

    def drive(self, setpoint: Array) -> None:
        """Drive the world for one step, and see whether the task is fulfilled."""
        _, success = self._world.follow(setpoint[None])
        self.success = self.success or success


@dataclass
class PolicyInWorld:
    """A policy that looks at the world; see :class:`robot_bridge.replay.Answers`."""

    policy: BundlePolicy
    world: World
    dt_s: float

    def act(self, state: Array, first: int, committed: NDArray[np.float32] | None) -> Array:
        """Return (K, D) what the network answers now."""
        observation = Observation(
            images={name: self.world.render(name) for name in self.policy.cameras},
            state=state.astype(np.float32),
            instruction=self.world.task.instruction,
            capture_ns=round(self.world.time_s * 1e9),
            episode=str(self.world.seed),
            last_action=first - 1,
            committed=committed,
        )
        return self.policy.act(observation).actions.astype(np.float64)


@dataclass(frozen=True)
class Episode:
    """How one went: whether the task was fulfilled, after how long, and the largest steps at its seams."""

    success: bool
    duration_s: float
    steps: Array
    held: int
    refused: int


def run_episode(
    policy: BundlePolicy,
    world: World,
    execution: Execution,
    *,
    seed: int,
    dt_s: float,
    latency_s: tuple[float, float],
    delays: DelayEstimate,
) -> Episode:
    """Return how the episode ``seed`` went under one mode."""
    world.reset(seed)
    arms = ArmsInWorld(world)
    plan = ChunkPlan(execution, delays, step_limit=world.task.step_limit, begin_ns=0)
    rng = np.random.default_rng(seed)
    outcome = execute(
        plan,
        arms,
        PolicyInWorld(policy, world, dt_s),
        lambda: float(rng.uniform(*latency_s)),
        over=lambda: arms.success,
    )
    joints = np.ones(world.embodiment.dimension, dtype=bool)
    joints[[part.stop - 1 for _, part in world.embodiment.slices()]] = False
    duration_s = arms.now_s
    steps = seam_steps(arms.sent, arms.seams_s, joints, tick_s=arms.tick_s, window_s=dt_s, near_s=2 * dt_s)
    return Episode(arms.success, duration_s, steps, arms.held, outcome.refused)


def summary(mode: str, episodes: list[Episode]) -> str:
    """Return the row of one mode."""
    wins = [episode for episode in episodes if episode.success]
    steps = np.concatenate([episode.steps for episode in episodes])
    asked = len(steps) + len(episodes)
    median_s = float(np.median([episode.duration_s for episode in wins])) if wins else float("nan")
    median, high = np.quantile(steps, [0.5, 0.95])
    return (
        f"| {mode} | {wilson(len(wins), len(episodes))} | {median_s:.1f} | {median:.1f} | {high:.1f} | "
        f"{steps.max():.1f} | {sum(e.held for e in episodes)} of {asked} | "
        f"{sum(e.refused for e in episodes)} |"
    )


HEAD = """\
| mode | success | s to success, median | step at seams after the limits, rad/s2, median | 95 % | largest \
| came while the arms held | refused |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    """Run every mode and print, and perhaps keep, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="(default: bundles/move_can_pot)")
    parser.add_argument("--task", default="move_can_pot")
    parser.add_argument("--episodes", type=whole_number(1, 10_000), default=200, help="of each mode")
    parser.add_argument("--seed", type=whole_number(10_000, 2**31 - 1), default=20_000)
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=_MODES)
    parser.add_argument(
        "--latency-ms", type=whole_number(0, 5000), nargs=2, default=(100, 300), metavar=("LOW", "HIGH"),
        help="uniform between the two (default: 100 300)",
    )  # fmt: skip
    parser.add_argument("--report", type=Path, help="file that the table is written to")
    args = parser.parse_args()
    bundle = load_bundle(args.bundle or share_dir() / "bundles" / args.task)
    policy = BundlePolicy(bundle)
    low, high = sorted(args.latency_ms)
    lines = [
        f"{bundle.manifest.name}, {args.task}, seeds {args.seed} to {args.seed + args.episodes - 1}, "
        f"latency {low} to {high} ms at random, chunks of {bundle.manifest.chunk_length} actions of "
        f"{bundle.manifest.dt_s:g} s",
        "",
        HEAD,
    ]
    print("\n".join(lines), flush=True)
    with World(policy.embodiment, load_task(args.task)) as world:
        for mode in args.modes:
            began_s, delays = time.monotonic(), DelayEstimate()
            run = _runner(policy, world, mode, bundle.manifest.dt_s, (low / 1000, high / 1000), delays)
            episodes: list[Episode] = []
            for seed in range(args.seed, args.seed + args.episodes):
                episodes.append(run(seed))
                if len(episodes) % _TELL_EVERY == 0:
                    print(f"{mode}: {sum(e.success for e in episodes)} of {len(episodes)}", flush=True)
            lines.append(summary(mode, episodes))
            print(f"{lines[-1]}  ({time.monotonic() - began_s:.0f} s)", flush=True)
    if args.report is not None:
        write_atomic(args.report, ("\n".join(lines) + "\n").encode())


def _runner(
    policy: BundlePolicy,
    world: World,
    mode: str,
    dt_s: float,
    latency_s: tuple[float, float],
    delays: DelayEstimate,
) -> Callable[[int], Episode]:
    execution = Execution(ExecutionMode(mode))
    return lambda seed: run_episode(
        policy, world, execution, seed=seed, dt_s=dt_s, latency_s=latency_s, delays=delays
    )


if __name__ == "__main__":
    main()
