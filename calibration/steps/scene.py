"""Where the table is, and the simulator's scene with everything where it was found."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import yaml
from numpy.typing import NDArray

from calibration.camera import CameraModel
from calibration.detection import BoardDetector, board_pose
from calibration.findings import Findings
from calibration.settings import Settings
from calibration.steps.bench import Bench
from calibration.steps.checks import one_line
from robot_bridge.clearance import TABLE_TOP_M
from simplevla.embodiment import Embodiment
from simplevla.errors import RecordError
from simplevla.files import write_atomic
from simplevla.session_record import SessionRecord, simulated, to_matrix

Array = NDArray[np.float64]


def find_table(bench: Bench, findings: Findings) -> None:
    """Have the board laid on the table and find the table's height from the first camera that sees it.

    Raises:
        CalibrationError: no camera sees the board.
        RecordError: that camera's pose is not known.
    """
    camera = bench.cameras[0]
    bench.guide.lay_down()
    bench.cell.settle()  # a picture that is on its way shows what was before
    picture = bench.cell.look(camera.name).image
    found = BoardDetector(bench.settings.board).find(picture)
    bench.preview.show(camera.name, picture, found, "the table")
    height_m, tilt_rad = table_of(picture, findings, camera.name, bench.lens(camera.name), bench.settings)
    findings.table_top_m = height_m
    check = bench.settings.judge(
        f"scene {camera.name}",
        {"height_off_mm": 1e3 * abs(height_m - TABLE_TOP_M), "tilt_deg": float(np.degrees(tilt_rad))},
    )
    bench.say(one_line(findings.judged(check)))


def table_of(
    picture: NDArray[np.uint8], findings: Findings, camera: str, lens: CameraModel, settings: Settings
) -> tuple[float, float]:
    """Return the height in the world, m, and the tilt, rad, of a table on which the board lies.

    Raises:
        CalibrationError: the board is not in the picture.
        RecordError: the camera's pose is not known.
    """
    if camera not in findings.camera_in_world:
        raise RecordError(f"where camera {camera} stands is not known", "calibrate hand-eye first")
    found = BoardDetector(settings.board).detect(picture)
    board = to_matrix(findings.camera_in_world[camera]) @ board_pose(found, settings.board, lens)
    corners = settings.board.corners_m() @ board[:3, :3].T + board[:3, 3]
    up = -board[:3, 2]
    height = float(corners[:, 2].mean()) - settings.board_thickness_m
    return height, float(np.arccos(np.clip(up[2], -1.0, 1.0)))


def write_scene(embodiment: Embodiment, record: SessionRecord, path: Path) -> None:
    """Write the robot as a simulator is to build it, as an embodiment's .yaml file."""
    text = yaml.safe_dump(msgspec.to_builtins(simulated(embodiment, record, TABLE_TOP_M)), sort_keys=False)
    write_atomic(path, text.encode())
