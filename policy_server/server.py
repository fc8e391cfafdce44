"""The policy server: one thread at the door, one that computes, one answer for each request.

The thread at the door takes messages in, checks them, and refuses what can be refused at once. When it is
a request's turn, the thread that took it in leaves the door to the other one and computes the answer
itself: handing it over would cost another wake-up. Who is next is :mod:`policy_server.schedule`'s to say.
It listens on this machine only, unless there are keys or it was told otherwise.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from policy_server import messages, protocol
from policy_server.address import require_local
from policy_server.answers import Answers, Call, Turn, welcome_to
from policy_server.datagram import slot_bytes
from policy_server.door import Door, Peer, Received
from policy_server.hot_swap import require_swappable
from policy_server.incumbent import Answer, Incumbent, InternalError, compute
from policy_server.keys import ServerKeys
from policy_server.metrics import Metrics
from policy_server.protocol import DEFAULT_ADDRESS, MessageError
from policy_server.schedule import DrainingError, Job, Refusals, Schedule
from policy_server.served_policy import ServedPolicy
from policy_server.waiting import SPIN_S
from simplevla.action_chunk import ActionChunk
from simplevla.bundle import Manifest
from simplevla.embodiment import require_same
from simplevla.errors import SimplevlaError
from simplevla.observation import Observation, check_observation

_POLL_S = 0.5
_KNOWN_CLIENTS = 256
_DRAIN_S = 5.0
_BRIEF_S = 2e-4
_MARGIN = 4  # an image of a wrong size is to be refused with words, not by hanging up

_log = logging.getLogger(__name__)


class HandshakeError(SimplevlaError):
    """A client asks for actions before it has said which robot it speaks for."""

    code = "no_handshake"


@dataclass(frozen=True)
class ServerOptions:
    """How a server serves.

    Attributes:
        allow_remote: accept an address that other machines can reach, without keys.
        keys: encrypt, and let in only clients whose keys are known.
        local: offer clients of this machine shared memory.
        sealed: offer clients with keys a sealed connection, on a port of its own.
        batch_wait_s: longest time that a request waits for others to be answered with it.
        metrics: where to count, if anywhere.
        spin_s: longest time that is spent looking for the next message before going to sleep, and only
            while messages come that quickly; see :mod:`policy_server.waiting`.
    """

    allow_remote: bool = False
    keys: ServerKeys | None = None
    local: bool = True
    sealed: bool = True
    batch_wait_s: float = 0.002
    metrics: Metrics | None = None
    spin_s: float = SPIN_S


class PolicyServer:
    """Serves one policy until told to stop. A context manager: it listens, warm, inside the block."""

    def __init__(
        self,
        policy: ServedPolicy,
        address: str = DEFAULT_ADDRESS,
        options: ServerOptions = ServerOptions(),
    ) -> None:
        """Prepare to serve; nothing is opened yet.

        Args:
            policy: what answers.
            address: ``tcp://host:port``, where port may be ``*`` for a free one, or ``ipc://path``.
            options: how.

        Raises:
            ConfigError: the address is no address, or other machines could reach it.
        """
        require_local(address, allow_remote=options.allow_remote, encrypted=options.keys is not None)
        self._incumbent = Incumbent(policy)
        self._metrics = options.metrics
        images = [3 * camera.width * camera.height for camera in policy.manifest.embodiment.cameras]
        self._sizes = {c.name: (c.width, c.height) for c in policy.manifest.embodiment.cameras}
        self._door = Door(
            address,
            max_part_bytes=min(protocol.MAX_PART_BYTES, max(1 << 20, _MARGIN * max(images))),
            max_message_bytes=min(protocol.MAX_TOTAL_BYTES, max(1 << 20, _MARGIN * slot_bytes(images))),
            sealed=options.sealed,
            slot_bytes=slot_bytes(images) if options.local else 0,
            keys=options.keys,
            spin_s=options.spin_s,
        )
        self._answers = Answers(options.metrics)
        self._resources = ExitStack()
        # Held by the thread that waits for messages.
        self._at_door = threading.Lock()
        # Guards the schedule, the policy and the counts, which both threads change.
        self._lock = threading.Lock()
        self._schedule = Schedule(policy.max_batch, options.batch_wait_s)
        self._stop = threading.Event()
        self._draining = False
        # Clients that said Hello; the oldest is forgotten and simply says it again.
        self._welcomed: OrderedDict[Peer, None] = OrderedDict()
        self._swaps = 0

    def __enter__(self) -> PolicyServer:
        """Warm the policy up, and listen.

        Raises:
            UnavailableError: the address is in use.
            ConfigError: it cannot be listened on.
            SimplevlaError: the policy cannot answer.
        """
        self._resources.enter_context(self._door)
        try:
            self._incumbent.policy.warm_up()
        except BaseException:
            self._resources.close()
            raise
        if self._metrics:
            self._metrics.serves(self._incumbent.policy.policy_id)
        self._ready_since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    @property
    def address(self) -> str:
        """Where it listens, with the port that was really taken."""
        return self._door.address

    @property
    def manifest(self) -> Manifest:
        """The served bundle's."""
        return self._incumbent.policy.manifest

    @property
    def policy_id(self) -> str:
        """The served bundle's identity."""
        return self._incumbent.policy.policy_id

    @property
    def backend(self) -> str:
        """What computes now."""
        return self._incumbent.policy.session.info.backend

    def stop(self) -> None:
        """Make :meth:`serve` answer what has arrived and return; safe from any thread and from a signal."""
        self._stop.set()
        self._door.wake()

    def serve(self) -> None:
        """Answer requests until :meth:`stop`, then those that are already here."""
        other = threading.Thread(target=self._work, name="policy-server")
        other.start()
        try:
            self._work()
            self._drain(other)
        finally:
            self._stop.set()
            other.join()

    def swap(self, policy: ServedPolicy) -> None:
        """Let ``policy`` answer from now on; what waits already is answered by the one before.

        Should one of its first answers fail, the one before gives it, and takes over again.

        Safe from any thread. Nothing is checked but that clients can go on: see
        :func:`policy_server.hot_swap.promote`.

        Raises:
            EmbodimentError: it is for another robot, or needs cameras that clients do not send.
        """
        require_swappable(self.manifest, policy.manifest)
        with self._lock:
            before = self._incumbent.promote(policy)
            self._schedule.max_batch = policy.max_batch
            self._swaps += 1
        if self._metrics:
            self._metrics.serves(policy.policy_id)
        _log.info("policy %s answers now, instead of %s", policy.policy_id[:12], before.policy_id[:12])

    def ask(
        self, client: str, observation: Observation, timeout_s: float
    ) -> tuple[ActionChunk, protocol.ServerTiming]:
        """Return the chunk for ``observation``, in turn with everybody else's; for other front doors.

        Safe from any thread but the one that serves.

        Args:
            client: whose request it is; of one client the latest wins.
            observation: of the served robot.
            timeout_s: longest wait.

        Raises:
            SimplevlaError: it was refused, or the policy could not answer.
            UnavailableError: there was no answer in time.
        """
        call = Call(self._answers)
        check_observation(observation, self.manifest.embodiment, self.manifest.cameras)
        call.received()
        self._admit(client, observation, time.monotonic() + timeout_s, call.refuse, call.answer)
        self._door.wake()
        return call.result(timeout_s)

    def status(self, request: int = 0) -> protocol.Status:
        """Return how it is; safe from any thread."""
        with self._lock:
            return protocol.Status(
                request=request,
                policy_id=self._incumbent.policy.policy_id,
                backend=self.backend,
                uptime_s=time.monotonic() - self._ready_since,
                answered=self._answers.answered,
                refused=self._answers.refused,
                state="draining" if self._draining or self._stop.is_set() else "ready",
                waiting=len(self._schedule),
                clients=len(self._welcomed),
                swaps=self._swaps,
            )

    def health(self, stalled_s: float = 30.0) -> tuple[bool, dict[str, Any]]:
        """Return whether it can answer, and its status; an inference that never ends is not well."""
        status = self.status()
        busy_since_s = self._schedule.busy_since_s
        busy_s = 0.0 if busy_since_s is None else time.monotonic() - busy_since_s
        well = status.state == "ready" and busy_s < stalled_s
        shown = ("policy_id", "backend", "uptime_s", "answered", "refused", "state", "waiting", "swaps")
        return well, {name: getattr(status, name) for name in shown} | {"busy_s": round(busy_s, 3)}

    # --- both threads ---

    def _work(self) -> None:
        while not self._stop.is_set():
            # Not for ever: a signal that comes just before the main thread begins to wait for a lock does
            # not end that wait, and is heard of only after it.
            if not self._at_door.acquire(timeout=_POLL_S):
                continue
            try:
                jobs = self._wait_for_turn()
                if 0 < self._schedule.usual_s < _BRIEF_S:
                    # To hand the door over would take longer than the answers do.
                    self._answer_in_turn(jobs)
                    continue
            finally:
                self._at_door.release()
            self._answer_in_turn(jobs)

    def _answer_in_turn(self, jobs: list[Job]) -> None:
        """Answer ``jobs``, and whatever has its turn by then."""
        while jobs:
            self.answer(jobs)
            jobs = self.due()

    def _wait_for_turn(self) -> list[Job]:
        """Mind the door until there is something to compute; return it, or nothing if it is time to end."""
        while not self._stop.is_set():
            with self._lock:
                now_s = time.monotonic()
                jobs = self._schedule.take(now_s)
                patience_s = 0.0 if jobs else self._schedule.patience_s(now_s)
            if jobs:
                return jobs
            self._look(min(_POLL_S, patience_s))
        return []

    def due(self) -> list[Job]:
        """Take note that what was due before is answered; return whose turn it is at once."""
        with self._lock:
            now_s = time.monotonic()
            self._schedule.ended(now_s)
            jobs = self._schedule.take(now_s)
            is_waited_for = not jobs and len(self._schedule) > 0
        if is_waited_for:
            self._door.wake()  # who minds it shall look at the clock
        return jobs

    # --- the thread at the door ---

    def _look(self, timeout_s: float) -> int:
        """Take in what comes within ``timeout_s``; return how many messages that were."""
        received = self._door.receive(timeout_s)
        for message in received:
            self.take(message)
        for peer in self._door.gone():
            self._welcomed.pop(peer, None)  # type: ignore[call-overload]
            with self._lock:
                self._schedule.forget(peer)
        with self._lock:
            late = self._schedule.expired(time.monotonic()) if len(self._schedule) else []
        _refuse(late)
        return len(received)

    def _drain(self, other: threading.Thread) -> None:
        """Answer what has arrived, refuse what still comes, and leave when all is done or time is up."""
        with self._at_door:
            while self._look(0.0):
                pass
            with self._lock:
                self._draining = True
        deadline_s = time.monotonic() + _DRAIN_S
        while time.monotonic() < deadline_s:
            with self._lock:
                jobs = self._schedule.take(time.monotonic())
                done = not jobs and not len(self._schedule) and self._schedule.busy_since_s is None
            if done and not other.is_alive():
                return
            self._answer_in_turn(jobs)
            other.join(0.01)  # it comes to the door once more, to see that it is to end
            with self._at_door:
                self._look(0.0)
        _log.warning("not everything was answered within %.0f s", _DRAIN_S)

    def take(self, received: Received) -> None:
        """Answer a message, or put it where it waits for its turn; nothing is raised, whatever it holds."""
        request = 0
        refusal: SimplevlaError
        try:
            if received.error is not None:
                raise received.error
            message = messages.decode(received.parts)
            request = message.header.request
            self._handle(received, message)
            return
        # An error that keeps its traceback keeps the message too, and the memory that it lies in.
        except MessageError as error:
            request, refusal = error.request or request, error.with_traceback(None)
        except SimplevlaError as error:
            refusal = error.with_traceback(None)
        except Exception:
            _log.exception("request failed")
            refusal = InternalError()
        self._answers.send_refusal(received.peer, request, refusal)

    def _handle(self, received: Received, message: messages.Message) -> None:
        header, peer = message.header, received.peer
        if isinstance(header, protocol.Act):
            if peer not in self._welcomed:
                raise HandshakeError("say hello first", "use the client of this version of simplevla")
            observation = messages.decode_observation(message, self._sizes)
            policy = self._incumbent.policy
            check_observation(observation, policy.manifest.embodiment, policy.manifest.cameras)
            receive_ms = 1e3 * (time.perf_counter() - received.start_s)
            self._admit(
                peer,
                observation,
                header.deadline_ns / 1e9 if header.deadline_ns else None,
                lambda error: self._answers.send_refusal(peer, header.request, error),
                lambda chunk, turn: self._answers.send_chunk(peer, header.request, chunk, receive_ms, turn),
            )
        elif isinstance(header, protocol.Hello):
            peer.send(messages.encode(self._welcome(peer, header)))
        elif isinstance(header, protocol.Health):
            peer.send(messages.encode(self.status(header.request)))
        else:
            name = header.__class__.__name__
            raise MessageError(f"{name} is no message to a server", request=header.request)

    def welcome(self, peer: Peer) -> None:
        """Remember that ``peer`` said hello; who said it longest ago is forgotten, and says it again."""
        self._welcomed[peer] = None
        self._welcomed.move_to_end(peer)
        if len(self._welcomed) > _KNOWN_CLIENTS:
            self._welcomed.popitem(last=False)

    def _welcome(self, peer: Peer, hello: protocol.Hello) -> protocol.Welcome:
        policy = self._incumbent.policy
        require_same(
            hello.embodiment, policy.manifest.embodiment, have_is="the client", want_is="the bundle"
        )
        self.welcome(peer)
        return welcome_to(
            policy,
            hello.request,
            local=self._door.local_offer if peer.is_near else None,
            sealed=self._door.sealed_offer() if peer.may_seal else None,
        )

    def _admit(
        self,
        client: Any,
        observation: Observation,
        deadline_s: float | None,
        refuse: Callable[[SimplevlaError], None],
        answer: Callable[[ActionChunk, Turn], None],
    ) -> None:
        now_s = time.monotonic()
        with self._lock:
            if self._draining:
                raise DrainingError("the server ends", "connect to another one, or wait for its return")
            job = Job(client, observation, self._incumbent.policy, deadline_s, now_s, refuse, answer)
            refusals = self._schedule.admit(job, now_s)
        _refuse(refusals)

    # --- the thread that computes ---

    def answer(self, jobs: list[Job]) -> None:
        """Compute and send the answers to ``jobs``; call :meth:`due` after that, for the next."""
        turn_s = time.monotonic()
        answers = self._computed(jobs)
        ready_s = time.perf_counter()
        for job, answer in zip(jobs, answers, strict=True):
            try:
                if isinstance(answer, SimplevlaError):
                    job.refuse(answer)
                else:
                    chunk, split = answer
                    job.answer(chunk, Turn(1e3 * (turn_s - job.arrived_s), split, ready_s))
            except Exception:
                _log.exception("an answer could not be sent")
        if self._metrics:
            self._metrics.batch(len(jobs), len(self._schedule))

    def _computed(self, jobs: list[Job]) -> list[Answer]:
        policy: ServedPolicy = jobs[0].policy
        observations = [job.observation for job in jobs]
        answers = compute(policy, observations)
        with self._lock:
            if not self._incumbent.falls(policy, answers):
                return answers
            before = self._incumbent.policy
            self._schedule.max_batch = before.max_batch
            self._schedule.hand_over(policy, before)
        if self._metrics:
            self._metrics.serves(before.policy_id)
            self._metrics.swap("rolled_back")
        return compute(before, observations)


def _refuse(refusals: Refusals) -> None:
    for job, error in refusals:
        job.refuse(error)
