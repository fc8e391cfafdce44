"""What is kept of training runs: their small files, and a comparison of several."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from sim_training import run_folder
from sim_training.generalisation import SPLITS
from sim_training.run_record import RunRecord, read_run
from simplevla.errors import ConfigError
from simplevla.files import whole_directory
from simplevla.intervals import wilson

_KEPT = (
    run_folder.CONFIG,
    run_folder.ORIGIN,
    run_folder.STAGES,
    run_folder.ENCODER_ERRORS,
    run_folder.BEFORE,
    run_folder.EVALUATION,
    run_folder.DEMONSTRATIONS_DONE,
    "corrections-*/demonstrations.json",
    "policy-*/history.json",
    "grpo/history.jsonl",
    "bundle/manifest.json",
    SPLITS,
)
_PICTURES = (run_folder.REPORT, run_folder.CURVE, "videos/*.webp")
_LARGEST_BYTES = 5_000_000
_LATEST = 5


def keep(run: Path, folder: Path, *, pictures: bool = True) -> Path:
    """Copy the small files of the run in ``run`` to ``folder``, whole or not at all, and return it.

    Args:
        pictures: also report, curve and videos; without them the report can still be made anew.

    Raises:
        RecordError: there is no run.
        ConfigError: ``folder`` exists, or a file is too large to be kept with the code.
    """
    read_run(run)
    if folder.exists():
        raise ConfigError(f"{folder} exists", "choose another folder, or remove it")
    with whole_directory(folder) as scratch:
        for pattern in _KEPT + (_PICTURES if pictures else ()):
            for source in sorted(run.glob(pattern)):
                if source.stat().st_size > _LARGEST_BYTES:
                    raise ConfigError(
                        f"{source} has {source.stat().st_size / 1e6:.1f} MB, too many to keep",
                        "film fewer episodes (evaluation.videos)",
                    )
                target = scratch / source.relative_to(run)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    return folder


@dataclass(frozen=True)
class Row:
    """One variant of a comparison: the same configuration with several seeds.

    Attributes:
        finals: success of the final evaluation, one a finished run.
        before: success of the evaluation before, one a finished run.
        sampled: sampled success over the last iterations, one a finished run.
        unfinished: runs that have no final evaluation.
        episodes: sampled in a finished run, on average.
        seconds: of reinforcement learning in a finished run, on average.
    """

    variant: str
    finals: tuple[float, ...]
    before: tuple[float, ...]
    sampled: tuple[float, ...]
    evaluation_episodes: int
    successes: int
    unfinished: int
    episodes: float
    seconds: float


def compare(runs: Mapping[str, Iterable[Path]]) -> list[Row]:
    """Return a row for each variant, from the folders of its runs.

    Raises:
        RecordError: a folder holds no run, or a damaged one.
        ConfigError: the runs were not evaluated on the same episodes.
    """
    records = {variant: [read_run(folder) for folder in folders] for variant, folders in runs.items()}
    judged = {
        (report.task, report.seed, len(report.episodes), report.randomisation)
        for found in records.values()
        for record in found
        if (report := record.after) is not None
    }
    if len(judged) > 1:
        raise ConfigError(
            f"these runs were evaluated on different episodes: {sorted(judged)}",
            "compare runs of one task, evaluation.seed and evaluation.episodes",
        )
    return [_row(variant, found) for variant, found in records.items()]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Return the mean and Student's 95 % interval over seeds; None for fewer than two.

    The interval speaks of other seeds of the same recipe, and is wide with three of them.
    """
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean, max(0.0, mean - reach), min(1.0, mean + reach)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the comparison as a table in Markdown, with what its columns mean below it."""
    lines = [
        "| variant | seeds | final of each seed, % | final, mean % | sampled, % | episodes | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        each = ", ".join(f"{100 * value:.1f}" for value in row.finals) or "-"
        missing = f" (+{row.unfinished} unfinished)" if row.unfinished else ""
        lines.append(
            f"| {row.variant} | {len(row.finals)}{missing} | {each} | {_mean(row)} "
            f"| {_percent(row.sampled)} | {row.episodes:.0f} | {row.seconds / 60:.0f} |"
        )
    tried = max((row.evaluation_episodes for row in rows), default=0)
    starts = {value for row in rows for value in row.before}
    before = f"; before, {', '.join(f'{100 * value:.1f} %' for value in sorted(starts))}" if starts else ""
    lines += [
        "",
        f"Final: greedy success over the same {tried} initial states that no training used{before}. "
        "Mean: over seeds, with Student's 95 % interval of the mean; of a single seed the Wilson interval "
        f"over its episodes. Sampled: the last {_LATEST} iterations' episodes at the sampling temperature. "
        "Episodes and minutes: of reinforcement learning, a run.",
    ]
    return "\n".join(lines) + "\n"


def _row(variant: str, records: Sequence[RunRecord]) -> Row:
    finished = [record for record in records if record.after is not None]
    histories = [record.history for record in finished if record.history]
    finals = [record.after.success for record in finished if record.after is not None]
    return Row(
        variant=variant,
        finals=tuple(share.rate for share in finals),
        before=tuple(record.before.success.rate for record in finished if record.before is not None),
        sampled=tuple(
            sum(i.sampled.successes for i in history[-_LATEST:])
            / max(sum(i.sampled.episodes for i in history[-_LATEST:]), 1)
            for history in histories
        ),
        evaluation_episodes=max((share.trials for share in finals), default=0),
        successes=sum(share.successes for share in finals),
        unfinished=len(records) - len(finished),
        episodes=_average([sum(i.sampled.episodes for i in history) for history in histories]),
        seconds=_average([history[-1].elapsed_s for history in histories]),
    )


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _percent(values: Sequence[float]) -> str:
    return f"{100 * np.mean(values):.1f}" if values else "-"


def _mean(row: Row) -> str:
    """Return the mean of the final evaluations with the interval that can be had."""
    if not row.finals:
        return "-"
    found = mean_interval(row.finals)
    if found is None:
        rate = wilson(row.successes, row.evaluation_episodes)
        found = rate.rate, rate.low, rate.high
    mean, low, high = (100 * value for value in found)
    return f"**{mean:.1f}** ({low:.1f}-{high:.1f})"
