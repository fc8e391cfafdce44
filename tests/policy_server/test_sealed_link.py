"""The sealed connection: what goes in comes out, and who has no key, or changes a byte, gets nowhere."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest

from policy_server import messages, protocol
from policy_server.client import PolicyClient
from policy_server.datagram import split
from policy_server.keys import ClientKeys, ServerKeys, allow_client, make_keys
from policy_server.local_link import GoneError
from policy_server.protocol import MessageError, Part, SealedOffer
from policy_server.sealed_link import SealedLink, SealedListener, SealedPeer
from policy_server.sealing import BLOCK_BYTES, sealed
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer
from simplevla.embodiment import Embodiment
from simplevla.errors import UnavailableError
from simplevla.observation import Observation

pytestmark = pytest.mark.by_the_clock

Observe = Callable[..., Observation]
Serving = Callable[..., AbstractContextManager[PolicyServer]]
_BODY_BYTES = 1 << 20


@pytest.fixture
def listener() -> Iterator[SealedListener]:
    with closing(SealedListener("tcp://127.0.0.1:0", _BODY_BYTES)) as listener:
        yield listener


def ready(handle: object, timeout_s: float = 5.0) -> bool:
    return bool(select.select([handle], [], [], timeout_s)[0])


def accepted(listener: SealedListener) -> SealedPeer:
    assert ready(listener)
    peer = listener.accept()
    assert peer is not None
    return peer


def greeted(listener: SealedListener) -> SealedPeer:
    peer = accepted(listener)
    while peer.greet_by_s is not None:
        assert ready(peer)
        peer.greet()
    return peer


def heard(peer: SealedPeer) -> list[Part] | None:
    """Return what comes next; None if the peer is gone."""
    while ready(peer):
        parts = peer.receive()
        if parts is None or parts:
            return parts
    raise AssertionError("nothing came")


class Relay:
    """Somebody between the two, who sees every byte and may change some."""

    def __init__(self, port: int, change: Callable[[bytes], bytes]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._target = port
        self._change = change
        self.seen = b""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            while data := client.recv(1 << 20):
                self.seen += data
                try:
                    server.sendall(self._change(data))
                except OSError:
                    return

    def close(self) -> None:
        self._listener.close()
        self._thread.join(5)


def message(size: int) -> list[Part]:
    rng = np.random.default_rng(size)
    arrays = {"a": rng.integers(0, 256, size, np.uint8), "b": rng.integers(0, 256, 7, np.uint8)}
    return messages.encode(protocol.Health(request=1), arrays)


@pytest.mark.parametrize("size", [1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5])
def test_what_goes_in_comes_out_in_both_directions(listener: SealedListener, size: int) -> None:
    with closing(SealedLink("127.0.0.1", listener.offer(), 5)) as link, closing(greeted(listener)) as peer:
        for _ in range(3):
            sender = threading.Thread(target=link.send, args=(message(size),))
            sender.start()
            got = heard(peer)
            sender.join()
            assert got is not None
            assert [bytes(part) for part in got] == [bytes(part) for part in message(size)]
            peer.send(message(1000))
            back = link.receive(5)
            assert back is not None
            assert [bytes(part) for part in back] == [bytes(part) for part in message(1000)]


def test_an_answer_that_comes_in_pieces_is_waited_for(listener: SealedListener) -> None:
    with closing(SealedLink("127.0.0.1", listener.offer(), 5)) as link, closing(greeted(listener)) as peer:
        (answer,) = sealed(
            peer._ours, split([b"header", b"words"], -1)[0], (), memoryview(bytearray(300_000))
        )
        whole = bytes(answer)

        def drip() -> None:
            for byte in whole:
                peer.socket.send(bytes([byte]))
                time.sleep(0.001)

        thread = threading.Thread(target=drip)
        thread.start()
        assert link.receive(5) == [b"header", b"words"]
        thread.join()
        assert link.receive(0.0) is None
        assert link.receive(0.02) is None


def test_nothing_that_was_said_can_be_read_on_the_way(listener: SealedListener) -> None:
    offer = listener.offer()
    with closing(Relay(offer.port, lambda data: data)) as relay:
        told = msgspec.structs.replace(offer, port=relay.port)
        secret = b"the can stands on the left " * 2000
        with closing(SealedLink("127.0.0.1", told, 5)) as link, closing(greeted(listener)) as peer:
            link.send([b"header", secret])
            assert heard(peer) == [b"header", secret]
        assert b"header" not in relay.seen
        assert secret[:20] not in relay.seen
        assert bytes.fromhex(offer.client_key) not in relay.seen


@pytest.mark.parametrize("place", ["length", "datagram", "block"])
def test_a_changed_byte_ends_the_connection(listener: SealedListener, place: str) -> None:
    offer = listener.offer()
    count = 0

    def change(data: bytes) -> bytes:
        nonlocal count
        spoilt = bytearray(data)
        for at in range(len(spoilt)):
            if count + at == {"length": 20, "datagram": 40, "block": 20_000}[place]:
                spoilt[at] ^= 1
        count += len(data)
        return bytes(spoilt)

    with closing(Relay(offer.port, change)) as relay:
        told = msgspec.structs.replace(offer, port=relay.port)
        with closing(SealedLink("127.0.0.1", told, 5)) as link, closing(greeted(listener)) as peer:
            link.send(message(100_000))
            assert heard(peer) is None


def test_a_recording_of_a_connection_opens_nothing(listener: SealedListener) -> None:
    offer = listener.offer()
    with closing(Relay(offer.port, lambda data: data)) as relay:
        told = msgspec.structs.replace(offer, port=relay.port)
        with closing(SealedLink("127.0.0.1", told, 5)) as link, closing(greeted(listener)) as peer:
            link.send(message(10))
            assert heard(peer)
        with socket.create_connection(("127.0.0.1", offer.port)) as again:
            again.sendall(relay.seen)
            with closing(accepted(listener)) as peer, pytest.raises(PermissionError):
                ready(peer)
                peer.greet()


def test_a_message_that_comes_twice_ends_the_connection(listener: SealedListener) -> None:
    offer = listener.offer()
    with closing(Relay(offer.port, lambda data: data if data.startswith(b"SVS1") else 2 * data)) as relay:
        told = msgspec.structs.replace(offer, port=relay.port)
        with closing(SealedLink("127.0.0.1", told, 5)) as link, closing(greeted(listener)) as peer:
            time.sleep(0.05)  # so that the ticket comes alone
            link.send(message(10))
            assert heard(peer)
            assert heard(peer) is None


@pytest.mark.parametrize("word", [b"GET / HTTP/1.1\r\n\r\n  ", b"SVS1" + bytes(16), bytes(20)])
def test_who_has_no_ticket_is_turned_away(listener: SealedListener, word: bytes) -> None:
    listener.offer()
    with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
        stranger.sendall(word)
        with closing(accepted(listener)) as peer, pytest.raises(PermissionError):
            ready(peer)
            peer.greet()


def test_a_ticket_without_the_keys_gets_no_word_in(listener: SealedListener) -> None:
    offer = listener.offer()
    thief = SealedOffer(offer.port, offer.ticket, "0" * 64, "0" * 64)
    with closing(SealedLink("127.0.0.1", thief, 5)) as link, closing(greeted(listener)) as peer:
        link.send(message(10))
        assert heard(peer) is None


def test_a_ticket_is_good_once_and_for_a_while(
    listener: SealedListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = listener.offer(), listener.offer()
    assert listener.redeem(first.ticket) == first
    assert listener.redeem(first.ticket) is None
    later_s = time.monotonic() + 11
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    assert listener.redeem(second.ticket) is None


def test_no_memory_is_taken_for_more_than_the_robots_pictures(listener: SealedListener) -> None:
    with closing(SealedLink("127.0.0.1", listener.offer(), 5)) as link, closing(greeted(listener)) as peer:
        threading.Thread(target=lambda: _try(link, message(_BODY_BYTES + 1)), daemon=True).start()
        assert heard(peer) is None


def _try(link: SealedLink, parts: list[Part]) -> None:
    with suppress(GoneError):
        link.send(parts)


def test_nonsense_of_a_client_that_was_let_in_gets_the_typed_error(listener: SealedListener) -> None:
    with closing(SealedLink("127.0.0.1", listener.offer(), 5)) as link, closing(greeted(listener)) as peer:
        link.send([bytes(protocol.MAX_HEADER_BYTES + 1)])
        with pytest.raises(MessageError):
            heard(peer)
        link.send(message(10))
        assert heard(peer)


def test_a_client_that_takes_no_answers_is_hung_up_on(listener: SealedListener) -> None:
    with closing(SealedLink("127.0.0.1", listener.offer(), 5)) as link, closing(greeted(listener)) as peer:
        for _ in range(500):
            peer.send([bytes(30_000)])
        assert heard(peer) is None
        assert link.fileno() >= 0


def test_offers_come_through_curve_alone_and_are_not_shown(
    tmp_path: Path, policy: ServedPolicy, embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    make_keys(tmp_path, "server")
    allow_client(tmp_path, make_keys(tmp_path, "robot"))
    keys = ClientKeys.load(tmp_path, "robot")
    with serving(policy, keys=ServerKeys.load(tmp_path)) as server:
        with PolicyClient(
            server.address, embodiment=embodiment, timeout_s=10, keys=keys, local=False
        ) as client:
            assert client.transport == "network, sealed"
            first = client.act(observe()).chunk
            client.connect()
            assert np.array_equal(client.act(observe()).chunk.actions, first.actions)
            welcome = client._welcome
        # Who came over the sealed connection is told of no other.
        assert welcome is not None
        assert welcome.sealed is None
    with (
        serving(policy) as server,
        PolicyClient(server.address, embodiment=embodiment, timeout_s=10) as client,
    ):
        assert client._welcome is not None
        assert client._welcome.sealed is None
    assert "ab" * 32 not in repr(SealedOffer(1, "0" * 32, "ab" * 32, "ab" * 32))


def test_a_server_may_leave_the_port_out(
    tmp_path: Path, policy: ServedPolicy, embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    make_keys(tmp_path, "server")
    allow_client(tmp_path, make_keys(tmp_path, "robot"))
    keys = ClientKeys.load(tmp_path, "robot")
    with (
        serving(policy, keys=ServerKeys.load(tmp_path), sealed=False) as server,
        PolicyClient(server.address, embodiment=embodiment, timeout_s=10, keys=keys, local=False) as client,
    ):
        assert client.transport == "network"
        assert client.act(observe()).chunk.length == 3


def test_where_the_port_is_shut_a_client_stays_with_curve(
    tmp_path: Path,
    policy: ServedPolicy,
    embodiment: Embodiment,
    observe: Observe,
    serving: Serving,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_keys(tmp_path, "server")
    allow_client(tmp_path, make_keys(tmp_path, "robot"))

    def refused(*_: object, **__: object) -> None:
        raise UnavailableError("nobody there", "open that port too")

    monkeypatch.setattr("policy_server.links.SealedLink", refused)
    with (
        serving(policy, keys=ServerKeys.load(tmp_path)) as server,
        PolicyClient(
            server.address,
            embodiment=embodiment,
            timeout_s=10,
            keys=ClientKeys.load(tmp_path, "robot"),
            local=False,
        ) as client,
    ):
        assert client.transport == "network"
        assert client.act(observe()).chunk.length == 3
