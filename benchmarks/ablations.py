r"""What each part of the recipe is worth: reinforcement learning with one thing at a time changed.

A part of the recipe is taken away or, with --switches, something is switched on that it leaves off.
Every run starts from the same fine-tuned policy, samples the same number of episodes in each of the
same number of iterations, and is evaluated on the same initial states that no training used. Runs are
made one after another, each resumable: call it again with the same arguments after an interruption.

    python -m benchmarks.ablations --config config/training/move_can_pot.yaml \
        --start runs/move_can_pot/policy-0/bundle --out runs/ablations --iterations 30
    python -m benchmarks.ablations --out runs/ablations --keep results/ablations    # only the table
    python -m benchmarks.ablations --switches --out runs/switches ...               # what goes beyond it
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from sim_training.figures import curves_of_runs
from sim_training.grpo.settings import GrpoSettings, PolicyLoss
from sim_training.results import compare, keep, markdown_table
from sim_training.run_record import read_run
from sim_training.training_config import TrainingConfig, load_config
from simplevla.cli import require_choice, whole_number
from simplevla.errors import ConfigError, SimplevlaError
from simplevla.files import whole_directory, write_atomic

FULL = "full-recipe"
_SEED = "seed-"
_CLIPS = {  # GSPO clips the ratio of whole attempts, which is that much nearer to 1 (arXiv 2507.18071, 5.1)
    "gspo": ("grpo.update.clip_low=0.0003", "grpo.update.clip_high=0.0004"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, and the table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of all runs, the table and the curves"
    )
    parser.add_argument(
        "--config", type=Path, help="training configuration with a part grpo; without, no runs"
    )
    parser.add_argument("--start", type=Path, help="bundle that every run starts from")
    parser.add_argument(
        "--iterations", type=whole_number(1, 100_000), help="of each run (default: as configured)"
    )
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas (default: 0,1,2)")
    parser.add_argument(
        "--switches", action="store_true", help="compare what goes beyond the recipe, not its parts"
    )
    parser.add_argument("--only", metavar="VARIANTS", help="make the runs of these alone, by commas")
    parser.add_argument("--keep", type=Path, help="copy what is small of every run to this new folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run")
    args = parser.parse_args(argv)
    try:
        if args.config:
            if args.start is None:
                raise ConfigError("nothing to start from", "give --start, a bundle")
            common = common_overrides(args.start, args.iterations, args.overrides)
            listed = (switches if args.switches else variants)(load_config(args.config, common))
            names = args.only.split(",") if args.only else list(listed)
            chosen = {require_choice("variant", name, list(listed)): listed[name] for name in names}
            _make_runs(args.config, common, chosen, _seeds(args.seeds), args.out)
        print(_compare(args.out))
        if args.keep:
            _keep(args.out, args.keep)
    except SimplevlaError as error:
        print(f"benchmarks.ablations: {error}", file=sys.stderr)
        return 2
    return 0


def _seeds(text: str) -> list[int]:
    try:
        return [whole_number(0, 2**31 - 1)(part) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--seeds: {error}", "write them as 0,1,2") from error


def variants(config: TrainingConfig) -> dict[str, list[str]]:
    """Return {name: overrides} of the full recipe and of each ablation that changes it.

    Raises:
        ConfigError: the configuration has no reinforcement learning.
    """
    grpo = _grpo(config)
    sampling, update = grpo.sampling, grpo.update
    found: dict[str, list[str]] = {FULL: []}
    if sampling.dynamic:
        found["dynamic-sampling-off"] = ["grpo.sampling.dynamic=false"]
    if update.clip_high > update.clip_low:
        found["clip-higher-off"] = [f"grpo.update.clip_high={update.clip_low}"]
    other = 1.0 if sampling.temperature != 1.0 else 1.6
    found[f"temperature-{other}"] = [f"grpo.sampling.temperature={other}"]
    return found


def switches(config: TrainingConfig) -> dict[str, list[str]]:
    """Return {name: overrides} of the full recipe and of each switch that it leaves off.

    Groups can only wait for a later update if more are sampled than one takes: ``surplus`` takes half as
    many, and what waited was sampled by an older policy, so correction is compared with that.

    Raises:
        ConfigError: the configuration has no reinforcement learning.
    """
    grpo = _grpo(config)
    sampling, update = grpo.sampling, grpo.update
    found: dict[str, list[str]] = {FULL: []}
    for loss in get_args(PolicyLoss):
        if loss != update.policy_loss:
            found[f"loss-{loss}"] = [f"grpo.update.policy_loss={loss}", *_CLIPS.get(loss, ())]
    sampled = sampling.sampled_groups
    surplus = [f"grpo.sampling.groups={max(sampled // 2, 1)}", f"grpo.sampling.round_groups={sampled}"]
    found["surplus"] = surplus
    for correction in ("token", "sequence"):
        found[f"surplus-{correction}"] = [*surplus, f"grpo.update.rollout_correction={correction}"]
    found["retry-unanimous"] = ["grpo.sampling.retry_unanimous=true"]
    found["curriculum"] = ["grpo.sampling.curriculum=true"]
    epochs = 1 if update.epochs > 1 else 4
    found[f"epochs-{epochs}"] = [f"grpo.update.epochs={epochs}"]
    found["randomised"] = [f"randomisation.{name}=true" for name in ("physics", "actuation", "latency")]
    return found


def _grpo(config: TrainingConfig) -> GrpoSettings:
    if config.grpo is None:
        raise ConfigError("this configuration has no reinforcement learning", "add the part grpo")
    return config.grpo


def common_overrides(start: Path, iterations: int | None, overrides: Sequence[str]) -> list[str]:
    """Return what all runs have in common: one start, one budget, no pictures."""
    common = [
        f"start_from={start}", "demonstrations=null", "pictures=null", "pretraining=null",
        "fine_tuning=null", "corrections={}", "evaluation.videos=0", "grpo.sampling.rounds=1",
    ]  # fmt: skip
    if iterations:
        common.append(f"grpo.iterations={iterations}")
    return [*common, *overrides]


def _make_runs(
    path: Path, common: Sequence[str], listed: dict[str, list[str]], seeds: Sequence[int], out: Path
) -> None:
    """Make every run that is not there, all variants of one seed before the next seed."""
    for seed in seeds:
        for name, changes in listed.items():
            folder = out / name / f"{_SEED}{seed}"
            first = name == FULL and seed == seeds[0]
            overrides = [
                *common, *changes, f"seed={seed}", f"grpo.seed={seed}",
                f"evaluation.before={'true' if first else 'false'}",
            ]  # fmt: skip
            print(f"{name}, seed {seed}: {folder}", flush=True)
            log = out / f"{folder.parent.name}-{folder.name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            command = [
                sys.executable,
                "-m",
                "simplevla",
                "train",
                "--config",
                str(path),
                "--out",
                str(folder),
            ]
            with log.open("ab") as stream:
                status = subprocess.run(
                    [*command, *overrides], stdout=stream, stderr=subprocess.STDOUT, check=False
                ).returncode
            if status:
                print(f"  failed with status {status}; {log} says why", file=sys.stderr, flush=True)


def _runs(out: Path) -> dict[str, list[Path]]:
    """Return {variant: folders of its runs}, the full recipe first.

    Raises:
        ConfigError: there is none.
    """
    found: dict[str, list[Path]] = {}
    for config in sorted(out.glob(f"*/{_SEED}*/config.json")):
        found.setdefault(config.parent.parent.name, []).append(config.parent)
    if not found:
        raise ConfigError(f"{out} holds no runs", "give --config and --start")
    return dict(sorted(found.items(), key=lambda item: item[0] != FULL))


def _compare(out: Path) -> str:
    """Write table and curves to ``out`` and return the table."""
    runs = _runs(out)
    table = markdown_table(compare(runs))
    write_atomic(out / "table.md", table.encode())
    buffer = io.BytesIO()
    histories = {name: [read_run(run).history for run in folders] for name, folders in runs.items()}
    curves_of_runs(histories).savefig(buffer, format="png", dpi=110)
    write_atomic(out / "curves.png", buffer.getvalue())
    return table


def _keep(out: Path, folder: Path) -> None:
    if folder.exists():
        raise ConfigError(f"{folder} exists", "choose another folder, or remove it")
    with whole_directory(folder) as scratch:
        for runs in _runs(out).values():
            for run in runs:
                keep(run, scratch / run.relative_to(out), pictures=False)
        for name in ("table.md", "curves.png"):
            (scratch / name).write_bytes((out / name).read_bytes())


if __name__ == "__main__":
    sys.exit(main())
