"""A whole training run: from the expert's demonstrations to a policy bundle and a report.

``stages`` lists what a configuration asks for, in order. Each stage leaves one whole thing in the
run's folder and is skipped if that is there already, so that a run that was cut off goes on where it
stopped; fine-tuning and reinforcement learning go on inside their stage as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sim_training import run_folder, stages
from sim_training.evaluation import rate
from sim_training.generalisation import SPLITS
from sim_training.progress import terminal
from sim_training.run_folder import StageEntry, claim, note_stage
from sim_training.stages import Run
from sim_training.training_config import TrainingConfig, load_config
from simplevla.bundle import load_bundle

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: as progress and report call it.
        leaves: path in the run's folder that is there, whole, once the stage was made.
        make: makes it, and returns in one line what came out.
        sums_up: whether it is made again when one before it was, although it is there.
    """

    name: str
    leaves: str
    make: Callable[[Run], str]
    sums_up: bool = False


def plan(config: TrainingConfig) -> tuple[Stage, ...]:
    """Return the stages of a run, in order."""
    listed: list[Stage] = []
    if config.start_from is None:
        listed.append(Stage("demonstrations", run_folder.DEMONSTRATIONS_DONE, stages.demonstrate))
        if config.pictures is not None:
            listed.append(Stage("pictures", run_folder.PICTURES, stages.draw))
        if config.pretraining is not None:
            listed.append(Stage("encoder pretraining", run_folder.ENCODER, stages.pretrain_encoder))
        listed.append(
            Stage("fine-tuning", run_folder.policy(0), partial(stages.fine_tune_policy, number=0))
        )
        for number in range(1, config.corrections.rounds + 1):
            correct = partial(stages.correct, number=number)
            tune = partial(stages.fine_tune_policy, number=number)
            listed.append(Stage(f"corrections {number}", run_folder.corrections(number), correct))
            listed.append(Stage(f"fine-tuning {number}", run_folder.policy(number), tune))
    if config.grpo is not None:
        if config.evaluation.before:
            listed.append(Stage("evaluation before", run_folder.BEFORE, stages.evaluate_before))
        listed.append(Stage("reinforcement learning", run_folder.GRPO_POLICY, stages.reinforce))
    listed.append(Stage("evaluation", run_folder.EVALUATION, stages.evaluate_after))
    listed.append(Stage("bundle", run_folder.BUNDLE, stages.publish))
    if config.evaluation.splits:
        listed.append(Stage("generalisation", SPLITS, stages.evaluate_generalisation))
    if config.evaluation.videos:
        listed.append(Stage("videos", run_folder.VIDEOS, stages.film))
    listed.append(Stage("report", run_folder.REPORT, stages.report, sums_up=True))
    return tuple(listed)


def show_plan(config_path: Path, overrides: Sequence[str], out: Path | None) -> int:
    """Print the stages that :func:`run` would make, and which of them are there in ``out``.

    Raises:
        ConfigError: the configuration is not valid.
    """
    for number, stage in enumerate(plan(load_config(config_path, overrides)), start=1):
        there = out is not None and (out / stage.leaves).exists()
        print(f"{number:2}  {stage.name:24} {stage.leaves:40} {'there' if there else 'to do'}")
    return 0


def run(config_path: Path, overrides: Sequence[str], out: Path) -> int:
    """Train as ``config_path`` says and leave bundle and report in ``out``; return the exit status.

    Args:
        overrides: ``key=value`` with dots for levels and YAML values.
        out: a new folder, or that of a run of the same configuration, which then goes on.

    Raises:
        ConfigError: the configuration is not valid, or ``out`` belongs to another run.
        MissingExtraError: a library that a stage needs is not installed.
        UnavailableError: another process is at work on this run.
    """
    config = load_config(config_path, overrides)
    stages.require_libraries(config)
    work = Run(out, config)
    with claim(out, config) as begun, terminal():
        log.info("%s the run in %s", "going on with" if begun else "beginning", out)
        listed, made = plan(config), False
        for number, stage in enumerate(listed, start=1):
            heading = f"[{number}/{len(listed)}] {stage.name}"
            if (out / stage.leaves).exists() and not (made and stage.sums_up):
                print(f"{heading}: there already", flush=True)
                continue
            print(heading, flush=True)
            since = time.perf_counter()
            outcome, made = stage.make(work), True
            seconds = time.perf_counter() - since
            note_stage(
                out,
                StageEntry(stage=stage.name, seconds=seconds, finished_ns=time.time_ns(), outcome=outcome),
            )
            print(f"{heading}: {outcome} ({seconds:.0f} s)", flush=True)
    print(f"success {rate(work.report().success)}")
    print(f"bundle  {load_bundle(out / run_folder.BUNDLE).path}")
    print(f"report  {out / run_folder.REPORT}")
    return 0
