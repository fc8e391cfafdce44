"""The board is printed at true scale, and found again where it is."""

import re

import cv2
import numpy as np
import pytest
from PIL import Image

from calibration.board import (
    DEFAULT_BOARD,
    Board,
    board_picture,
    load_board,
    plate_size_m,
    print_board,
    save_board,
)
from calibration.detection import BoardDetector
from calibration.faults import BoardNotFoundError, MirroredBoardError, WrongBoardError
from calibration.geometry import exp_rotation
from simplevla.errors import ConfigError

PICTURE = board_picture(DEFAULT_BOARD, pixels_per_square=60)


def test_a_printed_page_has_squares_of_the_stated_size(tmp_path):
    print_board(DEFAULT_BOARD, tmp_path / "board.png", dpi=300)
    page = Image.open(tmp_path / "board.png")
    px_per_m = page.info["dpi"][0] / 0.0254
    found = BoardDetector(DEFAULT_BOARD).detect(np.array(page.convert("L")))
    along = np.linalg.norm(found.corners_px[1] - found.corners_px[0]) / px_per_m
    assert along == pytest.approx(DEFAULT_BOARD.square_m, abs=2e-5)
    assert page.size[0] / px_per_m == pytest.approx(0.297, abs=2e-4)


def test_a_printed_pdf_is_a_page_of_the_paper(tmp_path):
    print_board(DEFAULT_BOARD, tmp_path / "board.pdf", dpi=150)
    data = (tmp_path / "board.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[\s*0 0 ([\d.]+) ([\d.]+)", data)
    assert data.startswith(b"%PDF")
    assert [float(side) / 72 * 25.4 for side in box.groups()] == pytest.approx([297, 210], abs=0.5)


@pytest.mark.parametrize(
    ("name", "paper", "square_m"), [("board.gif", "a4", 0.03), ("b.pdf", "b4", 0.03), ("b.pdf", "a4", 0.06)]
)
def test_what_cannot_be_printed_is_refused(tmp_path, name, paper, square_m):
    board = Board(squares_x=6, squares_y=5, square_m=square_m, marker_m=0.7 * square_m)
    with pytest.raises(ConfigError):
        print_board(board, tmp_path / name, paper=paper)
    assert not list(tmp_path.iterdir())


def test_a_board_survives_its_file(tmp_path):
    save_board(DEFAULT_BOARD, tmp_path / "board.yaml")
    assert load_board(tmp_path / "board.yaml") == DEFAULT_BOARD


@pytest.mark.parametrize(
    "change", ["square_m: 30", "marker_m: 0.029", "dictionary: DICT_9X9_5", "squares_x: 30", "colour: red"]
)
def test_a_board_that_cannot_be_is_refused(tmp_path, change):
    fields = {"squares_x": 6, "squares_y": 5, "square_m": 0.03, "marker_m": 0.022}
    key, value = change.split(": ")
    fields[key] = value
    (tmp_path / "board.yaml").write_text("".join(f"{k}: {v}\n" for k, v in fields.items()))
    with pytest.raises(ConfigError, match=r"board\.yaml"):
        load_board(tmp_path / "board.yaml")


@pytest.mark.parametrize("size", [(1000, 857), (175, 150)])
def test_corners_are_found_where_they_are(size):
    """In the small picture a square has 25 pixels; it is enlarged for the markers to be read."""
    picture = cv2.resize(PICTURE, size, interpolation=cv2.INTER_AREA)
    found = BoardDetector(DEFAULT_BOARD).detect(picture)
    scale = np.array(size) / PICTURE.shape[::-1]
    true = (DEFAULT_BOARD.corners_m()[:, :2] / DEFAULT_BOARD.square_m + 0.5) * 60 * scale - 0.5
    assert len(found.ids) == len(true)
    assert np.abs(found.corners_px - true).max() < 0.1


def test_a_mirrored_board_is_named():
    with pytest.raises(MirroredBoardError):
        BoardDetector(DEFAULT_BOARD).detect(np.ascontiguousarray(PICTURE[:, ::-1]))


def test_another_board_is_named():
    other = Board(squares_x=6, squares_y=5, square_m=0.03, marker_m=0.022, dictionary="DICT_6X6_50")
    with pytest.raises(WrongBoardError, match="6X6"):
        BoardDetector(DEFAULT_BOARD).detect(board_picture(other, pixels_per_square=60))


def test_a_picture_without_a_board_is_named():
    with pytest.raises(BoardNotFoundError):
        BoardDetector(DEFAULT_BOARD).detect(np.full((200, 300, 3), 128, np.uint8))


@pytest.mark.parametrize("pixels", [30, 40, 41, 64, 300, 709])
def test_markers_are_in_the_middle_of_their_squares(pixels):
    """Otherwise all corners lean to one side, which no average over them takes away."""
    picture = board_picture(DEFAULT_BOARD, pixels_per_square=pixels, margin_squares=0)
    side = picture.shape[1] // DEFAULT_BOARD.squares_x
    assert pixels <= side <= 1.25 * pixels
    black = np.argwhere(picture[:side, side : 2 * side] == 0)
    assert black.min(0).tolist() == (side - 1 - black.max(0)).tolist()


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.5])
def test_a_margin_is_as_wide_as_asked(margin):
    picture = board_picture(DEFAULT_BOARD, pixels_per_square=50, margin_squares=margin)
    height, width = picture.shape
    assert width / height == pytest.approx((6 + 2 * margin) / (5 + 2 * margin), rel=1e-9)


def test_the_plate_is_the_board_with_its_margin():
    pixel = DEFAULT_BOARD.square_m / 60
    assert plate_size_m(DEFAULT_BOARD) == pytest.approx(
        (PICTURE.shape[1] * pixel, PICTURE.shape[0] * pixel)
    )


@pytest.mark.parametrize("tilt", [0.0, 0.5, 0.9])
def test_corners_of_a_tilted_blurred_board_are_found_to_hundredths_of_a_pixel(tilt):
    """Beside markers a corner's window is easily too large: that costs up to a pixel in single corners."""
    fine = 4
    turn = exp_rotation(np.array([0.6 * tilt, tilt, 0.1]))
    points = DEFAULT_BOARD.corners_m() - 0.5 * np.array([*DEFAULT_BOARD.size_m, 0.0])
    camera = np.array([[600.0, 0, 320], [0, 600.0, 240], [0, 0, 1]])

    def seen(board_points):
        ahead = (board_points @ turn.T + [0.0, 0.0, 0.42]) @ camera.T
        return ahead[:, :2] / ahead[:, 2:]

    # Printed pixels count from their middles, and there are 60 on a square and 30 in the margin.
    printed = 60 * (DEFAULT_BOARD.corners_m()[:, :2] / DEFAULT_BOARD.square_m + 0.5) - 0.5
    to_fine, _ = cv2.findHomography(printed, fine * (seen(points) + 0.5) - 0.5)
    drawn = cv2.warpPerspective(
        PICTURE, to_fine, (640 * fine, 480 * fine), flags=cv2.INTER_AREA, borderValue=200
    )
    small = cv2.resize(
        cv2.GaussianBlur(drawn, (0, 0), 0.8 * fine), (640, 480), interpolation=cv2.INTER_AREA
    )
    noise = np.random.default_rng(0).normal(0, 2.0, small.shape)
    found = BoardDetector(DEFAULT_BOARD).detect(np.clip(small + noise, 0, 255).astype(np.uint8))
    off = found.corners_px - seen(points)[found.ids]
    assert len(found.ids) == 20
    assert np.sqrt(np.mean(off**2)) < 0.03
    assert np.abs(off).max() < 0.12
