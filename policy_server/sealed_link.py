"""The quick way between two machines that hold keys: one TCP connection, sealed with AES-256-GCM.

CURVE says who is at the other end and hides what is said, but its cipher (XSalsa20 and Poly1305) is
computed in software, which takes pictures longer than the wire does. Processors have instructions for AES.
So CURVE introduces and this carries: in its Welcome, which only the client that CURVE let in can read, the
server offers a port, a ticket and two fresh keys. The client shows the ticket there in clear ("SVS1" and 16
bytes); all else, in both directions, is sealed (:mod:`policy_server.sealing`).

The keys are random, were sent inside CURVE alone, serve one connection and one direction, and are forgotten
with it: a ticket is good once and for ten seconds, so that a recording opens nothing, and no nonce comes
twice. Whatever does not open ends the connection.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import secrets
import select
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

from policy_server import sealing
from policy_server.datagram import INLINE_BYTES, split
from policy_server.local_link import GoneError
from policy_server.protocol import Part, SealedOffer
from policy_server.sealing import KEY_BYTES, PLACE_BYTES, Reader, Seal, sealed
from policy_server.waiting import SPIN_S, Patience
from simplevla.errors import UnavailableError

_MAGIC = b"SVS1"
_TICKET_BYTES = 16
_PORTS_ABOVE = 1000
_OFFERS = 64
_OFFER_S = 10.0
_GREETING_S = 2.0
_CONNECT_S = 0.5  # a firewall that swallows the port must not keep a client from the way that is open
_SILENCE_S = 3
_ANSWERS_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class SealedLink:
    """A client's end. Owns a socket; not for several threads at once."""

    transport = "network, sealed"

    def __init__(self, host: str, offer: SealedOffer, timeout_s: float, spin_s: float = SPIN_S) -> None:
        """Connect, and show the ticket.

        Args:
            host: where the server is.
            offer: what it said.
            timeout_s: longest time that one call waits for the network, s.
            spin_s: see :class:`policy_server.waiting.Patience`.

        Raises:
            UnavailableError: the port cannot be reached, or nothing here can seal.
        """
        if not sealing.is_possible():
            raise UnavailableError("cryptography is not installed", 'pip install "simplevla[robot]"')
        self._timeout_s = timeout_s
        try:
            self._socket = socket.create_connection((host, offer.port), min(timeout_s, _CONNECT_S))
            self._socket.sendall(_MAGIC + bytes.fromhex(offer.ticket))
        except OSError as error:
            raise UnavailableError(
                f"nobody at {host}, port {offer.port}: {error}", "open that port too"
            ) from error
        _prepare(self._socket)
        self._ours = Seal(offer.client_key)
        self._reader = Reader(self._socket, Seal(offer.server_key), max_body_bytes=0)
        self._block = memoryview(bytearray(PLACE_BYTES))
        self._patience = Patience(spin_s)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def fileno(self) -> int:
        """The socket, to wait on."""
        return self._socket.fileno()

    def send(self, parts: Sequence[Part]) -> int:
        """Send a message, and wait until the system has it; nothing is to be released.

        Raises:
            MessageError: it is too long.
            GoneError: the server is gone, or takes nothing.
        """
        long = any(len(part) >= INLINE_BYTES for part in parts[1:])
        pieces, blocks = split(parts, 0 if long else -1)
        try:
            # The socket itself does not block, for its reader's sake: this waits as long as one may.
            self._socket.settimeout(self._timeout_s)
            for piece in sealed(self._ours, pieces, blocks, self._block):
                self._socket.sendall(piece)
            self._socket.setblocking(False)
        except OSError as error:
            raise GoneError("the policy server has ended the connection", "connect again") from error
        return -1

    def release(self, slot: int) -> None:
        """Nothing is held."""

    def receive(self, timeout_s: float) -> list[Part] | None:
        """Return the next message; None if there was none within ``timeout_s``.

        Raises:
            GoneError: the server is gone, or somebody else speaks.
            MessageError: what came is no message.
        """
        give_up_s = time.monotonic() + timeout_s
        while not (heard := self._patience.wait(self._look, timeout_s)) and timeout_s > 0:
            timeout_s = give_up_s - time.monotonic()  # what came may have been a part of a message
        return heard

    def close(self) -> None:
        """Let go of the socket; safe to call twice."""
        self._socket.close()

    def _look(self, timeout_s: float) -> list[Part] | None:
        if not self._poll.poll(max(1.0, 1e3 * timeout_s) if timeout_s > 0 else 0):
            return None
        return self._reader.read()


class SealedPeer:
    """A server's end of one connection: whom a message came from, and where its answer goes."""

    is_near = False
    may_seal = False

    def __init__(self, connection: socket.socket, listener: SealedListener, max_body_bytes: int) -> None:
        """Take a connection that has not shown its ticket yet."""
        self.socket = connection
        self.greet_by_s: float | None = time.monotonic() + _GREETING_S
        self._listener = listener
        self._max_body_bytes = max_body_bytes
        self._told = b""
        self._is_open = True
        # Answers are sent by one thread and the socket is closed by another.
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket, to wait on."""
        return self.socket.fileno()

    def greet(self) -> None:
        """Read the ticket, as far as it has come.

        Raises:
            PermissionError: it is none, or was used before.
            OSError: the client is gone.
        """
        wanted = len(_MAGIC) + _TICKET_BYTES
        heard = self.socket.recv(wanted - len(self._told))
        if not heard:
            raise ConnectionResetError("it has gone")
        self._told += heard
        if len(self._told) < wanted:
            return
        offer = self._listener.redeem(self._told[len(_MAGIC) :].hex())
        if not self._told.startswith(_MAGIC) or offer is None:
            raise PermissionError("it shows no ticket of ours")
        self._ours = Seal(offer.server_key)
        self._reader = Reader(self.socket, Seal(offer.client_key), self._max_body_bytes)
        self._block = memoryview(bytearray(PLACE_BYTES))
        self.greet_by_s = None

    def receive(self) -> list[Part] | None:
        """Return the message that is whole by now, nothing if none is; None if the client is gone.

        Raises:
            MessageError: what came is no message.
        """
        try:
            return self._reader.read() or []
        except GoneError as error:
            _log.debug("a sealed connection ends: %s", error)
            return None

    def send(self, parts: Sequence[Part]) -> None:
        """Send an answer; a client that is gone or takes none is hung up on. Safe from any thread."""
        with self._sending, contextlib.suppress(OSError):
            if not self._is_open:
                return
            pieces, _ = split(parts, -1)
            for piece in sealed(self._ours, pieces, (), self._block):
                try:
                    taken = self.socket.send(piece)
                except BlockingIOError:
                    taken = 0
                if taken < len(piece):
                    _log.warning("a client does not take its answers; it is hung up on")
                    self.socket.shutdown(socket.SHUT_RDWR)  # its reader sees the end, and closes
                    return

    def close(self) -> None:
        """Let go of the socket."""
        with self._sending:
            self._is_open = False
            self.socket.close()


class SealedListener:
    """Where clients that CURVE has let in may come instead: a TCP port beside ZMQ's."""

    def __init__(self, address: str, max_body_bytes: int) -> None:
        """Listen 1000 ports above ``address``, or on a free port if that one is taken.

        Args:
            address: ``tcp://host:port``, as ZMQ has bound it.
            max_body_bytes: the most that the long parts of one message may need.

        Raises:
            OSError: there is no port.
        """
        self._max_body_bytes = max_body_bytes
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        try:
            self.socket = socket.create_server((host, int(port) + _PORTS_ABOVE), family=family, backlog=64)
        except (OSError, OverflowError):
            self.socket = socket.create_server((host, 0), family=family, backlog=64)
        self.socket.setblocking(False)
        self.port = int(self.socket.getsockname()[1])
        self._offers: OrderedDict[str, tuple[float, SealedOffer]] = OrderedDict()

    def fileno(self) -> int:
        """The socket, to wait on."""
        return self.socket.fileno()

    def offer(self) -> SealedOffer:
        """Return a fresh offer, to be sent through CURVE alone."""
        offer = SealedOffer(
            self.port,
            secrets.token_hex(_TICKET_BYTES),
            secrets.token_hex(KEY_BYTES),
            secrets.token_hex(KEY_BYTES),
        )
        self._offers[offer.ticket] = time.monotonic(), offer
        if len(self._offers) > _OFFERS:
            self._offers.popitem(last=False)
        return offer

    def redeem(self, ticket: str) -> SealedOffer | None:
        """Return the offer that ``ticket`` stands for, for this once; None if it stands for none."""
        made_s, offer = self._offers.pop(ticket, (0.0, None))
        return offer if time.monotonic() - made_s < _OFFER_S else None

    def accept(self) -> SealedPeer | None:
        """Return who knocked, not yet greeted; None if it went away again."""
        try:
            connection, _ = self.socket.accept()
            _prepare(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ANSWERS_BYTES)
        except OSError:
            return None
        return SealedPeer(connection, self, self._max_body_bytes)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def _prepare(connection: socket.socket) -> None:
    """Send at once, and notice within seconds that the other machine is gone."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 1),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", _SILENCE_S),
        ("TCP_USER_TIMEOUT", 1000 * _SILENCE_S),
    ):
        if hasattr(socket, option):  # a robot's Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
