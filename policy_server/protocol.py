"""What robot and policy server say to each other: one versioned schema, checked at the door.

A message is a list of byte strings: part 0 is a msgpack header, one of the structs below, told apart
by its ``type``; every further part is one array, raw and C-contiguous, described in the header's
``arrays``. Each client message gets exactly one answer with the same ``request``:

    Hello -> Welcome      who I am -> what this policy is and needs
    Act   -> Chunk        observation (and until when) -> actions
    Health -> Status      are you well
    any   -> Error        refused, with a code and a remedy; the connection stays open

The functions are pure. Nothing is allocated, reshaped or copied before types, ranges and sizes were
checked, and bytes from outside raise :class:`MessageError` and nothing else. In every schema, past and
future, a header is a map with at least ``type``, ``schema`` and ``request``, so that two versions can
still tell each other that they differ.

How the parts travel is not this module's business: :mod:`policy_server.local_link` within one host, ZMQ
between hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from policy_server.jpeg import decode_jpeg, encode_jpeg
from simplevla.action_chunk import ActionChunk
from simplevla.embodiment import Embodiment
from simplevla.errors import ObservationError, SimplevlaError
from simplevla.observation import MAX_INSTRUCTION_CHARS, Observation

SCHEMA: Literal[2] = 2
DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"
MAX_ARRAYS = 18
MAX_HEADER_BYTES = 1 << 16
MAX_PART_BYTES = 1 << 26
MAX_TOTAL_BYTES = 1 << 27
STATE, COMMITTED, ACTIONS = "state", "committed", "actions"
IMAGE_PREFIX, JPEG_PREFIX = "image/", "jpeg/"

_MAX_ERROR_CHARS = 2000
_MAX_INT = (1 << 63) - 1
_DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype(np.uint8), "float32": np.dtype("<f4")}

# By the type itself: numpy makes up a type's name anew each time that it is asked for it.
_NAMES: dict[np.dtype[Any], Literal["uint8", "float32"]] = {
    np.dtype(np.uint8): "uint8",
    np.dtype(np.float32): "float32",
}

Count = Annotated[int, Meta(ge=0, le=_MAX_INT)]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
Milliseconds = Annotated[float, Meta(ge=0, le=1e9)]
Part: TypeAlias = "bytes | memoryview"


class MessageError(SimplevlaError):
    """A message breaks the protocol.

    Attributes:
        code: ``bad_message``, ``too_large`` or ``other_schema``.
        request: the request it belongs to; 0 if that could not be read.
    """

    code = "bad_message"

    def __init__(
        self,
        message: str,
        remedy: str = "use the client of this version of simplevla",
        *,
        code: str = "bad_message",
        request: int = 0,
    ) -> None:
        super().__init__(message, remedy)
        self.code = code
        self.request = request


class ArrayInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Describes one array: its bytes are the part of the message at the same place."""

    name: Name
    dtype: Literal["uint8", "float32"]
    shape: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=MAX_PART_BYTES)], ...], Meta(min_length=1, max_length=4)
    ]


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    request: Count
    schema: Literal[2] = SCHEMA
    arrays: Annotated[tuple[ArrayInfo, ...], Meta(max_length=MAX_ARRAYS)] = ()


class Hello(_Header, frozen=True, kw_only=True, tag="hello"):
    """First message of a client, and again after a reconnect: the robot it speaks for."""

    embodiment: Embodiment


class CameraNeed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A camera that the policy looks through, and the size of its images in pixels."""

    name: Name
    width: Annotated[int, Meta(ge=1, le=4096)]
    height: Annotated[int, Meta(ge=1, le=4096)]


class LocalOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A quicker way for a client on the server's own machine: a Unix socket, and frames in shared memory.

    Attributes:
        path: of the socket.
        token: what the client shows there, so that both know that they mean each other.
    """

    path: Annotated[str, Meta(min_length=1, max_length=100, pattern="^/")]
    token: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]


class Welcome(_Header, frozen=True, kw_only=True, tag="welcome"):
    """What the served policy is, needs and answers.

    Attributes:
        policy_id: hex SHA-256 of the bundle's manifest.
        cameras: in the policy's order.
        instructions: {task: its canonical instruction}.
        chunk_length: K.
        dt_s: time between two actions, s.
        action_space: what the network predicts; the wire carries absolute joint targets in any case.
        backend: what computes the network.
        clock_ns: the server's monotonic clock, which deadlines are told in.
        continues: whether the network was trained to go on from committed actions.
        local: only for a client that may be on the same machine.
    """

    policy_id: Name
    name: Name
    cameras: Annotated[tuple[CameraNeed, ...], Meta(min_length=1, max_length=MAX_ARRAYS - 2)]
    instructions: Annotated[dict[str, str], Meta(max_length=256)]
    chunk_length: Annotated[int, Meta(ge=1, le=512)]
    dt_s: Annotated[float, Meta(ge=1e-3, le=10)]
    action_space: Name
    backend: Name
    clock_ns: Count
    continues: bool = False
    local: LocalOffer | None = None


class Act(_Header, frozen=True, kw_only=True, tag="act"):
    """One observation.

    Arrays: ``state`` (D,) float32; for each camera either ``image/<camera>`` (H, W, 3) uint8 or
    ``jpeg/<camera>`` (N,) uint8, a JPEG file; optionally ``committed`` (m, D) float32, see
    :class:`~simplevla.observation.Observation`.

    Attributes:
        deadline_ns: on the server's clock; after that the answer is worth nothing. 0 is never.
    """

    instruction: Annotated[str, Meta(max_length=MAX_INSTRUCTION_CHARS)]
    capture_ns: Count
    episode: Annotated[str, Meta(max_length=128)] = ""
    last_action: Annotated[int, Meta(ge=-1, le=_MAX_INT)] = -1
    deadline_ns: Count = 0


class ServerTiming(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the time between a request's arrival and its answer went, ms.

    Attributes:
        receive_ms: taking the message off the socket and checking it.
        queue_ms: waiting for its turn.
        preprocess_ms: from observation to the network's inputs.
        inference_ms: the network; of the whole batch if several were answered at once.
        decode_ms: from logits to checked joint targets.
        send_ms: laying out the answer. Handing it to the system is not in it: that comes after.
    """

    receive_ms: Milliseconds
    preprocess_ms: Milliseconds
    inference_ms: Milliseconds
    decode_ms: Milliseconds
    queue_ms: Milliseconds = 0.0
    send_ms: Milliseconds = 0.0

    @property
    def total_ms(self) -> float:
        """From arrival to the answer, ms."""
        return float(sum(msgspec.structs.astuple(self)))


class Chunk(_Header, frozen=True, kw_only=True, tag="chunk"):
    """The answer to an Act; array: ``actions`` (K, D) float32 absolute joint targets, rad and m.

    Attributes:
        clock_ns: the server's monotonic clock as it answered.
    """

    capture_ns: Count
    dt_s: Annotated[float, Meta(ge=1e-3, le=10)]
    policy_id: Name
    timing: ServerTiming
    clock_ns: Count


class Health(_Header, frozen=True, kw_only=True, tag="health"):
    """Asks whether the server is well; needs no Hello."""


class Status(_Header, frozen=True, kw_only=True, tag="status"):
    """The answer to Health.

    Attributes:
        state: ``ready``, or ``draining`` while the last requests are answered before the end.
        uptime_s: since the server was ready, s.
        answered: chunks sent.
        refused: requests answered with an Error.
        waiting: requests that wait for their turn.
        clients: how many said hello and are remembered.
        swaps: how many times another bundle was promoted.
    """

    policy_id: Name
    backend: Name
    uptime_s: Annotated[float, Meta(ge=0)]
    answered: Count
    refused: Count
    state: Literal["ready", "draining"] = "ready"
    waiting: Count = 0
    clients: Count = 0
    swaps: Count = 0


class Error(_Header, frozen=True, kw_only=True, tag="error"):
    """A refusal: a stable ``code``, what is wrong, and what to do about it."""

    code: Name
    message: Annotated[str, Meta(max_length=_MAX_ERROR_CHARS)]
    remedy: Annotated[str, Meta(max_length=_MAX_ERROR_CHARS)]


Header: TypeAlias = "Hello | Welcome | Act | Chunk | Health | Status | Error"
_DECODER = msgspec.msgpack.Decoder(Hello | Welcome | Act | Chunk | Health | Status | Error)
_ENCODER = msgspec.msgpack.Encoder()


class _Envelope(msgspec.Struct, frozen=True):
    """What a header of any schema has."""

    schema: int
    request: Count


_ENVELOPE_DECODER = msgspec.msgpack.Decoder(_Envelope)


@dataclass(frozen=True)
class Message:
    """A decoded message.

    Attributes:
        header: one of the structs above.
        arrays: {name: array}; views of the received bytes, so they live as long as those do.
    """

    header: Header
    arrays: Mapping[str, NDArray[Any]]


def encode(header: Header, arrays: Mapping[str, NDArray[Any]] | None = None) -> list[Part]:
    """Return the parts of a message.

    Args:
        header: its ``arrays`` are filled in here.
        arrays: {name: uint8 or float32 array}.

    Raises:
        MessageError: an array is of another type, or something exceeds the protocol's sizes.
    """
    arrays = arrays or {}
    infos, parts = [], []
    for name, array in arrays.items():
        kind = _NAMES.get(array.dtype)
        if kind is None or not 1 <= array.ndim <= 4 or not array.size:
            raise MessageError(
                f"array {name!r} is {array.dtype} {array.shape}",
                "send uint8 or float32, 1 to 4 dimensions, none of them empty",
            )
        infos.append(ArrayInfo(name, kind, array.shape))
        parts.append(np.ascontiguousarray(array, dtype=_DTYPES[kind]).data.cast("B"))
    try:
        encoded = _ENCODER.encode(msgspec.structs.replace(header, arrays=tuple(infos)))
    except (UnicodeEncodeError, OverflowError) as error:
        raise MessageError(f"header cannot be sent: {error}", "correct the value", request=0) from error
    _check_sizes([encoded, *parts])
    return [encoded, *parts]


def decode(parts: Sequence[Part]) -> Message:
    """Return the message in ``parts``.

    Raises:
        MessageError: it is malformed, too large or of another schema.
    """
    _check_sizes(parts)
    envelope = _decode_header(_ENVELOPE_DECODER, parts[0], request=0)
    if envelope.schema != SCHEMA:
        raise MessageError(
            f"message has schema {envelope.schema}, this side speaks {SCHEMA}",
            "use the same version of simplevla on both sides",
            code="other_schema",
            request=envelope.request,
        )
    header = _decode_header(_DECODER, parts[0], request=envelope.request)
    return Message(header, _decode_arrays(header, parts[1:]))


def encode_observation(
    request: int,
    observation: Observation,
    cameras: Sequence[str],
    *,
    deadline_ns: int = 0,
    jpeg_quality: int | None = None,
) -> list[Part]:
    """Return an Act with the state and the images of ``cameras``.

    Args:
        request: its number.
        observation: as checked by :func:`~simplevla.observation.check_observation`.
        cameras: which images to send.
        deadline_ns: on the server's clock; 0 is never.
        jpeg_quality: 1 to 100 to send JPEG, which loses a little; None to send what was seen.

    Raises:
        MessageError: the observation does not fit the protocol.
    """
    header = Act(
        request=request,
        instruction=observation.instruction,
        capture_ns=observation.capture_ns,
        episode=observation.episode,
        last_action=observation.last_action,
        deadline_ns=deadline_ns,
    )
    arrays: dict[str, NDArray[Any]] = {STATE: observation.state}
    if observation.committed is not None:
        arrays[COMMITTED] = observation.committed
    for name in cameras:
        image = observation.images[name]
        if jpeg_quality is None:
            arrays[IMAGE_PREFIX + name] = image
        else:
            arrays[JPEG_PREFIX + name] = encode_jpeg(image, jpeg_quality)
    return encode(header, arrays)


def decode_observation(
    message: Message, cameras: Mapping[str, tuple[int, int]] | None = None
) -> Observation:
    """Return the observation in an Act, not yet checked against an embodiment.

    State and committed actions are copies, so that nobody can change them after they were checked; the
    images are views of what was received.

    Args:
        message: as decoded.
        cameras: {camera: (width, height)} of those that may send JPEG: a picture is unpacked only if it
            has exactly that size.

    Raises:
        MessageError: there is no state, an array is none of an observation, a camera comes twice, or a
            JPEG is not what it should be.
    """
    header = message.header
    if not isinstance(header, Act):
        raise MessageError(f"{header.__class__.__name__} carries no observation", request=header.request)
    images: dict[str, NDArray[np.uint8]] = {}
    for name, array in message.arrays.items():
        kind, _, camera = name.partition("/")
        if name in (STATE, COMMITTED):
            continue
        if kind not in ("image", "jpeg") or not camera or camera in images or STATE not in message.arrays:
            raise MessageError(
                f"an observation has the arrays {STATE!r}, {IMAGE_PREFIX + '<camera>'!r} or "
                f"{JPEG_PREFIX + '<camera>'!r}, and perhaps {COMMITTED!r}, "
                f"not {', '.join(map(repr, message.arrays))}",
                request=header.request,
            )
        if kind == "jpeg":
            images[camera] = _decode_jpeg(array, camera, cameras or {}, header.request)
        else:
            images[camera] = array
    if STATE not in message.arrays:
        raise MessageError(f"an observation needs the array {STATE!r}", request=header.request)
    committed = message.arrays.get(COMMITTED)
    return Observation(
        images=images,
        state=message.arrays[STATE].copy(),
        instruction=header.instruction,
        capture_ns=header.capture_ns,
        episode=header.episode,
        last_action=header.last_action,
        committed=None if committed is None else committed.copy(),
    )


def encode_chunk(request: int, chunk: ActionChunk, timing: ServerTiming, clock_ns: int) -> list[Part]:
    """Return a Chunk, stamped with the server's clock."""
    header = Chunk(
        request=request,
        capture_ns=chunk.capture_ns,
        dt_s=chunk.dt_s,
        policy_id=chunk.policy_id,
        timing=timing,
        clock_ns=clock_ns,
    )
    return encode(header, {ACTIONS: chunk.actions})


def decode_chunk(message: Message) -> ActionChunk:
    """Return the chunk in a Chunk, not yet checked against an embodiment.

    Raises:
        MessageError: it has no actions.
    """
    header = message.header
    if not isinstance(header, Chunk) or list(message.arrays) != [ACTIONS]:
        raise MessageError(f"{header.__class__.__name__} carries no actions", request=header.request)
    return ActionChunk(
        # A copy: the actions outlive the message, and may start at an odd address in it.
        actions=message.arrays[ACTIONS].copy(),
        dt_s=header.dt_s,
        capture_ns=header.capture_ns,
        policy_id=header.policy_id,
    )


def encode_error(request: int, error: SimplevlaError) -> list[Part]:
    """Return an Error that says what ``error`` says, cut to the protocol's lengths."""
    return encode(
        Error(
            request=request,
            code=error.code[:128] or "error",
            message=error.message[:_MAX_ERROR_CHARS],
            remedy=error.remedy[:_MAX_ERROR_CHARS],
        )
    )


def _decode_jpeg(
    data: NDArray[np.uint8], camera: str, cameras: Mapping[str, tuple[int, int]], request: int
) -> NDArray[np.uint8]:
    if camera not in cameras or data.ndim != 1 or data.dtype != np.uint8:
        raise MessageError(f"camera {camera!r} is not one that may send JPEG", request=request)
    try:
        return decode_jpeg(data, *cameras[camera])
    except ObservationError as error:
        raise MessageError(f"camera {camera!r}: {error.message}", error.remedy, request=request) from error


def _check_sizes(parts: Sequence[Part]) -> None:
    if not 1 <= len(parts) <= MAX_ARRAYS + 1:
        raise MessageError(
            f"message has {len(parts)} parts, allowed are 1 to {MAX_ARRAYS + 1}", code="too_large"
        )
    sizes = [len(part) for part in parts]
    for what, size, limit in (
        ("header", sizes[0], MAX_HEADER_BYTES),
        ("largest part", max(sizes), MAX_PART_BYTES),
        ("message", sum(sizes), MAX_TOTAL_BYTES),
    ):
        if size > limit:
            raise MessageError(
                f"{what} has {size} bytes, allowed are {limit}", "send smaller images", code="too_large"
            )


def _decode_header(decoder: msgspec.msgpack.Decoder[Any], raw: Part, *, request: int) -> Any:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = str(error)[:_MAX_ERROR_CHARS]
        raise MessageError(f"header is not a message: {text}", request=request) from error


def _decode_arrays(header: Header, parts: Sequence[Part]) -> dict[str, NDArray[Any]]:
    infos = header.arrays
    names = [info.name for info in infos]
    if len(infos) != len(parts) or len(set(names)) != len(names):
        raise MessageError(
            f"header describes {len(set(names))} different arrays, the message carries {len(parts)}",
            request=header.request,
        )
    arrays = {}
    for info, part in zip(infos, parts, strict=True):
        dtype = _DTYPES[info.dtype]
        if prod(info.shape) * dtype.itemsize != len(part):
            raise MessageError(
                f"array {info.name!r} is {info.dtype} {info.shape} and has {len(part)} bytes",
                request=header.request,
            )
        arrays[info.name] = np.frombuffer(part, dtype).reshape(info.shape)
    return arrays
