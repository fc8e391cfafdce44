"""Typed errors: what is wrong, and what to do about it."""

from __future__ import annotations


class SimplevlaError(Exception):
    """Base of every error that a user can act on.

    Attributes:
        code: stable machine-readable name of the kind of error, one per class.
        remedy: what to do about it, in the imperative.
    """

    code = "error"

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} -> {self.remedy}" if self.remedy else self.message


class ConfigError(SimplevlaError):
    """A configuration file or a command line is missing, unreadable or breaks its schema."""

    code = "bad_config"


class EmbodimentError(SimplevlaError):
    """Data does not fit the robot it is meant for."""

    code = "wrong_embodiment"


class ObservationError(SimplevlaError):
    """An observation breaks its contract."""

    code = "bad_observation"


class ChunkError(SimplevlaError):
    """An action chunk breaks its contract."""

    code = "bad_chunk"


class KinematicsError(SimplevlaError):
    """A pose cannot be reached, or a robot model is unusable."""

    code = "kinematics"


class BundleError(SimplevlaError):
    """A policy bundle is missing, incomplete, tampered with or of another schema."""

    code = "bad_bundle"


class RecordError(SimplevlaError):
    """A session record or an index of trials is missing, stale or unreadable."""

    code = "bad_record"


class CalibrationError(SimplevlaError):
    """Calibration data are unusable, or their result is not to be trusted: see ``calibration.faults``."""

    code = "bad_calibration"


class MissingExtraError(SimplevlaError):
    """An optional library is not installed."""

    code = "missing_extra"

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"{library} is not installed", f'install it with: pip install "simplevla[{extra}]"'
        )


class UnavailableError(SimplevlaError):
    """A process, a device or a server that is needed does not answer."""

    code = "unavailable"
