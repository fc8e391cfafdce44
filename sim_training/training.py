"""A whole training run: demonstrations, encoder, fine-tuning, corrections, evaluation, bundle.

``run`` reads top to bottom. Each stage leaves one whole thing in the run's folder and is skipped if
that is there already, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
import yaml
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sim_training.corrections import collect_corrections
from sim_training.demonstrations import DT_S, DemonstrationSet, Settings, collect
from sim_training.demonstrations import MANIFEST as DEMONSTRATIONS
from sim_training.evaluation import BundleSource, Report, evaluate, load_report, save_report
from sim_training.pretraining import PretrainingSettings, pretrain
from sim_training.samples import Samples, fit_codec, fit_proprio, load_samples, split
from sim_training.seeds import FIRST_EVALUATION_SEED
from sim_training.sft import SftSettings, fine_tune
from sim_training.tasks import load_task
from simplevla.action_codec import ActionCodec
from simplevla.bundle import (
    ActionSpaceName,
    Bundle,
    CodecEntry,
    Manifest,
    Provenance,
    load_bundle,
    write_bundle,
)
from simplevla.config import Config, build
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.errors import ConfigError, NotBuiltYetError
from simplevla.files import share_dir, write_atomic
from simplevla.policy.config import NetworkConfig, load_sizes
from simplevla.policy.network import VLANetwork, make_network, weights_of
from simplevla.policy.processor import PromptEncoder, proprio_size
from simplevla.policy.tokenizer import make_tokenizer

log = logging.getLogger(__name__)

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
    """The last evaluation: ``episodes`` from ``seed`` on."""

    episodes: Count = 100
    seed: Annotated[int, Meta(ge=FIRST_EVALUATION_SEED)] = FIRST_EVALUATION_SEED
    workers: Count = 1


class TrainingConfig(Config, frozen=True, kw_only=True):
    """A whole run. ``grpo`` is reserved: reinforcement learning is planned and not built."""

    name: str
    task: str
    embodiment: str
    cameras: Annotated[tuple[str, ...], Meta(min_length=1)]
    network: str
    action_space: ActionSpaceName
    chunk_length: Count
    seed: Annotated[int, Meta(ge=0)] = 0
    demonstrations: DemonstrationStage
    pretraining: PretrainingSettings
    fine_tuning: SftSettings
    corrections: CorrectionStage = CorrectionStage()
    evaluation: EvaluationStage = EvaluationStage()
    grpo: dict[str, Any] | None = None


def run(config_path: Path, overrides: Sequence[str], out: Path) -> int:
    """Train as ``config_path`` says and leave the bundle in ``out / "bundle"``; return the exit status.

    Args:
        overrides: ``key=value`` with dots for levels and YAML values.
        out: a new folder, or that of a run of the same configuration, which then goes on.

    Raises:
        ConfigError: the configuration is not valid, or ``out`` belongs to another run.
        NotBuiltYetError: it asks for GRPO.
    """
    config = load_config(config_path, overrides)
    if config.grpo is not None:
        raise NotBuiltYetError("training with GRPO is planned, not built", "remove the key grpo")
    embodiment = load_embodiment(config.embodiment)
    load_task(config.task)
    _claim(out, config)
    parts = _Parts(config, embodiment)

    sets = [_demonstrations(config, embodiment, out / "demonstrations")]
    encoder = _encoder(config, parts, sets, out / "encoder.safetensors")
    bundle = _policy(config, parts, sets, encoder, out / "policy-0")
    for number in range(1, config.corrections.rounds + 1):
        folder = out / f"corrections-{number}"
        sets.append(_corrections(config, embodiment, bundle, folder, number))
        bundle = _policy(config, parts, sets, encoder, out / f"policy-{number}")
    report = _evaluation(config, bundle, out / "evaluation.json")
    final = _publish(bundle, report, out / "bundle")
    print(f"success {report.success}")
    print(f"bundle  {final.path}")
    return 0


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Return the configuration at ``path`` with ``key=value`` overrides.

    Raises:
        ConfigError: it cannot be read or breaks the schema, or an override is malformed.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", "correct the file") from error
    for override in overrides:
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
            level[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r} has no YAML value", "write key=value") from error
    return build(data, TrainingConfig, source=str(path))


class _Parts:
    """What every stage is built from."""

    def __init__(self, config: TrainingConfig, embodiment: Embodiment) -> None:
        cameras = [embodiment.camera(name) for name in config.cameras]
        if len({(camera.height, camera.width) for camera in cameras}) != 1:
            raise ConfigError(
                "the cameras of one policy must have one picture size", "choose other cameras"
            )
        self.embodiment = embodiment
        self.tokenizer = make_tokenizer()
        self.network = NetworkConfig(
            sizes=load_sizes(config.network),
            frame_height=cameras[0].height,
            frame_width=cameras[0].width,
            n_cameras=len(cameras),
            chunk_length=config.chunk_length,
            dimension=embodiment.dimension,
            proprio=proprio_size(embodiment),
        )
        self.prompts = PromptEncoder(self.tokenizer, self.network.sizes.prompt_tokens)
        self.space: ActionSpaceName = config.action_space
        self.seed = config.seed

    def fresh(self) -> VLANetwork:
        torch.manual_seed(self.seed)
        return make_network(self.network)

    def samples(self, sets: Sequence[DemonstrationSet]) -> Samples:
        return load_samples(sets, self.embodiment, self.space, self.fresh().resample, self.prompts)


def _demonstrations(config: TrainingConfig, embodiment: Embodiment, folder: Path) -> DemonstrationSet:
    stage = config.demonstrations
    if not (folder / DEMONSTRATIONS).exists():
        seeds = range(stage.first_seed, stage.first_seed + stage.episodes)
        collect(folder, _settings(config, embodiment), seeds, workers=stage.workers, progress=_say)
    return DemonstrationSet(folder)


def _encoder(
    config: TrainingConfig, parts: _Parts, sets: Sequence[DemonstrationSet], path: Path
) -> dict[str, torch.Tensor]:
    """Return the weights of a network whose encoder was pretrained."""
    if not path.exists():
        network, samples = parts.fresh(), parts.samples(sets)
        train, test = split(samples, config.pretraining.held_out)
        errors = pretrain(
            network, samples, train, test, config.pretraining, config.fine_tuning, seed=config.seed
        )
        log.info(
            "places of held-out things: median error %s m, 90 %% below %s m", errors.median_m, errors.p90_m
        )
        write_atomic(path.with_suffix(".json"), json.dumps(asdict(errors)).encode())
        write_atomic(path, save({k: v.contiguous() for k, v in network.state_dict().items()}))
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "remove it to pretrain again") from error


def _policy(
    config: TrainingConfig,
    parts: _Parts,
    sets: Sequence[DemonstrationSet],
    encoder: dict[str, torch.Tensor],
    folder: Path,
) -> Bundle:
    """Return a bundle that was fine-tuned on ``sets``, its evaluation still empty."""
    path = folder / "bundle"
    if path.exists():
        return load_bundle(path)
    samples = parts.samples(sets)
    codec, (low, high) = fit_codec(samples, parts.embodiment), fit_proprio(samples)
    network = parts.fresh()
    network.load_state_dict(encoder)
    network.set_proprio_range(low, high)
    history = fine_tune(network, samples, codec, config.fine_tuning, seed=config.seed, folder=folder)
    write_atomic(folder / "history.json", json.dumps(history).encode())
    return write_bundle(
        path, _manifest(config, parts, codec, (low, high), sets), weights_of(network), parts.tokenizer
    )


def _corrections(
    config: TrainingConfig, embodiment: Embodiment, bundle: Bundle, folder: Path, number: int
) -> DemonstrationSet:
    stage = config.corrections
    if not (folder / DEMONSTRATIONS).exists():
        first = stage.first_seed + (number - 1) * stage.episodes
        collect_corrections(
            folder,
            _settings(config, embodiment),
            range(first, first + stage.episodes),
            BundleSource(bundle.path),
            expert_share=stage.expert_share,
            workers=stage.workers,
        )
    return DemonstrationSet(folder)


def _evaluation(config: TrainingConfig, bundle: Bundle, path: Path) -> Report:
    stage = config.evaluation
    if not path.exists():
        report = evaluate(
            BundleSource(bundle.path),
            config.task,
            episodes=stage.episodes,
            seed=stage.seed,
            workers=stage.workers,
            progress=_say,
        )
        save_report(report, path)
    return load_report(path)


def _publish(bundle: Bundle, report: Report, path: Path) -> Bundle:
    """Return the bundle at ``path``: the trained one, with its evaluation in its provenance."""
    if path.exists():
        return load_bundle(path)
    figures = msgspec.to_builtins(report)
    for key in ("policy_id", "episodes"):
        figures.pop(key)
    provenance = msgspec.structs.replace(bundle.manifest.provenance, evaluation=figures)
    manifest = msgspec.structs.replace(bundle.manifest, provenance=provenance)
    return write_bundle(path, manifest, bundle.weights(), bundle.tokenizer_path.read_bytes())


def _manifest(
    config: TrainingConfig,
    parts: _Parts,
    codec: ActionCodec,
    proprio: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
    sets: Sequence[DemonstrationSet],
) -> Manifest:
    task = load_task(config.task)
    return Manifest(
        name=config.name,
        created_ns=time.time_ns(),
        embodiment=parts.embodiment,
        network=msgspec.to_builtins(parts.network),
        cameras=config.cameras,
        instructions={task.name: task.instruction},
        action_space=config.action_space,
        chunk_length=config.chunk_length,
        dt_s=DT_S,
        codec=msgspec.convert(codec.to_dict(), CodecEntry),
        proprio_low=tuple(np.asarray(proprio[0], dtype=np.float32).tolist()),
        proprio_high=tuple(np.asarray(proprio[1], dtype=np.float32).tolist()),
        provenance=Provenance(
            commit=_commit(),
            config=msgspec.to_builtins(config),
            seeds={
                "training": config.seed,
                "first_demonstration": config.demonstrations.first_seed,
                "first_correction": config.corrections.first_seed,
                "evaluation": config.evaluation.seed,
            },
            demonstrations=sum(map(len, sets)),
        ),
    )


def _settings(config: TrainingConfig, embodiment: Embodiment) -> Settings:
    return Settings(
        task=config.task,
        embodiment=embodiment,
        cameras=config.cameras,
        chunk_length=config.chunk_length,
        observe_every=config.demonstrations.observe_every,
        perturbation_m=config.demonstrations.perturbation_m,
    )


def _claim(out: Path, config: TrainingConfig) -> None:
    """Make ``out`` the folder of this run, or check that it is."""
    encoded = msgspec.json.format(msgspec.json.encode(config), indent=1) + b"\n"
    path = out / "config.json"
    if path.exists():
        if path.read_bytes() != encoded:
            raise ConfigError(
                f"{out} holds a run of another configuration", "choose another folder, or remove it"
            )
        log.info("going on with the run in %s", out)
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", "choose another folder")
    write_atomic(path, encoded)


def _commit() -> str:
    """Return the version of the code: the commit if git knows it, else that there is none."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(share_dir()), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip() or "unknown"


def _say(done: int, kept: int) -> None:
    if done % 10 == 0:
        log.info("%d episodes, %d of them successful", done, kept)
