"""What goes out: chunks and refusals, encoded, sent, timed and counted."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from policy_server import messages
from policy_server.door import Peer
from policy_server.metrics import Metrics
from policy_server.protocol import CameraNeed, LocalOffer, SealedOffer, ServerTiming, Welcome
from policy_server.served_policy import ServedPolicy, Split
from simplevla.action_chunk import ActionChunk
from simplevla.errors import SimplevlaError, UnavailableError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
    """How a request's turn went: how long it waited, what it cost, when the answer was there."""

    queued_ms: float
    split: Split
    ready_s: float


class Answers:
    """Sends and counts them. Safe from any thread.

    Attributes:
        answered: chunks sent.
        refused: requests refused.
    """

    def __init__(self, metrics: Metrics | None) -> None:
        """Take where to count, if anywhere."""
        self._metrics = metrics
        self._lock = threading.Lock()
        self.answered = 0
        self.refused = 0

    def send_chunk(
        self, peer: Peer, request: int, chunk: ActionChunk, receive_ms: float, turn: Turn
    ) -> None:
        """Send a chunk to who asked for it."""
        timing = timing_of(receive_ms, turn, 1e3 * (time.perf_counter() - turn.ready_s))
        message = messages.encode_chunk(request, chunk, timing, time.monotonic_ns())
        self.count_answer()  # first: who has the answer and asks how many there were finds it among them
        peer.send(message)
        self.observe_answer(timing, time.perf_counter() - turn.ready_s)

    def send_refusal(self, peer: Peer, request: int, error: SimplevlaError) -> None:
        """Say no, and why."""
        self.count_refusal(error)
        _log.info("refused (%s): %.200s", error.code, error)
        peer.send(messages.encode_error(request, error))

    def count_answer(self) -> None:
        """Count a chunk that is handed out."""
        with self._lock:
            self.answered += 1

    def observe_answer(self, timing: ServerTiming, send_s: float) -> None:
        """Take into the metrics where the time of an answer went."""
        if self._metrics:
            self._metrics.answered(timing, send_s)

    def count_refusal(self, error: SimplevlaError) -> None:
        """Count a refusal."""
        with self._lock:
            self.refused += 1
        if self._metrics:
            self._metrics.refused(error.code)


class Call:
    """Waits for the answer to one request that came from within this process."""

    def __init__(self, answers: Answers) -> None:
        """Begin: the request is being taken in."""
        self._answers = answers
        self._done = threading.Event()
        self._outcome: SimplevlaError | tuple[ActionChunk, ServerTiming] | None = None
        self._start_s = self._received_s = time.perf_counter()

    def received(self) -> None:
        """Take note that the request is checked, and goes to where it waits for its turn."""
        self._received_s = time.perf_counter()

    def answer(self, chunk: ActionChunk, turn: Turn) -> None:
        """Take the answer."""
        timing = timing_of(1e3 * (self._received_s - self._start_s), turn, 0.0)
        self._answers.count_answer()
        self._answers.observe_answer(timing, 0.0)
        self._outcome = chunk, timing
        self._done.set()

    def refuse(self, error: SimplevlaError) -> None:
        """Take a refusal."""
        self._answers.count_refusal(error)
        self._outcome = error
        self._done.set()

    def result(self, timeout_s: float) -> tuple[ActionChunk, ServerTiming]:
        """Return the answer when it is there.

        Raises:
            SimplevlaError: the request was refused, or the policy could not answer.
            UnavailableError: there was no answer in time.
        """
        if not self._done.wait(timeout_s) or self._outcome is None:
            raise UnavailableError("the policy did not answer in time", "ask again")
        if isinstance(self._outcome, SimplevlaError):
            raise self._outcome
        return self._outcome


def timing_of(receive_ms: float, turn: Turn, send_ms: float) -> ServerTiming:
    """Return where the time of an answer went."""
    return ServerTiming(
        receive_ms=receive_ms,
        queue_ms=turn.queued_ms,
        preprocess_ms=turn.split.preprocess_ms,
        inference_ms=turn.split.inference_ms,
        decode_ms=turn.split.decode_ms,
        send_ms=send_ms,
    )


def welcome_to(
    policy: ServedPolicy, request: int, *, local: LocalOffer | None, sealed: SealedOffer | None
) -> Welcome:
    """Return what is said to a hello: what ``policy`` is and needs, and which quicker ways there are."""
    manifest = policy.manifest
    cameras = [manifest.embodiment.camera(name) for name in manifest.cameras]
    return Welcome(
        request=request,
        policy_id=policy.policy_id,
        name=manifest.name,
        cameras=tuple(CameraNeed(c.name, c.width, c.height) for c in cameras),
        instructions=manifest.instructions,
        chunk_length=manifest.chunk_length,
        dt_s=manifest.dt_s,
        action_space=manifest.action_space,
        backend=policy.session.info.backend,
        clock_ns=time.monotonic_ns(),
        continues=policy.continues,
        local=local,
        sealed=sealed,
    )
