"""``simplevla calibrate hand-eye --samples``: from a folder in the offline format to a pose, or a fault.

What is written has passed every test of its data; where one fails, nothing is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from calibration.faults import DegenerateMotionError, SampleFormatError, TooFewPosesError
from calibration.hand_eye import HandEye, calibrate_hand_eye
from calibration.intrinsics import calibrate_intrinsics
from calibration.refinement import Setup
from calibration.samples import SampleSet, View, load_samples
from simplevla.errors import ConfigError
from simplevla.files import write_atomic
from simplevla.kinematics import Chain, arm_chain

SCHEMA = 1


def run(args: argparse.Namespace) -> int:
    """Calibrate what ``args.samples`` hold, print it, and write it to ``args.json`` if that is given.

    Raises:
        CalibrationError: the data give no answer that could be trusted.
        ConfigError: a file or the arm's name is wrong.
    """
    console = Console()
    results = []
    for folder in args.samples:
        samples = load_samples(folder)
        for reason in samples.unseen:
            console.print(f"left out  {reason}", highlight=False)
        for (camera, arm), views in _groups(samples).items():
            title = " ".join(part for part in (folder.name, camera, arm) if part)
            try:
                found = solve(samples, views, args.setup, _chain(args, views, arm))
            except DegenerateMotionError as error:
                _print_proposals(console, error)
                raise
            console.print(describe(title, found), highlight=False)
            results.append({"samples": folder.name, "camera": camera, "arm": arm} | report(found))
    if args.json is not None:
        data = msgspec.json.encode({"schema": SCHEMA, "results": results})
        write_atomic(args.json, msgspec.json.format(data, indent=2) + b"\n")
    return 0


def solve(samples: SampleSet, views: Sequence[View], setup: Setup, chain: Chain | None) -> HandEye:
    """Return the hand-eye calibration of ``views``; without a camera.yaml its lens is found from them too.

    Raises:
        CalibrationError: the data give no answer that could be trusted.
    """
    camera = samples.camera
    if camera is None:
        if samples.size is None:
            raise SampleFormatError(
                "there is neither camera.yaml nor a picture that tells the size",
                "add camera.yaml, or the pictures",
            )
        detections = [view.detection for view in views]
        camera = calibrate_intrinsics(detections, samples.board, *samples.size).camera
    return calibrate_hand_eye(views, board=samples.board, camera=camera, setup=setup, chain=chain)


def report(found: HandEye) -> dict[str, Any]:
    """Return a calibration as what JSON can hold; lengths in m, angles in rad, matrices row by row."""
    pose, board = (
        ("T_base_camera", "T_gripper_board")
        if found.setup == "eye-to-hand"
        else ("T_gripper_camera", "T_base_board")
    )
    return {
        "setup": found.setup,
        pose: found.camera_pose.tolist(),
        board: found.board_pose.tolist(),
        "covariance": found.covariance.tolist(),
        "covariance_of": f"translation (m) and rotation vector (rad) of {pose}, in its parent frame",
        "camera": msgspec.to_builtins(found.camera),
        "figures": found.figures(),
        "arm_noise": found.arm_noise,
        "pixel_noise_px": found.pixel_noise_px,
        "views": list(found.names),
        "outliers": list(found.outliers),
    }


def describe(title: str, found: HandEye) -> str:
    """Return a calibration in words, a few lines."""
    xyz = ", ".join(f"{value:.5f}" for value in found.camera_pose[:3, 3])
    where = "base" if found.setup == "eye-to-hand" else "gripper"
    figures = ", ".join(f"{name} {value:.3g}" for name, value in found.figures().items())
    lines = [
        f"{title}: camera in {where} at ({xyz}) m, known to {1e3 * found.translation_std_m:.2f} mm and "
        f"{np.rad2deg(found.rotation_std_rad):.3f} deg",
        f"  {figures}",
    ]
    if found.outliers:
        lines.append(f"  left out as outliers: {', '.join(found.outliers)}")
    return "\n".join(lines)


def _groups(samples: SampleSet) -> dict[tuple[str, str], list[View]]:
    """Return the views by camera and arm.

    Raises:
        TooFewPosesError: there is no view at all.
        SampleFormatError: one camera.yaml is there for several cameras.
    """
    groups: dict[tuple[str, str], list[View]] = {}
    for view in samples.views:
        groups.setdefault((view.camera, view.arm), []).append(view)
    if not groups:
        raise TooFewPosesError("the board was found in no sample", "see the reasons above")
    if samples.camera is not None and len({camera for camera, _ in groups}) > 1:
        raise SampleFormatError(
            "the samples are of several cameras, and there is one camera.yaml",
            "use a folder for each camera",
        )
    return groups


def _chain(args: argparse.Namespace, views: Sequence[View], arm: str) -> Chain | None:
    """Return the arm's model: needed where samples have joints alone, used where ``--arm`` names it."""
    if not args.arm and all(view.base_gripper is not None for view in views):
        return None
    from robot_bridge.rig import load_rig

    arms = load_rig("twin" if args.twin else args.rig).load_embodiment().arms
    name = args.arm or arm or arms[0].name
    for each in arms:
        if each.name == name:
            return arm_chain(each)
    raise ConfigError(f"unknown arm {name!r}", f"choose one of: {', '.join(each.name for each in arms)}")


def _print_proposals(console: Console, error: DegenerateMotionError) -> None:
    for number, pose in enumerate(error.proposals, start=1):
        xyz = ", ".join(f"{value:.3f}" for value in pose.base_gripper[:3, 3])
        joints = (
            ""
            if pose.joints_rad is None
            else f", joints ({', '.join(f'{q:.3f}' for q in pose.joints_rad)}) rad"
        )
        console.print(
            f"proposed pose {number}: gripper at ({xyz}) m{joints}; camera then known to "
            f"{1e3 * pose.translation_std_m:.1f} mm",
            highlight=False,
        )
