"""The quick one: is the last calibration still true? A few poses, and the comparison."""

from __future__ import annotations

import numpy as np

from calibration.findings import model_of
from calibration.steps.bench import Bench, hold_board
from calibration.steps.checks import difference, one_line
from calibration.steps.hand_eye import find_camera_again
from simplevla.embodiment import Arm
from simplevla.errors import RecordError
from simplevla.session_record import Check, SessionRecord, to_matrix


def check_record(bench: Bench, record: SessionRecord, arm: Arm) -> list[Check]:
    """Return, for each camera, whether it still stands where ``record`` says, as ``arm`` sees it.

    The board may be clamped anew: where it is in the gripper is found along the way.

    Raises:
        CalibrationError: what was seen gives no trustworthy answer.
        RecordError: the record does not say where a camera stands.
        UnavailableError: the arms do not move, or a camera sends nothing.
    """
    hold_board(bench, arm)
    zeros = np.array(record.joint_zeros_rad.get(arm.name, np.zeros(len(arm.joints))))
    base = to_matrix(record.base_in_world.get(arm.name, arm.base))
    checks = []
    for camera in bench.cameras:
        if camera.name not in record.camera_in_world or camera.name not in record.lenses:
            raise RecordError(
                f"the record does not say where camera {camera.name} stands",
                "run: simplevla calibrate session",
            )
        lens = model_of(record.lenses[camera.name], camera.width, camera.height)
        found = find_camera_again(bench, arm, camera, zeros, lens)
        moved_mm, turned_deg = difference(
            base @ found.camera_pose, to_matrix(record.camera_in_world[camera.name])
        )
        figures = {
            "moved_mm": moved_mm,
            "turned_deg": turned_deg,
            "held_out_px": float(found.held_out_px),
            "translation_std_mm": 1e3 * found.translation_std_m,
        }
        check = bench.settings.judge(f"check {camera.name} {arm.name}", figures)
        bench.say(one_line(check))
        checks.append(check)
    bench.cell.carry({})
    return checks
