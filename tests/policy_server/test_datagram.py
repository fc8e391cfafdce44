"""A message's parts as one run of bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_server.datagram import INLINE_BYTES, MAGIC, beside, pack, slot_bytes, unpack
from policy_server.protocol import MessageError


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=6), st.data())
def test_a_message_comes_out_as_it_went_in(parts: list[bytes], data: st.DataObject) -> None:
    long = [data.draw(st.booleans()) and index > 0 for index in range(len(parts))]
    sent = [
        part * (INLINE_BYTES // max(1, len(part)) + 1) if x else part
        for part, x in zip(parts, long, strict=True)
    ]
    memory = memoryview(bytearray(slot_bytes([len(part) for part in sent])))
    packed = b"".join(bytes(piece) for piece in pack(sent, 0, memory))
    assert len(packed) < 10_000
    assert [bytes(part) for part in unpack(packed, [memory])] == sent
    assert [bytes(memory[start : start + size]) for start, size in beside(packed)] == [
        part for index, part in enumerate(sent) if index and len(part) >= INLINE_BYTES
    ]


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: MAGIC + tail))
def test_any_datagram_is_a_message_or_refused_with_the_typed_error(datagram: bytes) -> None:
    with contextlib.suppress(MessageError):
        parts = unpack(datagram, [memoryview(bytearray(4096))])
        assert sum(map(len, parts)) <= len(datagram) + 4096 * len(parts)


def test_a_header_cannot_lie_in_memory_that_changes_while_it_is_read() -> None:
    lying = (
        MAGIC + (1).to_bytes(2, "little") + (0).to_bytes(2, "little") + (8 | 1 << 31).to_bytes(4, "little")
    )
    with pytest.raises(MessageError, match="slot"):
        unpack(lying, [memoryview(bytearray(64))])
