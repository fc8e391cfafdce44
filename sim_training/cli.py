"""The commands ``simplevla train`` and ``simplevla evaluate``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sim_training.progress import episodes as counting
from sim_training.seeds import FIRST_EVALUATION_SEED
from simplevla.cli import Command, choice_or_only, require_choice, whole_number
from simplevla.errors import ConfigError

if TYPE_CHECKING:
    from sim_training.evaluation import BundleSource
    from sim_training.randomisation import Randomisation

_RANDOMISATIONS = "textures, lights, camera, table_height, clutter, physics, actuation, latency, all, none"


def _configure_train(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
The configuration says everything: task, robot, demonstrations, network, fine-tuning, reinforcement
learning, evaluation. Any of its keys can be overridden on the command line. A run ends with a policy
bundle and a report, whole or not at all; one that was interrupted or killed goes on where it stopped
when it gets the same --out.

examples:
  simplevla train --config config/training/move_can_pot.yaml --out runs/move_can_pot
  simplevla train --config config/training/move_can_pot.yaml --plan
  simplevla train --config config/training/move_can_pot.yaml grpo.iterations=20 seed=1 --out runs/short
"""
    parser.add_argument("--config", type=Path, required=True, help="training configuration, a YAML file")
    parser.add_argument(
        "--out", type=Path, default=None,
        help="folder for what the run leaves (default: runs/train-<time>)",
    )  # fmt: skip
    parser.add_argument(
        "--plan", action="store_true",
        help="list the stages of the run and what is there of them in --out, and do nothing",
    )  # fmt: skip
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the configuration; dots go down, null leaves a part out",
    )


def _run_train(args: argparse.Namespace) -> int:
    from sim_training.training import run, show_plan

    if args.plan:
        return show_plan(args.config, args.overrides, args.out)
    out = args.out or Path("runs") / time.strftime("train-%Y%m%d-%H%M%S")
    return run(args.config, args.overrides, out)


def _configure_train_report(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
Makes training_report.html anew from what a run left: nothing is trained, evaluated or filmed. It works
while a run is under way, on a finished one, and on what results/ keeps of one.

examples:
  simplevla train-report runs/move_can_pot
  simplevla train-report runs/move_can_pot --keep results/move_can_pot
  simplevla train-report results/move_can_pot
"""
    parser.add_argument("run", type=Path, help="folder of a training run, or what was kept of it")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER",
        help="also copy configuration, curves, evaluations, videos and report to this new folder",
    )  # fmt: skip


def _run_train_report(args: argparse.Namespace) -> int:
    from sim_training.report import make_report
    from sim_training.results import keep

    print(f"report  {make_report(args.run)}")
    if args.keep:
        print(f"kept    {keep(args.run, args.keep)}")
    return 0


def _configure_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"""\
Runs the policy greedily in simulation, episode by episode, and prints the success rate with its 95 %
Wilson interval. Episode i has the seed SEED + i, which decides the scene; seeds below
{FIRST_EVALUATION_SEED} are for training and refused. Same bundle, seeds and machine: same result.

examples:
  simplevla evaluate bundles/move_can_pot --task move_can_pot --episodes 100 --json out.json
  simplevla evaluate bundles/move_can_pot --episodes 20 --randomise lights,clutter --video out.mp4
  simplevla evaluate bundles/move_can_pot --split all --episodes 100 --json splits.json
"""
    parser.add_argument("bundle", type=Path, help="folder of a policy bundle")
    parser.add_argument("--task", help="task to try (default: the bundle's, if it has one alone)")
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
        "--split", metavar="NAMES",
        help="compare scenes that training may see with what it holds out: spatial, object, goal, "
        "separated by commas, or all (docs/tasks.md); --episodes of each",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=whole_number(1, 256), default=1, help="processes, about one a core (default: 1)"
    )
    parser.add_argument(
        "--session-record", type=Path, metavar="FILE",
        help="a robot's calibration: cameras and bases stand, and everything is late, as it says",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every episode's result here")
    parser.add_argument(
        "--video", type=Path, metavar="FILE", help="write an MP4 of the first episodes here"
    )


def _run_evaluate(args: argparse.Namespace) -> int:
    from sim_training.evaluation import BundleSource, evaluate, rate, record_video, save_report
    from sim_training.randomisation import Randomisation
    from sim_training.tasks import task_names
    from simplevla.session_record import load_session_record

    if args.task is not None:
        require_choice("task", args.task, task_names())
    randomisation = Randomisation.of([name.strip() for name in args.randomise.split(",")])
    source = BundleSource(args.bundle)
    args.task = choice_or_only("task of this bundle", args.task, source().tasks)
    if args.split is not None:
        return _evaluate_splits(args, source, randomisation)
    record = load_session_record(args.session_record) if args.session_record else None
    with counting(args.episodes, "evaluating") as progress:
        report = evaluate(
            source,
            args.task,
            episodes=args.episodes,
            seed=args.seed,
            randomisation=randomisation,
            record=record,
            workers=args.workers,
            progress=progress,
        )
    if args.json:
        save_report(report, args.json)
    if args.video:
        record_video(
            source, args.task, args.video, seed=args.seed, randomisation=randomisation, record=record
        )
    strategies = ", ".join(f"{name} {count}" for name, count in report.strategies.items())
    failures = ", ".join(f"{name} {count}" for name, count in report.failures.items()) or "none"
    print(f"success    {rate(report.success)}")
    print(f"pushcuts   {rate(report.pushcuts)}")
    print(f"strategies {strategies}; failures {failures}")
    if report.mean_actions is not None:
        print(f"actions    {report.mean_actions:.1f} in a successful episode on average")
    for name, share in report.regions.items():
        print(f"{name:<10} {rate(share)}")
    for path in filter(None, (args.json, args.video)):
        print(f"written    {path}")
    return 0


def _evaluate_splits(args: argparse.Namespace, source: BundleSource, randomisation: Randomisation) -> int:
    from sim_training.generalisation import chosen_splits, evaluate_splits, save_generalisation, trained_on

    if args.video or args.session_record:
        raise ConfigError(
            "--split makes no video and takes no calibration", "leave --split out, or the others"
        )
    splits = chosen_splits(args.task, args.split)
    with counting(args.episodes * (1 + len(splits)), "evaluating") as progress:
        result = evaluate_splits(
            source,
            args.task,
            splits,
            episodes=args.episodes,
            seed=args.seed,
            randomisation=randomisation,
            workers=args.workers,
            progress=progress,
        )
    print(result.table())
    scenes = trained_on(args.bundle)
    if scenes != "seen":
        print(f"note: the policy was trained on the scenes {scenes!r} and may know what is unseen here")
    if args.json:
        save_generalisation(result, args.json)
        print(f"written {args.json}")
    return 0


TRAIN = Command("train a policy and write its bundle", _configure_train, _run_train)
TRAIN_REPORT = Command("make the report of a training run anew", _configure_train_report, _run_train_report)
EVALUATE = Command(
    "try a policy bundle in simulation and count its successes", _configure_evaluate, _run_evaluate
)
