"""Who does what arms cannot do: clamp the board, lay it on the table, clear the table, stand clear.

A person at a terminal, or the twin, which is told by its control endpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Protocol, TextIO

import msgspec

from calibration.board import board_picture
from calibration.settings import Settings
from robot_bridge.twin.control import TwinControl, TwinTruth
from robot_bridge.twin.metal import EMPTY_TABLE, TABLE, Metal, Plate
from simplevla.embodiment import Pose
from simplevla.errors import UnavailableError
from simplevla.files import write_atomic
from simplevla.session_record import to_matrix, to_pose

_PIXELS_PER_SQUARE = 60  # more than a camera has on them, and markers and margins are whole
_MARGIN_SQUARES = 0.25


class Guide(Protocol):
    """Prepares the cell for a step and says when that is done."""

    def clear(self) -> None:
        """Take everything off the table and out of the grippers, and stand clear.

        Raises:
            UnavailableError: nobody does.
        """

    def mount(self, arm: str) -> None:
        """Put the board into the gripper of ``arm``.

        Raises:
            UnavailableError: nobody does.
        """

    def lay_down(self) -> None:
        """Lay the board on the table.

        Raises:
            UnavailableError: nobody does.
        """


class Operator:
    """A person at a terminal."""

    def __init__(self, *, answers: TextIO, questions: TextIO) -> None:
        """Ask on ``questions``, hear on ``answers``."""
        self._answers = answers
        self._questions = questions

    @classmethod
    def at_terminal(cls) -> Operator:
        """Return the person at this terminal.

        Raises:
            UnavailableError: there is no terminal.
        """
        if not sys.stdin.isatty():
            raise UnavailableError(
                "calibrating a robot needs a person at a terminal",
                "run this from a terminal, or with --twin, or from recorded data with --samples",
            )
        return cls(answers=sys.stdin, questions=sys.stdout)

    def clear(self) -> None:
        """Ask for an empty table."""
        self.ask(
            "Clear the table, take everything out of the grippers and stand clear: the arms get power and "
            "move. Enter when done: "
        )

    def mount(self, arm: str) -> None:
        """Ask for the board in a gripper."""
        self.ask(
            f"The arms hold. Put the board into the {arm} gripper by its wedge, facing the cameras as "
            "docs/calibration.md shows, and close the fingers on it. Stand clear, then Enter: "
        )

    def lay_down(self) -> None:
        """Ask for the board on the table."""
        self.ask("Take the board out and lay it flat on the table, face up, in the camera's view. Enter: ")

    def ask(self, question: str) -> None:
        """Ask ``question`` and return at the next line of the answers.

        Raises:
            UnavailableError: nobody answers.
        """
        self._questions.write(question)
        self._questions.flush()
        if not self._answers.readline():
            raise UnavailableError("nobody answers: standard input is closed", "run this from a terminal")


class TwinGuide:
    """The twin in the place of a person. A context manager that owns the connection to it.

    Args:
        control: the twin's control endpoint.
        settings: the board and where it goes.
        folder: where the board's picture is put.

    Attributes:
        pace: how much of real time the twin kept while the board was where it was, at the worst; below
            1 the twin is later than it can know.
    """

    def __init__(self, control: TwinControl, settings: Settings, folder: Path) -> None:
        self._control = control
        self._settings = settings
        self._picture = folder / "board.png"
        self.pace = 1.0

    def __enter__(self) -> TwinGuide:
        import cv2

        picture = board_picture(
            self._settings.board, pixels_per_square=_PIXELS_PER_SQUARE, margin_squares=_MARGIN_SQUARES
        )
        write_atomic(self._picture, cv2.imencode(".png", picture)[1].tobytes())
        self._control.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.__exit__(kind, error, trace)

    def clear(self) -> None:
        """Take everything off the table; the twin's board stays where it is until it is wanted."""
        self._control.reset(0, task=EMPTY_TABLE)

    def mount(self, arm: str) -> None:
        """Put the board into a gripper, where the settings say."""
        self._show(arm, self._settings.mount)

    def lay_down(self) -> None:
        """Lay the board on the table, where the settings say."""
        self._show(TABLE, self._settings.on_table)

    def truth(self) -> TwinTruth:
        """Return what the twin's metal is really like."""
        return self._control.truth()

    def kept(self) -> float:
        """Return how much of real time the twin has kept since the board was last put somewhere."""
        return self._control.status().real_time_factor_since_reset

    def alter(self, metal: Metal) -> None:
        """Make the twin's metal differ from what the embodiment says."""
        self._control.alter(metal)

    def _show(self, holder: str, pose: Pose) -> None:
        board, margin_m = self._settings.board, _MARGIN_SQUARES * self._settings.board.square_m
        corner = to_matrix(pose)
        corner[:3, 3] -= corner[:3, :3] @ [margin_m, margin_m, 0.0]
        width_m, height_m = (side + 2 * margin_m for side in board.size_m)
        plate = Plate(
            picture=str(self._picture.resolve()),
            size_m=(width_m, height_m),
            holder=holder,
            pose=msgspec.structs.replace(pose, xyz_m=to_pose(corner).xyz_m),
        )
        self.pace = min(self.pace, self.kept())
        self._control.alter(Metal(plate=plate))
