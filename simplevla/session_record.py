"""The session record: what calibration found before a session, and whether the robot may move."""

from __future__ import annotations

from pathlib import Path

import msgspec

from simplevla.embodiment import Pose
from simplevla.errors import RecordError
from simplevla.files import write_atomic

SCHEMA = 1


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One check with its figures; ``limits`` are the thresholds it was held against, by figure."""

    name: str
    passed: bool
    figures: dict[str, float] = {}
    limits: dict[str, float] = {}


class SessionRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is true of one rig from this calibration to the next.

    Attributes:
        created_ns: when, ns of the system clock.
        serials: {device name in the rig: serial number}.
        camera_in_world: {camera: pose of its optical frame in the world frame}.
        base_in_world: {arm: pose of its base in the world frame}.
        delays_s: {name: seconds}, such as ``head_capture`` or ``left_command``.
    """

    created_ns: int
    embodiment: str
    serials: dict[str, str]
    checks: tuple[Check, ...]
    camera_in_world: dict[str, Pose] = {}
    base_in_world: dict[str, Pose] = {}
    delays_s: dict[str, float] = {}
    schema: int = SCHEMA

    @property
    def passed(self) -> bool:
        """Whether there was at least one check and every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def save_session_record(record: SessionRecord, path: Path) -> None:
    """Write ``record`` as JSON, whole or not at all."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def load_session_record(path: Path) -> SessionRecord:
    """Return the record at ``path``.

    Raises:
        RecordError: it is missing, unreadable or of another schema.
    """
    remedy = "run: simplevla calibrate session"
    try:
        record = msgspec.json.decode(path.read_bytes(), type=SessionRecord)
    except OSError as error:
        raise RecordError(f"session record {path} cannot be read: {error.strerror}", remedy) from error
    except msgspec.DecodeError as error:
        raise RecordError(f"session record {path} is not valid: {error}", remedy) from error
    if record.schema != SCHEMA:
        raise RecordError(f"session record {path} has schema {record.schema}, not {SCHEMA}", remedy)
    return record


def require_valid(
    record: SessionRecord, *, embodiment: str, serials: dict[str, str], now_ns: int, max_age_s: float
) -> None:
    """Check that ``record`` lets this rig move now.

    Raises:
        RecordError: a check failed, the record is stale or from the future, or it is for another
            embodiment or other serial numbers.
    """
    remedy = "run: simplevla calibrate session"
    age_s = (now_ns - record.created_ns) / 1e9
    if not record.passed:
        failed = ", ".join(check.name for check in record.checks if not check.passed)
        raise RecordError(f"the last calibration did not pass: {failed or 'no check was made'}", remedy)
    if not 0 <= age_s <= max_age_s:
        raise RecordError(f"the last calibration is {age_s / 3600:.1f} h old", remedy)
    if record.embodiment != embodiment:
        raise RecordError(f"the last calibration is for {record.embodiment!r}, not {embodiment!r}", remedy)
    if record.serials != serials:
        raise RecordError(
            f"the last calibration is for the devices {record.serials}, not {serials}", remedy
        )
