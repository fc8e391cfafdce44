"""The message door: what goes in comes out, and nothing but the typed error comes from bad bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from policy_server import messages, protocol
from policy_server.protocol import MessageError
from simplevla.action_chunk import ActionChunk
from simplevla.embodiment import load_embodiment
from simplevla.errors import ConfigError
from simplevla.observation import Observation

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
number = st.integers(0, 2**63 - 1)
finite = st.floats(-10, 10, width=32)
observations = st.builds(
    Observation,
    images=st.dictionaries(
        st.text("abcdef", min_size=1, max_size=5),
        hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 4), st.just(3))),
        min_size=1,
        max_size=3,
    ),
    state=hnp.arrays(np.float32, st.integers(1, 14), elements=finite),
    instruction=text,
    capture_ns=number,
    episode=text,
    last_action=st.integers(-1, 2**31),
)
timings = st.builds(
    protocol.ServerTiming,
    **dict.fromkeys(("receive_ms", "preprocess_ms", "inference_ms", "decode_ms"), st.floats(0, 1e6)),
)
chunks = st.builds(
    ActionChunk,
    actions=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=finite),
    dt_s=st.floats(1e-3, 10),
    capture_ns=number,
    policy_id=st.text("0123456789abcdef", min_size=1, max_size=64),
)


def raw(parts: list[protocol.Part]) -> list[bytes]:
    return [bytes(part) for part in parts]


@given(number, observations)
def test_an_observation_comes_back_as_it_was(request: int, observation: Observation) -> None:
    parts = raw(messages.encode_observation(request, observation, list(observation.images)))
    message = messages.decode(parts)
    back = messages.decode_observation(message)
    assert message.header.request == request
    assert back.images.keys() == observation.images.keys()
    for name, image in observation.images.items():
        np.testing.assert_array_equal(back.images[name], image)
    np.testing.assert_array_equal(back.state, observation.state)
    assert back.state.dtype == np.float32
    for field in ("instruction", "capture_ns", "episode", "last_action"):
        assert getattr(back, field) == getattr(observation, field)


@given(number, chunks, timings)
def test_a_chunk_comes_back_as_it_was(
    request: int, chunk: ActionChunk, timing: protocol.ServerTiming
) -> None:
    message = messages.decode(raw(messages.encode_chunk(request, chunk, timing, 7)))
    back = messages.decode_chunk(message)
    np.testing.assert_array_equal(back.actions, chunk.actions)
    assert dataclasses.replace(back, actions=chunk.actions) == chunk
    assert isinstance(message.header, protocol.Chunk)
    assert message.header.timing == timing


def test_a_hello_carries_the_whole_embodiment() -> None:
    hello = protocol.Hello(request=3, embodiment=load_embodiment("piper_dual"))
    assert messages.decode(raw(messages.encode(hello))).header == hello


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_arbitrary_bytes_raise_the_typed_error(parts: list[bytes]) -> None:
    with pytest.raises(MessageError) as caught:
        messages.decode(parts)
    assert caught.value.code in {"bad_message", "too_large", "other_schema"}
    assert caught.value.remedy


@given(observations, st.data())
def test_a_damaged_message_is_decoded_or_refused_with_the_typed_error(
    observation: Observation, data: st.DataObject
) -> None:
    parts = raw(messages.encode_observation(7, observation, list(observation.images)))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "drop", "repeat"]))
        which = data.draw(st.integers(0, len(parts) - 1))
        part = bytearray(parts[which])
        at = data.draw(st.integers(0, max(len(part) - 1, 0)))
        if kind == "flip" and part:
            part[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del part[at:]
        elif kind == "insert":
            part[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "drop" and len(parts) > 1:
            del parts[which]
            continue
        elif kind == "repeat":
            parts.insert(which, parts[which])
            continue
        parts[which] = bytes(part)
    with contextlib.suppress(MessageError):
        back = messages.decode_observation(messages.decode(parts))
        assert back.capture_ns >= 0
        assert {array.dtype.name for array in (back.state, *back.images.values())} <= {"uint8", "float32"}


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | text
        | st.binary(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from(["hello", "welcome", "act", "chunk", "health", "status", "error"]),
)
def test_well_formed_msgpack_of_any_content_is_refused(value: object, tag: str) -> None:
    for header in (
        value,
        {"type": tag, "schema": protocol.SCHEMA, "request": 5, "arrays": value, "embodiment": value},
    ):
        with pytest.raises(MessageError):
            messages.decode([msgspec.msgpack.encode(header), b"x"])


def act(**changes: object) -> dict[str, object]:
    """Return the header of a valid Act with one array of three floats, changed."""
    return {
        "type": "act",
        "schema": protocol.SCHEMA,
        "request": 9,
        "instruction": "go",
        "capture_ns": 1,
        "arrays": [{"name": "state", "dtype": "float32", "shape": [3]}],
    } | changes


@pytest.mark.parametrize(
    ("changes", "parts", "says"),
    [
        ({"schema": 1}, [bytes(12)], "schema 1"),
        ({"type": "dance"}, [bytes(12)], "dance"),
        ({"surplus": 1}, [bytes(12)], "surplus"),
        ({"capture_ns": -1}, [bytes(12)], "capture_ns"),
        ({"capture_ns": "now"}, [bytes(12)], "capture_ns"),
        ({"instruction": "a" * 513}, [bytes(12)], "instruction"),
        ({"last_action": -2}, [bytes(12)], "last_action"),
        ({}, [], "carries 0"),
        ({}, [bytes(12), bytes(12)], "carries 2"),
        ({}, [bytes(11)], "11 bytes"),
        ({"arrays": [{"name": "state", "dtype": "float64", "shape": [3]}]}, [bytes(24)], "float64"),
        ({"arrays": [{"name": "state", "dtype": "uint8", "shape": [0]}]}, [b""], "shape"),
        ({"arrays": [{"name": "state", "dtype": "uint8", "shape": [-3, -4]}]}, [bytes(12)], "shape"),
        (
            {"arrays": [{"name": "state", "dtype": "uint8", "shape": [1 << 26] * 4}]},
            [bytes(12)],
            "12 bytes",
        ),
        ({"arrays": [{"name": "state", "dtype": "uint8", "shape": [1] * 5}]}, [bytes(1)], "shape"),
        (
            {"arrays": [{"name": "s", "dtype": "uint8", "shape": [1]}] * 2},
            [bytes(1)] * 2,
            "different arrays",
        ),
    ],
)
def test_each_broken_field_is_named(changes: dict[str, object], parts: list[bytes], says: str) -> None:
    assert messages.decode([msgspec.msgpack.encode(act()), bytes(12)]).header.request == 9
    with pytest.raises(MessageError, match=says) as caught:
        messages.decode([msgspec.msgpack.encode(act(**changes)), *parts])
    assert caught.value.request == 9, "the refusal can be matched to its request"


def test_another_schema_is_told_apart_whatever_else_it_holds() -> None:
    header = {"type": "act2", "schema": 12, "request": 5, "new": {"field": [1, None]}}
    with pytest.raises(MessageError) as caught:
        messages.decode([msgspec.msgpack.encode(header)])
    assert (caught.value.code, caught.value.request) == ("other_schema", 5)


@pytest.mark.parametrize(
    "header",
    [
        b"\x81\xa6arrays\xdd\xff\xff\xff\xff",  # a list of 4 thousand million entries, in 12 bytes
        b"\x83\xa6schema\x02\xa7request\x01\xa1x" + b"\x91" * 60_000,  # nested as deep as the header allows
        b"\x82\xa6schema\x02\xa7request\xcf" + b"\xff" * 8,
        b"\x81\xa4type\xdb\xff\xff\xff\xff",
    ],
)
def test_a_header_cannot_make_the_reader_allocate_what_was_not_sent(header: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MessageError):
            messages.decode([header])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_sizes_are_bounded_in_both_directions() -> None:
    too_many = [msgspec.msgpack.encode(act()), *[b"x"] * (protocol.MAX_ARRAYS + 1)]
    for parts in ([], too_many, [bytes(protocol.MAX_HEADER_BYTES + 1)]):
        with pytest.raises(MessageError) as caught:
            messages.decode(parts)
        assert caught.value.code == "too_large"
    with pytest.raises(MessageError) as caught:
        messages.encode(
            protocol.Health(request=1), {"a": np.zeros((2, protocol.MAX_PART_BYTES // 2 + 1), np.uint8)}
        )
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros(0, np.uint8), np.array(1, np.uint8)])
def test_an_array_that_the_protocol_does_not_know_is_not_sent(array: np.ndarray) -> None:
    with pytest.raises(MessageError, match="'a'"):
        messages.encode(protocol.Health(request=1), {"a": array})


def test_a_text_that_is_no_unicode_is_not_sent() -> None:
    observation = Observation({}, np.zeros(3, np.float32), "\ud800", 0)
    with pytest.raises(MessageError):
        messages.encode_observation(1, observation, [])


def test_a_strided_array_arrives_as_it_looks() -> None:
    wide = np.arange(24, dtype=np.uint8).reshape(4, 6)
    message = messages.decode(raw(messages.encode(protocol.Health(request=1), {"a": wide[::2, ::-1]})))
    np.testing.assert_array_equal(message.arrays["a"], wide[::2, ::-1])


def test_an_error_of_any_length_fits_in_a_message() -> None:
    parts = raw(messages.encode_error(4, ConfigError("x" * 100_000, "y" * 100_000)))
    header = messages.decode(parts).header
    assert isinstance(header, protocol.Error)
    assert (header.request, header.code) == (4, "bad_config")
    assert header.message.startswith("xxx")
