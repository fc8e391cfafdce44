"""Steps from recorded data, without a robot: what a live session wrote, or folders in the same format."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np

from calibration.arms_base import base_to_base, require_arms_not_swapped
from calibration.camera import CameraModel
from calibration.findings import Findings, model_of
from calibration.samples import SampleSet, load_samples
from calibration.settings import Settings
from calibration.steps.checks import difference
from calibration.steps.hand_eye import judge, solve
from calibration.steps.intrinsics import measure_lens
from calibration.steps.latency import judge as judge_delays
from calibration.steps.latency import load_swing, read_delays
from calibration.steps.scene import table_of
from calibration.steps.touch import Touches, check_touches
from robot_bridge.clearance import TABLE_TOP_M
from simplevla.config import load_yaml
from simplevla.embodiment import Arm, Embodiment
from simplevla.errors import ConfigError
from simplevla.session_record import Check, SessionRecord, to_matrix


def intrinsics(folder: Path, settings: Settings) -> tuple[CameraModel, Check]:
    """Return the lens that a folder of samples shows, and its check against the folder's camera.yaml.

    Raises:
        CalibrationError: the samples give no trustworthy answer.
        ConfigError: the folder has no camera.yaml, which gives the pictures' size.
    """
    samples = load_samples(folder)
    told = _camera_of(samples, folder)
    own = _with_board(settings, samples)
    return measure_lens([view.detection for view in samples.views], own, told, folder.name)


def bases(
    folders: list[Path], settings: Settings, embodiment: Embodiment, touches: Path | None
) -> list[Check]:
    """Return whether two arms stand as the embodiment says, by one camera that saw both of them.

    Args:
        folders: two folders of samples, the left and the right arm's in the embodiment's order.
        settings: the limits.
        embodiment: the two arms.
        touches: a .yaml file of points that both arms' tools touched, for a second opinion; see
            :class:`~calibration.steps.touch.Touches`.

    Raises:
        CalibrationError: the samples give no trustworthy answer, or the arms are swapped.
        ConfigError: there are not two arms and two folders, or a file is unreadable.
    """
    if len(folders) != 2 or len(embodiment.arms) != 2:
        raise ConfigError("two arms and a folder of samples for each are needed", "give --samples twice")
    found, checks = [], []
    for folder, arm in zip(folders, embodiment.arms, strict=True):
        samples = load_samples(folder)
        own = _with_board(settings, samples)
        one = solve(samples.views, own, _camera_of(samples, folder), arm)
        checks.append(judge(own, f"hand_eye {folder.name} {arm.name}", one))
        found.append(one)
    left, right = embodiment.arms
    nominal = np.linalg.inv(to_matrix(left.base)) @ to_matrix(right.base)
    by_camera = base_to_base(*found)
    require_arms_not_swapped(by_camera, nominal)
    apart_mm, turned_deg = difference(by_camera.pose, nominal)
    figures = {"apart_mm": apart_mm, "turned_deg": turned_deg}
    checks.append(settings.judge(f"bases {left.name} {right.name}", figures))
    if touches is not None:
        checks.append(
            check_touches(settings, load_yaml(touches, Touches), by_camera, left.name, right.name)
        )
    return checks


def latency(file: Path, settings: Settings) -> Check:
    """Return the check of a recorded swing.

    Raises:
        ConfigError: the file is no swing.
        NoCommonMotionError: its signals do not show one motion.
    """
    return judge_delays(settings, f"latency {file.stem}", read_delays(load_swing(file)))


def scene(picture: Path, settings: Settings, record: SessionRecord, camera: str) -> Check:
    """Return the check of the table in a picture of the board that lies on it.

    Raises:
        CalibrationError: the board is not in the picture.
        ConfigError: the picture cannot be read.
        RecordError: the record does not know the camera.
    """
    import cv2

    image = cv2.imread(str(picture), cv2.IMREAD_COLOR)
    if image is None:
        raise ConfigError(f"{picture} is no picture", "give a .png of the board on the table")
    findings = Findings.of(record)
    lens = model_of(record.lenses[camera], image.shape[1], image.shape[0])
    height_m, tilt_rad = table_of(np.ascontiguousarray(image[..., ::-1]), findings, camera, lens, settings)
    figures = {"height_off_mm": 1e3 * abs(height_m - TABLE_TOP_M), "tilt_deg": float(np.degrees(tilt_rad))}
    return settings.judge(f"scene {camera}", figures)


def check(folder: Path, settings: Settings, record: SessionRecord, arm: Arm, camera: str) -> Check:
    """Return whether ``camera`` still stands where ``record`` says, by a folder of samples of ``arm``.

    Raises:
        CalibrationError: the samples give no trustworthy answer.
    """
    samples = load_samples(folder)
    zeros = np.array(record.joint_zeros_rad.get(arm.name, np.zeros(len(arm.joints))))
    views = [
        dataclasses.replace(view, joints_rad=np.asarray(view.joints_rad) - zeros) for view in samples.views
    ]
    found = solve(
        views, _with_board(settings, samples), _camera_of(samples, folder), arm, joint_offsets=False
    )
    base = to_matrix(record.base_in_world.get(arm.name, arm.base))
    moved_mm, turned_deg = difference(base @ found.camera_pose, to_matrix(record.camera_in_world[camera]))
    figures = {"moved_mm": moved_mm, "turned_deg": turned_deg, "held_out_px": float(found.held_out_px)}
    return settings.judge(f"check {camera} {arm.name}", figures)


def _camera_of(samples: SampleSet, folder: Path) -> CameraModel:
    if samples.camera is None:
        raise ConfigError(
            f"{folder} has no camera.yaml", "write it, or measure it: simplevla calibrate intrinsics"
        )
    return samples.camera


def _with_board(settings: Settings, samples: SampleSet) -> Settings:
    """Return the settings with the board that the samples show."""
    return msgspec.structs.replace(settings, board=samples.board)
