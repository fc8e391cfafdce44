"""A message without an end: whoever sends one is hung up on, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

import pytest
import zmq

from policy_server import backlog
from policy_server.door import Door

pytestmark = [
    pytest.mark.by_the_clock,
    pytest.mark.skipif(not backlog.is_possible(), reason="only Linux counts a connection's bytes"),
]

_PART_BYTES = 900_000
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_READY = b"\x05READY" + b"\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"


def dealer(address: str) -> socket.socket:
    """Return a connection that has introduced itself as ZMQ does; ZMQ itself sends no half messages."""
    host, port = address.removeprefix("tcp://").split(":")
    raw = socket.create_connection((host, int(port)), 5)
    raw.sendall(_GREETING + b"\x04" + bytes([len(_READY)]) + _READY)
    return raw


def part(*, more: bool, size: int = _PART_BYTES) -> bytes:
    return bytes([2 | more]) + size.to_bytes(8, "big") + bytes(size)


def send_parts(raw: socket.socket, count: int) -> None:
    with contextlib.suppress(OSError):
        for _ in range(count):
            raw.sendall(part(more=True))


def until_gone(door: Door, raw: socket.socket, timeout_s: float = 5.0) -> bool:
    """Mind the door; return whether the connection has ended in time."""
    raw.settimeout(0.01)
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        door.receive(0.02)
        try:
            if not raw.recv(1 << 16):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def test_who_never_ends_a_message_is_hung_up_on() -> None:
    with (
        Door("tcp://127.0.0.1:*", max_part_bytes=1 << 20, max_message_bytes=1 << 20) as door,
        dealer(door.address) as raw,
        dealer(door.address) as other,
    ):
        flood = threading.Thread(target=send_parts, args=(raw, 30))
        flood.start()
        assert until_gone(door, raw)
        flood.join()
        other.sendall(part(more=True, size=10) + part(more=False, size=10))
        got = [received for _ in range(50) for received in door.receive(0.02)]
        assert [len(received.parts) for received in got] == [2]


def test_looking_at_what_is_no_connection_any_more_leaves_no_file_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    event = os.eventfd(0)
    try:
        for handle in (event, 10_000):
            assert backlog._peer(handle) is None
            assert backlog._received_bytes(handle) == 0
        assert len(os.listdir("/proc/self/fd")) == before + 1
    finally:
        os.close(event)


def test_who_brings_much_before_the_first_look_is_no_offender() -> None:
    with (
        Door("tcp://127.0.0.1:*", max_part_bytes=1 << 20, max_message_bytes=1 << 20) as door,
        dealer(door.address) as raw,
    ):
        door.receive(0.0)  # the next look is a tenth of a second away
        flood = threading.Thread(
            target=lambda: [raw.sendall(part(more=False, size=_PART_BYTES)) for _ in range(30)]
        )
        flood.start()
        taken = 0
        give_up_s = time.monotonic() + 5
        while taken < 30 and time.monotonic() < give_up_s:
            taken += len(door.receive(0.02))
        flood.join(5)
        assert taken == 30
        assert not until_gone(door, raw, timeout_s=0.3)


def test_many_whole_messages_and_one_that_is_slow_are_no_offence() -> None:
    with (
        Door("tcp://127.0.0.1:*", max_part_bytes=1 << 20, max_message_bytes=1 << 20) as door,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as client,
        dealer(door.address) as slow,
    ):
        client.connect(door.address)
        slow.sendall(part(more=True))
        taken = 0
        for _ in range(24):
            client.send_multipart([bytes(_PART_BYTES)])
            give_up_s = time.monotonic() + 5
            while not (got := door.receive(0.05)) and time.monotonic() < give_up_s:
                pass
            taken += len(got)
        assert taken == 24
        time.sleep(0.15)
        slow.sendall(part(more=False, size=10))
        give_up_s = time.monotonic() + 5
        while not (got := door.receive(0.05)) and time.monotonic() < give_up_s:
            pass
        assert [len(received.parts) for received in got] == [2]
