"""The configuration of a training run: what can be said, and what is refused before anything starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from msgspec import Meta

from sim_training.grpo.settings import GrpoSettings
from sim_training.pictures import PictureSettings
from sim_training.pretraining import PretrainingSettings
from sim_training.randomisation import Randomisation
from sim_training.seeds import FIRST_EVALUATION_SEED
from sim_training.sft import SftSettings
from sim_training.tasks import load_task
from simplevla.bundle import ActionSpaceName
from simplevla.config import Config, build
from simplevla.embodiment import load_embodiment
from simplevla.errors import ConfigError

Count = Annotated[int, Meta(ge=1)]
TrainingSeed = Annotated[int, Meta(ge=0, lt=FIRST_EVALUATION_SEED)]


class DemonstrationStage(Config, frozen=True, kw_only=True):
    """How many episodes the expert tries, from which seed on, and how it is perturbed."""

    episodes: Count
    first_seed: TrainingSeed = 0
    observe_every: Count = 1
    perturbation_m: Annotated[float, Meta(ge=0, le=0.05)] = 0.0
    workers: Count = 1


class CorrectionStage(Config, frozen=True, kw_only=True):
    """Rounds of corrections, each over ``episodes`` new seeds, after which it is fine-tuned anew."""

    rounds: Annotated[int, Meta(ge=0)] = 0
    episodes: Count = 50
    first_seed: TrainingSeed = 5000
    expert_share: Annotated[float, Meta(ge=0, le=1)] = 0.3
    workers: Count = 1


class EvaluationStage(Config, frozen=True, kw_only=True):
    """The greedy evaluations before and after reinforcement learning, on the same episodes.

    Attributes:
        episodes: how many, from ``seed`` on.
        splits: episodes of each part of the generalisation splits, for the trained policy; 0 for none.
        before: whether the policy is evaluated before reinforcement learning, too.
        videos: episodes that are filmed for the report, from ``seed`` on; 0 for none.
    """

    episodes: Count = 100
    seed: Annotated[int, Meta(ge=FIRST_EVALUATION_SEED)] = FIRST_EVALUATION_SEED
    workers: Count = 1
    splits: Annotated[int, Meta(ge=0)] = 0
    before: bool = True
    videos: Annotated[int, Meta(ge=0, le=9)] = 4


class TrainingConfig(Config, frozen=True, kw_only=True):
    """A whole run; what is None is left out.

    Attributes:
        start_from: folder of a bundle that takes the place of everything before reinforcement
            learning; or None, and the policy is made from ``demonstrations``.
        cameras: what the policy looks through, in this order.
        network: name of a file in ``config/policy``.
        seed: of every random draw that is not the seed of an episode.
        pictures: of random scenes, for the encoder's pretraining; None, and it looks at the
            demonstrations.
        randomisation: what differs between the scenes of all training; evaluations are of the plain
            scene.
    """

    name: str
    task: str
    embodiment: str
    cameras: Annotated[tuple[str, ...], Meta(min_length=1)]
    network: str
    action_space: ActionSpaceName
    chunk_length: Count
    seed: Annotated[int, Meta(ge=0)] = 0
    randomisation: Randomisation = Randomisation()
    start_from: str | None = None
    demonstrations: DemonstrationStage | None = None
    pictures: PictureSettings | None = None
    pretraining: PretrainingSettings | None = None
    fine_tuning: SftSettings | None = None
    corrections: CorrectionStage = CorrectionStage()
    evaluation: EvaluationStage = EvaluationStage()
    grpo: GrpoSettings | None = None


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Return the configuration at ``path`` with ``key=value`` overrides.

    Raises:
        ConfigError: it cannot be read, breaks the schema or contradicts itself, or an override is
            malformed.
        EmbodimentError: the robot has no such camera.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a safe loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", "correct the file") from error
    for override in overrides:
        _apply(data, override)
    config = build(data, TrainingConfig, source=str(path))
    _check(config, str(path))
    return config


def _apply(data: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is no override", "write key=value, with dots for levels")
    level = data
    *above, last = key.split(".")
    for name in above:
        level = level.setdefault(name, {}) if isinstance(level, dict) else None
    if not isinstance(level, dict):
        raise ConfigError(f"{override!r} goes below a key that holds a value", "check the key")
    try:
        level[last] = yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r} has no YAML value", "write key=value") from error


def _check(config: TrainingConfig, source: str) -> None:
    """Refuse what would fail hours later."""
    load_task(config.task)
    embodiment = load_embodiment(config.embodiment)
    cameras = [embodiment.camera(name) for name in config.cameras]
    if len({(camera.height, camera.width) for camera in cameras}) != 1:
        raise ConfigError(
            f"{source}: the cameras of one policy must have one picture size", "choose other cameras"
        )
    demonstrations, corrections = config.demonstrations, config.corrections
    if config.start_from is None:
        if demonstrations is None or config.fine_tuning is None:
            raise ConfigError(
                f"{source}: nothing says where the policy comes from",
                "give demonstrations and fine_tuning, or start_from",
            )
    elif (
        demonstrations or config.pictures or config.pretraining or config.fine_tuning or corrections.rounds
    ):
        raise ConfigError(
            f"{source}: start_from takes the place of demonstrations, pictures, pretraining, fine_tuning "
            "and corrections",
            "remove those (or set them to null), or start_from",
        )
    if config.pictures and not config.pretraining:
        raise ConfigError(
            f"{source}: pictures are for pretraining alone", "give pretraining, or remove them"
        )
    for key, first, episodes in (
        ("demonstrations", demonstrations.first_seed, demonstrations.episodes)
        if demonstrations
        else ("", 0, 0),
        ("corrections", corrections.first_seed, corrections.rounds * corrections.episodes),
    ):
        if first + episodes > FIRST_EVALUATION_SEED:
            raise ConfigError(
                f"{source}: {key} would use the seeds {first} to {first + episodes - 1}, and those from "
                f"{FIRST_EVALUATION_SEED} on are kept for evaluation",
                f"lower {key}.first_seed or the number of episodes",
            )


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does and PyYAML does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
