"""Where messages come in and answers go out: a ZMQ ROUTER, and the quicker ways that a Welcome offers.

One thread waits in :meth:`Door.receive`; any thread may send to a peer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import zmq
from zmq.auth.thread import ThreadAuthenticator

from policy_server import backlog, local_link, protocol, sealing
from policy_server.address import is_loopback
from policy_server.backlog import CHECK_S, Backlog
from policy_server.keys import ServerKeys
from policy_server.local_link import LocalListener, LocalPeer
from policy_server.protocol import LocalOffer, MessageError, Part, SealedOffer
from policy_server.sealed_link import SealedListener, SealedPeer
from policy_server.waiting import SPIN_S, Patience
from simplevla.errors import ConfigError, UnavailableError

_QUEUED_MESSAGES = 8
_AT_ONCE = 32
_DIRECT_CLIENTS = 64  # of each kind
_REMOTE_CLIENTS = 256  # the one silent for longest is forgotten, and simply says hello again
_UNFINISHED = 2  # messages' worth of bytes without a whole message among them, but at least
_UNFINISHED_BYTES = 16 << 20
_LINGER_MS = 500
_HEARTBEAT_MS = 1000
_SILENCE_MS = 3000
_HANDSHAKE_MS = 3000

_log = logging.getLogger(__name__)


class Peer(Protocol):
    """Who sent a message; stays the same object from one message to the next."""

    @property
    def is_near(self) -> bool:
        """Whether it may be on this machine."""

    @property
    def may_seal(self) -> bool:
        """Whether its keys were checked, and it may get a connection of the sealed kind."""

    def send(self, parts: Sequence[Part]) -> None:
        """Send it an answer; nothing happens if it is gone. Safe from any thread."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message, or what was wrong with it, and when it was taken in (``time.perf_counter``)."""

    peer: Peer
    parts: list[Part]
    start_s: float
    error: MessageError | None = None


class Door:
    """The sockets of a server. A context manager: they are open inside the block.

    Args:
        address: ``tcp://host:port``, where port may be ``*`` for a free one, or ``ipc://path``.
        max_part_bytes: the largest part that is read from the network; a peer that announces a larger
            one is cut off before memory is taken for it.
        max_message_bytes: the most that the arrays of one message may need.
        slot_bytes: shared memory for one message of a local client; 0 for no local socket.
        keys: encrypt, and let in only clients whose keys are known.
        sealed: open a port where those may come in sealed.
        spin_s: see :class:`policy_server.waiting.Patience`.
    """

    def __init__(
        self,
        address: str,
        *,
        max_part_bytes: int = protocol.MAX_PART_BYTES,
        max_message_bytes: int = protocol.MAX_TOTAL_BYTES,
        slot_bytes: int = 0,
        keys: ServerKeys | None = None,
        sealed: bool = True,
        spin_s: float = SPIN_S,
    ) -> None:
        self._address = address
        self._patience = Patience(spin_s)
        self._max_part_bytes = max_part_bytes
        self._slot_bytes = slot_bytes
        self._max_message_bytes = max_message_bytes
        self._may_seal = sealed and keys is not None and address.startswith("tcp://")
        self._keys = keys
        self._remote: OrderedDict[bytes, _RemotePeer] = OrderedDict()
        self._direct: dict[int, LocalPeer | SealedPeer] = {}
        self._gone: list[Hashable] = []
        # ZMQ's sockets may change threads, but not be used by two at once.
        self._lock = threading.Lock()
        self._local: LocalListener | None = None
        self._sealed: SealedListener | None = None
        self._listeners: dict[int, LocalListener | SealedListener] = {}

    def __enter__(self) -> Door:
        """Open the sockets.

        Raises:
            UnavailableError: the address is in use.
            ConfigError: it cannot be listened on.
        """
        self._resources = contextlib.ExitStack()
        try:
            self._open()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._resources.callback(context.destroy, linger=_LINGER_MS)
        if self._keys is not None:
            doorman = ThreadAuthenticator(context)
            doorman.start()
            self._resources.callback(doorman.stop)
            doorman.configure_curve_callback("*", credentials_provider=self._keys)
        self._router = context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.RCVHWM, _QUEUED_MESSAGES),
            (zmq.SNDHWM, 4 * _QUEUED_MESSAGES),
            (zmq.MAXMSGSIZE, self._max_part_bytes),
            (zmq.LINGER, _LINGER_MS),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS),
            (zmq.HEARTBEAT_TTL, _SILENCE_MS),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
        ):
            self._router.setsockopt(option, value)
        if self._keys is not None:
            self._router.curve_secretkey = self._keys.secret
            self._router.curve_publickey = self._keys.public
            self._router.curve_server = True
        self._backlog: Backlog | None = None
        if self._address.startswith("tcp://") and backlog.is_possible():
            limit = max(_UNFINISHED_BYTES, _UNFINISHED * self._max_message_bytes)
            self._backlog = Backlog(self._router, limit)
            self._resources.callback(self._backlog.close)
        _bind(self._router, self._address)
        self.address = str(self._router.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        self._epoll = select.epoll()
        self._resources.callback(self._epoll.close)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._resources.callback(os.close, self._wake)
        self._router_fd = int(self._router.getsockopt(zmq.FD))
        for handle in (self._wake, self._router_fd):
            self._epoll.register(handle, select.EPOLLIN)
        if self._slot_bytes and local_link.is_possible():
            self._local = LocalListener(self._slot_bytes)
            self._mind(self._local)
        if self._may_seal:
            if sealing.is_possible():
                self._sealed = SealedListener(self.address, self._max_message_bytes)
                self._mind(self._sealed)
                _log.info("clients with keys send sealed pictures to port %d", self._sealed.port)
            else:
                _log.warning("pictures of clients with keys are slow: cryptography is not installed")

    def _mind(self, listener: LocalListener | SealedListener) -> None:
        self._listeners[listener.fileno()] = listener
        self._resources.callback(listener.close)
        self._epoll.register(listener, select.EPOLLIN)

    @property
    def local_offer(self) -> LocalOffer | None:
        """Where clients of this machine may come in instead."""
        return self._local.offer if self._local else None

    def sealed_offer(self) -> SealedOffer | None:
        """Return where one client may come in instead whose keys were checked: a fresh one at each call."""
        return self._sealed.offer() if self._sealed else None

    def receive(self, timeout_s: float) -> list[Received]:
        """Return the messages that are there, at most some at once; wait for the first one.

        Args:
            timeout_s: how long to wait, s; :meth:`wake` ends it sooner.
        """
        got = self._receive_remote()  # what came without a new signal, ZMQ's being told only once
        if self._backlog is not None:
            with self._lock:
                self._backlog.check(time.monotonic(), all_taken=not got)
            if self._backlog.is_needed:
                timeout_s = min(timeout_s, CHECK_S)
        for handle, _ in self._patience.wait(self._epoll.poll, 0.0 if got else timeout_s):
            if handle == self._router_fd:
                got += self._receive_remote()
                self._patience.forget()
            elif handle == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif handle in self._listeners:
                self._accept(self._listeners[handle])
            else:
                self._receive_direct(handle, got)
        return got

    def wake(self) -> None:
        """Make :meth:`receive` return; safe from any thread and from a signal."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.eventfd_write(self._wake, 1)

    def gone(self) -> list[Hashable]:
        """Return the peers that have gone since the last call; their answers interest nobody."""
        now_s = time.monotonic()
        for peer in [p for p in self._direct.values() if p.greet_by_s and p.greet_by_s < now_s]:
            self._close_direct(peer)
        gone, self._gone = self._gone, []
        return gone

    def close(self) -> None:
        """Close everything."""
        for peer in list(self._direct.values()):
            self._close_direct(peer)
        with self._lock:
            self._resources.close()

    def send_remote(self, identity: bytes, parts: Sequence[Part]) -> None:
        """Send to a peer of the network; what it does not take, or no longer, is dropped."""
        with self._lock:
            try:
                self._router.send_multipart([identity, *parts], flags=zmq.NOBLOCK)
            except zmq.Again:
                _log.warning("a client does not take its answers; one was dropped")
            except zmq.ZMQError as error:
                _log.debug("a client is gone: %s", error)
                peer = self._remote.pop(identity, None)
                if peer is not None:
                    self._gone.append(peer)
            # Sending may have taken note of what came in, and the signal for it is given only once.
            arrived = not self._router.closed and self._has_news()
        if arrived:
            self.wake()

    def _has_news(self) -> bool:
        return bool(int(self._router.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def _receive_remote(self) -> list[Received]:
        got: list[Received] = []
        with self._lock:
            while len(got) < _AT_ONCE and self._has_news():
                start_s = time.perf_counter()
                frame = self._router.recv(copy=False)
                identity = frame.bytes
                parts: list[Part] = []
                near = self._address.startswith("ipc:")
                while frame.more:
                    frame = self._router.recv(copy=False)
                    if not parts and identity not in self._remote:
                        near = near or _is_near(frame)
                    if len(parts) <= protocol.MAX_ARRAYS + 1:  # one too many is enough to refuse it
                        parts.append(frame.buffer)
                if self._backlog is not None:
                    self._backlog.took(frame)
                peer = self._remote.get(identity)
                if peer is None:
                    peer = self._remote[identity] = _RemotePeer(
                        self, identity, is_near=near, may_seal=self._keys is not None
                    )
                    if len(self._remote) > _REMOTE_CLIENTS:
                        self._remote.popitem(last=False)
                self._remote.move_to_end(identity)
                got.append(Received(peer, parts, start_s))
        return got

    def _accept(self, listener: LocalListener | SealedListener) -> None:
        peer = listener.accept()
        if peer is None:
            return
        if sum(isinstance(other, type(peer)) for other in self._direct.values()) >= _DIRECT_CLIENTS:
            _log.warning("there are %d such clients already; one more is turned away", _DIRECT_CLIENTS)
            peer.close()
            return
        self._direct[peer.fileno()] = peer
        self._epoll.register(peer, select.EPOLLIN)

    def _receive_direct(self, handle: int, got: list[Received]) -> None:
        peer = self._direct[handle]
        start_s = time.perf_counter()
        try:
            if peer.greet_by_s is not None:
                peer.greet()
                return
            parts = peer.receive()
        except MessageError as error:
            got.append(Received(peer, [], start_s, error))
            return
        except OSError as error:
            _log.info("a client was turned away: %s", error)
            parts = None
        if parts is None:
            self._close_direct(peer)
        elif parts:
            got.append(Received(peer, parts, start_s))

    def _close_direct(self, peer: LocalPeer | SealedPeer) -> None:
        del self._direct[peer.fileno()]
        self._epoll.unregister(peer)
        peer.close()
        self._gone.append(peer)


class _RemotePeer:
    """A client on the network, told by ZMQ's identity of its connection."""

    def __init__(self, door: Door, identity: bytes, *, is_near: bool, may_seal: bool) -> None:
        self.identity = identity
        self.is_near = is_near
        self.may_seal = may_seal
        self._door = door

    def send(self, parts: Sequence[Part]) -> None:
        self._door.send_remote(self.identity, parts)


def _is_near(frame: zmq.Frame) -> bool:
    try:
        return is_loopback(str(frame.get("Peer-Address")))
    except zmq.ZMQError:
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
