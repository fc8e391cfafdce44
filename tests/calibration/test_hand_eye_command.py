"""``simplevla calibrate hand-eye --samples``: a pose in a file, or a fault and no file."""

import json

import numpy as np
import pytest

from benchmarks.calibration_data import CHAIN, data, views
from benchmarks.calibration_rigs import BOARD
from calibration.samples import line_of, save_samples
from simplevla.cli import main


def folder_of(path, setup="eye-to-hand", *, poses=True, joints=None, camera=True):
    given = data(setup)
    grippers = np.array([CHAIN.forward(q) for q in given.readings]) if poses else None
    kept = views(
        given.rig.detections, given.readings if joints is None else joints(given.readings), grippers
    )
    save_samples(path, BOARD, [line_of(v) for v in kept], camera=given.rig.camera if camera else None)
    return given


@pytest.mark.parametrize(
    ("setup", "pose"), [("eye-to-hand", "T_base_camera"), ("eye-in-hand", "T_gripper_camera")]
)
def test_a_folder_becomes_a_pose(tmp_path, capsys, setup, pose):
    given = folder_of(tmp_path / "samples", setup)
    out = tmp_path / "out.json"
    command = ["calibrate", "hand-eye", "--samples", str(tmp_path / "samples"), "--setup", setup]
    assert main([*command, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["results"][0]
    assert np.allclose(np.array(found[pose])[:3, 3], given.rig.camera_pose[:3, 3], atol=2e-3)
    assert np.linalg.eigvalsh(found["covariance"]).min() > 0
    assert found["figures"]["views"] == 15
    assert "held_out_mm" in capsys.readouterr().out


def test_joints_alone_need_the_arm_of_the_rig(tmp_path):
    folder_of(tmp_path / "samples", poses=False)
    out = tmp_path / "out.json"
    command = ["calibrate", "hand-eye", "--samples", str(tmp_path / "samples"), "--json", str(out)]
    assert main([*command, "--rig", "twin_single"]) == 0
    assert out.exists()
    out.unlink()
    assert main([*command, "--rig", "twin_single", "--arm", "third"]) != 0
    assert not out.exists()


def test_a_fault_is_told_and_nothing_is_written(tmp_path, capsys):
    folder_of(tmp_path / "samples", poses=False, joints=lambda q: np.random.default_rng(0).permutation(q))
    out = tmp_path / "out.json"
    command = ["calibrate", "hand-eye", "--samples", str(tmp_path / "samples"), "--json", str(out)]
    assert main([*command, "--rig", "twin_single"]) != 0
    assert "do not agree" in capsys.readouterr().err
    assert not out.exists()


def test_corners_without_a_camera_are_refused(tmp_path, capsys):
    folder_of(tmp_path / "samples", camera=False)
    assert main(["calibrate", "hand-eye", "--samples", str(tmp_path / "samples")]) != 0
    assert "camera.yaml" in capsys.readouterr().err
