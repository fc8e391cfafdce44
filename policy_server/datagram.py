"""A message's parts as one run of bytes: short parts within, long ones beside it.

    datagram = "SVL3", number of parts, slot or -1, each part's size (top bit: beside), short parts

What lies beside is in shared memory (:mod:`policy_server.local_link`) or follows sealed, block by block
(:mod:`policy_server.sealed_link`); each long part begins at a multiple of 64 bytes there.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence

from policy_server.protocol import MAX_ARRAYS, MAX_HEADER_BYTES, MessageError, Part

INLINE_BYTES = 1 << 15
MAX_DATAGRAM_BYTES = 160 << 10
MAGIC = b"SVL3"

_HEAD = struct.Struct("<4sHh")
_SIZE_BYTES = 4
_BESIDE = 1 << 31
_ALIGNMENT = 64


def pack(parts: Sequence[Part], slot: int, memory: memoryview) -> list[Part]:
    """Return the pieces of the datagram, after copying the long parts into ``memory``, the slot's.

    Raises:
        MessageError: it does not fit.
    """
    pieces, long = split(parts, slot)
    offset = 0
    for part in long:
        size = len(part)
        if offset + size > len(memory):
            raise MessageError(
                f"the arrays need more than the {len(memory)} bytes of a slot",
                "send images in the sizes that the embodiment names",
                code="too_large",
            )
        memory[offset : offset + size] = part
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return pieces


def split(parts: Sequence[Part], slot: int) -> tuple[list[Part], list[Part]]:
    """Return the pieces of the datagram, and the long parts that go beside it; none where slot is -1.

    Raises:
        MessageError: the datagram would be too long.
    """
    pieces: list[Part] = [b""]
    long: list[Part] = []
    sizes: list[int] = []
    length = 0
    for part in parts:
        size = len(part)
        if slot >= 0 and sizes and size >= INLINE_BYTES:
            long.append(part)
            sizes.append(size | _BESIDE)
        else:
            pieces.append(part)
            sizes.append(size)
            length += size
    if length > MAX_DATAGRAM_BYTES - 1024:
        raise MessageError("the message is too long", "send fewer arrays", code="too_large")
    pieces[0] = _HEAD.pack(MAGIC, len(parts), slot) + struct.pack(f"<{len(sizes)}I", *sizes)
    return pieces, long


def unpack(datagram: bytes, slots: Sequence[memoryview]) -> list[Part]:
    """Return the parts of a message: views of the datagram, and of the slot for the long ones.

    Raises:
        MessageError: a size or a slot is none, or bytes are missing or left over.
    """
    slot, sizes = _table(datagram)
    if slot >= len(slots):
        raise MessageError("the datagram is no message")
    start = _HEAD.size + len(sizes) * _SIZE_BYTES
    whole = memoryview(datagram)
    parts: list[Part] = []
    offset = 0
    for index, told in enumerate(sizes):
        size = told & ~_BESIDE
        if told & _BESIDE:
            # The header is always within: it must not change while it is read.
            if index == 0 or slot < 0 or offset + size > len(slots[slot]):
                raise MessageError("an array does not lie in its slot")
            parts.append(slots[slot][offset : offset + size])
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
        else:
            if start + size > len(datagram) or (index == 0 and size > MAX_HEADER_BYTES):
                raise MessageError(
                    "the datagram is cut short", code="too_large" if index == 0 else "bad_message"
                )
            parts.append(whole[start : start + size])
            start += size
    if start != len(datagram):
        raise MessageError("the datagram is longer than its parts")
    return parts


def beside(datagram: bytes) -> list[tuple[int, int]]:
    """Return where each long part lies beside the datagram: (offset, size), in order.

    Raises:
        MessageError: it is no datagram.
    """
    places = []
    offset = 0
    for told in _table(datagram)[1]:
        size = told & ~_BESIDE
        if told & _BESIDE:
            places.append((offset, size))
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places


def slot_bytes(sizes: Sequence[int]) -> int:
    """Return how large a slot must be that holds parts of ``sizes``, in whole pages."""
    needed = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)
    return -(-max(needed, 1) // mmap.PAGESIZE) * mmap.PAGESIZE


def _table(datagram: bytes) -> tuple[int, tuple[int, ...]]:
    """Return the slot and each part's size, checked for their number alone."""
    if len(datagram) < _HEAD.size:
        raise MessageError("the datagram is no message")
    magic, count, slot = _HEAD.unpack_from(datagram)
    if magic != MAGIC or not 1 <= count <= MAX_ARRAYS + 1 or slot < -1:
        raise MessageError("the datagram is no message")
    if _HEAD.size + count * _SIZE_BYTES > len(datagram):
        raise MessageError("the datagram is cut short")
    return slot, struct.unpack_from(f"<{count}I", datagram, _HEAD.size)
