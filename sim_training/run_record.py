"""What a training run left, read back: for its report, and for comparing runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sim_training import run_folder
from sim_training.demonstrations import Manifest
from sim_training.evaluation import Report, load_report
from sim_training.generalisation import SPLITS, Generalisation, load_generalisation
from sim_training.history import Iteration, read_history
from sim_training.run_folder import Origin, StageEntry, read_stages
from simplevla.errors import RecordError

T = TypeVar("T")


@dataclass(frozen=True)
class RunRecord:
    """A run, or what was kept of it; None or empty is what is not there (yet).

    Attributes:
        config: the configuration as plain data, so that a run of an older version can be read.
        demonstrations: {strategy: episodes} that were kept; ``tried`` is how many were tried.
        place_errors: of encoder pretraining, as it wrote them.
        fine_tuning: its log, the last one where there were several.
        before, after: evaluation before reinforcement learning, and the final one.
        generalisation: evaluation of the trained policy on seen and unseen scenes.
        videos: {name: file}, "before" and "after".
    """

    folder: Path
    config: dict[str, Any]
    origin: Origin | None
    stages: tuple[StageEntry, ...]
    demonstrations: dict[str, int]
    tried: int
    place_errors: dict[str, list[float]] | None
    fine_tuning: tuple[dict[str, float], ...]
    history: tuple[Iteration, ...]
    before: Report | None
    after: Report | None
    generalisation: Generalisation | None = None
    videos: dict[str, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the run is called."""
        return str(self.config.get("name", self.folder.name))

    @property
    def training_s(self) -> float:
        """Time of all stages and of reinforcement learning, s.

        A stage counts with the call that finished it, reinforcement learning with all its iterations.
        """
        learning = self.history[-1].elapsed_s if self.history else 0.0
        return learning + sum(
            entry.seconds for entry in self.stages if entry.stage != "reinforcement learning"
        )


def read_run(folder: Path) -> RunRecord:
    """Return what lies in ``folder``.

    Raises:
        RecordError: there is no run, or a file of it is damaged.
        ConfigError: an evaluation is damaged.
    """
    if not (folder / run_folder.CONFIG).exists():
        raise RecordError(f"{folder} holds no training run", "give the folder that was --out")
    manifest = _read(folder / run_folder.DEMONSTRATIONS_DONE, Manifest)
    strategies: dict[str, int] = {}
    for entry in manifest.episodes if manifest else ():
        strategies[entry.strategy.value] = strategies.get(entry.strategy.value, 0) + 1
    tuned = sorted(folder.glob("policy-[0-9]*/history.json"))
    return RunRecord(
        folder=folder,
        config=_read(folder / run_folder.CONFIG, dict[str, Any]) or {},
        origin=_read(folder / run_folder.ORIGIN, Origin),
        stages=tuple(read_stages(folder)),
        demonstrations=strategies,
        tried=manifest.tried if manifest else 0,
        place_errors=_read(folder / run_folder.ENCODER_ERRORS, dict[str, list[float]]),
        fine_tuning=tuple((_read(tuned[-1], list[dict[str, float]]) if tuned else None) or ()),
        history=tuple(read_history(folder / run_folder.GRPO)),
        before=_report(folder / run_folder.BEFORE),
        after=_report(folder / run_folder.EVALUATION),
        generalisation=load_generalisation(splits) if (splits := folder / SPLITS).exists() else None,
        videos={path.stem: path for path in sorted((folder / run_folder.VIDEOS).glob("*.webp"))},
    )


def configuration_text(record: RunRecord) -> str:
    """Return the configuration as YAML."""
    import yaml

    return str(yaml.safe_dump(json.loads(json.dumps(record.config)), sort_keys=False, width=100))


def _read(path: Path, kind: type[T]) -> T | None:
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise RecordError(f"{path} cannot be read: {error}", "remove it, or make it again") from error


def _report(path: Path) -> Report | None:
    return load_report(path) if path.exists() else None
