"""Messages as the parts that travel, and what they carry: observations, chunks, refusals.

The words themselves are :mod:`policy_server.protocol`'s. A message is a list of byte strings: part 0 is the
msgpack header, every further part is one array, raw and C-contiguous, described in the header's ``arrays``.

The functions are pure. Nothing is allocated, reshaped or copied before types, ranges and sizes were
checked, and bytes from outside raise :class:`~policy_server.protocol.MessageError` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from policy_server.jpeg import decode_jpeg, encode_jpeg
from policy_server.protocol import (
    ACTIONS,
    COMMITTED,
    IMAGE_PREFIX,
    JPEG_PREFIX,
    MAX_ARRAYS,
    MAX_ERROR_CHARS,
    MAX_HEADER_BYTES,
    MAX_PART_BYTES,
    MAX_TOTAL_BYTES,
    SCHEMA,
    STATE,
    Act,
    ArrayInfo,
    Chunk,
    Count,
    Error,
    Header,
    Health,
    Hello,
    MessageError,
    Part,
    ServerTiming,
    Status,
    Welcome,
)
from simplevla.action_chunk import ActionChunk
from simplevla.errors import ObservationError, SimplevlaError
from simplevla.observation import Observation

_DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype(np.uint8), "float32": np.dtype("<f4")}

# By the type itself: numpy makes up a type's name anew each time that it is asked for it.
_NAMES: dict[np.dtype[Any], Literal["uint8", "float32"]] = {
    np.dtype(np.uint8): "uint8",
    np.dtype(np.float32): "float32",
}


class _Envelope(msgspec.Struct, frozen=True):
    """What a header of any schema has."""

    schema: int
    request: Count


_DECODER = msgspec.msgpack.Decoder(Hello | Welcome | Act | Chunk | Health | Status | Error)
_ENVELOPE_DECODER = msgspec.msgpack.Decoder(_Envelope)
_ENCODER = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Message:
    """A decoded message.

    Attributes:
        header: one of the protocol's structs.
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
    infos: list[ArrayInfo] = []
    parts: list[Part] = [b""]
    for name, array in (arrays or {}).items():
        kind = _NAMES.get(array.dtype)
        if kind is None or not 1 <= array.ndim <= 4 or not array.size:
            raise MessageError(
                f"array {name!r} is {array.dtype} {array.shape}",
                "send uint8 or float32, 1 to 4 dimensions, none of them empty",
            )
        infos.append(_info(name, kind, array.shape))
        parts.append(np.ascontiguousarray(array, dtype=_DTYPES[kind]).data.cast("B"))
    try:
        parts[0] = _ENCODER.encode(msgspec.structs.replace(header, arrays=tuple(infos)))
    except (UnicodeEncodeError, OverflowError) as error:
        raise MessageError(f"header cannot be sent: {error}", "correct the value", request=0) from error
    _check_sizes(parts)
    return parts


@lru_cache(maxsize=256)
def _info(name: str, kind: Literal["uint8", "float32"], shape: tuple[int, ...]) -> ArrayInfo:
    return ArrayInfo(name, kind, shape)


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
    return Message(header, _decode_arrays(header, parts))


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
            message=error.message[:MAX_ERROR_CHARS],
            remedy=error.remedy[:MAX_ERROR_CHARS],
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
    header, largest, total = sizes[0], max(sizes), sum(sizes)
    if header <= MAX_HEADER_BYTES and largest <= MAX_PART_BYTES and total <= MAX_TOTAL_BYTES:
        return
    for what, size, limit in (
        ("header", header, MAX_HEADER_BYTES),
        ("largest part", largest, MAX_PART_BYTES),
        ("message", total, MAX_TOTAL_BYTES),
    ):
        if size > limit:
            raise MessageError(
                f"{what} has {size} bytes, allowed are {limit}", "send smaller images", code="too_large"
            )


def _decode_header(decoder: msgspec.msgpack.Decoder[Any], raw: Part, *, request: int) -> Any:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = str(error)[:MAX_ERROR_CHARS]
        raise MessageError(f"header is not a message: {text}", request=request) from error


def _decode_arrays(header: Header, parts: Sequence[Part]) -> dict[str, NDArray[Any]]:
    """Return the arrays in ``parts``, whose first is the header."""
    arrays: dict[str, NDArray[Any]] = {}
    infos = header.arrays
    if len(infos) == len(parts) - 1:
        for index, info in enumerate(infos, 1):
            part, shape = parts[index], info.shape
            dtype = _DTYPES[info.dtype]
            if prod(shape) * dtype.itemsize != len(part):
                raise MessageError(
                    f"array {info.name!r} is {info.dtype} {shape} and has {len(part)} bytes",
                    request=header.request,
                )
            # Sizes agree, so that this makes a view of the bytes and refuses nothing.
            arrays[info.name] = np.ndarray(shape, dtype, part)
    if not len(arrays) == len(infos) == len(parts) - 1:
        raise MessageError(
            f"header describes {len({info.name for info in infos})} different arrays, "
            f"the message carries {len(parts) - 1}",
            request=header.request,
        )
    return arrays
