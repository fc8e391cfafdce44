"""How good a policy is in simulation: episodes it has never seen, counted with an interval.

Actions are executed as the real stack executes them: the K actions of a chunk are played, then the
policy looks again. Episodes are numbered by their seeds; seeds from 10 000 up are for evaluation
alone, so that no policy is judged on scenes it was trained on.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from sim_training.randomisation import Randomisation
from sim_training.seeds import FIRST_EVALUATION_SEED
from sim_training.splits import Scenes, require_split
from sim_training.tasks import Task, load_task
from sim_training.tasks.base import TABLE_TOP_M
from simplevla.action_chunk import ActionChunk, check_chunk
from simplevla.bundle import Bundle, load_bundle
from simplevla.embodiment import Embodiment
from simplevla.errors import ConfigError, MissingExtraError
from simplevla.files import write_atomic
from simplevla.intervals import Rate, wilson
from simplevla.observation import Observation
from simplevla.session_record import SessionRecord, simulated
from simplevla.trial import FailureCode, Strategy

if TYPE_CHECKING:
    from sim_training.world import World

SCHEMA = 1

_VIDEO_EPISODES = 4
_VIDEO_RATE_HZ = 10.0


class Policy(Protocol):
    """Anything that answers observations.

    Attributes:
        id: what a report calls it; the bundle's identity if it has one.
        embodiment: the robot it is for.
        cameras: the cameras it looks through.
    """

    id: str
    embodiment: Embodiment
    cameras: tuple[str, ...]

    def act(self, observation: Observation) -> ActionChunk:
        """Return the next actions."""


PolicySource = Callable[[], Policy]
"""Makes a policy in the process that uses it; must be picklable where there are several workers."""


class EpisodeResult(msgspec.Struct, frozen=True, kw_only=True):
    """How one episode went.

    Attributes:
        region: where the object started, as the task names it; empty in older reports.
    """

    seed: int
    success: bool
    failure: FailureCode
    strategy: Strategy
    actions: int
    region: str = ""


class Share(msgspec.Struct, frozen=True):
    """A success rate with its 95 % Wilson interval, as JSON shows it."""

    successes: int
    trials: int
    rate: float
    low: float
    high: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """An evaluation; the same policy, task, seeds and machine give the same report.

    Attributes:
        success, pushcuts: over all episodes, with their 95 % Wilson intervals; a pushcut is a
            success by pushing.
        strategies, failures: how many episodes ended so.
        mean_actions: over the successful episodes.
        regions: success of the episodes that started in each region; empty in older reports.
        scenes: which part of the task's scenes the episodes were drawn from.
    """

    policy_id: str
    task: str
    embodiment: str
    randomisation: tuple[str, ...]
    seed: int
    success: Share
    pushcuts: Share
    strategies: dict[str, int]
    failures: dict[str, int]
    mean_actions: float | None
    episodes: tuple[EpisodeResult, ...]
    regions: dict[str, Share] = {}
    scenes: Scenes = Scenes.ALL
    schema: int = SCHEMA


def evaluate(
    source: PolicySource,
    task: str,
    *,
    episodes: int,
    seed: int = FIRST_EVALUATION_SEED,
    randomisation: Randomisation | None = None,
    record: SessionRecord | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Let a policy try the episodes ``seed`` to ``seed + episodes - 1``.

    Args:
        source: makes the policy, in every worker anew; ``BundleSource`` for a bundle.
        task: name of the task.
        episodes: how many.
        seed: of the first one.
        randomisation: what differs between scenes; nothing by default.
        record: a robot's calibration: cameras and bases stand, and everything is late, as it says.
        workers: processes; with 1 everything happens in this one.
        progress: called with (episodes done, successes) after each episode.

    Raises:
        ConfigError: the task is unknown or has no such scenes, there are no episodes, or the seeds
            belong to training.
    """
    randomisation = randomisation or Randomisation.none()
    require_split(load_task(task), randomisation.scenes)
    if episodes < 1:
        raise ConfigError(f"{episodes} episodes are nothing to evaluate", "evaluate at least one")
    if seed < FIRST_EVALUATION_SEED:
        raise ConfigError(
            f"seed {seed} may have been trained on", f"choose a seed of {FIRST_EVALUATION_SEED} or more"
        )
    job = _Job(source, task, randomisation, record)
    policy = source()
    results: list[EpisodeResult] = []
    for result in _map(job, policy, range(seed, seed + episodes), workers):
        results.append(result)
        if progress is not None:
            progress(len(results), sum(r.success for r in results))
    return _report(job, policy, seed, results)


def rate(share: Share) -> Rate:
    """Return a share of a report as the rate that prints itself."""
    return Rate(*msgspec.structs.astuple(share))


def save_report(report: Report, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def load_report(path: Path) -> Report:
    """Return the report at ``path``.

    Raises:
        ConfigError: it cannot be read or is no report.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} is no evaluation: {error}", "evaluate again") from error


def record_video(
    source: PolicySource,
    task: str,
    path: Path,
    *,
    seed: int,
    randomisation: Randomisation,
    record: SessionRecord | None = None,
) -> None:
    """Write an MP4 of the first camera through the first four episodes from ``seed`` on.

    Raises:
        ConfigError: no video can be written here.
        MissingExtraError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise MissingExtraError("opencv-python", "sim") from error
    policy = source()
    camera = policy.embodiment.camera(policy.cameras[0])
    with (
        tempfile.TemporaryDirectory() as folder,
        Bench(policy, task, randomisation, record) as bench,
    ):
        scratch = Path(folder) / "video.mp4"
        size = (camera.width, camera.height)
        writer = cv2.VideoWriter(str(scratch), cv2.VideoWriter.fourcc(*"mp4v"), _VIDEO_RATE_HZ, size)
        if not writer.isOpened():
            raise ConfigError("OpenCV cannot write MP4 here", "install opencv-python from PyPI")

        def keep(world: World) -> None:
            writer.write(np.ascontiguousarray(world.render(camera.name)[..., ::-1]))

        for episode in range(seed, seed + _VIDEO_EPISODES):
            bench.run(episode, after_action=keep)
        writer.release()
        write_atomic(path, scratch.read_bytes())


@dataclass(frozen=True)
class BundleSource:
    """Makes the policy of the bundle at ``path``, run by the reference network in torch."""

    path: Path

    def __call__(self) -> BundlePolicy:
        """Return the policy.

        Raises:
            BundleError: the bundle is broken.
            MissingExtraError: torch is not installed.
        """
        return BundlePolicy(load_bundle(self.path))


class BundlePolicy:
    """A bundle's network and processor, greedy, one observation at a time."""

    def __init__(self, bundle: Bundle) -> None:
        try:
            import torch

            from simplevla.policy.network import load_network
        except ImportError as error:
            raise MissingExtraError("torch", "train") from error
        from simplevla.policy.processor import PolicyProcessor

        torch.set_num_threads(1)  # two threads on a busy machine are far slower than one
        self.id = bundle.id
        self.embodiment = bundle.manifest.embodiment
        self.cameras = bundle.manifest.cameras
        self.tasks = tuple(bundle.manifest.instructions)
        self._torch = torch
        self._processor = PolicyProcessor.from_bundle(bundle)
        self._network = load_network(bundle)

    def act(self, observation: Observation) -> ActionChunk:
        """Return the greedy chunk for ``observation``."""
        torch = self._torch
        inputs = {k: torch.from_numpy(v) for k, v in self._processor.inputs(observation).items()}
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._network(**inputs).numpy()
        return self._processor.chunk(logits, observation, self.id)


@dataclass(frozen=True)
class _Job:
    source: PolicySource
    task: str
    randomisation: Randomisation
    record: SessionRecord | None = None


class Bench:
    """One world and one policy that try episodes one after another; a context manager.

    Args:
        policy: the policy.
        task: name of the task.
        randomisation: what differs between scenes.
        record: a robot's calibration, as which the world is built.

    Attributes:
        world: in which it happens.
    """

    def __init__(
        self,
        policy: Policy,
        task: str,
        randomisation: Randomisation,
        record: SessionRecord | None = None,
    ) -> None:
        from sim_training.world import World

        self._policy = policy
        self._task: Task = load_task(task)
        if record is not None:
            randomisation = randomisation.measured(record, policy.embodiment)
        robot = simulated(policy.embodiment, record, TABLE_TOP_M)
        self.world = World(robot, self._task, randomisation=randomisation)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.world.close()

    def run(self, seed: int, after_action: Callable[[World], None] | None = None) -> EpisodeResult:
        """Return how the episode ``seed`` went; it ends with success, the limit, or a lost object.

        ``after_action`` is shown the world every action's time, and changes nothing.
        """
        from sim_training.episode import observe, play

        world, policy = self.world, self._policy
        world.reset(seed)
        done, success = 0, False
        while done < self._task.step_limit and not success and world.failure() is not FailureCode.DROPPED:
            chunk = policy.act(observe(world, policy.cameras, done - 1))
            check_chunk(chunk, policy.embodiment)
            actions = chunk.actions[: self._task.step_limit - done]
            played = play(world, actions, chunk.dt_s, after_action=after_action)
            done, success = done + played.actions, played.success
        return EpisodeResult(
            seed=seed,
            success=success,
            failure=FailureCode.NONE if success else world.failure(),
            strategy=world.strategy(),
            actions=done,
            region=world.region,
        )


def _map(job: _Job, policy: Policy, seeds: Sequence[int], workers: int) -> Iterator[EpisodeResult]:
    if workers <= 1:
        with Bench(policy, job.task, job.randomisation, job.record) as bench:
            yield from map(bench.run, seeds)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (job,)) as pool:
        yield from pool.imap(_run_in_worker, seeds)


def _report(job: _Job, policy: Policy, seed: int, results: Sequence[EpisodeResult]) -> Report:
    wins = [result for result in results if result.success]
    pushcuts = sum(result.strategy is Strategy.PUSH for result in wins)
    return Report(
        policy_id=policy.id,
        task=job.task,
        embodiment=policy.embodiment.name,
        randomisation=tuple(job.randomisation.names()),
        seed=seed,
        success=Share(*wilson(len(wins), len(results))),
        pushcuts=Share(*wilson(pushcuts, len(results))),
        strategies=dict(sorted(Counter(r.strategy.value for r in results).items())),
        failures=dict(sorted(Counter(r.failure.value for r in results if not r.success).items())),
        mean_actions=float(np.mean([r.actions for r in wins])) if wins else None,
        episodes=tuple(results),
        regions=_regions(results),
        scenes=job.randomisation.scenes,
    )


def _regions(results: Sequence[EpisodeResult]) -> dict[str, Share]:
    tried = Counter(result.region for result in results)
    wins = Counter(result.region for result in results if result.success)
    return {name: Share(*wilson(wins[name], count)) for name, count in sorted(tried.items())}


_bench: Any = None


def _start_worker(job: _Job) -> None:
    global _bench  # noqa: PLW0603 (one world and one policy for each process of the pool)
    _bench = Bench(job.source(), job.task, job.randomisation, job.record)


def _run_in_worker(seed: int) -> EpisodeResult:
    result: EpisodeResult = _bench.run(seed)
    return result
