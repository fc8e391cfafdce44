"""Messages sealed with AES-256-GCM, one behind the other: what one side seals the other opens, in order.

    length of what follows (4 bytes); sealed datagram; sealed blocks

A datagram is :mod:`policy_server.datagram`'s; its long parts follow in blocks of 256 KiB. The nonce is the
number of seals before this one and is not sent: what is repeated, left out or put in another place does not
open. Before something has opened only a bounded length is read; memory is taken for what it then announces.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from policy_server.datagram import MAX_DATAGRAM_BYTES, beside, unpack
from policy_server.local_link import GoneError
from policy_server.protocol import MessageError, Part
from policy_server.waiting import Patience

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

BLOCK_BYTES = 256 << 10
KEY_BYTES = 32

_TAG_BYTES = 16
_LENGTH_BYTES = 4
PLACE_BYTES = max(MAX_DATAGRAM_BYTES, BLOCK_BYTES) + _LENGTH_BYTES + _TAG_BYTES
_QUICK_BYTES = 1 << 16  # who sent that much at a time is about to send more
_QUICK_S = 1e-3
_GAP_S = 5e-5  # between two blocks on one machine; a real network's are longer, and are slept through
_AT_ONCE_BYTES = 8 << 20


def is_possible() -> bool:
    """Return whether what seals is installed."""
    try:
        return hasattr(_cipher(bytes(KEY_BYTES)), "encrypt_into")
    except ImportError:
        return False


class Seal:
    """One direction of a connection: whoever seals counts, and so does whoever opens."""

    def __init__(self, key: str) -> None:
        """Take a key, 32 bytes in hex, which must serve nothing else."""
        self._cipher = _cipher(bytes.fromhex(key))
        self._count = 0

    def close(self, plain: Part, sealed: memoryview, also: bytes = b"") -> None:
        """Seal ``plain`` into ``sealed``, which is 16 bytes longer; ``also`` is vouched for, not hidden."""
        self._cipher.encrypt_into(self._nonce(), plain, also, sealed)

    def open(self, sealed: memoryview, plain: memoryview, also: bytes = b"") -> None:
        """Open ``sealed`` into ``plain``, which is 16 bytes shorter.

        Raises:
            GoneError: it is not what the other side sealed at this place: the connection is worth nothing.
        """
        from cryptography.exceptions import InvalidTag

        try:
            self._cipher.decrypt_into(self._nonce(), sealed, also, plain)
        except InvalidTag:
            raise GoneError("what came was not sealed by the other side", "connect again") from None

    def _nonce(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(12, "little")


def sealed(
    seal: Seal, pieces: Sequence[Part], long: Sequence[Part], place: memoryview
) -> Iterator[memoryview]:
    """Yield what to send, one after the other, each in ``place``: use it before asking for the next.

    Args:
        seal: of this direction.
        pieces, long: what :func:`policy_server.datagram.split` returns.
        place: PLACE_BYTES to work in.
    """
    datagram = b"".join(pieces)
    size = len(datagram) + _TAG_BYTES
    length = size.to_bytes(_LENGTH_BYTES, "little")
    place[:_LENGTH_BYTES] = length
    seal.close(datagram, place[_LENGTH_BYTES : _LENGTH_BYTES + size], length)
    yield place[: _LENGTH_BYTES + size]
    for part in long:
        whole = memoryview(part)
        for start in range(0, len(whole), BLOCK_BYTES):
            block = whole[start : start + BLOCK_BYTES]
            closed = place[: len(block) + _TAG_BYTES]
            seal.close(block, closed)
            yield closed


class Reader:
    """Puts messages together from what a socket gives, piece by piece, and opens them."""

    def __init__(self, connection: socket.socket, seal: Seal, max_body_bytes: int) -> None:
        """Take a socket that does not block, the seal of its direction, and how much to take memory for."""
        self._socket = connection
        self._seal = seal
        self._max_body_bytes = max_body_bytes
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._patience = Patience(_GAP_S)
        self._place = memoryview(bytearray(PLACE_BYTES))
        self._steps = self._messages()
        self._wanted = self._next_size()
        self._have = 0

    def read(self) -> list[Part] | None:
        """Return the next message if it is whole by now; nothing of it is lost if it is not.

        Raises:
            GoneError: the other side has gone, or what came is not its own.
            MessageError: what came is no message.
        """
        taken = 0
        while taken < _AT_ONCE_BYTES:
            try:
                size = self._socket.recv_into(self._place[self._have : self._wanted])
            except BlockingIOError:
                if taken >= _QUICK_BYTES and self._patience.wait(self._has_more, _QUICK_S):
                    continue
                return None
            except OSError as error:
                raise GoneError("the connection has ended", "connect again") from error
            if not size:
                raise GoneError("the connection has ended", "connect again")
            taken += size
            self._have += size
            if self._have == self._wanted:
                self._have = 0
                said = next(self._steps)
                if isinstance(said, int):
                    self._wanted = said
                    continue
                self._wanted = self._next_size()
                if isinstance(said, MessageError):
                    raise said
                return said
        return None

    def _has_more(self, timeout_s: float) -> bool:
        return bool(self._poll.poll(1e3 * timeout_s))

    def _next_size(self) -> int:
        size = next(self._steps)
        assert isinstance(size, int)  # a message begins with its length
        return size

    def _messages(self) -> Iterator[int | list[Part] | MessageError]:
        """Yield how many bytes it needs next in ``_place``, or a message, or why it is none."""
        while True:
            yield _LENGTH_BYTES
            length = bytes(self._place[:_LENGTH_BYTES])
            size = int.from_bytes(length, "little")
            if not _TAG_BYTES < size <= MAX_DATAGRAM_BYTES + _TAG_BYTES:
                raise GoneError("what came was not sealed by the other side", "connect again")
            yield size
            plain = bytearray(size - _TAG_BYTES)
            self._seal.open(self._place[:size], memoryview(plain), length)
            datagram = bytes(plain)
            try:
                places = beside(datagram)
            except MessageError as error:  # nobody can tell where the next one begins
                raise GoneError(error.message, error.remedy) from error
            needed = sum(places[-1]) if places else 0
            if needed > self._max_body_bytes:
                raise GoneError(f"a message needs {needed} bytes", "send images in the robot's sizes")
            body = np.empty(needed, np.uint8).data
            for offset, total in places:
                for start in range(offset, offset + total, BLOCK_BYTES):
                    end = min(start + BLOCK_BYTES, offset + total)
                    yield end - start + _TAG_BYTES
                    self._seal.open(self._place[: end - start + _TAG_BYTES], body[start:end])
            try:
                yield unpack(datagram, [body])
            except MessageError as error:
                yield error


def _cipher(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)
