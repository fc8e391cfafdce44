"""One episode: look, ask the policy server, hand the arms what of the answer they are to play, look again.

When to look, what is committed and what the arms get is decided by a
:class:`~robot_bridge.execution_modes.ChunkPlan`. What was executed is what the arms say they played, by
index; no clock is asked. Arms that do not follow are left to come to rest, and the policy looks again.
Whatever is lost on the way ends the episode with a failure code and a reason; the arms hold by
themselves, and the next episode starts afresh.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from robot_bridge.execution_modes import ChunkPlan, DelayEstimate, Execution, HandOver
from simplevla.errors import ChunkError, SimplevlaError, UnavailableError
from simplevla.observation import Observation
from simplevla.trial import FailureCode

if TYPE_CHECKING:
    from policy_server.client import PolicyClient, Reply
    from robot_bridge.drivers.realsense import Frame

logger = logging.getLogger(__name__)

_PLAYED_PATIENCE_S = 0.5
_DISCOVERY_S = 10.0  # until DDS has brought two nodes of a busy machine together
_MAX_UNPLAYED = 3  # one may be refused for a gap in the joint feedback; then the policy looks again
_MAX_STALE = 3
_WORD_NS = 300_000_000  # how late the arms' word may come on a busy machine
_BEHIND = 1  # actions that the arms' word may lag behind what is due


class Phase(str, Enum):
    """Where an episode is; finished means that the step limit was reached."""

    IDLE = "idle"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class EpisodeState:
    """What is to be known of the present or the last episode; ``actions`` were executed so far."""

    phase: Phase = Phase.IDLE
    episode: str = ""
    actions: int = 0
    failure: FailureCode = FailureCode.NONE
    reason: str = ""


@dataclass(frozen=True)
class Request:
    """What an episode is to do: in words, under which name, and for how many actions at most."""

    instruction: str
    episode: str
    step_limit: int


@dataclass(frozen=True)
class PlayedChunk:
    """What of an answer is on its way to the arms, with its times in ns of the system clock.

    Attributes:
        index: of the answer in its episode.
        hand: the targets, and when the arms shall set out, which names the trajectory.
        asked: index in the episode of the answer's first action.
        committed: how many of its first actions the arms had already.
    """

    index: int
    hand: HandOver
    asked: int
    committed: int
    request_ns: int
    reply_ns: int
    reply: Reply


class Camera(Protocol):
    """A camera that can be waited for; see :class:`~robot_bridge.drivers.realsense.RealSenseDriver`."""

    def wait_newer(self, capture_ns: int, timeout_s: float) -> Frame:
        """Return the newest picture exposed after ``capture_ns``, or raise UnavailableError."""
        ...


class JointTimeline:
    """Measured positions by stamp: added in one thread, waited for in another."""

    def __init__(self, length: int = 400) -> None:
        self._news = threading.Condition()
        self._values: deque[tuple[int, NDArray[np.float64]]] = deque(maxlen=length)

    def add(self, stamp_ns: int, positions: NDArray[np.float64]) -> None:
        """Take note of the positions (D,) at ``stamp_ns``."""
        with self._news:
            self._values.append((stamp_ns, positions))
            self._news.notify_all()

    def heard(self, timeout_s: float) -> bool:
        """Return whether there are any positions yet, having waited for the first ones."""
        with self._news:
            return bool(self._news.wait_for(lambda: self._values, timeout_s))

    def at(self, stamp_ns: int, timeout_s: float) -> NDArray[np.float64]:
        """Return the first positions (D,) that are not older than ``stamp_ns``, once there are any.

        Raises:
            UnavailableError: none came in time.
        """
        with self._news:
            if not self._news.wait_for(lambda: self._values and self._values[-1][0] >= stamp_ns, timeout_s):
                raise UnavailableError(
                    f"no joint feedback for {timeout_s:g} s", "see the arms' diagnostics"
                )
            return next(positions for stamp, positions in self._values if stamp >= stamp_ns)


class PlayedCounts:
    """How many targets of each trajectory the arms say they have played, and by when."""

    def __init__(self, length: int = 400) -> None:
        self._news = threading.Condition()
        self._counts: deque[tuple[int, int, int]] = deque(maxlen=length)

    def add(self, stamp_ns: int, count: int, at_ns: int) -> None:
        """Take note that ``count`` targets of the trajectory with this stamp were played by ``at_ns``."""
        with self._news:
            self._counts.append((stamp_ns, count, at_ns))
            self._news.notify_all()

    def wait(self, stamp_ns: int, count: int, timeout_s: float) -> int | None:
        """Return how many were played, as soon as it is ``count`` or time is up; None if it never began."""
        with self._news:
            self._news.wait_for(lambda: self._of(stamp_ns) == count, timeout_s)
            return self._of(stamp_ns)

    def by(self, at_ns: int) -> dict[int, int]:
        """Return {stamp of a trajectory: targets played by ``at_ns``} of the last trajectories."""
        with self._news:
            return {stamp: count for stamp, count, when_ns in self._counts if when_ns <= at_ns}

    def _of(self, stamp_ns: int) -> int | None:
        return next((count for stamp, count, _ in reversed(self._counts) if stamp == stamp_ns), None)


class PolicyLoop:
    """Runs one episode at a time in a thread of its own. A context manager.

    Args:
        client: connected to the policy server; used by the episode's thread alone.
        cameras: {camera: its open driver}, at least those that the policy needs.
        joints: measured positions, as the arms publish them.
        played: what the arms say they played.
        publish: hands a chunk to the arms.
        execution: how chunks become motion; synchronously by default.
        timeout_s: how long to wait for a picture or for joint feedback.
    """

    def __init__(
        self,
        client: PolicyClient,
        cameras: Mapping[str, Camera],
        joints: JointTimeline,
        played: PlayedCounts,
        publish: Callable[[PlayedChunk], None],
        *,
        execution: Execution | None = None,
        timeout_s: float = 1.0,
    ) -> None:
        self._client = client
        self._cameras = cameras
        self._joints = joints
        self._played = played
        self._publish = publish
        self._execution = execution or Execution()
        self._delays = DelayEstimate()
        self._timeout_s = timeout_s
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._changing = threading.Lock()
        self._unplayed = self._stale = 0  # chunks in a row
        self._handed: dict[int, HandOver] = {}  # by stamp
        self.state = EpisodeState()

    def __enter__(self) -> PolicyLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, request: Request) -> None:
        """Begin an episode.

        Raises:
            UnavailableError: one is running.
        """
        with self._changing:
            if self._thread is not None and self._thread.is_alive():
                raise UnavailableError(f"episode {self.state.episode!r} is running", "stop it first")
            self._stopping.clear()
            self.state = EpisodeState(Phase.RUNNING, request.episode)
            self._thread = threading.Thread(target=self._run, args=(request,), name="episode", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the episode, if there is one, and return when it has ended. The last chunk plays out."""
        with self._changing:
            self._stopping.set()
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            if self.state.phase is Phase.RUNNING:
                self.state = replace(self.state, phase=Phase.IDLE)

    def _run(self, request: Request) -> None:
        logger.info(
            "episode %s: %r, at most %d actions", request.episode, request.instruction, request.step_limit
        )
        try:
            self._meet_arms()
            self._unplayed = self._stale = 0
            self._handed.clear()
            plan = ChunkPlan(
                self._execution, self._delays, step_limit=request.step_limit, begin_ns=time.time_ns()
            )
            while not self._stopping.is_set() and self.state.actions < request.step_limit:
                self._one_chunk(request, plan)
            if self._stopping.is_set():
                self._rest(plan)
        except _LostError as lost:
            self._fail(lost.failure, str(lost.__cause__))
        except Exception as error:
            logger.exception("episode %s", request.episode)
            self._fail(FailureCode.OTHER, f"{type(error).__name__}: {error}")
        else:
            if self.state.actions >= request.step_limit:
                self.state = replace(self.state, phase=Phase.FINISHED)

    def _meet_arms(self) -> None:
        """Wait for the first word of arms that were never heard; those heard before answer at once."""
        deadline = time.monotonic() + _DISCOVERY_S
        while not self._joints.heard(0.1) and time.monotonic() < deadline:
            if self._stopping.is_set():
                return

    def _one_chunk(self, request: Request, plan: ChunkPlan) -> None:
        """Look when it is time, ask, and have the answer played; or let the arms come to rest."""
        if plan.newest is not None and not (plan.goes_on and self._follow(plan)):
            self._rest(plan)
            return
        self._pause_until(plan.look_ns())
        if self._stopping.is_set():
            return
        observation = self._observe(request, plan.look_ns())
        executed = self._executed(observation.capture_ns)
        if executed < plan.due(observation.capture_ns) - _BEHIND:
            self._rest(plan)
            return
        committed = plan.commit(executed)
        request_ns = time.time_ns()
        reply = self._ask(replace(observation, last_action=plan.asked - 1, committed=committed))
        reply_ns = time.time_ns()
        if self._stopping.is_set() or not self._follow(plan):
            return
        try:
            hand = plan.take(
                reply.chunk.actions,
                reply.chunk.dt_s,
                capture_ns=observation.capture_ns,
                now_ns=time.time_ns(),
            )
        except ChunkError as error:
            self._refuse(error)
            return
        self._stale, index = 0, len(self._handed)
        self._handed[hand.start_ns] = hand
        given = len(committed) if committed is not None else 0
        self._publish(PlayedChunk(index, hand, plan.asked, given, request_ns, reply_ns, reply))
        if hand.held:
            logger.info("chunk %d came late: the arms were holding", index)

    def _pause_until(self, t_ns: int) -> None:
        self._stopping.wait(max(0, t_ns - time.time_ns()) / 1e9)

    def _executed(self, at_ns: int) -> int:
        """Return how many actions of the episode were executed by ``at_ns``, as the arms count."""
        played = self._played.by(at_ns)
        return max(
            (hand.first + played[stamp] for stamp, hand in self._handed.items() if stamp in played),
            default=0,
        )

    def _follow(self, plan: ChunkPlan) -> bool:
        """Return whether the arms do what they were given, as far as they have said by now."""
        now_ns = time.time_ns()
        executed = self._executed(now_ns)
        self.state = replace(self.state, actions=max(self.state.actions, executed))
        return executed >= plan.due(now_ns - _WORD_NS) - _BEHIND

    def _refuse(self, error: ChunkError) -> None:
        """Play nothing of a stale answer, and give up after several in a row."""
        self._stale += 1
        logger.warning("answer refused: %s", error)
        if self._stale == _MAX_STALE:
            raise _LostError(FailureCode.SERVER_LOST) from error

    def _observe(self, request: Request, after_ns: int) -> Observation:
        """Return what the robot shows after ``after_ns``."""
        try:
            frames = {
                name: camera.wait_newer(after_ns, self._timeout_s) for name, camera in self._cameras.items()
            }
        except SimplevlaError as error:
            raise _LostError(FailureCode.CAMERA_LOST) from error
        capture_ns = max(frame.capture_ns for frame in frames.values())
        try:
            state = self._joints.at(capture_ns, self._timeout_s)
        except UnavailableError as error:
            raise _LostError(FailureCode.ARM_LOST) from error
        return Observation(
            images={name: frame.image for name, frame in frames.items()},
            state=state.astype(np.float32),
            instruction=request.instruction,
            capture_ns=capture_ns,
            episode=request.episode,
        )

    def _ask(self, observation: Observation) -> Reply:
        try:
            return self._client.act(observation)
        except UnavailableError as error:
            raise _LostError(FailureCode.SERVER_LOST) from error
        except SimplevlaError as error:
            raise _LostError(FailureCode.OTHER) from error

    def _rest(self, plan: ChunkPlan) -> None:
        """Let the arms play what they have, and count it; a moment later than it was due, if need be."""
        hand = plan.newest
        if hand is None:
            return
        self._pause_until(hand.ends_ns)
        stopping = self._stopping.is_set()
        count = len(hand.targets)
        played = self._played.wait(hand.start_ns, count, 0.0 if stopping else _PLAYED_PATIENCE_S)
        self._unplayed = self._unplayed + 1 if played is None else 0
        if self._unplayed == _MAX_UNPLAYED and not stopping:
            error = UnavailableError(
                f"the arms did not play {_MAX_UNPLAYED} trajectories in a row",
                "see the arms' diagnostics and log",
            )
            raise _LostError(FailureCode.ARM_LOST) from error
        if played != count and not stopping:
            logger.warning("of the last chunk the arms played %d of %d actions", played or 0, count)
        executed = self._executed(time.time_ns())
        self.state = replace(self.state, actions=executed)
        plan.rest_at(executed, hand.ends_ns + round(self._execution.settle_s * 1e9))

    def _fail(self, failure: FailureCode, reason: str) -> None:
        logger.error("episode %s failed: %s", self.state.episode, reason)
        self.state = replace(self.state, phase=Phase.FAILED, failure=failure, reason=reason)


class _LostError(Exception):
    """Something that an episode needs is gone; the cause says what, in words for a person."""

    def __init__(self, failure: FailureCode) -> None:
        super().__init__(failure.value)
        self.failure = failure
