"""How well a policy does on what was held out of its training, one property at a time.

The part *seen* and the unseen part of each split (:mod:`sim_training.splits`) are evaluated on the
same seeds, all of them from the range for evaluation. A split's figures differ in one property of the
scenes alone: where the object starts, of which models the scene is made, or where the goal is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from sim_training.evaluation import PolicySource, Report, evaluate, rate
from sim_training.randomisation import Randomisation
from sim_training.seeds import FIRST_EVALUATION_SEED
from sim_training.splits import Scenes, Split, require_split
from sim_training.tasks import load_task
from simplevla.bundle import load_bundle
from simplevla.cli import require_choice
from simplevla.errors import ConfigError
from simplevla.files import write_atomic

SCHEMA = 1
SPLITS = "splits.json"
"""What such evaluations are called in the folder of a training run."""


class Generalisation(msgspec.Struct, frozen=True, kw_only=True):
    """The evaluations of one policy on seen and unseen scenes.

    Attributes:
        seen: scenes of which no split holds anything out.
        unseen: by split, scenes with just that property held out.
    """

    seen: Report
    unseen: dict[str, Report]
    schema: int = SCHEMA

    def table(self) -> str:
        """Return success on seen and unseen scenes with 95 % Wilson intervals, as lines of text."""
        rows = [("scenes", "success"), ("seen", str(rate(self.seen.success)))]
        rows += [(f"unseen, {split}", str(rate(report.success))) for split, report in self.unseen.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def chosen_splits(task: str, text: str) -> tuple[Split, ...]:
    """Return the splits of a task that ``text`` names, separated by commas; ``all`` means each of them.

    Raises:
        ConfigError: there is no such split, or the task does not have it.
    """
    loaded = load_task(task)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        require_choice("split", name, [*(split.value for split in Split), "all"])
    if "all" in names:
        return loaded.splits
    splits = tuple(dict.fromkeys(Split(name) for name in names))
    for split in splits:
        require_split(loaded, Scenes.unseen(split))
    return splits


def evaluate_splits(
    source: PolicySource,
    task: str,
    splits: Sequence[Split],
    *,
    episodes: int,
    seed: int = FIRST_EVALUATION_SEED,
    randomisation: Randomisation | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Generalisation:
    """Let a policy try ``episodes`` seen scenes and as many of the unseen part of each split.

    Args:
        source: makes the policy; see :func:`sim_training.evaluation.evaluate`.
        task: name of the task.
        splits: what to try beside the seen scenes.
        episodes: how many of each part.
        seed: of the first episode of each part.
        randomisation: what else differs between scenes; its ``scenes`` have no part here.
        workers: processes.
        progress: called with (episodes done, successes), over all parts together.

    Raises:
        ConfigError: as ``evaluate`` does, or the task does not have a split.
    """
    parts = [Scenes.SEEN, *(Scenes.unseen(split) for split in splits)]
    for scenes in parts:
        require_split(load_task(task), scenes)
    reports: list[Report] = []
    for scenes in parts:
        before = sum(report.success.successes for report in reports)

        def count(done: int, wins: int, before: int = before, first: int = len(reports) * episodes) -> None:
            if progress is not None:
                progress(first + done, before + wins)

        report = evaluate(
            source,
            task,
            episodes=episodes,
            seed=seed,
            randomisation=msgspec.structs.replace(randomisation or Randomisation(), scenes=scenes),
            workers=workers,
            progress=count,
        )
        reports.append(report)
    seen, *unseen = reports
    names = [split.value for split in splits]
    return Generalisation(seen=seen, unseen=dict(zip(names, unseen, strict=True)))


def trained_on(bundle: Path) -> str:
    """Return which scenes the policy of a bundle was trained on, as its provenance says; ``all`` if silent.

    Raises:
        BundleError: the bundle is broken.
    """
    settings = load_bundle(bundle).manifest.provenance.config.get("randomisation")
    return str(settings.get("scenes", "all")) if isinstance(settings, dict) else "all"


def save_generalisation(result: Generalisation, path: Path) -> None:
    """Write the evaluations as JSON, whole or not at all."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")


def load_generalisation(path: Path) -> Generalisation:
    """Return the evaluations at ``path``.

    Raises:
        ConfigError: they cannot be read or are none.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Generalisation)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} is no evaluation of splits: {error}", "evaluate again") from error
