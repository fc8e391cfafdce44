"""The policy server: one ZMQ ROUTER socket, one loop, one answer for each request.

It listens on this machine only, unless told otherwise: traffic is neither encrypted nor authenticated.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType

import zmq

from policy_server import protocol
from policy_server.protocol import DEFAULT_ADDRESS, MessageError, Part
from policy_server.served_policy import ServedPolicy
from simplevla.embodiment import require_same
from simplevla.errors import ConfigError, SimplevlaError, UnavailableError

_POLL_MS = 100
_QUEUED_MESSAGES = 32
_KNOWN_CLIENTS = 256
_DRAIN_S = 2.0
_LINGER_MS = 500

_log = logging.getLogger(__name__)


class HandshakeError(SimplevlaError):
    """A client asks for actions before it has said which robot it speaks for."""

    code = "no_handshake"


class InternalError(SimplevlaError):
    """Something failed in the server that is not the client's doing."""

    code = "internal"


class PolicyServer:
    """Serves one policy until told to stop. A context manager: it listens, warm, inside the block."""

    def __init__(
        self, policy: ServedPolicy, address: str = DEFAULT_ADDRESS, *, allow_remote: bool = False
    ) -> None:
        """Prepare to serve; nothing is opened yet.

        Args:
            policy: what answers.
            address: ``tcp://host:port``, where port may be ``*`` for a free one, or ``ipc://path``.
            allow_remote: accept an address that other machines can reach.

        Raises:
            ConfigError: the address is no address, or other machines could reach it.
        """
        require_local(address, allow_remote=allow_remote)
        self._policy = policy
        self._address = address
        self._stop = threading.Event()
        # Clients that said Hello, by ZMQ identity; the oldest is forgotten and simply says it again.
        self._welcomed: OrderedDict[bytes, None] = OrderedDict()
        self._answered = 0
        self._refused = 0

    def __enter__(self) -> PolicyServer:
        """Listen, and warm the policy up.

        Raises:
            UnavailableError: the address is in use.
            ConfigError: it cannot be listened on.
        """
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            self._socket.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
            self._socket.setsockopt(zmq.SNDHWM, _QUEUED_MESSAGES)
            self._socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_PART_BYTES)
            self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
            _bind(self._socket, self._address)
            self._policy.warm_up()
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._ready_since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=_LINGER_MS)

    @property
    def address(self) -> str:
        """Where it listens, with the port that was really taken."""
        return str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")

    def stop(self) -> None:
        """Make :meth:`serve` answer what has arrived and return; safe from any thread and from a signal."""
        self._stop.set()

    def serve(self) -> None:
        """Answer requests until :meth:`stop`, then those that are already here."""
        while not self._stop.is_set():
            if self._socket.poll(_POLL_MS):
                self._answer_one()
        deadline = time.monotonic() + _DRAIN_S
        while time.monotonic() < deadline and self._socket.poll(0):
            self._answer_one()

    def _answer_one(self) -> None:
        start = time.perf_counter()
        client, parts = self._receive()
        reply = self._reply(client, parts, start)
        try:
            # ROUTER drops what is meant for a client that is gone or whose queue is full.
            self._socket.send_multipart([client, *reply], flags=zmq.NOBLOCK)
        except zmq.Again:
            _log.warning("a client does not take its answers; one was dropped")

    def _receive(self) -> tuple[bytes, list[Part]]:
        """Return one client's identity and message; parts beyond what a message may have are dropped."""
        client = self._socket.recv()
        parts: list[Part] = []
        while self._socket.getsockopt(zmq.RCVMORE):
            frame = self._socket.recv(copy=False)
            if len(parts) <= protocol.MAX_ARRAYS + 1:
                parts.append(frame.buffer)
        return client, parts

    def _reply(self, client: bytes, parts: Sequence[Part], start: float) -> list[Part]:
        request = 0
        refusal: SimplevlaError
        try:
            message = protocol.decode(parts)
            request = message.header.request
            return self._handle(client, message, start)
        except MessageError as error:
            request, refusal = error.request, error
        except SimplevlaError as error:
            refusal = error
        except Exception:
            _log.exception("request failed")
            refusal = InternalError("the policy server failed to answer", "read the server's log")
        self._refused += 1
        _log.info("refused (%s): %.200s", refusal.code, refusal)
        return protocol.encode_error(request, refusal)

    def _handle(self, client: bytes, message: protocol.Message, start: float) -> list[Part]:
        header = message.header
        if isinstance(header, protocol.Act):
            if client not in self._welcomed:
                raise HandshakeError("say hello first", "use the client of this version of simplevla")
            observation = protocol.decode_observation(message)
            received = time.perf_counter()
            chunk, split = self._policy.answer(observation)
            timing = protocol.ServerTiming(
                receive_ms=1e3 * (received - start),
                preprocess_ms=split.preprocess_ms,
                inference_ms=split.inference_ms,
                decode_ms=split.decode_ms,
            )
            reply = protocol.encode_chunk(header.request, chunk, timing)
            self._answered += 1
            return reply
        if isinstance(header, protocol.Hello):
            return protocol.encode(self._welcome(client, header))
        if isinstance(header, protocol.Health):
            return protocol.encode(self._status(header.request))
        raise MessageError(f"{header.__class__.__name__} is no message to a server", request=header.request)

    def _welcome(self, client: bytes, hello: protocol.Hello) -> protocol.Welcome:
        manifest = self._policy.manifest
        require_same(hello.embodiment, manifest.embodiment, have_is="the client", want_is="the bundle")
        self._welcomed[client] = None
        self._welcomed.move_to_end(client)
        if len(self._welcomed) > _KNOWN_CLIENTS:
            self._welcomed.popitem(last=False)
        cameras = [manifest.embodiment.camera(name) for name in manifest.cameras]
        return protocol.Welcome(
            request=hello.request,
            policy_id=self._policy.policy_id,
            name=manifest.name,
            cameras=tuple(protocol.CameraNeed(c.name, c.width, c.height) for c in cameras),
            instructions=manifest.instructions,
            chunk_length=manifest.chunk_length,
            dt_s=manifest.dt_s,
            action_space=manifest.action_space,
            backend=self._policy.session.info.backend,
        )

    def _status(self, request: int) -> protocol.Status:
        return protocol.Status(
            request=request,
            policy_id=self._policy.policy_id,
            backend=self._policy.session.info.backend,
            uptime_s=time.monotonic() - self._ready_since,
            answered=self._answered,
            refused=self._refused,
        )


def require_local(address: str, *, allow_remote: bool) -> None:
    """Check that only this machine can reach ``address``, or warn if that was asked for by name.

    Raises:
        ConfigError: it is no address, or others could reach it.
    """
    scheme, separator, place = address.partition("://")
    if not separator or scheme not in ("tcp", "ipc") or not place:
        raise ConfigError(f"{address!r} is no address", f"use one like {DEFAULT_ADDRESS} or ipc:///path")
    if scheme == "ipc" or _is_loopback(place.rpartition(":")[0]):
        return
    if not allow_remote:
        raise ConfigError(
            f"{address} can be reached from other machines",
            f"listen on {DEFAULT_ADDRESS} and forward it with ssh -L, or add --allow-remote if the "
            "network is yours alone",
        )
    _log.warning(
        "listening on %s: other machines can reach it, and traffic is neither encrypted nor authenticated",
        address,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _bind(socket: zmq.Socket[bytes], address: str) -> None:
    if address.startswith("tcp://["):
        socket.setsockopt(zmq.IPV6, 1)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise UnavailableError(
                f"{address} is in use already", "stop the other server, or choose another --address"
            ) from error
        raise ConfigError(f"cannot listen on {address}: {error}", "choose another --address") from error
