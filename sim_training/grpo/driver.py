"""The loop of reinforcement learning: sample groups, keep those that teach, update, look, save.

Every draw is a function of (seed, iteration), so that a run that was killed goes on as if it had not
been.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sim_training.grpo import algorithm, curriculum
from sim_training.grpo.actor import Actor, open_actor
from sim_training.grpo.algorithm import Group
from sim_training.grpo.checkpoint import Progress, checkpoints, load_progress, save_checkpoint
from sim_training.grpo.engine import WEIGHTS
from sim_training.grpo.experience import Answer, Environments, Episode, Looks, Trajectory
from sim_training.grpo.settings import GrpoSettings
from sim_training.grpo.tracking import Heard, tracking
from sim_training.history import Counted, Iteration, append_iteration
from sim_training.randomisation import PLACEMENT_KEY, Randomisation, generator
from sim_training.rollouts import Environments as Simulations
from sim_training.rollouts import settings_of
from sim_training.seeds import FIRST_EVALUATION_SEED, FIRST_VALIDATION_SEED
from sim_training.splits import draw_scene
from sim_training.tasks import load_task
from simplevla.bundle import Bundle
from simplevla.embodiment import Embodiment
from simplevla.errors import UnavailableError
from simplevla.files import write_atomic

log = logging.getLogger(__name__)

POLICY = "policy.safetensors"
BEST = "best.safetensors"
RegionOf = Callable[[int], str]


def train(
    bundle: Bundle,
    task: str,
    settings: GrpoSettings,
    folder: Path,
    *,
    randomisation: Randomisation | None = None,
    progress: Heard | None = None,
) -> Path:
    """Train the bundle's policy on ``task``, from the last checkpoint in ``folder`` if there is one.

    Args:
        folder: gets history.jsonl, tensorboard/, the checkpoints and the policy.
        randomisation: what differs from episode to episode; nothing but the placement by default.
        progress: hears of every iteration.

    Returns:
        The trained weights, one safetensors file with the names of the network's state.

    Raises:
        ConfigError: the checkpoint is of another network, or damaged.
        UnavailableError: a worker died; starting again goes on.
    """
    remaining = settings.placement.restarts
    while True:
        try:
            return _train(bundle, task, settings, folder, randomisation, progress)
        except UnavailableError as error:
            if not remaining:
                raise
            log.warning("%s; going on from the last checkpoint", error.message)
            remaining -= 1


def _train(
    bundle: Bundle,
    task: str,
    settings: GrpoSettings,
    folder: Path,
    randomisation: Randomisation | None,
    progress: Heard | None,
) -> Path:
    placement = settings.placement
    rollouts = settings_of(
        bundle,
        task,
        workers=placement.environment_workers,
        slots=placement.slots,
        horizon=settings.sampling.horizon or load_task(task).step_limit,
        randomisation=randomisation,
    )
    with ExitStack() as stack:
        hosts = None
        if placement.engine == "ray":
            from sim_training.grpo.cluster import RayHosts, cluster

            stack.enter_context(cluster(placement))
            hosts = RayHosts(rollouts)
        environments = stack.enter_context(Simulations(rollouts, hosts))
        actor = stack.enter_context(open_actor(bundle, environments.instructions, settings))
        varied = bundle.manifest.action_codec().varied
        return learn(
            actor,
            environments,
            varied,
            settings,
            folder,
            region_of=regions_of(task, bundle.manifest.embodiment, randomisation),
            progress=progress,
        )


def regions_of(task: str, embodiment: Embodiment, randomisation: Randomisation | None = None) -> RegionOf:
    """Return what tells the region that a seed's scene starts in."""
    known, scenes = load_task(task), (randomisation or Randomisation.none()).scenes

    def region_of(seed: int) -> str:
        placements = draw_scene(known, generator(seed, PLACEMENT_KEY), embodiment, scenes)
        return known.traits(placements).region

    return region_of


def learn(
    actor: Actor,
    environments: Environments,
    varied: NDArray[np.bool_],
    settings: GrpoSettings,
    folder: Path,
    *,
    region_of: RegionOf | None = None,
    progress: Heard | None = None,
) -> Path:
    """Run the loop; see :func:`train`.

    Args:
        varied: (D,) which action dimensions count.
        region_of: where the object of a seed starts; without it, what the environments say, and no
            curriculum.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _resume(actor, folder)
    with tracking(settings.tracking, folder) as track:
        while state.iteration < settings.iterations:
            iteration = _iterate(state, actor, environments, varied, settings, region_of)
            if iteration.greedy is not None and iteration.greedy.successes > state.best:
                state.best = iteration.greedy.successes
                _export(actor, folder / BEST)
            state.iteration += 1
            state.elapsed_s = iteration.elapsed_s
            append_iteration(folder, iteration)
            track(iteration)
            if progress is not None:
                progress(iteration)
            if state.iteration % settings.save_every == 0 or state.iteration == settings.iterations:
                save_checkpoint(folder, state, actor.save)
    best = settings.deliver == "best" and (folder / BEST).exists()
    source = folder / BEST if best else checkpoints(folder)[-1] / WEIGHTS
    write_atomic(folder / POLICY, source.read_bytes())
    return folder / POLICY


def _iterate(
    state: Progress,
    actor: Actor,
    environments: Environments,
    varied: NDArray[np.bool_],
    settings: GrpoSettings,
    region_of: RegionOf | None,
) -> Iteration:
    """Sample, update and look once."""
    clock = _Clock(environments)
    number, temperature = state.iteration, settings.temperature(state.iteration)
    with clock.measure("rollouts"):
        sampled, groups, kept = _sample(state, actor, environments, settings, region_of)
    with clock.measure("log_probs"):
        _add_log_probs(state.ready, actor, varied, settings, temperature)
    chosen = state.ready[: settings.sampling.groups]
    with clock.measure("update"):
        figures = _update(chosen, actor, varied, settings, number, temperature)
    state.ready = state.ready[len(chosen) :] if settings.sampling.keep_surplus else []
    greedy = None
    if settings.evaluate_every and (number + 1) % settings.evaluate_every == 0:
        with clock.measure("evaluation"):
            greedy = _evaluate(actor, environments, settings)
    seconds = clock.seconds()
    return Iteration(
        iteration=number,
        sampled=counted(sampled),
        regions={name: counted(part) for name, part in curriculum.by_region(sampled).items()},
        greedy=greedy,
        groups=groups,
        kept_groups=kept,
        updated_groups=len(chosen),
        loss=figures["loss"],
        entropy=figures["entropy"],
        ratio=figures["ratio"],
        clip_fraction=figures["clip"],
        gradient_norm=figures["gradient_norm"],
        learning_rate=settings.learning_rate(number),
        temperature=temperature,
        horizon=settings.horizon(number),
        seconds=seconds,
        elapsed_s=state.elapsed_s + clock.elapsed_s(),
    )


def _sample(
    state: Progress,
    actor: Actor,
    environments: Environments,
    settings: GrpoSettings,
    region_of: RegionOf | None,
) -> tuple[list[Trajectory], int, int]:
    """Sample groups and add those that teach to ``state.ready``.

    Returns:
        Every episode that was played, how many groups that were, and how many of them teach.
    """
    sampling = settings.sampling
    temperature = settings.temperature(state.iteration)
    state.ready = [g for g in state.ready if state.iteration - _version(g) <= sampling.oldest]
    played: list[Trajectory] = []
    sampled = kept = 0

    def act(looks: Looks) -> Answer:
        return actor.act(looks, key=(settings.seed, state.iteration), temperature=temperature)

    for round_number in range(sampling.rounds):
        if len(state.ready) >= sampling.groups:
            break
        again = state.failed[: sampling.sampled_groups // 2]
        state.failed = state.failed[len(again) :]
        seeds = curriculum.draw_seeds(
            sampling.sampled_groups - len(again),
            (settings.seed, state.iteration, round_number),
            # Advantages are taken by initial state: no two groups of one update may share theirs.
            avoid={group[0].episode.seed for group in [*again, *state.failed, *state.ready]},
            region_of=region_of if sampling.curriculum else None,
            success=state.regions,
        )
        wanted = [
            Episode(group[0].episode.seed, len(group) + m)
            for group in again
            for m in range(sampling.group_size)
        ]
        wanted += [Episode(seed, member) for seed in seeds for member in range(sampling.group_size)]
        found = [
            replace(t, version=state.iteration, region=region_of(t.episode.seed) if region_of else t.region)
            for t in environments.collect(wanted, act, horizon=settings.horizon(state.iteration))
        ]
        played += found
        before = {group[0].episode.seed: group for group in again}
        for new in algorithm.group_by_seed(found):
            earlier = before.get(new[0].episode.seed, [])
            group = [*earlier, *new]
            sampled += 1
            if algorithm.worth_learning(group, sampling):
                kept += 1
                state.ready.append(group)
            elif sampling.retry_unanimous and not earlier and algorithm.accuracy(group) == 0:
                state.failed.append(group)
        state.failed = [g for g in state.failed if state.iteration - _version(g) <= sampling.oldest]
    curriculum.remember(state.regions, played, sampling.curriculum_memory)
    return played, sampled, kept


def _add_log_probs(
    groups: Sequence[Group],
    actor: Actor,
    varied: NDArray[np.bool_],
    settings: GrpoSettings,
    temperature: float,
) -> None:
    """Give every trajectory of ``groups`` that has none the log-probabilities of what it did.

    The policy has not changed since they were sampled.
    """
    places = [(g, i) for g in groups for i, t in enumerate(g) if t.log_probs is None]
    multiple = settings.update.micro_batch * settings.placement.learners
    for first in range(0, len(places), settings.update.mini_batch):
        part = places[first : first + settings.update.mini_batch]
        batch = algorithm.make_batch([group[i] for group, i in part], varied, multiple=multiple)
        values = actor.log_probs(batch, temperature=temperature).numpy()
        looks = batch.batch["look_mask"].shape[1]
        for row, (group, index) in enumerate(part):
            upto = group[index].looks
            group[index] = replace(group[index], log_probs=values[row].reshape(looks, -1)[:upto].copy())


def _update(
    groups: Sequence[Group],
    actor: Actor,
    varied: NDArray[np.bool_],
    settings: GrpoSettings,
    number: int,
    temperature: float,
) -> dict[str, float]:
    """Learn from ``groups``; return means over their tokens, zeros if there are none."""
    if not groups:
        log.warning("iteration %d: no group had an accuracy worth learning from", number)
        return dict.fromkeys(("loss", "entropy", "ratio", "clip", "gradient_norm"), 0.0)
    update = settings.update
    trajectories = [trajectory for group in groups for trajectory in group]
    batch = algorithm.make_batch(trajectories, varied, multiple=update.mini_batch)
    if update.rollout_correction == "off":
        batch.batch["old_log_probs"] = batch.batch["rollout_log_probs"]
    else:
        batch.batch["old_log_probs"] = actor.log_probs(batch, temperature=temperature)
        algorithm.add_correction(batch, update)
    if update.kl:
        batch.batch["ref_log_probs"] = actor.reference_log_probs(batch, temperature=temperature)
    algorithm.add_advantages(batch, normalise=update.normalise)
    return actor.update(
        batch,
        temperature=temperature,
        learning_rate=settings.learning_rate(number),
        seed=settings.seed * 1_000_003 + number,
    )


def _evaluate(actor: Actor, environments: Environments, settings: GrpoSettings) -> Counted:
    """Return how the greedy policy does on seeds that nothing else uses, the same each time."""
    available = FIRST_EVALUATION_SEED - FIRST_VALIDATION_SEED
    count = min(settings.evaluation_episodes, available)
    episodes = [Episode(FIRST_VALIDATION_SEED + i) for i in range(count)]
    return counted(
        environments.collect(episodes, lambda looks: actor.act(looks, key=(settings.seed,), temperature=0))
    )


def counted(trajectories: Sequence[Trajectory]) -> Counted:
    """Return how many succeeded, and how."""
    good = [trajectory for trajectory in trajectories if trajectory.success]
    return Counted(
        episodes=len(trajectories),
        successes=len(good),
        strategies=dict(Counter(t.strategy for t in good if t.strategy)),
    )


def _resume(actor: Actor, folder: Path) -> Progress:
    found = checkpoints(folder)
    if not found:
        return Progress()
    actor.load(found[-1])
    return load_progress(found[-1])


def _export(actor: Actor, path: Path) -> None:
    """Write the policy's weights, whole, in the place of what ``path`` held."""
    scratch = path.with_name(f".{path.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    actor.save(scratch)
    (scratch / WEIGHTS).replace(path)
    shutil.rmtree(scratch)


def _version(group: Group) -> int:
    return min(trajectory.version for trajectory in group)


class _Clock:
    """Where the time of one iteration goes."""

    def __init__(self, environments: Environments) -> None:
        self._start = time.perf_counter()
        self._environments = environments
        self._before = dict(environments.seconds)
        self._spent: Counter[str] = Counter()

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - start  # type: ignore[assignment]

    def seconds(self) -> dict[str, float]:
        inside = {k: v - self._before.get(k, 0.0) for k, v in self._environments.seconds.items()}
        return {**inside, **dict(self._spent)}

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start
