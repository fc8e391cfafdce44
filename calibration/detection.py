"""Finding the board's corners in a picture, and saying what is there when the board is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.board import DICTIONARIES, Board, opencv_board
from calibration.camera import CameraModel
from calibration.faults import BoardNotFoundError, MirroredBoardError, WrongBoardError
from calibration.geometry import Array, transform
from calibration.saddles import refined

LEAST_CORNERS = 6

_SMALL_PX = 480  # pictures lower than this are enlarged at once for the markers to be read
_COVERAGE_GRID = (8, 6)
_LEAST_SPREAD = 0.02  # of the corners' second axis to their first: below, they are one line


@dataclass(frozen=True, eq=False)
class Detection:
    """The corners of the board that were found in a picture.

    Attributes:
        ids: (K,) which inner corners, rising.
        corners_px: (K, 2) where they are, in the camera's pixels.
    """

    ids: NDArray[np.int64]
    corners_px: Array


class BoardDetector:
    """Finds one board in pictures.

    Args:
        board: the board to look for.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        settings = cv2.aruco.CharucoParameters()
        settings.minMarkers = 2  # both neighbours: one marker misread would put corners anywhere
        settings.tryRefineMarkers = True
        markers = cv2.aruco.DetectorParameters()
        markers.cornerRefinementMethod = cv2.aruco.CORNER_REFINE_NONE
        self._detector = cv2.aruco.CharucoDetector(opencv_board(board), settings, markers)

    def find(self, picture: NDArray[np.uint8]) -> Detection | None:
        """Return the corners in a picture, (H, W) or (H, W, 3) uint8 RGB; None if too few are seen.

        A view is kept when at least ``LEAST_CORNERS`` corners, not all in one line, are seen.
        """
        found = self._corners(_grey(picture))
        return found if found is not None and _spread(found, self.board) else None

    def detect(self, picture: NDArray[np.uint8]) -> Detection:
        """Return the corners in a picture; see :meth:`find`.

        Raises:
            MirroredBoardError: the board is there, mirrored.
            WrongBoardError: another board is there.
            BoardNotFoundError: there is no board, or too little of it.
        """
        grey = _grey(picture)
        found = self._corners(grey)
        if found is not None and _spread(found, self.board):
            return found
        flipped = self._corners(np.ascontiguousarray(grey[:, ::-1]))
        if flipped is not None and _spread(flipped, self.board):
            raise MirroredBoardError(
                "the board in the picture is mirrored",
                "switch the camera's mirroring off, or print the board again without mirroring",
            )
        other = self._other_dictionary(grey)
        if other is not None:
            raise WrongBoardError(
                f"the picture shows a board with markers of {other}, not {self.board.dictionary}",
                "show the board that board.yaml describes, or describe the one that is shown",
            )
        seen = 0 if found is None else len(found.ids)
        raise BoardNotFoundError(
            f"{seen or 'no'} corners of the board are seen, {LEAST_CORNERS} are needed",
            "bring the whole board into the picture: flat, lit evenly, sharp and large enough",
        )

    def _corners(self, grey: NDArray[np.uint8]) -> Detection | None:
        """Return the corners in a picture; where some are missing, markers may only have been too small."""
        factor = 2 if grey.shape[0] < _SMALL_PX else 1
        found = self._enlarged(grey, factor)
        if found is not None and len(found.ids) == len(self.board.corners_m()):
            return found
        if grey.shape[0] < 2 * _SMALL_PX:
            again = self._enlarged(grey, 2 * factor)
            if again is not None and (found is None or len(again.ids) > len(found.ids)):
                return again
        return found

    def _enlarged(self, grey: NDArray[np.uint8], factor: int) -> Detection | None:
        """Return the corners that are found in the picture enlarged by ``factor``, in its own pixels."""
        large = (
            cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
            if factor > 1
            else grey
        )
        corners, ids, _, _ = self._detector.detectBoard(large)
        if ids is None or len(ids) < 4:
            return None
        # An enlarged picture's pixel centres lie at (x + 1/2) factor - 1/2.
        corners = (np.asarray(corners, np.float64).reshape(-1, 2) + 0.5) / factor - 0.5
        ids = np.asarray(ids, np.int64).ravel()
        order = np.argsort(ids)
        found = Detection(ids[order], corners[order])
        if not _spread(found, self.board):
            return found
        squares = self.board.corners_m()[found.ids, :2] / self.board.square_m
        gap = 0.5 * (1 - self.board.marker_m / self.board.square_m)
        return Detection(found.ids, refined(grey, found.corners_px, squares, gap))

    def _other_dictionary(self, grey: NDArray[np.uint8]) -> str | None:
        """Return the dictionary of which at least four markers are in the picture, or None."""
        best, most = None, 3
        for name in DICTIONARIES:
            dictionary = cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, name))
            _, ids, _ = cv2.aruco.ArucoDetector(dictionary).detectMarkers(grey)
            if ids is not None and len(ids) > most:
                best, most = name, len(ids)
        return best if best != self.board.dictionary else None


def board_pose(detection: Detection, board: Board, camera: CameraModel) -> Array:
    """Return the (4, 4) pose of the board in the camera's frame that fits the corners best.

    Raises:
        BoardNotFoundError: the corners are too few or in one line.
        MirroredBoardError: the corners run the other way round.
    """
    if not _spread(detection, board):
        raise BoardNotFoundError(
            f"{len(detection.ids)} corners in a line or too few give no pose", "show more of the board"
        )
    points = board.corners_m()[detection.ids]
    if mirrored(detection, board):
        raise MirroredBoardError(
            "the corners of the board run the other way round: they are mirrored",
            "number the corners row by row from the top left of the printed board; do not flip pictures",
        )
    matrix, coefficients = camera.matrix(), camera.coefficients()
    _, rotations, shifts, _ = cv2.solvePnPGeneric(
        points, detection.corners_px, matrix, coefficients, flags=cv2.SOLVEPNP_IPPE
    )
    poses = []
    for first_turn, first_shift in zip(rotations, shifts, strict=True):
        rotation, shift = cv2.solvePnPRefineLM(
            points, detection.corners_px, matrix, coefficients, first_turn, first_shift
        )
        pixels, _ = cv2.projectPoints(points, rotation, shift, matrix, coefficients)
        error = float(np.sum((pixels[:, 0] - detection.corners_px) ** 2))
        poses.append((error, transform(cv2.Rodrigues(rotation)[0], np.ravel(shift))))
    return min(poses, key=lambda pair: pair[0])[1]


def mirrored(detection: Detection, board: Board) -> bool:
    """Return whether the corners run the other way round than on the printed board."""
    points = board.corners_m()[detection.ids, :2]
    homography, _ = cv2.findHomography(points, detection.corners_px)
    return homography is not None and float(np.linalg.det(homography / homography[2, 2])) < 0


def coverage(detections: Iterable[Detection], camera: CameraModel) -> float:
    """Return which part, 0 to 1, of the picture's cells has held a corner (8 by 6 cells)."""
    columns, rows = _COVERAGE_GRID
    seen = np.zeros((rows, columns), bool)
    for detection in detections:
        x = np.clip(detection.corners_px[:, 0] / camera.width * columns, 0, columns - 1).astype(int)
        y = np.clip(detection.corners_px[:, 1] / camera.height * rows, 0, rows - 1).astype(int)
        seen[y, x] = True
    return float(seen.mean())


def draw_detection(picture: NDArray[np.uint8], detection: Detection) -> NDArray[np.uint8]:
    """Return a copy of a picture, (H, W, 3) uint8 RGB, with the corners and their ids drawn in."""
    out: Any = picture.copy()
    for number, (x, y) in zip(detection.ids.tolist(), detection.corners_px.tolist(), strict=True):
        centre = (round(x), round(y))
        cv2.circle(out, centre, 4, (230, 30, 120), 1, cv2.LINE_AA)
        cv2.putText(
            out, str(number), (centre[0] + 5, centre[1] - 4), 0, 0.35, (20, 120, 230), 1, cv2.LINE_AA
        )
    return np.asarray(out, np.uint8)


def _grey(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
        raise BoardNotFoundError("a picture must be (H, W) or (H, W, 3) uint8", "convert it")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if picture.ndim == 3 else picture, np.uint8)


def _spread(detection: Detection, board: Board) -> bool:
    """Return whether there are enough corners, and not all in one line."""
    if len(detection.ids) < LEAST_CORNERS:
        return False
    points = board.corners_m()[detection.ids, :2]
    singular = np.linalg.svd(points - points.mean(0), compute_uv=False)
    return bool(singular[1] > _LEAST_SPREAD * singular[0])
