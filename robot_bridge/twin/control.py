"""The twin's control endpoint: reset the scene, ask how the task stands, make things go wrong, end it.

One request, one answer, as JSON over ZMQ on loopback. It stands where a person stands on a robot:
nothing that moves an arm goes this way.
"""

from __future__ import annotations

from types import TracebackType
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from robot_bridge.twin.faults import Fault
from robot_bridge.twin.metal import Metal
from simplevla.embodiment import Pose
from simplevla.errors import MissingExtraError, UnavailableError
from simplevla.trial import FailureCode, Strategy

MAX_MESSAGE_BYTES = 1 << 16
_RESET_S = 10.0  # how much longer than another answer a new scene may take

Seed = Annotated[int, Meta(ge=0, lt=1 << 31)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", kw_only=True):
    """Base of all messages, told apart by ``type``."""


class Reset(Message, frozen=True, tag="reset"):
    """Place the objects as ``seed`` says, of ``task`` or of the present one. Answer: TwinStatus.

    The arms stay where they are, as when a person sets the scene up, unless ``arms_home``: then they
    are at home the next moment, which no metal can do.
    """

    seed: Seed
    task: str = ""
    arms_home: bool = False


class GetStatus(Message, frozen=True, tag="get_status"):
    """Ask how the task stands. Answer: TwinStatus."""


class Alter(Message, frozen=True, tag="alter"):
    """Make the metal differ from what the embodiment says; what is left out stays. Answer: TwinTruth.

    A plate that is named takes the place of the one before, and the scene is set up anew for it.
    """

    metal: Metal


class GetTruth(Message, frozen=True, tag="get_truth"):
    """Ask what the metal is really like. Answer: TwinTruth."""


class Inject(Message, frozen=True, tag="inject"):
    """Let a fault begin; one of the same kind and part ends. Answer: TwinFaults."""

    fault: Fault


class ClearFaults(Message, frozen=True, tag="clear_faults"):
    """End every fault. Answer: TwinFaults."""


class GetFaults(Message, frozen=True, tag="get_faults"):
    """Ask what is wrong now. Answer: TwinFaults."""


class Shutdown(Message, frozen=True, tag="shutdown"):
    """End the twin. Answer: TwinStatus, the last."""


class TwinStatus(Message, frozen=True, tag="status"):
    """How the task stands.

    Attributes:
        task: the scene's task.
        seed: of the last reset.
        time_s: simulated time since then.
        real_time_factor: simulated time over wall time, over the last second; 1 when it keeps up.
        real_time_factor_since_reset: the same since the reset.
        success: whether the task was fulfilled at any moment since the reset.
        success_time_s: simulated time of that moment; None before.
        strategy: how the object was moved, until success.
        failure: why the task is not fulfilled; ``none`` after success.
    """

    task: str
    seed: int
    time_s: float
    real_time_factor: float
    real_time_factor_since_reset: float
    success: bool
    success_time_s: float | None
    strategy: Strategy
    failure: FailureCode


class TwinTruth(Message, frozen=True, tag="truth"):
    """What the metal is really like, in the words of a session record.

    Attributes:
        camera_in_world: {camera: pose of its optical frame}.
        base_in_world: {arm: pose of its base}.
        joint_zeros_rad: {arm: what each joint reports where it truly is at zero}.
        delays_s: as :class:`~simplevla.session_record.SessionRecord` has them; deliveries as they
            were over the last pictures, commands at the pace that physics keeps now.
    """

    camera_in_world: dict[str, Pose]
    base_in_world: dict[str, Pose]
    joint_zeros_rad: dict[str, tuple[float, ...]]
    delays_s: dict[str, float]


class TwinFaults(Message, frozen=True, tag="faults"):
    """What is wrong now."""

    faults: tuple[Fault, ...]


class Refused(Message, frozen=True, tag="refused"):
    """The request was not followed, and why."""

    message: str
    remedy: str = ""


Answer = TypeVar("Answer", bound=Message)
Request = Reset | GetStatus | Alter | GetTruth | Inject | ClearFaults | GetFaults | Shutdown

_REQUESTS = msgspec.json.Decoder(Request)
_ANSWERS = msgspec.json.Decoder(TwinStatus | TwinTruth | TwinFaults | Refused)
_encode = msgspec.json.encode


def decode_request(data: bytes) -> Request:
    """Return a request.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _REQUESTS.decode(data)


class TwinControl:
    """A client of the twin's control endpoint. A context manager; each call waits for its answer.

    Args:
        address: the endpoint, ``tcp://127.0.0.1:<port>``.
        timeout_s: how long to wait for an answer; a reset may take ten seconds on top.
    """

    def __init__(self, address: str, timeout_s: float = 2.0) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._socket: Any = None

    def __enter__(self) -> TwinControl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a later call opens it again."""
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def reset(self, seed: int, *, task: str = "", arms_home: bool = False) -> TwinStatus:
        """Set the scene up as ``seed`` says; see :class:`Reset`.

        Raises:
            UnavailableError: nobody answers in time, or the twin refuses; the message says why.
        """
        return self._ask(
            Reset(seed=seed, task=task, arms_home=arms_home), TwinStatus, self._timeout_s + _RESET_S
        )

    def status(self) -> TwinStatus:
        """Return how the task stands.

        Raises:
            UnavailableError: nobody answers in time.
        """
        return self._ask(GetStatus(), TwinStatus, self._timeout_s)

    def alter(self, metal: Metal) -> TwinTruth:
        """Make the metal differ from what the embodiment says; see :class:`Alter`.

        Raises:
            UnavailableError: nobody answers in time, or the twin refuses; the message says why.
        """
        return self._ask(Alter(metal=metal), TwinTruth, self._timeout_s + _RESET_S)

    def truth(self) -> TwinTruth:
        """Return what the metal is really like.

        Raises:
            UnavailableError: nobody answers in time.
        """
        return self._ask(GetTruth(), TwinTruth, self._timeout_s)

    def inject(self, fault: Fault) -> TwinFaults:
        """Let ``fault`` begin; see :class:`Inject`.

        Raises:
            UnavailableError: nobody answers in time, or the twin refuses; the message says why.
        """
        return self._ask(Inject(fault=fault), TwinFaults, self._timeout_s)

    def clear_faults(self) -> TwinFaults:
        """End every fault.

        Raises:
            UnavailableError: nobody answers in time.
        """
        return self._ask(ClearFaults(), TwinFaults, self._timeout_s)

    def faults(self) -> TwinFaults:
        """Return what is wrong now.

        Raises:
            UnavailableError: nobody answers in time.
        """
        return self._ask(GetFaults(), TwinFaults, self._timeout_s)

    def shutdown(self) -> TwinStatus:
        """End the twin process.

        Raises:
            UnavailableError: nobody answers in time.
        """
        return self._ask(Shutdown(), TwinStatus, self._timeout_s)

    def _ask(self, request: Request, kind: type[Answer], timeout_s: float) -> Answer:
        zmq = _library()
        if self._socket is None:
            self._socket = zmq.Context.instance().socket(zmq.REQ)
            self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            self._socket.connect(self.address)
        self._socket.send(_encode(request))
        if not self._socket.poll(round(timeout_s * 1000)):
            self.close()  # a request without its answer leaves a REQ socket unusable
            raise UnavailableError(
                f"the twin at {self.address} does not answer within {timeout_s:g} s",
                "start it: simplevla twin",
            )
        try:
            answer = _ANSWERS.decode(self._socket.recv())
        except msgspec.DecodeError as error:
            raise UnavailableError(
                f"what answers at {self.address} is no twin: {error}", "correct twin.control in the rig"
            ) from error
        if isinstance(answer, Refused):
            raise UnavailableError(answer.message, answer.remedy)
        if not isinstance(answer, kind):
            raise UnavailableError(f"the twin answered with {type(answer).__name__}", "start it anew")
        return answer


def _library() -> Any:
    try:
        import zmq
    except ImportError as error:
        raise MissingExtraError("pyzmq", "robot") from error
    return zmq
