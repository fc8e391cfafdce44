"""The commands ``simplevla train`` and ``simplevla evaluate``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sim_training.seeds import FIRST_EVALUATION_SEED
from simplevla.cli import Command, require_choice, whole_number

_RANDOMISATIONS = "textures, lights, camera, table_height, clutter, physics, all, none"


def _configure_train(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
The configuration says everything: task, embodiment, demonstrations, network, training. Any of its
keys can be overridden on the command line. A run ends with a policy bundle, whole or not at all; one
that was interrupted goes on where it stopped when it gets the same --out.

examples:
  simplevla train --config config/training/move_can_pot.yaml --out runs/move_can_pot
  simplevla train --config config/training/move_can_pot.yaml fine_tuning.steps=200 --out runs/short
"""
    parser.add_argument("--config", type=Path, required=True, help="training configuration, a YAML file")
    parser.add_argument(
        "--out", type=Path, default=None,
        help="folder for what the run leaves (default: runs/train-<time>)",
    )  # fmt: skip
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the configuration; dots go down",
    )


def _run_train(args: argparse.Namespace) -> int:
    from sim_training.training import run

    out = args.out or Path("runs") / time.strftime("train-%Y%m%d-%H%M%S")
    return int(run(args.config, args.overrides, out))


def _configure_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"""\
Runs the policy greedily in simulation, episode by episode, and prints the success rate with its 95 %
Wilson interval. Episode i has the seed SEED + i, which decides the scene; seeds below
{FIRST_EVALUATION_SEED} are for training and refused. Same bundle, seeds and machine: same result.

examples:
  simplevla evaluate bundles/move_can_pot --task move_can_pot --episodes 100 --json out.json
  simplevla evaluate bundles/move_can_pot --episodes 20 --randomise lights,clutter --video out.mp4
"""
    parser.add_argument("bundle", type=Path, help="folder of a policy bundle")
    parser.add_argument("--task", default="move_can_pot", help="task to try (default: move_can_pot)")
    parser.add_argument(
        "--episodes", type=whole_number(1, 1_000_000), default=100, help="how many (default: 100)"
    )
    parser.add_argument(
        "--seed", type=whole_number(FIRST_EVALUATION_SEED, 2**31 - 1), default=FIRST_EVALUATION_SEED,
        help=f"seed of the first episode (default: {FIRST_EVALUATION_SEED}, the lowest)",
    )  # fmt: skip
    parser.add_argument(
        "--randomise", default="none", metavar="NAMES",
        help=f"what differs between scenes, separated by commas: {_RANDOMISATIONS} (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=whole_number(1, 256), default=1, help="processes, about one a core (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every episode's result here")
    parser.add_argument(
        "--video", type=Path, metavar="FILE", help="write an MP4 of the first episodes here"
    )


def _run_evaluate(args: argparse.Namespace) -> int:
    from sim_training.evaluation import BundleSource, evaluate, rate, record_video, save_report
    from sim_training.randomisation import Randomisation
    from sim_training.tasks import task_names

    require_choice("task", args.task, task_names())
    randomisation = Randomisation.of([name.strip() for name in args.randomise.split(",")])
    source = BundleSource(args.bundle)
    require_choice("task of this bundle", args.task, source().tasks)
    with _progress(args.episodes) as progress:
        report = evaluate(
            source,
            args.task,
            episodes=args.episodes,
            seed=args.seed,
            randomisation=randomisation,
            workers=args.workers,
            progress=progress,
        )
    if args.json:
        save_report(report, args.json)
    if args.video:
        record_video(source, args.task, args.video, seed=args.seed, randomisation=randomisation)
    strategies = ", ".join(f"{name} {count}" for name, count in report.strategies.items())
    failures = ", ".join(f"{name} {count}" for name, count in report.failures.items()) or "none"
    print(f"success    {rate(report.success)}")
    print(f"pushcuts   {rate(report.pushcuts)}")
    print(f"strategies {strategies}; failures {failures}")
    if report.mean_actions is not None:
        print(f"actions    {report.mean_actions:.1f} in a successful episode on average")
    for path in filter(None, (args.json, args.video)):
        print(f"written    {path}")
    return 0


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, successes): a live bar on a terminal, some lines elsewhere."""
    if not sys.stderr.isatty():
        every = max(1, total // 10)

        def line(done: int, successes: int) -> None:
            if done % every == 0 or done == total:
                print(f"{done} of {total} episodes, {successes} successes", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("evaluating", total=total)

        def update(done: int, successes: int) -> None:
            bar.update(task, completed=done, description=f"{successes} of {done} succeeded")

        yield update


TRAIN = Command("train a policy and write its bundle", _configure_train, _run_train)
EVALUATE = Command(
    "try a policy bundle in simulation and count its successes", _configure_evaluate, _run_evaluate
)
