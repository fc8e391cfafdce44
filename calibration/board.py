"""The ChArUco board: what it is, how it looks, and a page of it at true scale.

The board's frame is OpenCV's: origin at the pattern's top left corner, x right, y down, z into the
paper, m. Corner ids count the inner corners row by row from the top left.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import cv2
import msgspec
import numpy as np
import yaml
from msgspec import Meta
from numpy.typing import NDArray

from calibration.geometry import Array
from simplevla.config import Config, load_yaml
from simplevla.errors import ConfigError
from simplevla.files import write_atomic

DICTIONARIES = tuple(f"DICT_{bits}X{bits}_{count}" for bits in (4, 5, 6) for count in (50, 100, 250))
PAPERS_MM = {"a4": (210.0, 297.0), "a3": (297.0, 420.0), "letter": (215.9, 279.4)}

_LEAST_EDGE_MM = 5.0
_SCALE_BAR_MM = 100.0
_MM_PER_INCH = 25.4

Squares = Annotated[int, Meta(ge=3, le=40)]
Size = Annotated[float, Meta(ge=0.002, le=0.5)]


class Board(Config):
    """A ChArUco board.

    Attributes:
        squares_x, squares_y: squares of the chessboard across and down.
        square_m: side of a square, m.
        marker_m: side of a marker, its black border included, m.
        dictionary: name of OpenCV's ArUco dictionary.
    """

    squares_x: Squares
    squares_y: Squares
    square_m: Size
    marker_m: Size
    dictionary: str = "DICT_4X4_50"

    def __post_init__(self) -> None:
        if self.dictionary not in DICTIONARIES:
            raise ValueError(f"dictionary {self.dictionary!r} is none of {', '.join(DICTIONARIES)}")
        if not 0.4 * self.square_m <= self.marker_m <= 0.9 * self.square_m:
            raise ValueError("marker_m must be 0.4 to 0.9 of square_m")
        if self.squares_x * self.squares_y // 2 > int(self.dictionary.rsplit("_", 1)[1]):
            raise ValueError(f"{self.dictionary} has too few markers for that many squares")

    @property
    def size_m(self) -> tuple[float, float]:
        """Width and height of the pattern, m."""
        return self.squares_x * self.square_m, self.squares_y * self.square_m

    def corners_m(self) -> Array:
        """Return (K, 3) the inner corners in the board's frame, by id, m."""
        y, x = np.mgrid[1 : self.squares_y, 1 : self.squares_x]
        return np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1) * self.square_m

    def describe(self) -> str:
        """Return the board in words."""
        return (
            f"{self.squares_x} x {self.squares_y} squares of {1e3 * self.square_m:.2f} mm, markers of "
            f"{1e3 * self.marker_m:.2f} mm from {self.dictionary}"
        )


DEFAULT_BOARD = Board(squares_x=6, squares_y=5, square_m=0.030, marker_m=0.022)


def load_board(path: Path) -> Board:
    """Return the board in a YAML file.

    Raises:
        ConfigError: the file is missing or breaks the schema.
    """
    return load_yaml(path, Board)


def save_board(board: Board, path: Path) -> None:
    """Write ``board`` as YAML, whole or not at all."""
    write_atomic(path, yaml.safe_dump(msgspec.to_builtins(board), sort_keys=False).encode())


@lru_cache(maxsize=16)
def opencv_board(board: Board) -> Any:
    """Return ``board`` as OpenCV's ``CharucoBoard``."""
    dictionary = cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, board.dictionary))
    return cv2.aruco.CharucoBoard(
        (board.squares_x, board.squares_y), board.square_m, board.marker_m, dictionary
    )


def board_picture(
    board: Board, *, pixels_per_square: int, margin_squares: float = 0.5
) -> NDArray[np.uint8]:
    """Return (H, W) uint8 the board as printed, with a white margin around it.

    Args:
        board: what to draw.
        pixels_per_square: least side of a square in pixels. It is up to a quarter more where markers are
            only then whole pixels wide and in the middle of their squares: a marker off the middle is
            nearer to one corner than to the others, and pulls those corners all in one direction.
        margin_squares: width of the margin as a part of a square; rounded to whole pixels, which the
            side is chosen for, too. The board's frame then begins that many squares from the left and
            from the top of the picture.
    """
    side = min(
        range(pixels_per_square, pixels_per_square + pixels_per_square // 4 + 1),
        key=lambda pixels: (
            round(_off(pixels * margin_squares) / pixels + _marker_off(board, pixels), 6),
            pixels,
        ),
    )
    margin = round(margin_squares * side)
    width, height = board.squares_x * side, board.squares_y * side
    pattern = opencv_board(board).generateImage((width, height), marginSize=0, borderBits=1)
    picture: NDArray[np.uint8] = np.pad(np.asarray(pattern, np.uint8), margin, constant_values=255)
    return picture


def _off(pixels: float) -> float:
    """Return how far from a whole number it is."""
    return abs(pixels - round(pixels))


def _marker_off(board: Board, side_px: int) -> float:
    """Return how far a marker's edge is drawn from where it belongs, as a part of a square of that side."""
    exact = side_px * board.marker_m / board.square_m
    drawn = round(exact)
    return (_off(exact) + (side_px - drawn) % 2) / (2 * side_px)


def plate_size_m(board: Board, margin_squares: float = 0.5) -> tuple[float, float]:
    """Return width and height of the board with its margin, m; what :func:`board_picture` shows."""
    width, height = board.size_m
    return width + 2 * margin_squares * board.square_m, height + 2 * margin_squares * board.square_m


def print_board(board: Board, path: Path, *, paper: str = "a4", dpi: int = 600) -> None:
    """Write a page with ``board`` at true scale and a bar to measure, as ``.pdf`` or ``.png``.

    Raises:
        ConfigError: the board does not fit the paper, or the paper or the suffix is unknown.
    """
    from PIL import Image, ImageDraw, ImageFont

    if path.suffix not in (".pdf", ".png"):
        raise ConfigError(f"a board is no {path.suffix or 'file without a suffix'}", "name it .pdf or .png")
    if paper not in PAPERS_MM:
        raise ConfigError(f"unknown paper {paper!r}", f"choose one of: {', '.join(PAPERS_MM)}")
    page_mm = sorted(PAPERS_MM[paper], reverse=board.squares_x > board.squares_y)
    size_mm = [1e3 * side for side in board.size_m]
    if any(side + 2 * _LEAST_EDGE_MM > room for side, room in zip(size_mm, page_mm, strict=True)):
        raise ConfigError(
            f"a board of {size_mm[0]:.0f} x {size_mm[1]:.0f} mm does not fit {paper} "
            f"({page_mm[0]:.0f} x {page_mm[1]:.0f} mm)",
            "choose a larger paper, or fewer or smaller squares",
        )
    least_px = round(1e3 * board.square_m * dpi / _MM_PER_INCH)
    pattern = board_picture(board, pixels_per_square=least_px, margin_squares=0)
    px_per_mm = pattern.shape[1] / (1e3 * board.size_m[0])  # dpi or more, so that squares are whole pixels
    width, height = (round(side * px_per_mm) for side in page_mm)
    page = Image.new("L", (width, height), 255)
    top = max((height - pattern.shape[0]) // 2 - round(4 * px_per_mm), round(_LEAST_EDGE_MM * px_per_mm))
    left = (width - pattern.shape[1]) // 2
    page.paste(Image.fromarray(pattern), (left, top))
    pen = ImageDraw.Draw(page)
    below = top + pattern.shape[0] + round(2 * px_per_mm)
    bar = round(_SCALE_BAR_MM * px_per_mm)
    pen.rectangle((left, below, left + bar - 1, below + round(0.6 * px_per_mm)), fill=0)
    pen.text(
        (left, below + round(1.2 * px_per_mm)),
        f"this bar is {_SCALE_BAR_MM:.0f} mm long when printed at 100 % - {board.describe()}",
        fill=0,
        font=ImageFont.load_default(round(3 * px_per_mm)),
    )
    data = BytesIO()
    true_dpi = px_per_mm * _MM_PER_INCH
    if path.suffix == ".pdf":
        page.convert("1").save(data, "PDF", resolution=true_dpi)
    else:
        page.save(data, "PNG", dpi=(true_dpi, true_dpi))
    write_atomic(path, data.getvalue())
