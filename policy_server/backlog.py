"""What ZMQ holds of messages that are not whole yet, and an end to peers that never make one whole.

ZMQ keeps the parts of a message until the last one has come, without a limit of its own, and shows nothing
of them before. The kernel knows how many bytes a connection has brought, though: who has brought more since
the last whole message than any few messages can need is hung up on, and ZMQ gives the memory back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

CHECK_S = 0.1

_CHECK_BUSY_S = 1.0

_INFO_BYTES = 136
_RECEIVED = struct.Struct("=128xQ")  # tcpi_bytes_received in Linux's struct tcp_info

_log = logging.getLogger(__name__)


@dataclass
class _Connection:
    who: Any
    taken_bytes: int = 0


class Backlog:
    """Watches the connections of a ROUTER over TCP. Not thread-safe: its owner locks."""

    def __init__(self, router: zmq.Socket[bytes], limit_bytes: int) -> None:
        """Begin, before ``router`` is bound.

        Args:
            router: whose connections.
            limit_bytes: what one may bring before it has brought a whole message.
        """
        self._router = router
        self._limit_bytes = limit_bytes
        self._connections: dict[int, _Connection] = {}
        self._gave: set[int] = set()  # a whole message since the last look
        self._monitor = router.get_monitor_socket(zmq.EVENT_ACCEPTED)
        self._checked_s = 0.0

    def took(self, frame: zmq.Frame) -> None:
        """Take note that a whole message was taken, of which ``frame`` is a part."""
        with contextlib.suppress(zmq.ZMQError):
            self._gave.add(int(frame.get(zmq.SRCFD)))

    def check(self, now_s: float, *, all_taken: bool) -> None:
        """Hang up on who has brought too much without an end; does nothing if it has just looked.

        Args:
            now_s: on the monotonic clock.
            all_taken: whether every whole message was taken; if some still wait they would count as parts
                without an end, so that it looks seldom then.
        """
        if now_s - self._checked_s < (CHECK_S if all_taken else _CHECK_BUSY_S):
            return
        self._checked_s = now_s
        while self._monitor.poll(0):
            handle = int(recv_monitor_message(self._monitor)["value"])
            if (who := _peer(handle)) is not None:
                self._connections[handle] = _Connection(who)
        for handle, connection in list(self._connections.items()):
            # The number may be another connection's by now.
            if _peer(handle) != connection.who:
                del self._connections[handle]
            elif handle in self._gave:
                connection.taken_bytes = _received_bytes(handle)
            elif _received_bytes(handle) - connection.taken_bytes > self._limit_bytes:
                _log.warning("a client sends a message without an end; it is hung up on")
                del self._connections[handle]
                with contextlib.suppress(OSError), _same(handle) as peer:
                    peer.shutdown(socket.SHUT_RDWR)
        self._gave.clear()

    @property
    def is_needed(self) -> bool:
        """Whether there are connections to look at again soon."""
        return bool(self._connections)

    def close(self) -> None:
        """Let go of the monitor; the router goes on."""
        self._router.disable_monitor()
        self._monitor.close(linger=0)


def is_possible() -> bool:
    """Return whether this system tells how much a connection has brought."""
    return sys.platform == "linux"


def _peer(handle: int) -> Any:
    """Return who is at the other end of a TCP connection; None if ``handle`` is none."""
    try:
        with _same(handle) as copy:
            return copy.getpeername() if copy.family in (socket.AF_INET, socket.AF_INET6) else None
    except OSError:
        return None


def _received_bytes(handle: int) -> int:
    try:
        with _same(handle) as copy:
            info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        return int(_RECEIVED.unpack(info)[0])
    except (OSError, struct.error):
        return 0


@contextlib.contextmanager
def _same(handle: int) -> Iterator[socket.socket]:
    """Yield a socket of our own for the one that ZMQ has; OSError if ``handle`` is none any more."""
    own = os.dup(handle)
    try:
        copy = socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise
    with copy:
        yield copy
