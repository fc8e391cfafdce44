"""The offline format keeps what is put in, and names the line that breaks it."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.calibration_data import CHAIN, data, views
from benchmarks.calibration_rigs import BOARD
from calibration.board import DEFAULT_BOARD, Board, board_picture, save_board
from calibration.camera import CameraModel
from calibration.faults import MirroredBoardError, MixedUnitsError, SampleFormatError, WrongBoardError
from calibration.samples import Line, line_of, load_samples, save_samples
from simplevla.errors import ConfigError, SimplevlaError

PICTURE = np.repeat(board_picture(DEFAULT_BOARD, pixels_per_square=40)[..., None], 3, axis=2)
EYE = [[1, 0, 0, 0.1], [0, 1, 0, 0.2], [0, 0, 1, 0.3], [0, 0, 0, 1]]
JOINTS = [0.1, 0.2, -0.3, 0.4, 0.5, 0.6]


def write(folder, *lines):
    save_board(DEFAULT_BOARD, folder / "board.yaml")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "samples.jsonl").write_text(text)


def test_what_is_saved_comes_back(tmp_path):
    given_ = data()
    poses = np.array([CHAIN.forward(q) for q in given_.readings])
    kept = views(given_.rig.detections, given_.readings, poses, arm="left")
    save_samples(tmp_path / "a", BOARD, [line_of(view) for view in kept], camera=given_.rig.camera)
    back = load_samples(tmp_path / "a")
    assert back.board == BOARD
    assert back.camera == given_.rig.camera
    for before, after in zip(kept, back.views, strict=True):
        assert (after.detection.ids == before.detection.ids).all()
        assert np.allclose(after.detection.corners_px, before.detection.corners_px)
        assert np.allclose(after.joints_rad, before.joints_rad)
        assert np.allclose(after.base_gripper, before.base_gripper)
        assert (after.stamp_ns, after.arm) == (before.stamp_ns, "left")


def test_corners_are_found_in_pictures_and_what_shows_no_board_is_told(tmp_path):
    lines = [Line(image=f"{i}.png", joints=JOINTS, stamp_ns=2 - i) for i in range(2)]
    pictures = {"0.png": PICTURE, "1.png": np.zeros_like(PICTURE)}
    save_samples(tmp_path, DEFAULT_BOARD, lines, pictures=pictures)
    found = load_samples(tmp_path)
    assert [view.name for view in found.views] == ["0.png"]
    assert len(found.views[0].detection.ids) == len(DEFAULT_BOARD.corners_m())
    assert found.unseen[0].startswith("1.png: no corners")
    assert found.size == PICTURE.shape[1::-1]


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("{", SampleFormatError, "line 1"),
        ({"joints": JOINTS}, SampleFormatError, "neither image nor corners"),
        ({"corners": []}, SampleFormatError, "neither joints"),
        ({"corners": [], "joints": JOINTS, "colour": 1}, SampleFormatError, "colour"),
        ({"corners": [[0, 1, 2], [0, 3, 4]], "joints": JOINTS}, SampleFormatError, "twice"),
        ({"corners": [[99, 1, 2]], "joints": JOINTS}, WrongBoardError, "corner 99"),
        ({"corners": [], "joints": [90, 0, 0, 0, 0, 0]}, MixedUnitsError, "full turn"),
        (
            {"corners": [], "T_base_gripper": [[1e3 * x for x in EYE[0]], *EYE[1:]]},
            SampleFormatError,
            "rigid",
        ),
        (
            {"corners": [], "T_base_gripper": [[*EYE[0][:3], 350], *EYE[1:]]},
            MixedUnitsError,
            "not in mm",
        ),
        ({"corners": [], "T_base_gripper": [[-1, 0, 0, 0], *EYE[1:]]}, SampleFormatError, "rotation"),
        ({"image": "../secret.png", "joints": JOINTS}, SampleFormatError, "not inside"),
        ({"image": "/etc/hostname", "joints": JOINTS}, SampleFormatError, "not inside"),
        ({"image": "none.png", "joints": JOINTS}, SampleFormatError, "cannot be read"),
        ({"image": "board.yaml", "joints": JOINTS}, SampleFormatError, "no picture"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, error, words):
    write(tmp_path, line)
    with pytest.raises(error, match=words):
        load_samples(tmp_path)


def test_a_folder_without_its_files_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"board\.yaml"):
        load_samples(tmp_path)
    save_board(DEFAULT_BOARD, tmp_path / "board.yaml")
    with pytest.raises(SampleFormatError, match=r"samples\.jsonl"):
        load_samples(tmp_path)


@pytest.mark.parametrize(
    ("picture", "error"),
    [
        (np.ascontiguousarray(PICTURE[:, ::-1]), MirroredBoardError),
        (
            board_picture(
                Board(squares_x=6, squares_y=5, square_m=0.03, marker_m=0.022, dictionary="DICT_5X5_50"),
                pixels_per_square=40,
            ),
            WrongBoardError,
        ),
    ],
)
def test_pictures_of_another_board_are_named(tmp_path, picture, error):
    lines = [Line(image=f"{i}.png", joints=JOINTS) for i in range(2)]
    save_samples(tmp_path, DEFAULT_BOARD, lines, pictures={f"{i}.png": picture for i in range(2)})
    with pytest.raises(error):
        load_samples(tmp_path)


def test_pictures_of_another_size_than_the_camera_are_refused(tmp_path):
    camera = CameraModel(width=640, height=480, fx=600, fy=600, cx=320, cy=240)
    save_samples(
        tmp_path,
        DEFAULT_BOARD,
        [Line(image="0.png", joints=JOINTS)],
        camera=camera,
        pictures={"0.png": PICTURE},
    )
    with pytest.raises(SampleFormatError, match="size"):
        load_samples(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.recursive(st.none() | st.floats() | st.text(), st.lists)))
def test_whatever_is_in_the_file_gets_a_typed_error(tmp_path, content):
    save_board(DEFAULT_BOARD, tmp_path / "board.yaml")
    data_ = content if isinstance(content, bytes) else json.dumps({"corners": content}).encode()
    (tmp_path / "samples.jsonl").write_bytes(data_)
    with pytest.raises(SimplevlaError):
        load_samples(tmp_path)
