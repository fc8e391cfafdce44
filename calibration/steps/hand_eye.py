"""Where the cameras stand: an arm shows them a board in many poses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.arms_base import base_to_base, require_arms_not_swapped
from calibration.camera import CameraModel
from calibration.faults import TooFewPosesError
from calibration.findings import Findings, lens_of, turned
from calibration.hand_eye import HandEye, HandEyeOptions, calibrate_hand_eye
from calibration.samples import View
from calibration.settings import Settings
from calibration.steps.bench import Bench, ShownPose, show_board
from calibration.steps.checks import difference, one_line
from simplevla.embodiment import Arm, Camera
from simplevla.errors import RecordError
from simplevla.kinematics import arm_chain
from simplevla.session_record import Check, to_matrix, to_pose

Array = NDArray[np.float64]

LEAST_VIEWS = 6


def find_cameras(bench: Bench, findings: Findings, arm: Arm) -> list[ShownPose]:
    """Find every camera from ``arm``, which holds the board; return all that was seen.

    The first arm of the embodiment decides where the cameras stand in the world; the base of every
    other arm is then found through them.

    Raises:
        CalibrationError: what was seen gives no trustworthy answer; the message says why.
        UnavailableError: the arms do not move, or a camera sends nothing.
    """
    reference = bench.placed.arms[0].name
    unknown = [each.name for each in bench.cameras if each.name not in findings.camera_in_world]
    if arm.name != reference and unknown:
        raise RecordError(
            f"where {', '.join(unknown)} stands is not known yet", f"show the board with {reference} first"
        )
    every: list[ShownPose] = []
    zeros: list[Array] = []
    for camera in bench.cameras:
        shown = show_board(bench, arm, camera, bench.settings.poses)
        every += shown
        lens = bench.lens(camera.name)
        found = solve([each.view for each in shown], bench.settings, lens, arm)
        findings.solved[camera.name, arm.name] = found
        zeros.append(-np.asarray(found.joint_offsets_rad))
        base = findings.base(bench.placed, arm.name)
        if arm.name == reference:
            findings.place_camera(camera.name, found.camera_pose, found.covariance, base)
        else:
            _place_base(bench, findings, arm, camera.name, found)
        findings.lenses[camera.name] = lens_of(lens)
        findings.board_in_tool[arm.name] = to_pose(found.board_pose)
        check = findings.judged(judge(bench.settings, f"hand_eye {camera.name} {arm.name}", found))
        bench.say(one_line(check))
    findings.joint_zeros_rad[arm.name] = tuple(np.mean(zeros, axis=0).tolist())
    return every


def solve(
    views: Sequence[View],
    settings: Settings,
    lens: CameraModel,
    arm: Arm,
    *,
    joint_offsets: bool = True,
) -> HandEye:
    """Return where the camera stands in the base of ``arm`` that showed it the board in ``views``.

    Raises:
        CalibrationError: the views give no trustworthy answer.
    """
    if len(views) < LEAST_VIEWS:
        raise TooFewPosesError(
            f"the board was seen in {len(views)} poses, {LEAST_VIEWS} are needed",
            "check the light, the board's mount and what hides it; see preview.png",
        )
    return calibrate_hand_eye(
        list(views),
        board=settings.board,
        camera=lens,
        setup="eye-to-hand",
        chain=arm_chain(arm),
        options=HandEyeOptions(joint_offsets=joint_offsets, seed=settings.seed),
    )


def judge(settings: Settings, name: str, found: HandEye) -> Check:
    """Return the check of a solution against the limits of its kind."""
    views = len(found.names)
    return settings.judge(
        name,
        {
            "held_out_px": float(found.held_out_px),
            "translation_std_mm": 1e3 * found.translation_std_m,
            "rotation_std_deg": float(np.degrees(found.rotation_std_rad)),
            "outlier_share": len(found.outliers) / max(views, 1),
            "views": float(views),
        },
    )


def find_camera_again(
    bench: Bench, arm: Arm, camera: Camera, zeros_rad: Array, lens: CameraModel
) -> HandEye:
    """Return where ``camera`` stands now, from the few poses of a quick check; joints' zeros are known.

    Raises:
        CalibrationError: the views give no trustworthy answer.
        UnavailableError: the arms do not move, or the camera sends nothing.
    """
    shown = show_board(bench, arm, camera, bench.settings.check_poses)
    true = [
        dataclasses.replace(each.view, joints_rad=np.asarray(each.view.joints_rad) - zeros_rad)
        for each in shown
    ]
    return solve(true, bench.settings, lens, arm, joint_offsets=False)


def _place_base(bench: Bench, findings: Findings, arm: Arm, camera: str, found: HandEye) -> None:
    """Keep where the base of ``arm`` stands, and check that this is about where it is said to stand.

    Raises:
        SwappedArmsError: the two arms were taken for each other.
    """
    first = bench.placed.arms[0]
    first_base = findings.base(bench.placed, first.name)
    reference = findings.solved.get((camera, first.name))
    if reference is not None:
        between = base_to_base(reference, found)
        require_arms_not_swapped(between, np.linalg.inv(first_base) @ to_matrix(arm.base))
        base = first_base @ between.pose
        findings.covariances[f"base {arm.name}"] = turned(between.covariance, first_base)
    else:  # the first arm's part is an earlier session's, of which the camera's pose is left
        base = to_matrix(findings.camera_in_world[camera]) @ np.linalg.inv(found.camera_pose)
        findings.covariances.pop(f"base {arm.name}", None)
    apart_mm, turned_deg = difference(base, to_matrix(arm.base))
    findings.base_in_world[arm.name] = to_pose(base)
    figures = {"apart_mm": apart_mm, "turned_deg": turned_deg}
    check = findings.judged(bench.settings.judge(f"bases {first.name} {arm.name}", figures))
    bench.say(one_line(check))
