r"""Does reinforcement learning under Ray go on after a kill -9 as if nothing had been?

Trains one policy on the real task four times from the same seed: in one process; with two learners
under Ray; the same with one learner killed in the middle of an iteration, after which the run restarts
by itself; and the same with the driver killed, after which the command is given again. Prints the
loss and the gradient's norm of every iteration side by side, and fails if an interrupted run did not
become the other.

    python -m benchmarks.grpo_recovery                      # a few minutes on two quiet cores
    python -m benchmarks.grpo_recovery --start BUNDLE --iterations 10 --groups 16
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from sim_training.grpo.settings import GrpoSettings, PlacementSettings, SamplingSettings, UpdateSettings
from sim_training.history import Iteration, read_history
from simplevla.bundle import load_bundle
from simplevla.cli import whole_number
from simplevla.files import share_dir

_POLL_S = 0.2
_PATIENCE_S = 1800.0
_SAME = 1e-3  # relative: sums of several processes may be rounded in another order


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs and compare them; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grpo_recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--start", type=Path, help="bundle to start from (default: the shipped one)")
    parser.add_argument("--task", default="move_can_pot")
    parser.add_argument("--iterations", type=whole_number(2, 1000), default=3)
    parser.add_argument("--groups", type=whole_number(1, 1000), default=4)
    parser.add_argument("--learners", type=whole_number(2, 64), default=2)
    parser.add_argument("--horizon", type=whole_number(1, 1000), default=60, help="actions of an episode")
    parser.add_argument(
        "--temperature", type=float, default=2.0, help="high: the shipped policy hardly fails"
    )
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", choices=("local", "ray"), default="ray", help=argparse.SUPPRESS)
    parser.add_argument("--restarts", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one is not None:
        return _train(args)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        runs = {
            "one process": _run(out / "local", args, engine="local"),
            f"Ray, {args.learners} learners": _run(out / "ray", args),
            "a learner killed": _run(out / "learner", args, restarts=1, kill="learner"),
            "the driver killed": _run(out / "driver", args, kill="driver"),
        }
    return _report(runs)


def _train(args: argparse.Namespace) -> int:
    """Train in this process; what the other runs of this file start."""
    from sim_training.grpo.driver import train

    local = args.engine == "local"
    settings = GrpoSettings(
        iterations=args.iterations,
        sampling=SamplingSettings(
            groups=args.groups, temperature=args.temperature, horizon=args.horizon, dynamic=False
        ),
        update=UpdateSettings(mini_batch=8 * args.learners, micro_batch=8, learning_rate=1e-4, epochs=2),
        placement=PlacementSettings(
            engine=args.engine,
            learners=1 if local else args.learners,
            environment_workers=2,
            restarts=args.restarts,
        ),
        evaluate_every=0,
        tracking=(),
    )
    bundle = load_bundle(args.start or share_dir() / "bundles/move_can_pot")
    train(bundle, args.task, settings, args.one, progress=_say)
    return 0


def _say(iteration: Iteration) -> None:
    print(
        f"  iteration {iteration.iteration}: loss {iteration.loss:+.6f}, success {iteration.sampled.rate}"
    )


def _run(
    folder: Path, args: argparse.Namespace, *, engine: str = "ray", restarts: int = 0, kill: str = ""
) -> list[Iteration]:
    """Return the history of a run, of which one process is killed in the middle of iteration 1."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "benchmarks.grpo_recovery",
        "--one",
        str(folder),
        "--engine",
        engine,
    ]
    command += ["--restarts", str(restarts), "--task", args.task, "--iterations", str(args.iterations)]
    command += ["--groups", str(args.groups), "--learners", str(args.learners)]
    command += ["--horizon", str(args.horizon)]
    command += [
        "--temperature",
        str(args.temperature),
        *(["--start", str(args.start)] if args.start else []),
    ]
    print(f"{folder.name}:", flush=True)
    with subprocess.Popen(command) as process:
        if kill:
            _wait_for_iteration(folder, process)
            family = psutil.Process(process.pid).children(recursive=True)
            _kill(kill, process, family)
        status = process.wait(_PATIENCE_S)
    if kill == "driver":
        psutil.wait_procs(family, timeout=120)  # Ray's processes end with their driver
        print("  started again", flush=True)
        status = subprocess.run(command, check=False, timeout=_PATIENCE_S).returncode
    if status:
        raise SystemExit(f"the run {folder.name} ended with status {status}")
    return read_history(folder)


def _wait_for_iteration(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the first iteration is saved and the second has been under way for a moment."""
    deadline = time.monotonic() + _PATIENCE_S
    while not (folder / "iteration-000001").is_dir():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run {folder.name} never ended an iteration")
        time.sleep(_POLL_S)
    time.sleep(1.0)


def _kill(which: str, process: subprocess.Popen[bytes], family: Sequence[psutil.Process]) -> None:
    if which == "driver":
        process.kill()
        print("  driver killed", flush=True)
        return
    learners = [
        child for child in family if child.cmdline() and child.cmdline()[0].startswith("ray::VLAWorker")
    ]
    if not learners:
        raise SystemExit("no learner was found among the run's processes")
    learners[-1].kill()
    print(f"  learner {learners[-1].pid} of {len(learners)} killed", flush=True)


def _report(runs: dict[str, list[Iteration]]) -> int:
    names = list(runs)
    print(f"\n{os.cpu_count()} cores. Loss, the gradient's norm and successes of each iteration:\n")
    print("| iteration | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for number in range(len(runs[names[0]])):
        row = [runs[name][number] for name in names]
        cells = [
            f"{i.loss:+.5f}, {i.gradient_norm:.4f}, {i.sampled.successes}/{i.sampled.episodes}" for i in row
        ]
        print(f"| {number} | " + " | ".join(cells) + " |")
    whole = runs[names[1]]
    furthest = {
        name: max(_apart(a, b) for a, b in zip(runs[name], whole, strict=True)) for name in names[2:]
    }
    for name, distance in furthest.items():
        print(f"\n{name}: at most {distance:.1e} (relative) from the uninterrupted run")
    return 0 if max(furthest.values()) <= _SAME else 1


def _apart(one: Iteration, other: Iteration) -> float:
    """Return the largest relative difference of what the two iterations computed."""
    pairs = [
        (getattr(one, name), getattr(other, name)) for name in ("loss", "entropy", "ratio", "gradient_norm")
    ]
    return max(abs(a - b) / max(abs(b), 1e-2) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
