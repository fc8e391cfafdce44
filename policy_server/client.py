"""The thin client of a policy server: for the robot, needs neither torch nor an inference library."""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from types import TracebackType

from policy_server import protocol
from policy_server.protocol import DEFAULT_ADDRESS, MessageError, Part, ServerTiming
from simplevla.action_chunk import ActionChunk, check_chunk
from simplevla.embodiment import Embodiment
from simplevla.errors import (
    ChunkError,
    ConfigError,
    EmbodimentError,
    MissingExtraError,
    ObservationError,
    SimplevlaError,
    UnavailableError,
)
from simplevla.observation import Observation, check_observation

try:
    import zmq
except ImportError as _error:
    raise MissingExtraError("pyzmq", "robot") from _error

_log = logging.getLogger(__name__)


class RemoteError(SimplevlaError):
    """The server refused a request.

    Attributes:
        code: what the server named, such as ``internal`` or ``other_schema``.
    """

    code = "remote"

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.code = code


class PolicyChangedError(SimplevlaError):
    """The server answers with another policy than before; ``info`` already describes the new one."""

    code = "policy_changed"


@dataclass(frozen=True)
class ServerInfo:
    """The served policy.

    Attributes:
        policy_id: identity of its bundle.
        name: its bundle's name.
        cameras: the cameras that an observation must have, with their sizes.
        instructions: {task: canonical instruction} of the tasks it was trained on.
        chunk_length: K.
        dt_s: time between two actions, s.
        action_space: what the network predicts inside; chunks are absolute joint targets.
        backend: what computes the network.
    """

    policy_id: str
    name: str
    cameras: tuple[protocol.CameraNeed, ...]
    instructions: dict[str, str]
    chunk_length: int
    dt_s: float
    action_space: str
    backend: str


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        chunk: checked: K actions of the embodiment, finite, for the observation that was sent.
        timing: where the time went in the server.
        round_trip_ms: from the call to the checked answer, ms.
    """

    chunk: ActionChunk
    timing: ServerTiming
    round_trip_ms: float


class PolicyClient:
    """Asks one policy server for chunks. A context manager; not for use by several threads at once.

    It says hello on entering, and again by itself after a silence or a restart of the server.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        embodiment: Embodiment,
        timeout_s: float = 2.0,
        wait_s: float = 0.0,
    ) -> None:
        """Prepare to connect; nothing is opened yet.

        Args:
            address: where the server listens.
            embodiment: the robot that this client speaks for.
            timeout_s: longest time that any call takes, s.
            wait_s: how long entering waits for a server that is still starting, s.
        """
        self._address = address
        self._embodiment = embodiment
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        # Request numbers never repeat, so that a late answer is never taken for a fresh one.
        self._requests = itertools.count(1)
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._info: ServerInfo | None = None

    def __enter__(self) -> PolicyClient:
        try:
            self.connect(self._wait_s)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def info(self) -> ServerInfo:
        """The served policy, as of the last hello.

        Raises:
            UnavailableError: there was none yet.
        """
        if self._info is None:
            raise UnavailableError(f"not connected to {self._address}", "connect first")
        return self._info

    def connect(self, wait_s: float = 0.0) -> ServerInfo:
        """Say hello, on a new socket, and return what the server serves.

        Args:
            wait_s: how long to wait for a server that is still starting, s; at least the timeout.

        Raises:
            UnavailableError: nobody answered.
            EmbodimentError: the policy is for another robot.
            RemoteError: the server refused otherwise.
        """
        self._disconnect()
        return self._hello(time.monotonic() + max(wait_s, self._timeout_s))

    def act(self, observation: Observation) -> Reply:
        """Return the server's chunk for ``observation``.

        Raises:
            ObservationError: the observation does not fit the robot; nothing was sent.
            UnavailableError: no answer within the timeout; the next call connects anew.
            PolicyChangedError: another policy answers than before; the next call goes on with it.
            RemoteError: the server refused.
        """
        start = time.monotonic()
        deadline = start + self._timeout_s
        if self._socket is None or self._info is None:
            self._hello(deadline)
        check_observation(observation, self._embodiment, tuple(c.name for c in self.info.cameras))
        try:
            message = self._ask_act(observation, deadline)
        except RemoteError as error:
            if error.code != "no_handshake":
                raise
            # The server was started anew behind the same address and does not know this client.
            self._hello(deadline)
            message = self._ask_act(observation, deadline)
        chunk = self._checked_chunk(message, observation, deadline)
        assert isinstance(message.header, protocol.Chunk)
        return Reply(chunk, message.header.timing, 1e3 * (time.monotonic() - start))

    def health(self) -> protocol.Status:
        """Return how the server is.

        Raises:
            UnavailableError: no answer within the timeout.
        """
        request = next(self._requests)
        parts = protocol.encode(protocol.Health(request=request))
        header = self._ask(request, parts, time.monotonic() + self._timeout_s).header
        if not isinstance(header, protocol.Status):
            raise _unexpected(header)
        return header

    def close(self) -> None:
        """Let go of the socket; safe to call twice."""
        self._disconnect()
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    def _hello(self, deadline: float) -> ServerInfo:
        request = next(self._requests)
        parts = protocol.encode(protocol.Hello(request=request, embodiment=self._embodiment))
        header = self._ask(request, parts, deadline).header
        if not isinstance(header, protocol.Welcome):
            raise _unexpected(header)
        known = {camera.name for camera in self._embodiment.cameras}
        if not known.issuperset(camera.name for camera in header.cameras):
            raise EmbodimentError("the server asks for cameras of another robot", "restart the server")
        before, self._info = (
            self._info,
            ServerInfo(
                policy_id=header.policy_id,
                name=header.name,
                cameras=header.cameras,
                instructions=header.instructions,
                chunk_length=header.chunk_length,
                dt_s=header.dt_s,
                action_space=header.action_space,
                backend=header.backend,
            ),
        )
        if before is not None and before.policy_id != self._info.policy_id:
            raise self._changed(before.policy_id, self._info.policy_id)
        return self._info

    def _changed(self, before: str, now: str) -> PolicyChangedError:
        return PolicyChangedError(
            f"the server at {self._address} now answers with policy {now[:12]} instead of {before[:12]}",
            "start the trial again",
        )

    def _ask_act(self, observation: Observation, deadline: float) -> protocol.Message:
        request = next(self._requests)
        cameras = [camera.name for camera in self.info.cameras]
        return self._ask(request, protocol.encode_observation(request, observation, cameras), deadline)

    def _checked_chunk(
        self, message: protocol.Message, observation: Observation, deadline: float
    ) -> ActionChunk:
        chunk = protocol.decode_chunk(message)
        if chunk.policy_id != self.info.policy_id:
            before = self.info.policy_id
            self._hello(deadline)
            raise self._changed(before, chunk.policy_id)
        check_chunk(chunk, self._embodiment)
        if chunk.length != self.info.chunk_length or chunk.capture_ns != observation.capture_ns:
            raise ChunkError(
                f"the server answered {chunk.length} actions for the capture time {chunk.capture_ns}, "
                f"not {self.info.chunk_length} for {observation.capture_ns}",
                "restart the server",
            )
        return chunk

    def _ask(self, request: int, parts: list[Part], deadline: float) -> protocol.Message:
        """Send one request and return its answer; answers to older requests are thrown away."""
        socket = self._connected()
        start = time.monotonic()
        try:
            socket.send_multipart(parts, flags=zmq.NOBLOCK)
            while (left_ms := 1e3 * (deadline - time.monotonic())) > 0:
                if not socket.poll(max(1, round(left_ms))):
                    break
                message = protocol.decode(socket.recv_multipart())
                if message.header.request == request:
                    return _accepted(message)
                _log.debug("answer to request %d came too late", message.header.request)
        except zmq.Again:
            _log.debug("the queue to %s is full", self._address)
        except MessageError:
            self._disconnect()
            raise
        self._disconnect()
        raise UnavailableError(
            f"no policy server answers at {self._address} (waited {time.monotonic() - start:.1f} s)",
            "start one with: simplevla serve BUNDLE",
        )

    def _connected(self) -> zmq.Socket[bytes]:
        if self._socket is not None:
            return self._socket
        self._context = self._context or zmq.Context()
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 8)
        socket.setsockopt(zmq.RCVHWM, 8)
        socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_PART_BYTES)
        if self._address.startswith("tcp://["):
            socket.setsockopt(zmq.IPV6, 1)
        try:
            socket.connect(self._address)
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(
                f"{self._address!r} is no address of a server", f"use one like {DEFAULT_ADDRESS}"
            ) from error
        self._socket = socket
        return socket

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None


def _accepted(message: protocol.Message) -> protocol.Message:
    header = message.header
    if not isinstance(header, protocol.Error):
        return message
    for kind in (EmbodimentError, ObservationError):
        if header.code == kind.code:
            raise kind(header.message, header.remedy)
    raise RemoteError(header.code, header.message, header.remedy)


def _unexpected(header: protocol.Header) -> MessageError:
    return MessageError(f"the server answered with {header.__class__.__name__}")
