"""openpi's own client against our endpoint, and what strangers may send."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_server.openpi import OpenpiEndpoint, observation_of, pack
from policy_server.protocol import MessageError
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer
from simplevla.bundle import Bundle
from simplevla.errors import ConfigError, UnavailableError
from simplevla.observation import Observation

pytest.importorskip("websockets")
Observe = Callable[..., Observation]


@pytest.fixture
def endpoint(server: PolicyServer) -> Iterator[OpenpiEndpoint]:
    with OpenpiEndpoint(server, 0) as listening:
        yield listening


@pytest.fixture
def connect(endpoint: OpenpiEndpoint) -> Callable[[], Any]:
    client = pytest.importorskip(
        "openpi_client.websocket_client_policy",
        reason="openpi-client is not installed (pip install --no-deps openpi-client)",
    )
    return lambda: client.WebsocketClientPolicy("127.0.0.1", endpoint.port)


def as_openpi(observation: Observation) -> dict[str, Any]:
    return {
        "state": observation.state,
        "images": dict(observation.images),
        "prompt": observation.instruction,
    }


def test_an_unmodified_client_gets_the_policys_actions(
    connect: Callable[[], Any], policy: ServedPolicy, observe: Observe, bundle: Bundle
) -> None:
    client = connect()
    metadata = client.get_server_metadata()
    assert metadata["policy_id"] == bundle.id
    assert metadata["images"] == {"head": [48, 64, 3]}
    assert metadata["action_horizon"] == 3
    for seed in range(3):
        observation = observe(seed)
        want = policy.answer(observation)[0].actions
        answer = client.infer(as_openpi(observation))
        np.testing.assert_array_equal(answer["actions"], want)
        assert answer["actions"].dtype == np.float32
        assert answer["server_timing"]["infer_ms"] >= 0


def test_other_spellings_of_an_observation_mean_the_same(
    connect: Callable[[], Any], observe: Observe
) -> None:
    client, observation = connect(), observe(0)
    picture = observation.images["head"]
    want = client.infer(as_openpi(observation))["actions"]
    flat = {"observation/state": observation.state.astype(np.float64), "prompt": observation.instruction}
    for changed in (
        {**flat, "observation/image": picture},
        {**flat, "observation/head": picture.transpose(2, 0, 1)},
        {"state": observation.state.tolist(), "images": {"head": picture}},  # the policy's only prompt
    ):
        np.testing.assert_allclose(client.infer(changed)["actions"], want, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": np.zeros(3, np.float32)}, "state is"),
        ({"state": np.full(7, np.nan, np.float32)}, "not finite"),
        ({"images": {}}, "no 'observation/head'"),
        ({"images": {"head": np.zeros((480, 640, 3), np.uint8)[:100]}}, "not uint8"),
        ({"images": {"head": np.zeros((48, 64, 3), np.float32)}}, "not uint8"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x" * 600}, "characters"),
    ],
)
def test_a_refusal_says_why_and_the_connection_stays(
    connect: Callable[[], Any], observe: Observe, changes: dict[str, Any], message: str
) -> None:
    client = connect()
    with pytest.raises(RuntimeError, match=message):
        client.infer({**as_openpi(observe(0)), **changes})
    assert client.infer(as_openpi(observe(0)))["actions"].shape == (3, 7)


def test_no_web_page_gets_in_and_health_is_told(endpoint: OpenpiEndpoint) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect as connect_raw

    address = f"127.0.0.1:{endpoint.port}"
    with pytest.raises(InvalidStatus, match="403"):
        connect_raw(f"ws://{address}", additional_headers={"Origin": "http://evil.example"})
    with urllib.request.urlopen(f"http://{address}/healthz", timeout=5) as answer:
        assert (answer.status, answer.read()) == (200, b"OK\n")


def test_what_is_too_large_ends_that_connection_alone(connect: Callable[[], Any], observe: Observe) -> None:
    from websockets.exceptions import ConnectionClosed

    greedy, other = connect(), connect()
    huge = {**as_openpi(observe(0)), "more": np.zeros(3_000_000, np.uint8)}
    with pytest.raises(ConnectionClosed):
        greedy.infer(huge)
    assert other.infer(as_openpi(observe(0)))["actions"].shape == (3, 7)


def test_it_listens_on_this_machine_alone_and_on_a_free_port(server: PolicyServer) -> None:
    with pytest.raises(ConfigError, match="no keys"):
        OpenpiEndpoint(server, 0, host="0.0.0.0")  # noqa: S104 (it must be refused)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(UnavailableError, match="--openpi-port"),
            OpenpiEndpoint(server, taken.getsockname()[1]),
        ):
            pass


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
keys = st.sampled_from(
    ["state", "images", "prompt", "observation/state", "observation/image", "head",
     b"__ndarray__", b"data", b"dtype", b"shape"]
)  # fmt: skip
arrays = st.fixed_dictionaries(
    {
        b"__ndarray__": st.just(value=True) | scalars,
        b"data": st.binary(max_size=64) | scalars,
        b"dtype": st.sampled_from(["|u1", "<f4", "<f8", "|O", b"<f4", ">f8", "float32", "V9"]) | scalars,
        b"shape": st.lists(st.integers(-4, 2**62), max_size=6)
        | st.just([7])
        | st.just([48, 64, 3])
        | scalars,
    }
)
values = st.recursive(
    scalars | st.binary(max_size=32) | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(value=st.dictionaries(keys, values, max_size=5))
@settings(deadline=None, max_examples=200)
def test_whatever_is_sent_is_an_observation_or_a_message_error(bundle: Bundle, value: Any) -> None:
    try:
        observation = observation_of(msgspec.msgpack.encode(value), bundle.manifest)
    except MessageError:
        return
    assert observation.state.shape == (7,)


@given(raw=st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_whatever_bytes_are_sent_are_refused_in_words(bundle: Bundle, raw: bytes) -> None:
    with pytest.raises(MessageError):
        observation_of(raw, bundle.manifest)


def test_arrays_read_as_openpi_reads_them() -> None:
    numpy_ = pytest.importorskip("openpi_client.msgpack_numpy")
    for value in (np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(3)[::2].astype(np.int64)):
        np.testing.assert_array_equal(numpy_.unpackb(pack({"a": value}))["a"], value)
