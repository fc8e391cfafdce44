"""A trial, one judged attempt on a robot or the twin, and the index of a run's trials."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import msgspec

from simplevla.errors import RecordError
from simplevla.files import write_atomic
from simplevla.intervals import Rate, wilson

SCHEMA = 1
INDEX_NAME = "index.json"


class Outcome(str, Enum):
    """How a trial ended. Abstained and error are no failures of the policy and count in no rate."""

    SUCCESS = "success"
    FAILURE = "failure"
    ABSTAINED = "abstained"
    ERROR = "error"


class Strategy(str, Enum):
    """How a task was done, judged from contacts; pushcut is success by pushing.

    ``TOUCH`` is for tasks in which nothing is to be moved.
    """

    GRASP = "grasp"
    PUSH = "push"
    TOUCH = "touch"
    NONE = "none"
    UNKNOWN = "unknown"


class FailureCode(str, Enum):
    """Why a trial did not succeed."""

    NONE = "none"
    TIME_LIMIT = "time_limit"
    NOT_UPRIGHT = "not_upright"
    DROPPED = "dropped"
    SERVER_LOST = "server_lost"
    CAMERA_LOST = "camera_lost"
    ARM_LOST = "arm_lost"
    OPERATOR = "operator"
    OTHER = "other"


class LatencySplit(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over a trial's chunks of each leg from exposure to the first frame on the bus, ms."""

    capture_to_request_ms: float
    request_to_reply_ms: float
    inference_ms: float
    reply_to_bus_ms: float
    total_ms: float


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to count, find and explain one attempt.

    Attributes:
        rig: ``twin`` or the name of a hardware rig.
        seed: decides the initial state on the twin; names it on a robot.
        started_ns: ns of the system clock.
        actions: actions executed before the end.
        limits: {cause: count} of limit events during the trial.
        real_time_factor: simulated over real time during the trial on the twin; None on a robot.
        recording: MCAP folder or file, relative to the index.
    """

    id: str
    task: str
    rig: str
    embodiment: str
    policy_id: str
    instruction: str
    seed: int
    operator: str
    started_ns: int
    duration_s: float
    actions: int
    outcome: Outcome
    failure: FailureCode
    strategy: Strategy
    note: str = ""
    latency: LatencySplit | None = None
    limits: dict[str, int] = {}
    real_time_factor: float | None = None
    recording: str = ""


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What all trials of a run share, and where their policy comes from.

    Attributes:
        policy_commit, demonstrations, evaluation: as the bundle's provenance has them; the
            evaluation was made in simulation.
        backend: the policy server's back end.
        step_limit: actions after which a trial fails.
        started_ns: ns of the system clock.
        version: of this package.
    """

    task: str
    instruction: str
    rig: str
    embodiment: str
    operator: str
    policy_name: str
    policy_id: str
    policy_commit: str
    demonstrations: int
    backend: str
    step_limit: int
    started_ns: int
    version: str
    evaluation: dict[str, Any] = {}


class TrialIndex(msgspec.Struct, frozen=True, kw_only=True):
    """The trials of one run, in the order they were made."""

    trials: tuple[Trial, ...] = ()
    run: RunInfo | None = None
    schema: int = SCHEMA

    def success(self) -> Rate:
        """Return the success rate over successes and failures alone, with its Wilson interval."""
        outcomes = [trial.outcome for trial in self.trials]
        wins = outcomes.count(Outcome.SUCCESS)
        return wilson(wins, wins + outcomes.count(Outcome.FAILURE))


def save_index(index: TrialIndex, folder: Path) -> None:
    """Write the index of a run, whole or not at all."""
    write_atomic(folder / INDEX_NAME, msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n")


def load_index(folder: Path) -> TrialIndex:
    """Return the index of the run in ``folder``.

    Raises:
        RecordError: there is none, or it is unreadable or of another schema.
    """
    path = folder / INDEX_NAME
    remedy = "give the folder of a run"
    try:
        index = msgspec.json.decode(path.read_bytes(), type=TrialIndex)
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}", remedy) from error
    except msgspec.DecodeError as error:
        raise RecordError(f"{path} is not an index of trials: {error}", remedy) from error
    if index.schema != SCHEMA:
        raise RecordError(
            f"{path} has schema {index.schema}, not {SCHEMA}", "use the version that wrote it"
        )
    return index
