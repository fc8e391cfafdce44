"""Whether an arm goes where it is sent: joints at rest, their zeros, the gripper's stroke."""

from __future__ import annotations

import numpy as np

from calibration.findings import Findings
from calibration.steps.bench import Bench, ShownPose
from calibration.steps.checks import one_line
from simplevla.embodiment import Arm
from simplevla.errors import UnavailableError


def measure_grippers(bench: Bench) -> dict[str, float]:
    """Close and open every empty gripper; return {arm: largest difference from what was asked, m}.

    Raises:
        UnavailableError: the arms do not move.
    """
    cell = bench.cell
    worst = dict.fromkeys((arm.name for arm in bench.placed.arms), 0.0)
    for share in (0.0, 1.0):
        goal = bench.placed.home()
        for arm, part in bench.placed.slices():
            goal[part.stop - 1] = share * arm.gripper.stroke_m
        cell.move(goal)
        cell.settle()
        reached = cell.averaged()
        for arm, part in bench.placed.slices():
            off_m = abs(float(reached[part.stop - 1] - goal[part.stop - 1]))
            worst[arm.name] = max(worst[arm.name], off_m)
    cell.home()
    return worst


def judge_arm(
    bench: Bench, findings: Findings, arm: Arm, shown: list[ShownPose], gripper_m: float | None
) -> None:
    """Check an arm by what was seen of it while it showed the board, and by its gripper."""
    part = next(part for each, part in bench.placed.slices() if each.name == arm.name)
    joints = slice(part.start, part.stop - 1)
    errors = [np.abs(each.measured[joints] - each.wanted[joints]).max() for each in shown]
    if not errors:
        raise UnavailableError(f"arm {arm.name} showed the board nowhere", "see the log")
    figures = {
        "joint_zero_deg": float(np.degrees(np.abs(findings.joint_zeros_rad[arm.name]).max())),
        "still_error_deg": float(np.degrees(max(errors))),
    }
    if gripper_m is not None:
        figures["gripper_error_mm"] = 1e3 * gripper_m
    bench.say(one_line(findings.judged(bench.settings.judge(f"arms {arm.name}", figures))))
