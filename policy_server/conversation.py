"""What a client says and how it takes what it hears, whatever carries the words: no socket in here."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from policy_server import messages, protocol
from policy_server.clock import ServerClock
from policy_server.protocol import MessageError, Part, ServerTiming
from simplevla.action_chunk import ActionChunk, check_chunk
from simplevla.embodiment import Embodiment
from simplevla.errors import ChunkError, EmbodimentError, ObservationError, SimplevlaError, UnavailableError
from simplevla.observation import Observation, check_observation


class RemoteError(SimplevlaError):
    """The server refused a request.

    Attributes:
        code: what the server named, such as ``internal``, ``superseded`` or ``too_late``.
    """

    code = "remote"

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.code = code


class PolicyChangedError(SimplevlaError):
    """The server answers with another policy than before; ``info`` already describes the new one."""

    code = "policy_changed"


@dataclass(frozen=True)
class ServerInfo:
    """The served policy.

    Attributes:
        policy_id: identity of its bundle.
        name: its bundle's name.
        cameras: the cameras that an observation must have, with their sizes.
        instructions: {task: canonical instruction} of the tasks it was trained on.
        chunk_length: K.
        dt_s: time between two actions, s.
        action_space: what the network predicts inside; chunks are absolute joint targets.
        backend: what computes the network.
        continues: whether the network was trained to go on from committed actions.
    """

    policy_id: str
    name: str
    cameras: tuple[protocol.CameraNeed, ...]
    instructions: dict[str, str]
    chunk_length: int
    dt_s: float
    action_space: str
    backend: str
    continues: bool


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        chunk: checked: K actions of the embodiment, finite, for the observation that was sent.
        timing: where the time went in the server.
        round_trip_ms: from the call to the checked answer, ms.
    """

    chunk: ActionChunk
    timing: ServerTiming
    round_trip_ms: float


class Conversation:
    """A client's memory of what was said: who the server is, what its clock shows.

    Args:
        embodiment: the robot that the client speaks for.
        address: the server's, for messages to people.
        jpeg_quality: None to send images as they are.
    """

    def __init__(self, embodiment: Embodiment, address: str, jpeg_quality: int | None = None) -> None:
        self._embodiment = embodiment
        self._address = address
        self._jpeg_quality = jpeg_quality
        # Request numbers never repeat, so that a late answer is never taken for a fresh one.
        self._requests = itertools.count(1)
        self._clock = ServerClock()
        self._info: ServerInfo | None = None
        self._cameras: tuple[str, ...] = ()

    @property
    def is_acquainted(self) -> bool:
        """Whether the server has said what it serves."""
        return self._info is not None

    @property
    def info(self) -> ServerInfo:
        """The served policy, as of the last hello.

        Raises:
            UnavailableError: there was none yet.
        """
        if self._info is None:
            raise UnavailableError(f"not connected to {self._address}", "connect first")
        return self._info

    def hello(self) -> tuple[int, list[Part]]:
        """Return a request number and the message that introduces this client."""
        request = next(self._requests)
        return request, messages.encode(protocol.Hello(request=request, embodiment=self._embodiment))

    def health(self) -> tuple[int, list[Part]]:
        """Return a request number and the message that asks how the server is."""
        request = next(self._requests)
        return request, messages.encode(protocol.Health(request=request))

    def act(self, observation: Observation, deadline_s: float) -> tuple[int, list[Part]]:
        """Return a request number and the message that asks for actions.

        Args:
            observation: what the robot sees.
            deadline_s: when the answer is worth nothing any more, on this machine's monotonic clock.

        Raises:
            ObservationError: the observation does not fit the robot.
        """
        check_observation(observation, self._embodiment, self._cameras)
        request = next(self._requests)
        return request, messages.encode_observation(
            request,
            observation,
            self._cameras,
            deadline_ns=max(1, round(1e9 * deadline_s) + self._clock.ahead_ns),
            jpeg_quality=self._jpeg_quality,
        )

    def welcomed(self, message: messages.Message, asked_s: float) -> ServerInfo:
        """Take in a Welcome to a hello that was said at ``asked_s`` (monotonic), and return what it says.

        Raises:
            MessageError: it is none.
            EmbodimentError: the server asks for cameras that the robot does not have.
            PolicyChangedError: it serves another policy than before.
        """
        header = self.heard_welcome(message)
        known = {camera.name for camera in self._embodiment.cameras}
        if not known.issuperset(camera.name for camera in header.cameras):
            raise EmbodimentError("the server asks for cameras of another robot", "restart the server")
        self._clock = ServerClock()  # it may have been started anew, elsewhere
        self._clock.hear(header.clock_ns, round(1e9 * asked_s), time.monotonic_ns())
        self._cameras = tuple(camera.name for camera in header.cameras)
        before, self._info = (
            self._info,
            ServerInfo(
                policy_id=header.policy_id,
                name=header.name,
                cameras=header.cameras,
                instructions=header.instructions,
                chunk_length=header.chunk_length,
                dt_s=header.dt_s,
                action_space=header.action_space,
                backend=header.backend,
                continues=header.continues,
            ),
        )
        if before is not None and before.policy_id != self._info.policy_id:
            raise self.changed(before.policy_id)
        return self._info

    def heard_welcome(self, message: messages.Message) -> protocol.Welcome:
        """Return the Welcome that ``message`` is; MessageError if it is none."""
        if not isinstance(message.header, protocol.Welcome):
            raise _unexpected(message.header)
        return message.header

    def changed(self, before: str) -> PolicyChangedError:
        """Return the error that says that the policy is not ``before`` any more."""
        return PolicyChangedError(
            f"the server at {self._address} now answers with policy {self.info.policy_id[:12]} "
            f"instead of {before[:12]}",
            "start the trial again",
        )

    def reply(self, message: messages.Message, observation: Observation, asked_s: float) -> Reply:
        """Return the answer to ``observation`` that ``message`` holds, checked.

        Whether it is of the policy that ``info`` describes is the caller's to look at.

        Raises:
            MessageError: it is none.
            ChunkError: it is not a sound one, or for another observation.
        """
        chunk = messages.decode_chunk(message)
        header = message.header
        assert isinstance(header, protocol.Chunk)
        spent_ns = round(1e6 * header.timing.total_ms)
        self._clock.hear(header.clock_ns, round(1e9 * asked_s), time.monotonic_ns(), spent_ns)
        check_chunk(chunk, self._embodiment)
        same_policy = chunk.policy_id == self.info.policy_id
        if chunk.capture_ns != observation.capture_ns or (
            same_policy and chunk.length != self.info.chunk_length
        ):
            raise ChunkError(
                f"the server answered {chunk.length} actions for the capture time {chunk.capture_ns}, "
                f"not {self.info.chunk_length} for {observation.capture_ns}",
                "restart the server",
            )
        return Reply(chunk, header.timing, 1e3 * (time.monotonic() - asked_s))

    def status(self, message: messages.Message) -> protocol.Status:
        """Return the Status that ``message`` is.

        Raises:
            MessageError: it is none.
        """
        if not isinstance(message.header, protocol.Status):
            raise _unexpected(message.header)
        return message.header


def accepted(message: messages.Message) -> messages.Message:
    """Return ``message`` unless it is a refusal.

    Raises:
        EmbodimentError, ObservationError, UnavailableError, RemoteError: what the server refused.
    """
    header = message.header
    if not isinstance(header, protocol.Error):
        return message
    if header.code == "draining":
        raise UnavailableError(header.message, header.remedy)
    for kind in (EmbodimentError, ObservationError):
        if header.code == kind.code:
            raise kind(header.message, header.remedy)
    raise RemoteError(header.code, header.message, header.remedy)


def no_answer(address: str, waited_s: float) -> UnavailableError:
    """Return the error that says that nobody answers."""
    return UnavailableError(
        f"no policy server answers at {address} (waited {waited_s:.1f} s)",
        "start one with: simplevla serve BUNDLE",
    )


def _unexpected(header: protocol.Header) -> MessageError:
    return MessageError(f"the server answered with {header.__class__.__name__}")
