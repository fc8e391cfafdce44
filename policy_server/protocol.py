"""What robot and policy server say to each other: one versioned schema, checked at the door.

Each message has a header, one of the structs below, told apart by its ``type``, and perhaps arrays, which
the header's ``arrays`` describes. Each client message gets exactly one answer with the same ``request``:

    Hello -> Welcome      who I am -> what this policy is and needs
    Act   -> Chunk        observation (and until when) -> actions
    Health -> Status      are you well
    any   -> Error        refused, with a code and a remedy; the connection stays open

In every schema, past and future, a header is a map with at least ``type``, ``schema`` and ``request``, so
that two versions can still tell each other that they differ. What bytes these are is the business of
:mod:`policy_server.messages`, and how the bytes travel that of the links.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from simplevla.embodiment import Embodiment
from simplevla.errors import SimplevlaError
from simplevla.observation import MAX_INSTRUCTION_CHARS

SCHEMA: Literal[3] = 3
DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"
MAX_ARRAYS = 18
MAX_HEADER_BYTES = 1 << 16
MAX_PART_BYTES = 1 << 26
MAX_TOTAL_BYTES = 1 << 27
MAX_ERROR_CHARS = 2000
STATE, COMMITTED, ACTIONS = "state", "committed", "actions"
IMAGE_PREFIX, JPEG_PREFIX = "image/", "jpeg/"

_MAX_INT = (1 << 63) - 1
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
    schema: Literal[3] = SCHEMA
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


class SealedOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A quicker way for a client that CURVE let in: a TCP port, and fresh keys for one connection to it.

    Attributes:
        port: on the host that the client speaks to already.
        ticket: what the client shows there, once.
        client_key, server_key: what seals the words of either; 256 bits in hex.
    """

    port: Annotated[int, Meta(ge=1, le=65535)]
    ticket: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    client_key: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    server_key: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

    def __repr__(self) -> str:
        """Return nothing of the keys: it may come into a log."""
        return f"SealedOffer(port={self.port})"


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
        sealed: only for a client whose keys were checked.
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
    sealed: SealedOffer | None = None


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
    message: Annotated[str, Meta(max_length=MAX_ERROR_CHARS)]
    remedy: Annotated[str, Meta(max_length=MAX_ERROR_CHARS)]


Header: TypeAlias = "Hello | Welcome | Act | Chunk | Health | Status | Error"
