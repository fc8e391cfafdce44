"""A CAN bus on loopback: python-can's interface ``simplevla_twin``, and the hub at its other end.

Machines without SocketCAN (containers, laptops) have no bus to put under the vendor's SDK; python-can's
own stand-ins echo what is sent, or mix two arms. Here an arm's bus is a UDP port of 127.0.0.1. The
emulated arm is the hub; every opened bus talks to the hub and hears the hub alone, so nothing echoes.

A frame is 16 bytes, big-endian: u32 identifier, u8 length (0 to 8), 3 bytes of zero, 8 data bytes. A
datagram holds one or more frames; an empty one says "I listen", and must be said again at least every
second. A bus that only sends says nothing and is sent nothing.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import can

from simplevla.errors import UnavailableError

logger = logging.getLogger(__name__)

FRAME_BYTES = 16
MAX_STANDARD_ID = 0x7FF
_FRAME = struct.Struct(">IB3x8s")
_MAX_DATAGRAM = 2048
_RENEW_S = 0.3
_FORGET_S = 1.0
_RECEIVE_BUFFER = 1 << 20
_MAX_BATCH = 256


class CanFrame(NamedTuple):
    """One classic CAN frame with an 11-bit identifier."""

    id: int
    data: bytes


def pack_frames(frames: Iterable[CanFrame]) -> bytes:
    """Return one datagram."""
    return b"".join(_FRAME.pack(frame.id, len(frame.data), frame.data) for frame in frames)


def unpack_frames(datagram: bytes) -> list[CanFrame]:
    """Return a datagram's frames.

    Raises:
        ValueError: its length is no multiple of 16, or an identifier, a length or the padding is wrong.
    """
    if len(datagram) % FRAME_BYTES:
        raise ValueError(f"{len(datagram)} bytes are no whole number of frames")
    frames = []
    for identifier, length, data in _FRAME.iter_unpack(datagram):
        if identifier > MAX_STANDARD_ID or length > 8 or any(data[length:]):
            raise ValueError(f"frame {identifier:#x} with length {length} is malformed")
        frames.append(CanFrame(identifier, data[:length]))
    return frames


class TwinCanBus(can.BusABC):
    """One end of an emulated arm's bus, for python-can.

    Args:
        channel: ``127.0.0.1:<port>``, where the hub is.
    """

    def __init__(self, channel: str, can_filters: Any = None, **_: object) -> None:
        host, port = _address(channel)
        self.channel_info = f"simplevla_twin {channel}"
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._socket.setblocking(False)
        self._socket.connect((host, port))
        self._waiting: deque[can.Message] = deque()
        self._said_s = float("-inf")
        super().__init__(channel=channel, can_filters=can_filters)

    def send(self, msg: can.Message, timeout: float | None = None) -> None:  # noqa: ARG002
        """Send one frame; it is gone if nobody is at the other end, as on a bus without power."""
        if msg.is_extended_id or msg.is_remote_frame or msg.is_fd or msg.arbitration_id > MAX_STANDARD_ID:
            raise can.CanOperationError("the twin's bus carries classic data frames with 11-bit ids only")
        try:
            self._socket.send(pack_frames([CanFrame(msg.arbitration_id, bytes(msg.data))]))
        except ConnectionRefusedError:
            logger.debug("%s: nobody is there", self.channel_info)
        except OSError as error:
            raise can.CanOperationError(f"{self.channel_info}: {error}") from error

    def fileno(self) -> int:
        """Return the socket's descriptor, or -1 once it is closed."""
        return self._socket.fileno()

    def shutdown(self) -> None:
        """Close the socket."""
        super().shutdown()
        self._socket.close()

    def _recv_internal(self, timeout: float | None) -> tuple[can.Message | None, bool]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._waiting:
            self._say_listening()
            left = _RENEW_S if deadline is None else min(_RENEW_S, deadline - time.monotonic())
            if left < 0 or (
                not self._readable(left) and deadline is not None and time.monotonic() >= deadline
            ):
                return None, False
            self._receive()
        return self._waiting.popleft(), False

    def _say_listening(self) -> None:
        now = time.monotonic()
        if now - self._said_s >= _RENEW_S:
            self._said_s = now
            try:
                self._socket.send(b"")
            except ConnectionRefusedError:
                logger.debug("%s: nobody is there", self.channel_info)
            except OSError as error:
                raise can.CanOperationError(f"{self.channel_info}: {error}") from error

    def _readable(self, timeout_s: float) -> bool:
        try:
            return bool(select.select([self._socket], [], [], timeout_s)[0])
        except (OSError, ValueError) as error:
            raise can.CanOperationError(f"{self.channel_info} is closed") from error

    def _receive(self) -> None:
        try:
            datagram = self._socket.recv(_MAX_DATAGRAM)
            frames = unpack_frames(datagram)
        except (BlockingIOError, ConnectionRefusedError):
            return
        except ValueError as error:
            logger.warning("%s: %s", self.channel_info, error)
            return
        now = time.time()
        self._waiting.extend(
            can.Message(
                timestamp=now, arbitration_id=frame.id, is_extended_id=False, data=frame.data, is_rx=True
            )
            for frame in frames
        )


class CanHub:
    """The emulated arm's end of its bus. A context manager.

    Args:
        channel: ``127.0.0.1:<port>`` to listen on.

    Raises:
        UnavailableError: on entering, the port is taken.
    """

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self._listeners: dict[tuple[str, int], float] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self) -> CanHub:
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        try:
            self._socket.bind(_address(self.channel))
        except OSError as error:
            self._socket.close()
            raise UnavailableError(
                f"UDP port {self.channel} cannot be opened: {error.strerror}",
                "end the other twin, or give this rig other ports",
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    def receive(self) -> Iterator[CanFrame]:
        """Yield the frames that wait, and note who listens.

        Malformed datagrams are dropped and logged. One call takes at most ``_MAX_BATCH`` datagrams, so
        that a flood does not keep the arm from speaking.
        """
        for _ in range(_MAX_BATCH):
            try:
                datagram, sender = self._socket.recvfrom(_MAX_DATAGRAM)
            except BlockingIOError:
                return
            except ConnectionRefusedError:  # an earlier send found nobody; the listener will be forgotten
                continue
            if not datagram:
                self._listeners[sender] = time.monotonic()
                continue
            try:
                yield from unpack_frames(datagram)
            except ValueError as error:
                logger.warning("%s: %s", self.channel, error)

    def send(self, frames: list[CanFrame]) -> None:
        """Send frames, in one datagram, to everyone who listens."""
        if not frames:
            return
        datagram = pack_frames(frames)
        now = time.monotonic()
        for listener, said_s in list(self._listeners.items()):
            if now - said_s > _FORGET_S:
                del self._listeners[listener]
                continue
            try:
                self._socket.sendto(datagram, listener)
            except (BlockingIOError, ConnectionRefusedError):
                continue


def _address(channel: str) -> tuple[str, int]:
    host, _, port = channel.rpartition(":")
    if host != "127.0.0.1" or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise can.CanInitializationError(f"channel {channel!r} is not 127.0.0.1:<port>")
    return host, int(port)
