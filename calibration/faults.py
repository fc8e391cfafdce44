"""What can be wrong with calibration data: one typed error for each fault that is told from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simplevla.errors import CalibrationError

if TYPE_CHECKING:
    from calibration.observability import PlannedPose


class SampleFormatError(CalibrationError):
    """A folder of samples, or a file in it, breaks its format."""

    code = "bad_samples"


class BoardNotFoundError(CalibrationError):
    """No board is in a picture, or too little of it."""

    code = "board_not_found"


class WrongBoardError(CalibrationError):
    """Another board than the one described was shown."""

    code = "wrong_board"


class MirroredBoardError(CalibrationError):
    """The board, or the picture of it, is mirrored."""

    code = "mirrored_board"


class RescaledBoardError(CalibrationError):
    """The board was not printed at the size that its description gives."""

    code = "rescaled_board"


class TooFewPosesError(CalibrationError):
    """There are not enough usable poses for an answer that could be checked."""

    code = "too_few_poses"


class DegenerateMotionError(CalibrationError):
    """The poses leave a part of the answer undetermined.

    Attributes:
        proposals: poses to add that would determine it, best first.
    """

    code = "degenerate_motion"

    def __init__(self, message: str, remedy: str, proposals: Sequence[PlannedPose] = ()) -> None:
        super().__init__(message, remedy)
        self.proposals = tuple(proposals)


class CameraMovedError(CalibrationError):
    """The camera moved while samples were taken."""

    code = "camera_moved"


class BoardMovedError(CalibrationError):
    """The board moved, or slipped in the gripper, while samples were taken."""

    code = "board_moved"


class SwappedArmsError(CalibrationError):
    """The samples of one arm carry the positions of the other."""

    code = "swapped_arms"


class MixedUnitsError(CalibrationError):
    """Numbers are in degrees or millimetres where rad and m are meant."""

    code = "mixed_units"


class WrongSetupError(CalibrationError):
    """The data fit, but another arrangement than the one named, or poses the other way round."""

    code = "wrong_setup"


class InconsistentDataError(CalibrationError):
    """Arm and camera do not agree, and no single fault explains why."""

    code = "inconsistent_data"
