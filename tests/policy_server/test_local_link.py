"""Shared memory between two processes: what goes in comes out, strangers stay out, nothing is left."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from policy_server import messages, protocol
from policy_server.client import PolicyClient
from policy_server.datagram import INLINE_BYTES, MAGIC
from policy_server.local_link import SLOTS, GoneError, LocalLink, LocalListener
from policy_server.protocol import LocalOffer, MessageError
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer
from simplevla.embodiment import Embodiment
from simplevla.errors import UnavailableError
from simplevla.observation import Observation

pytestmark = pytest.mark.by_the_clock

Observe = Callable[..., Observation]
Serving = Callable[..., AbstractContextManager[PolicyServer]]


def offer_of(server: PolicyServer, embodiment: Embodiment) -> LocalOffer:
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=5, local=False) as client:
        assert client.offer is not None
        return client.offer


def shared_memories() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:simplevla-frames")


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    give_up_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < give_up_s:
        time.sleep(0.01)
    return condition()


def test_a_client_of_this_machine_goes_over_to_shared_memory(
    server: PolicyServer, policy: ServedPolicy, embodiment: Embodiment, observe: Observe
) -> None:
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client:
        assert client.transport == "shared memory"
        for seed in range(2 * SLOTS):
            have = client.act(observe(seed)).chunk.actions
            np.testing.assert_array_equal(have, policy.answer(observe(seed))[0].actions)


def test_big_images_lie_in_the_slot_and_too_big_ones_are_refused(
    server: PolicyServer, embodiment: Embodiment
) -> None:
    link = LocalLink(offer_of(server, embodiment), 5)
    try:
        big = np.zeros((2 * INLINE_BYTES,), np.uint8)
        with pytest.raises(MessageError) as caught:
            link.send(messages.encode(protocol.Health(request=1), {"a": big}))
        assert caught.value.code == "too_large"
        # The slot was given back: all of them can still be used.
        for request in range(SLOTS + 1):
            link.send(messages.encode(protocol.Health(request=request)))
            heard = link.receive(5)
            assert heard is not None
            assert messages.decode(heard).header.request == request
    finally:
        link.close()


def test_the_memory_is_private_sealed_and_gone_with_the_client(
    server: PolicyServer, embodiment: Embodiment
) -> None:
    offer = offer_of(server, embodiment)
    folder = Path(offer.path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(offer.path).stat().st_mode) == 0o600
    before = shared_memories()
    link = LocalLink(offer, 5)
    assert shared_memories() == before + 2  # this process is both sides
    link.close()
    assert wait_for(lambda: shared_memories() == before)


def test_nobody_can_shrink_the_memory_under_the_server(
    server: PolicyServer, embodiment: Embodiment
) -> None:
    offer = offer_of(server, embodiment)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.connect(offer.path)
        raw.send(MAGIC + offer.token.encode())
        _, (handle,), _, _ = socket.recv_fds(raw, 256, 1)
    try:
        size = os.fstat(handle).st_size
        assert size % mmap.PAGESIZE == 0
        assert stat.S_IMODE(os.fstat(handle).st_mode) == 0o600
        assert fcntl.fcntl(handle, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


@pytest.mark.parametrize("greeting", [b"", MAGIC + b"0" * 32, b"hello", MAGIC, bytes(300)])
def test_who_does_not_know_the_word_is_turned_away(
    server: PolicyServer, embodiment: Embodiment, observe: Observe, greeting: bytes
) -> None:
    offer = offer_of(server, embodiment)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(5)
        stranger.connect(offer.path)
        stranger.send(greeting)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client:
        assert client.act(observe()).chunk.length == 3


def test_nonsense_on_the_link_is_refused_and_the_link_stays(
    server: PolicyServer, embodiment: Embodiment
) -> None:
    link = LocalLink(offer_of(server, embodiment), 5)
    raw = socket.socket(fileno=os.dup(link.fileno()))
    try:
        for nonsense in (b"x", MAGIC + bytes(100), b"SVL3\x01\x00\x09\x00" + bytes(4), bytes(170_000)):
            raw.send(nonsense)
            heard = link.receive(5)
            assert heard is not None
            header = messages.decode(heard).header
            assert isinstance(header, protocol.Error)
            assert header.code in ("bad_message", "too_large")
        link.send(messages.encode(protocol.Health(request=1)))
        heard = link.receive(5)
        assert heard is not None
        assert isinstance(messages.decode(heard).header, protocol.Status)
    finally:
        raw.close()
        link.close()


def test_a_client_does_not_trust_any_socket(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, tmp_path / "missing", tmp_path):
        with pytest.raises(UnavailableError):
            LocalLink(LocalOffer(str(path), "0" * 32), 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        with pytest.raises(UnavailableError):
            LocalLink(LocalOffer(str(tmp_path / "other"), "0" * 32), 0.1)


def test_a_client_that_was_killed_leaves_nothing(server: PolicyServer, embodiment: Embodiment) -> None:
    offer = offer_of(server, embodiment)
    before = shared_memories()
    code = (
        "import sys; from policy_server.local_link import LocalLink\n"
        "from policy_server.protocol import LocalOffer\n"
        "link = LocalLink(LocalOffer(*sys.argv[1:]), 5); print('here', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, offer.path, offer.token], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        assert shared_memories() == before + 1
    finally:
        child.kill()
        child.communicate()
    assert wait_for(lambda: shared_memories() == before)


def test_a_dead_server_is_noticed_at_once(
    policy: ServedPolicy, embodiment: Embodiment, serving: Serving
) -> None:
    with serving(policy) as server:
        link = LocalLink(offer_of(server, embodiment), 5)
        path = Path(server._door.local_offer.path)  # type: ignore[union-attr]
        assert path.exists()
    start_s = time.monotonic()
    with pytest.raises(GoneError):
        link.receive(30)
    assert time.monotonic() - start_s < 5
    with pytest.raises(GoneError):
        link.send([b"x"])
    link.close()
    assert not path.parent.exists()


def test_a_listener_leaves_no_folder() -> None:
    listener = LocalListener(4096)
    folder = Path(listener.offer.path).parent
    assert listener.accept() is None
    listener.close()
    assert not folder.exists()
