"""The stages of a training run: each reads what those before it left, and leaves one whole thing."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sim_training import run_folder
from sim_training.corrections import collect_corrections
from sim_training.demonstrations import DT_S, DemonstrationSet, Settings, collect
from sim_training.evaluation import BundleSource, Report, evaluate, load_report, rate, save_report
from sim_training.generalisation import SPLITS, evaluate_splits, save_generalisation
from sim_training.grpo.settings import require_libraries as require_grpo
from sim_training.pictures import Pictures, draw_pictures, load_pictures, save_pictures
from sim_training.pretraining import pretrain
from sim_training.progress import episodes, iterations
from sim_training.samples import Samples, fit_codec, fit_proprio, load_samples, split
from sim_training.sft import fine_tune
from sim_training.tasks import load_task
from sim_training.training_config import TrainingConfig
from simplevla.action_codec import ActionCodec
from simplevla.bundle import Bundle, CodecEntry, Manifest, Provenance, load_bundle, write_bundle
from simplevla.embodiment import load_embodiment
from simplevla.errors import ConfigError, MissingExtraError
from simplevla.files import write_atomic
from simplevla.policy.config import NetworkConfig, load_sizes
from simplevla.policy.network import VLANetwork, make_network, weights_of
from simplevla.policy.processor import PromptEncoder, proprio_size
from simplevla.policy.tokenizer import make_tokenizer

log = logging.getLogger(__name__)


class Run:
    """A run as its stages see it: configuration, folder, and what every stage is built from."""

    def __init__(self, folder: Path, config: TrainingConfig) -> None:
        self.folder = folder
        self.config = config
        self.embodiment = load_embodiment(config.embodiment)
        self.task = load_task(config.task)
        if config.start_from is not None:
            _check_start(self.tuned(), config, self.network)

    @cached_property
    def tokenizer(self) -> bytes:
        """The tokenizer of a policy that begins here."""
        return make_tokenizer()

    @cached_property
    def network(self) -> NetworkConfig:
        """The network of a policy that begins here."""
        camera = self.embodiment.camera(self.config.cameras[0])
        return NetworkConfig(
            sizes=load_sizes(self.config.network),
            frame_height=camera.height,
            frame_width=camera.width,
            n_cameras=len(self.config.cameras),
            chunk_length=self.config.chunk_length,
            dimension=self.embodiment.dimension,
            proprio=proprio_size(self.embodiment),
        )

    def fresh_network(self) -> VLANetwork:
        """Return the network with fresh weights, the same at each call."""
        torch.manual_seed(self.config.seed)
        return make_network(self.network)

    def settings(self) -> Settings:
        """Return how demonstrations and corrections are collected."""
        stage = self.config.demonstrations
        if stage is None:
            raise ConfigError("this run has no demonstrations", "give demonstrations")
        return Settings(
            task=self.config.task,
            embodiment=self.embodiment,
            cameras=self.config.cameras,
            chunk_length=self.config.chunk_length,
            observe_every=stage.observe_every,
            perturbation_m=stage.perturbation_m,
            randomisation=self.config.randomisation,
        )

    def sets(self, corrections: int) -> list[DemonstrationSet]:
        """Return the demonstrations and the first ``corrections`` sets of corrections."""
        folders = [run_folder.DEMONSTRATIONS]
        folders += [run_folder.corrections_folder(number) for number in range(1, corrections + 1)]
        return [DemonstrationSet(self.folder / name) for name in folders]

    def samples(self, sets: Sequence[DemonstrationSet]) -> Samples:
        """Return what a network learns from ``sets``."""
        prompts = PromptEncoder(self.tokenizer, self.network.sizes.prompt_tokens)
        resample = self.fresh_network().resample
        return load_samples(sets, self.embodiment, self.config.action_space, resample, prompts)

    def tuned(self) -> Bundle:
        """Return the policy before reinforcement learning."""
        if self.config.start_from is not None:
            return load_bundle(Path(self.config.start_from))
        return load_bundle(self.folder / run_folder.policy(self.config.corrections.rounds))

    def trained(self) -> Bundle:
        """Return the policy after all training, its evaluation still empty."""
        if self.config.grpo is None:
            return self.tuned()
        return load_bundle(self.folder / run_folder.GRPO_POLICY)

    def report(self) -> Report:
        """Return the final evaluation."""
        return load_report(self.folder / run_folder.EVALUATION)


def require_libraries(config: TrainingConfig) -> None:
    """Refuse a run whose later stages would find a library missing.

    Raises:
        MissingExtraError: one is not installed.
    """
    wanted = (("sapien", "sim"), ("cv2", "sim"), ("matplotlib", "train"), ("jinja2", "train"))
    for library, extra in wanted:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, extra)
    if config.grpo is not None:
        require_grpo()


def demonstrate(run: Run) -> str:
    """Let the expert try the task, and keep the episodes that it masters."""
    stage, settings = run.config.demonstrations, run.settings()
    assert stage is not None
    seeds = range(stage.first_seed, stage.first_seed + stage.episodes)
    with episodes(stage.episodes, "demonstrating") as progress:
        manifest = collect(
            run.folder / run_folder.DEMONSTRATIONS,
            settings,
            seeds,
            workers=stage.workers,
            progress=progress,
        )
    return f"kept {len(manifest.episodes)} of {manifest.tried} episodes"


def draw(run: Run) -> str:
    """Draw pictures of random scenes, with where things are."""
    config = run.config
    assert config.pictures is not None
    pictures = draw_pictures(
        config.pictures, config.task, run.embodiment, config.cameras, run.network, config.randomisation
    )
    save_pictures(pictures, run.folder / run_folder.PICTURES)
    return f"{len(pictures)} pictures of {config.pictures.scenes} scenes"


def pretrain_encoder(run: Run) -> str:
    """Teach the image encoder where things are."""
    config = run.config
    assert config.pretraining is not None
    assert config.fine_tuning is not None
    network = run.fresh_network()
    if config.pictures is not None:
        seen: Pictures | Samples = load_pictures(run.folder / run_folder.PICTURES)
    else:
        seen = run.samples(run.sets(0))
    train, test = split(seen, config.pretraining.held_out)
    errors = pretrain(network, seen, train, test, config.pretraining, config.fine_tuning, seed=config.seed)
    write_atomic(run.folder / run_folder.ENCODER_ERRORS, json.dumps(asdict(errors)).encode())
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    write_atomic(run.folder / run_folder.ENCODER, save(weights))
    millimetres = ", ".join(f"{1000 * error:.1f}" for error in errors.median_m)
    return f"places of held-out things: median error {millimetres} mm"


def fine_tune_policy(run: Run, *, number: int) -> str:
    """Fine-tune on the demonstrations and the first ``number`` sets of corrections."""
    config, path = run.config, run.folder / run_folder.policy(number)
    assert config.fine_tuning is not None
    sets = run.sets(number)
    samples = run.samples(sets)
    codec, (low, high) = fit_codec(samples, run.embodiment), fit_proprio(samples)
    network = run.fresh_network()
    if config.pretraining is not None:
        network.load_state_dict(_encoder(run.folder / run_folder.ENCODER))
    network.set_proprio_range(low, high)
    folder = path.parent
    history = fine_tune(network, samples, codec, config.fine_tuning, seed=config.seed, folder=folder)
    write_atomic(folder / "history.json", json.dumps(history).encode())
    write_bundle(path, _manifest(run, codec, (low, high), sets), weights_of(network), run.tokenizer)
    return f"{len(samples)} samples of {sum(map(len, sets))} episodes"


def correct(run: Run, *, number: int) -> str:
    """Let the latest policy act and the expert say what it would have done."""
    stage = run.config.corrections
    first = stage.first_seed + (number - 1) * stage.episodes
    manifest = collect_corrections(
        run.folder / run_folder.corrections_folder(number),
        run.settings(),
        range(first, first + stage.episodes),
        BundleSource(run.folder / run_folder.policy(number - 1)),
        expert_share=stage.expert_share,
        workers=stage.workers,
    )
    return f"{len(manifest.episodes)} episodes"


def evaluate_before(run: Run) -> str:
    """Evaluate the policy that reinforcement learning starts from."""
    return _evaluate(run, run.tuned(), run_folder.BEFORE)


def reinforce(run: Run) -> str:
    """Let the policy try, and learn from what worked."""
    from sim_training.grpo.driver import train

    settings, tuned = run.config.grpo, run.tuned()
    assert settings is not None
    with iterations(settings.iterations) as progress:
        weights = train(
            tuned,
            run.config.task,
            settings,
            run.folder / run_folder.GRPO,
            randomisation=run.config.randomisation,
            progress=progress,
        )
    before = tuned.manifest.provenance
    provenance = msgspec.structs.replace(
        before,
        commit=run_folder.commit(),
        config=msgspec.to_builtins(run.config),
        seeds={**before.seeds, "grpo": settings.seed},
    )
    manifest = msgspec.structs.replace(
        tuned.manifest, name=run.config.name, created_ns=time.time_ns(), provenance=provenance
    )
    tensors = {name: tensor.numpy() for name, tensor in load_file(weights).items()}
    write_bundle(run.folder / run_folder.GRPO_POLICY, manifest, tensors, tuned.tokenizer_path.read_bytes())
    return f"{settings.iterations} iterations"


def evaluate_after(run: Run) -> str:
    """Evaluate the trained policy."""
    return _evaluate(run, run.trained(), run_folder.EVALUATION)


def publish(run: Run) -> str:
    """Write the result: the trained policy with its evaluation in its provenance."""
    bundle, report = run.trained(), run.report()
    figures = msgspec.to_builtins(report)
    for key in ("policy_id", "episodes"):
        figures.pop(key)
    provenance = msgspec.structs.replace(bundle.manifest.provenance, evaluation=figures)
    manifest = msgspec.structs.replace(bundle.manifest, provenance=provenance)
    path = run.folder / run_folder.BUNDLE
    final = write_bundle(path, manifest, bundle.weights(), bundle.tokenizer_path.read_bytes())
    return f"policy {final.id[:12]}, {final.weights_path.stat().st_size / 1e6:.1f} MB"


def evaluate_generalisation(run: Run) -> str:
    """Evaluate the trained policy on seen scenes and on each kind of unseen ones."""
    stage, splits = run.config.evaluation, run.task.splits
    with episodes(stage.splits * (1 + len(splits)), "evaluating splits") as progress:
        found = evaluate_splits(
            BundleSource(run.trained().path),
            run.config.task,
            splits,
            episodes=stage.splits,
            seed=stage.seed,
            workers=stage.workers,
            progress=progress,
        )
    save_generalisation(found, run.folder / SPLITS)
    unseen = ", ".join(f"{name} {rate(report.success)}" for name, report in found.unseen.items())
    return f"seen {rate(found.seen.success)}; unseen: {unseen}"


def film(run: Run) -> str:
    """Film the first episodes of the evaluation, before and after reinforcement learning."""
    from sim_training.videos import film_policies

    stage = run.config.evaluation
    sources = {"after": BundleSource(run.trained().path)}
    if run.config.grpo is not None:
        sources = {"before": BundleSource(run.tuned().path), **sources}
    seeds = range(stage.seed, stage.seed + stage.videos)
    film_policies(sources, run.config.task, seeds, run.folder / run_folder.VIDEOS)
    return f"{stage.videos} episodes of {' and '.join(sources)}"


def report(run: Run) -> str:
    """Make the page that shows the run."""
    from sim_training.report import make_report

    return make_report(run.folder).name


def _encoder(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "remove it to pretrain again") from error


def _evaluate(run: Run, bundle: Bundle, name: str) -> str:
    stage = run.config.evaluation
    with episodes(stage.episodes, "evaluating") as progress:
        found = evaluate(
            BundleSource(bundle.path),
            run.config.task,
            episodes=stage.episodes,
            seed=stage.seed,
            workers=stage.workers,
            progress=progress,
        )
    save_report(found, run.folder / name)
    return str(rate(found.success))


def _manifest(
    run: Run,
    codec: ActionCodec,
    proprio: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
    sets: Sequence[DemonstrationSet],
) -> Manifest:
    config = run.config
    assert config.demonstrations is not None
    return Manifest(
        name=config.name,
        created_ns=time.time_ns(),
        embodiment=run.embodiment,
        network=msgspec.to_builtins(run.network),
        cameras=config.cameras,
        instructions={run.task.name: run.task.instruction},
        action_space=config.action_space,
        chunk_length=config.chunk_length,
        dt_s=DT_S,
        codec=msgspec.convert(codec.to_dict(), CodecEntry),
        proprio_low=tuple(np.asarray(proprio[0], dtype=np.float32).tolist()),
        proprio_high=tuple(np.asarray(proprio[1], dtype=np.float32).tolist()),
        provenance=Provenance(
            commit=run_folder.commit(),
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


def _check_start(bundle: Bundle, config: TrainingConfig, network: NetworkConfig) -> None:
    """Refuse a bundle that is not the policy that the configuration speaks of."""
    manifest = bundle.manifest
    for key, said, held in (
        ("embodiment", load_embodiment(config.embodiment).name, manifest.embodiment.name),
        ("cameras", config.cameras, manifest.cameras),
        ("action_space", config.action_space, manifest.action_space),
        ("chunk_length", config.chunk_length, manifest.chunk_length),
    ):
        if said != held:
            raise ConfigError(
                f"{key} is {said}, and that of the bundle {bundle.path} is {held}",
                "correct the configuration",
            )
    if msgspec.json.decode(msgspec.json.encode(network)) != manifest.network:  # lists, as the manifest has
        raise ConfigError(
            f"the bundle {bundle.path} has another network than {config.network}",
            "correct the configuration",
        )
    if config.task not in manifest.instructions:
        raise ConfigError(
            f"the bundle {bundle.path} knows no task {config.task}",
            f"choose one of: {', '.join(manifest.instructions)}",
        )
