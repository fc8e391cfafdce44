"""Rollouts: many episodes at once, simulated in processes of their own, with one policy for all.

Each process holds several worlds in two lanes. While the policy answers what one lane sees, the process
simulates the other, so that neither waits. A slot whose episode ends begins the next; the policy is
asked about slots that look, and about no others.
"""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sim_training.grpo.experience import Act, Answer, Episode, Looks, Trajectory
from sim_training.randomisation import Randomisation
from sim_training.rollout_worker import Command, Ended, News, RolloutSettings, Worker
from sim_training.tasks import load_task
from simplevla.bundle import Bundle
from simplevla.errors import SimplevlaError, UnavailableError
from simplevla.policy.config import network_config

logger = logging.getLogger(__name__)

LANES = 2


def settings_of(
    bundle: Bundle,
    task: str,
    *,
    workers: int,
    slots: int,
    horizon: int,
    randomisation: Randomisation | None = None,
    small_pictures: bool = True,
) -> RolloutSettings:
    """Return the settings under which a bundle's policy plays ``task``."""
    manifest = bundle.manifest
    return RolloutSettings(
        task=task,
        embodiment=manifest.embodiment,
        cameras=manifest.cameras,
        network=network_config(manifest.network, source=f"{bundle.path}: network"),
        action_space=manifest.action_space,
        codec=manifest.action_codec(),
        dt_s=manifest.dt_s,
        horizon=horizon,
        workers=workers,
        slots=slots,
        small_pictures=small_pictures,
        randomisation=randomisation or Randomisation.none(),
    )


class Hosts(Protocol):
    """Workers somewhere, each of which answers its commands in their order."""

    def __len__(self) -> int:
        """Return how many there are."""

    def send(self, host: int, command: Command) -> None:
        """Hand a command to a worker."""

    def receive(self) -> list[tuple[int, News]]:
        """Wait for at least one answer; return (worker, answer) of all that are there."""

    def close(self) -> None:
        """End the workers."""


class Environments:
    """Worlds that play episodes with a policy; a context manager.

    Attributes:
        instructions: what the policy may be told; a look's prompt is an index into it.
        seconds: seconds spent so far, summed over processes: "physics", "rendering", "kinematics" and
            "scene" (building it) in the workers, "inference", "transport" (sending, receiving and putting
            together) and "waiting" (for the workers) in this process.
    """

    def __init__(self, settings: RolloutSettings, hosts: Hosts | None = None) -> None:
        self.instructions = (load_task(settings.task).instruction,)
        self.seconds: dict[str, float] = {}
        self._slots = settings.slots
        self._hosts = hosts or Processes(settings)

    def __enter__(self) -> Environments:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hosts.close()

    def collect(self, episodes: Sequence[Episode], act: Act, *, horizon: int = 0) -> list[Trajectory]:
        """Play every episode to its end and return them, in the order of ``episodes``.

        Args:
            episodes: what to play.
            act: the policy.
            horizon: actions after which an episode has failed; 0 as the settings have it.

        Raises:
            UnavailableError: a worker died.
        """
        waiting = _Waiting(deque(enumerate(episodes)), horizon)
        attempts: dict[tuple[int, int], _Attempt] = {}
        finished: dict[int, Trajectory] = {}
        for lane in range(LANES):
            for host in range(len(self._hosts)):
                self._send(host, lane, range(lane, self._slots, LANES), [], _NO_BINS, waiting, attempts)
        while len(finished) < len(episodes):
            start = time.perf_counter()
            arrived = self._hosts.receive()
            self._spent("waiting", start)
            start = time.perf_counter()
            for host, news in arrived:
                for what, seconds in news.seconds.items():
                    self.seconds[what] = self.seconds.get(what, 0.0) + seconds
                for end in news.ended:
                    attempt = attempts.pop((host, end.slot))
                    finished[attempt.index] = attempt.trajectory(end)
            looking = [attempts[host, slot] for host, news in arrived for slot in news.slots]
            looks = _looks(looking, [news for _, news in arrived if news.slots])
            self._spent("transport", start)
            start = time.perf_counter()
            answer = act(looks) if looking else Answer(_NO_BINS)
            self._spent("inference", start)
            start = time.perf_counter()
            for row, attempt in enumerate(looking):
                attempt.keep(looks, answer, row)
            row = 0
            for host, news in arrived:
                bins = answer.bins[row : row + len(news.slots)]
                row += len(news.slots)
                free = [end.slot for end in news.ended]
                self._send(host, news.lane, free, news.slots, bins, waiting, attempts)
            self._spent("transport", start)
        return [finished[index] for index in range(len(episodes))]

    def _send(
        self,
        host: int,
        lane: int,
        free: Sequence[int],
        acting: list[int],
        bins: NDArray[np.uint8],
        waiting: _Waiting,
        attempts: dict[tuple[int, int], _Attempt],
    ) -> None:
        begin = []
        for slot in free:
            if waiting.episodes:
                index, episode = waiting.episodes.popleft()
                attempts[host, slot] = _Attempt(index, episode)
                begin.append((slot, episode.seed))
        if acting or begin:
            bins = np.ascontiguousarray(bins)
            self._hosts.send(host, Command(lane, acting, bins, begin, waiting.horizon))

    def _spent(self, what: str, since: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since


class Processes:
    """Workers in spawned processes, each behind a pipe.

    Raises:
        UnavailableError: one cannot start, or dies.
    """

    def __init__(self, settings: RolloutSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        try:
            for number in range(settings.workers):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, settings), daemon=True, name=f"rollouts-{number}"
                )
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
            for pipe in self._pipes:
                _received(pipe)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._pipes)

    def send(self, host: int, command: Command) -> None:
        """Send a command through a worker's pipe."""
        try:
            self._pipes[host].send(command)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _died() from error

    def receive(self) -> list[tuple[int, News]]:
        """Return what has come through the pipes, once something has."""
        ready = wait(self._pipes)
        return [(host, _received(pipe)) for host, pipe in enumerate(self._pipes) if pipe in ready]

    def close(self) -> None:
        """Close the pipes, upon which the processes end."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


class _Waiting(NamedTuple):
    """Episodes that have not begun, each with its index, and the actions that each may take."""

    episodes: deque[tuple[int, Episode]]
    horizon: int


@dataclass(eq=False)
class _Attempt:
    """An episode that is being played."""

    index: int
    episode: Episode
    seen: list[NDArray[Any]] = field(default_factory=list)
    proprio: list[NDArray[np.float32]] = field(default_factory=list)
    bins: list[NDArray[np.uint8]] = field(default_factory=list)

    def keep(self, looks: Looks, answer: Answer, row: int) -> None:
        self.seen.append(looks.images[row] if answer.kept is None else answer.kept[row])
        self.proprio.append(looks.proprio[row])
        self.bins.append(answer.bins[row])

    def trajectory(self, end: Ended) -> Trajectory:
        return Trajectory(
            episode=self.episode,
            seen=np.stack(self.seen),
            proprio=np.stack(self.proprio),
            prompt=0,
            bins=np.stack(self.bins),
            actions=end.actions,
            success=end.success,
            strategy=end.strategy,
            failure=end.failure,
            region=end.region,
        )


_NO_BINS = np.zeros((0, 0, 0), dtype=np.uint8)


def _looks(looking: list[_Attempt], news: list[News]) -> Looks:
    if not looking:
        none = np.zeros(0, dtype=np.int64)
        return Looks(none.reshape(0, 2), none, _NO_BINS, none.reshape(0, 1).astype(np.float32), none)
    return Looks(
        episodes=np.array([attempt.episode for attempt in looking], dtype=np.int64),
        turns=np.array([len(attempt.bins) for attempt in looking], dtype=np.int64),
        images=np.concatenate([part.images for part in news]),
        proprio=np.concatenate([part.proprio for part in news]),
        prompts=np.zeros(len(looking), dtype=np.int64),
    )


def _serve(pipe: Connection, settings: RolloutSettings) -> None:
    """Answer commands until the pipe closes; what goes wrong is sent instead of an answer."""
    try:
        with Worker(settings) as worker:
            worker.warm()
            pipe.send(None)
            while True:
                pipe.send(worker.advance(pipe.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return
    except SimplevlaError as error:
        pipe.send(error)
    except Exception as error:  # told to the process that can tell the user
        logger.exception("a rollout worker failed")
        pipe.send(UnavailableError(f"a rollout worker failed: {error!r}", "see the log above"))


def _received(pipe: Connection) -> Any:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise _died() from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _died() -> UnavailableError:
    return UnavailableError(
        "a rollout worker died", "look for a lack of memory or a graphics driver's fault, and run again"
    )
