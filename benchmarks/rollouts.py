"""How many episodes a second: many worlds in several processes, beside one world in one process.

The plain loop is what ``simplevla evaluate`` does: one environment, one picture, one answer at a time. All
rows play the same episodes with the same policy in one run; compare the ratios. Seconds are summed over
processes and given per episode.

    python -m benchmarks.rollouts bundles/move_can_pot
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from sim_training.evaluation import BundleSource, evaluate
from sim_training.grpo.acting import ActingNetwork
from sim_training.grpo.experience import Answer, Episode, Looks
from sim_training.rollout_worker import RolloutSettings
from sim_training.rollouts import Environments, settings_of
from sim_training.seeds import FIRST_EVALUATION_SEED
from simplevla.bundle import Bundle, load_bundle
from simplevla.cli import whole_number
from simplevla.errors import SimplevlaError

_PARTS = ("physics", "rendering", "kinematics", "scene", "inference", "transport")


class Row(NamedTuple):
    """One way to roll out: episodes a second, how many succeeded, and the seconds of each part."""

    name: str
    episodes_per_s: float
    successes: int
    seconds: dict[str, float]


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the policy bundle")
    parser.add_argument(
        "--episodes", type=whole_number(8, 10_000), default=48, help="of each row (default: 48)"
    )
    parser.add_argument(
        "--plain-episodes", type=whole_number(2, 10_000), default=12, help="of the first row (default: 12)"
    )
    parser.add_argument(
        "--workers", type=whole_number(1, 256), default=2, help="most processes (default: 2)"
    )
    args = parser.parse_args()
    try:
        bundle = load_bundle(args.bundle)
        task = next(iter(bundle.manifest.instructions))
        print(f"{bundle.manifest.name} {bundle.id[:12]}, task {task}, seeds from {FIRST_EVALUATION_SEED}")
        print(f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
        rows = measure(bundle, task, args.episodes, args.plain_episodes, args.workers)
    except SimplevlaError as error:
        print(f"rollouts: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def measure(bundle: Bundle, task: str, episodes: int, plain_episodes: int, workers: int) -> list[Row]:
    """Return the plain loop, then workers from 1 and slots from 2 upwards, and full-size pictures."""
    horizon = 0
    settings = settings_of(bundle, task, workers=1, slots=2, horizon=horizon)
    counts = sorted({1, workers})
    ways = {
        f"{w} process{'es' if w > 1 else ''} x {s} worlds": replace(settings, workers=w, slots=s)
        for w in counts
        for s in (2, 4, 8)
    }
    most = replace(settings, workers=workers, slots=8, small_pictures=False)
    ways[f"the same, pictures at {bundle.manifest.embodiment.cameras[0].width} px"] = most
    rows = [_plain(bundle, task, plain_episodes)]
    return rows + [_many(bundle, name, way, episodes) for name, way in ways.items()]


def table(rows: list[Row]) -> str:
    """Return all rows with the ratio to the first, and milliseconds an episode of each part."""
    head = f"{'':34}{'episodes/s':>11}{'ratio':>8}{'success':>9}" + "".join(f"{p:>12}" for p in _PARTS)
    lines = [head + "   (ms an episode, summed over processes)"]
    for row in rows:
        parts = "".join(f"{1e3 * row.seconds[p]:12.0f}" if p in row.seconds else f"{'':12}" for p in _PARTS)
        ratio = row.episodes_per_s / rows[0].episodes_per_s
        lines.append(f"{row.name:34}{row.episodes_per_s:11.2f}{ratio:7.1f}x{row.successes:9d}{parts}")
    return "\n".join(lines)


def _plain(bundle: Bundle, task: str, episodes: int) -> Row:
    source = BundleSource(bundle.path)
    evaluate(source, task, episodes=1)  # compiles shaders
    start = time.perf_counter()
    report = evaluate(source, task, episodes=episodes)
    rate = episodes / (time.perf_counter() - start)
    return Row("plain loop: 1 process, 1 world", rate, report.success.successes, {})


def _many(bundle: Bundle, name: str, settings: RolloutSettings, episodes: int) -> Row:
    torch.set_num_threads(1)
    wanted = [Episode(FIRST_EVALUATION_SEED + i) for i in range(episodes)]
    with Environments(settings) as environments:
        network = ActingNetwork(bundle, environments.instructions, keep_tokens=True)

        def act(looks: Looks) -> Answer:
            return network.act(looks, key=(), temperature=0.0)

        start = time.perf_counter()
        played = environments.collect(wanted, act)
        rate = episodes / (time.perf_counter() - start)
        seconds = {part: spent / episodes for part, spent in environments.seconds.items()}
    return Row(name, rate, sum(trajectory.success for trajectory in played), seconds)


if __name__ == "__main__":
    sys.exit(main())
