"""A client's way over the network: a ZMQ DEALER, encrypted where there are keys."""

from __future__ import annotations

from collections.abc import Sequence

from policy_server import protocol
from policy_server.protocol import DEFAULT_ADDRESS, MessageError, Part
from simplevla.errors import ConfigError, MissingExtraError

try:
    import zmq
except ImportError as _error:
    raise MissingExtraError("pyzmq", "robot") from _error

from policy_server.keys import ClientKeys

_HEARTBEAT_MS = 1000
_SILENCE_MS = 3000
_RECONNECT_MS = 50
_QUEUED_MESSAGES = 8


class RemoteLink:
    """Owns a ZMQ socket, for messages to and fro; not for several threads at once.

    Its file descriptor tells of news only once: ask :meth:`receive` after each :meth:`send` too.
    """

    transport = "network"

    def __init__(self, address: str, keys: ClientKeys | None = None) -> None:
        """Begin to connect; that nobody is there shows when no answer comes.

        Args:
            address: the server's.
            keys: encrypt, and speak to the one server that they name.

        Raises:
            ConfigError: it is no address.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, _QUEUED_MESSAGES),
            (zmq.RCVHWM, _QUEUED_MESSAGES),
            (zmq.MAXMSGSIZE, protocol.MAX_PART_BYTES),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS),
            (zmq.IPV6, int(address.startswith("tcp://["))),
        ):
            self._socket.setsockopt(option, value)
        if keys is not None:
            self._socket.curve_secretkey = keys.secret
            self._socket.curve_publickey = keys.public
            self._socket.curve_serverkey = keys.server
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"{address!r} is no address of a server", f"use one like {DEFAULT_ADDRESS}"
            ) from error

    def fileno(self) -> int:
        """What to wait on for the next message."""
        return int(self._socket.getsockopt(zmq.FD))

    def send(self, parts: Sequence[Part]) -> int:
        """Send a message without copying its arrays: leave them alone until the answer is there.

        Raises:
            MessageError: too many messages wait to be sent.
        """
        try:
            self._socket.send_multipart(parts, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            raise MessageError(
                "the queue to the server is full", "wait for an answer", code="too_large"
            ) from None
        return -1

    def release(self, slot: int) -> None:
        """Nothing is held."""

    def receive(self, timeout_s: float) -> list[Part] | None:
        """Return the next message, or None if there is none within ``timeout_s``."""
        if not self._has_news() and timeout_s > 0:
            self._socket.poll(max(1, round(1e3 * timeout_s)))
        if not self._has_news():
            return None
        return list(self._socket.recv_multipart())

    def _has_news(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def close(self) -> None:
        """Let go of the socket; safe to call twice."""
        self._context.destroy(linger=0)
