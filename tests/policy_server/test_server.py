"""Server and client over a real socket: handshake, refusals, silence, restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket as sockets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from policy_server import messages, protocol
from policy_server.address import require_local
from policy_server.client import PolicyChangedError, PolicyClient, RemoteError
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer
from simplevla.bundle import Bundle
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.errors import ConfigError, EmbodimentError, ObservationError, UnavailableError
from simplevla.observation import Observation

pytestmark = pytest.mark.by_the_clock

CHUNK_LENGTH = 3
Observe = Callable[..., Observation]
Serving = Callable[..., AbstractContextManager[PolicyServer]]


def free_address() -> str:
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


class RawClient:
    """A socket that sends whatever it is given."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.connect(address)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def ask(self, parts: list[protocol.Part]) -> protocol.Header:
        """Send ``parts`` and return the header of what comes back."""
        self.socket.send_multipart(parts)
        assert self.socket.poll(5000), "no answer"
        return messages.decode(self.socket.recv_multipart()).header


def test_a_chunk_is_what_the_policy_answers(
    server: PolicyServer, policy: ServedPolicy, bundle: Bundle, embodiment: Embodiment, observe: Observe
) -> None:
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client:
        info = client.info
        assert (info.policy_id, info.name, info.chunk_length) == (bundle.id, "small", CHUNK_LENGTH)
        assert (info.action_space, info.dt_s, info.backend) == ("ee_delta", 0.1, "numpy")
        assert info.cameras == (protocol.CameraNeed("head", 64, 48),)
        assert info.instructions == {"move_can_pot": "move the can next to the pot"}
        for seed in range(3):
            observation = observe(seed)
            reply = client.act(observation)
            want, _ = policy.answer(observation)
            np.testing.assert_array_equal(reply.chunk.actions, want.actions)
            assert reply.chunk.capture_ns == observation.capture_ns
            parts = msgspec.structs.astuple(reply.timing)
            assert min(parts) >= 0
            assert sum(parts) <= reply.round_trip_ms
        status = client.health()
        assert (status.answered, status.refused, status.policy_id) == (3, 0, bundle.id)


def test_two_clients_at_once_each_get_their_own_answers(
    server: PolicyServer, policy: ServedPolicy, embodiment: Embodiment, observe: Observe
) -> None:
    wrong: list[int] = []

    def ask(offset: int) -> None:
        with PolicyClient(server.address, embodiment=embodiment, timeout_s=10) as client:
            for seed in range(offset, offset + 10):
                observation = observe(seed)
                have = client.act(observation).chunk
                if not np.array_equal(have.actions, policy.answer(observation)[0].actions):
                    wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert wrong == []


def test_another_robot_is_refused_with_the_difference(server: PolicyServer) -> None:
    with (
        pytest.raises(EmbodimentError, match=r"'piper_dual' .*'piper_single'"),
        PolicyClient(server.address, embodiment=load_embodiment("piper_dual"), timeout_s=5),
    ):
        pass


def test_another_schema_is_refused_and_the_connection_stays(server: PolicyServer) -> None:
    with RawClient(server.address) as client:
        newer = {"type": "hello", "schema": 4, "request": 8, "robot": "piper"}
        refusal = client.ask([msgspec.msgpack.encode(newer)])
        assert isinstance(refusal, protocol.Error)
        assert (refusal.code, refusal.request) == ("other_schema", 8)
        assert "same version" in refusal.remedy
        assert isinstance(client.ask(messages.encode(protocol.Health(request=9))), protocol.Status)


def test_actions_need_a_hello(server: PolicyServer, observe: Observe) -> None:
    with RawClient(server.address) as client:
        refusal = client.ask(messages.encode_observation(1, observe(), ["head"]))
        assert isinstance(refusal, protocol.Error)
        assert refusal.code == "no_handshake"


def bad_messages(observation: Observation) -> dict[str, list[protocol.Part]]:
    good = messages.encode_observation(5, observation, ["head"])

    def changed(**changes: object) -> list[protocol.Part]:
        return messages.encode_observation(5, dataclasses.replace(observation, **changes), ["head"])

    image = observation.images["head"]
    nan = observation.state.copy()
    nan[2] = np.nan
    return {
        "empty": [b""],
        "no msgpack": [b"GET / HTTP/1.1"],
        "a pickle": [b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."],
        "a part too few": good[:-1],
        "a part too many": [*good, b"x"],
        "a hundred parts": [good[0], *[b"x"] * 100],
        "a header too large": [bytes(protocol.MAX_HEADER_BYTES + 1)],
        "cut image": [*good[:-1], bytes(good[-1])[:-1]],
        "a server's message": messages.encode(protocol.Error(request=5, code="x", message="", remedy="")),
        "no state": messages.encode(
            protocol.Act(request=5, instruction="", capture_ns=0), {"image/head": image}
        ),
        "surplus array": messages.encode(
            protocol.Act(request=5, instruction="", capture_ns=0), {"state": nan, "other": nan}
        ),
        "state not finite": changed(state=nan),
        "state too short": changed(state=nan[:2]),
        "state of bytes": changed(state=np.zeros(7, np.uint8)),
        "image of another size": changed(images={"head": image[:10].copy()}),
        "image of floats": changed(images={"head": image.astype(np.float32)}),
        "camera missing": messages.encode_observation(5, observation, []),
        "too many words": changed(instruction="can " * 100),
    }


def test_every_bad_message_gets_a_typed_error_and_the_next_good_one_an_answer(
    server: PolicyServer, embodiment: Embodiment, observe: Observe
) -> None:
    good = messages.encode_observation(6, observe(), ["head"])
    with RawClient(server.address) as client:
        client.ask(messages.encode(protocol.Hello(request=1, embodiment=embodiment)))
        for name, parts in bad_messages(observe()).items():
            refusal = client.ask(parts)
            assert isinstance(refusal, protocol.Error), name
            assert refusal.code in {"bad_message", "too_large", "bad_observation"}, (name, refusal)
            assert refusal.message, name
            assert refusal.remedy, name
            assert isinstance(client.ask(good), protocol.Chunk), f"after {name}"


def test_noise_on_the_port_harms_nobody(
    server: PolicyServer, embodiment: Embodiment, observe: Observe
) -> None:
    port = int(server.address.rpartition(":")[2])
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client:
        for noise in (b"\x00" * 4096, b"\xff" * 4096, b"GET / HTTP/1.1\r\n\r\n"):
            with sockets.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(noise)
            assert client.act(observe()).chunk.length == CHUNK_LENGTH


def test_a_failure_inside_inference_is_named_logged_and_survived(
    server: PolicyServer,
    session: Any,
    embodiment: Embodiment,
    caplog: pytest.LogCaptureFixture,
    observe: Observe,
) -> None:
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client:
        session.failure = RuntimeError("secret detail of the server")
        with caplog.at_level(logging.ERROR), pytest.raises(RemoteError) as caught:
            client.act(observe())
        assert caught.value.code == "internal"
        assert "secret" not in str(caught.value)
        assert "secret detail of the server" in caplog.text
        assert client.act(observe()).chunk.length == CHUNK_LENGTH
        assert client.health().refused == 1


def test_logits_that_are_not_finite_never_become_actions(
    server: PolicyServer,
    session: Any,
    embodiment: Embodiment,
    monkeypatch: pytest.MonkeyPatch,
    observe: Observe,
) -> None:
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client:
        bad = np.full((1, CHUNK_LENGTH * embodiment.dimension, 256), np.nan, np.float32)
        monkeypatch.setattr(session, "run", lambda _: bad)
        with pytest.raises(RemoteError) as caught:
            client.act(observe())
        assert caught.value.code == "bad_chunk"


def test_a_bad_observation_is_named_before_anything_is_sent(
    server: PolicyServer, embodiment: Embodiment, observe: Observe
) -> None:
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client:
        observation = observe()
        with pytest.raises(ObservationError, match="no image of camera 'head'"):
            client.act(dataclasses.replace(observation, images={}))
        assert client.health().refused == 0
        assert client.act(observation).chunk.length == CHUNK_LENGTH


def test_a_server_that_is_not_there_is_named_in_bounded_time(embodiment: Embodiment) -> None:
    address = free_address()
    start = time.monotonic()
    with (
        pytest.raises(UnavailableError, match=address) as caught,
        PolicyClient(address, embodiment=embodiment, timeout_s=0.3),
    ):
        pass
    assert time.monotonic() - start < 2
    assert "simplevla serve" in caught.value.remedy


def test_a_client_waits_for_a_server_that_is_starting(
    policy: ServedPolicy, embodiment: Embodiment, serving: Serving
) -> None:
    address = free_address()
    ready = threading.Event()
    infos = []

    def connect() -> None:
        with PolicyClient(address, embodiment=embodiment, timeout_s=5, wait_s=20) as client:
            infos.append(client.info)
            ready.set()

    thread = threading.Thread(target=connect)
    thread.start()
    time.sleep(0.3)
    with serving(policy, address):
        assert ready.wait(20)
    thread.join(10)
    assert infos[0].name == "small"


def test_a_restart_between_two_requests_is_not_noticed(
    policy: ServedPolicy, embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    address = free_address()
    client = PolicyClient(address, embodiment=embodiment, timeout_s=5)
    with serving(policy, address):
        before = client.connect(), client.act(observe()).chunk
    with serving(policy, address):
        after = client.info, client.act(observe()).chunk
    client.close()
    assert before[0] == after[0]
    np.testing.assert_array_equal(before[1].actions, after[1].actions)


def test_a_client_goes_on_once_the_server_is_back(
    policy: ServedPolicy, embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    address = free_address()
    client = PolicyClient(address, embodiment=embodiment, timeout_s=0.5)
    with serving(policy, address):
        client.connect(wait_s=10)
        before = client.act(observe()).chunk
    start = time.monotonic()
    with pytest.raises(UnavailableError):
        client.act(observe())
    assert time.monotonic() - start < 2
    with serving(policy, address):
        after = None
        while after is None and time.monotonic() - start < 20:
            with contextlib.suppress(UnavailableError):
                after = client.act(observe()).chunk
    client.close()
    assert after is not None
    np.testing.assert_array_equal(after.actions, before.actions)


def test_a_server_that_forgot_the_client_is_told_again_who_asks(
    server: PolicyServer, embodiment: Embodiment, observe: Observe
) -> None:
    with PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client:
        server._welcomed.clear()
        assert client.act(observe()).chunk.length == CHUNK_LENGTH


def test_another_policy_behind_the_same_address_is_noticed(
    policy: ServedPolicy, embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    address = free_address()
    observation = observe()
    client = PolicyClient(address, embodiment=embodiment, timeout_s=5)
    with serving(policy, address):
        client.connect()
    other = dataclasses.replace(policy, policy_id="f" * 64)
    with serving(other, address):
        with pytest.raises(PolicyChangedError, match="ffffffffffff"):
            client.act(observation)
        assert client.info.policy_id == "f" * 64
        assert client.act(observation).chunk.policy_id == "f" * 64
    client.close()


def test_late_answers_are_thrown_away(embodiment: Embodiment) -> None:
    """A hand-made server answers twice: first an old request, then the one that was asked."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")

    def welcome(request: int, name: str) -> list[protocol.Part]:
        return messages.encode(
            protocol.Welcome(
                request=request,
                policy_id="a",
                name=name,
                cameras=(protocol.CameraNeed("head", 64, 48),),
                instructions={},
                chunk_length=1,
                dt_s=0.1,
                action_space="ee_delta",
                backend="none",
                clock_ns=0,
            )
        )

    def answer() -> None:
        client, *parts = router.recv_multipart()
        request = messages.decode(parts).header.request
        router.send_multipart([client, *welcome(request + 1000, "late")])
        router.send_multipart([client, *welcome(request, "right")])

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with PolicyClient(f"tcp://127.0.0.1:{port}", embodiment=embodiment, timeout_s=5) as client:
            assert client.info.name == "right"
    finally:
        thread.join(5)
        context.destroy(linger=0)


def test_what_has_arrived_is_answered_before_the_server_stops(policy: ServedPolicy) -> None:
    with PolicyServer(policy, "tcp://127.0.0.1:*") as server, RawClient(server.address) as client:
        for request in range(1, 6):
            client.socket.send_multipart(messages.encode(protocol.Health(request=request)))
        client.socket.poll(200)  # nobody serves yet: gives the messages time to arrive
        server.stop()
        server.serve()
        answers = []
        while client.socket.poll(500):
            answers.append(messages.decode(client.socket.recv_multipart()).header.request)
    assert answers == [1, 2, 3, 4, 5]


def test_an_address_in_use_is_one_clear_error(server: PolicyServer, policy: ServedPolicy) -> None:
    with pytest.raises(UnavailableError, match="in use") as caught, PolicyServer(policy, server.address):
        pass
    assert "--address" in caught.value.remedy


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:5555",
        "tcp://*:5555",
        "tcp://192.0.2.1:5555",
        "tcp://robot.example.org:5555",
        "tcp://[::]:5555",
    ],
)
def test_other_machines_are_let_in_only_by_name(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="other machines"):
        require_local(address, allow_remote=False)
    require_local(address, allow_remote=True)
    assert "neither encrypted nor authenticated" in caplog.text


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:5555", "tcp://localhost:5", "tcp://[::1]:5", "ipc:///x"]
)
def test_this_machine_needs_no_leave(address: str, caplog: pytest.LogCaptureFixture) -> None:
    require_local(address, allow_remote=False)
    assert not caplog.records


@pytest.mark.parametrize("address", ["", "127.0.0.1:5555", "http://127.0.0.1:5555", "tcp://"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        require_local(address, allow_remote=False)


def test_a_client_of_a_wrong_address_says_so(embodiment: Embodiment) -> None:
    with pytest.raises(ConfigError, match="no address"), PolicyClient("nonsense", embodiment=embodiment):
        pass


def test_ipc_serves_too(
    policy: ServedPolicy, embodiment: Embodiment, tmp_path: Path, observe: Observe, serving: Serving
) -> None:
    with (
        serving(policy, f"ipc://{tmp_path}/policy") as server,
        PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client,
    ):
        assert client.act(observe()).chunk.length == CHUNK_LENGTH


def test_the_client_needs_no_inference_library() -> None:
    heavy = "torch", "transformers", "onnxruntime", "onnx", "rclpy", "sapien"
    code = f"import sys, policy_server.client; sys.exit(any(x in sys.modules for x in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_bundle_is_served_by_what_it_says(
    tmp_path: Path,
    write_small_bundle: Callable[[Path, int], Bundle],
    session: Any,
    embodiment: Embodiment,
    serving: Serving,
) -> None:
    other = write_small_bundle(tmp_path / "other", 1)
    with (
        serving(ServedPolicy.of(other, session)) as server,
        PolicyClient(server.address, embodiment=embodiment, timeout_s=5) as client,
    ):
        assert client.info.policy_id == other.id
