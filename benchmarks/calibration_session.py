"""A calibration session on a twin whose metal is not what its embodiment says: found against true.

The twin's camera is moved and turned, one joint's zero is put off, commands, pictures and the camera's
clock are made late; all drawn from a seed. A whole session then runs unattended through the real
drivers, and what it found is printed beside what is true. At last the camera is moved by 5 mm, and the
quick check is timed.

    python -m benchmarks.calibration_session
    python -m benchmarks.calibration_session --rig twin --seed 3 --out runs/calibration_demo
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.spatial.transform import Rotation

from calibration.guide import TwinGuide
from calibration.session import Job, calibrate_all, opened
from calibration.settings import load_settings
from calibration.steps.check import check_record
from calibration.steps.checks import difference, one_line
from robot_bridge.rig import Rig, load_rig
from robot_bridge.twin.control import TwinTruth
from robot_bridge.twin.metal import Metal
from simplevla.embodiment import Pose
from simplevla.session_record import SessionRecord, to_matrix, to_pose

_OFF_JOINT = 2  # joint 3: not the first or the last, whose zeros are part of what base and gripper mean
_MOVED_M = np.array([0.003, 0.004, 0.0])


def main() -> int:
    """Run it; return 0 if the record passed and the moved camera was noticed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rig", default="twin_single", help="a twin's rig (default: twin_single)")
    parser.add_argument("--seed", type=int, default=0, help="of what is off (default: 0)")
    parser.add_argument("--poses", type=int, default=14, help="poses of each arm (default: 14)")
    parser.add_argument("--out", type=Path, help="keep samples and record here (default: nowhere)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return run(load_rig(args.rig), args.seed, args.poses, args.out or Path(scratch))


def run(rig: Rig, seed: int, poses: int, folder: Path) -> int:
    """Run a session and a check on a twin with metal drawn from ``seed``; return the exit status."""
    console = Console(highlight=False)
    settings = msgspec.structs.replace(load_settings(), poses=poses)
    metal = draw_metal(rig, np.random.default_rng(seed))
    job = Job(rig, settings, folder / "session.json", folder, say=print, metal=metal, window=False)
    began_s = time.monotonic()
    with opened(job) as bench:
        if not isinstance(bench.guide, TwinGuide):
            raise TypeError("this needs a twin's rig")
        opened_s = time.monotonic()
        record = calibrate_all(bench, job)
        ended_s = time.monotonic()
        truth = bench.guide.truth()
        console.print(compared(record, truth))
        console.print(
            f"rig {rig.name}, seed {seed}: twin up in {opened_s - began_s:.0f} s, session "
            f"{ended_s - opened_s:.0f} s; the twin kept at least {bench.guide.pace:.2f} of real time"
        )
        moved = {
            name: to_pose(_shifted(to_matrix(pose), _MOVED_M, np.zeros(3)))
            for name, pose in truth.camera_in_world.items()
        }
        bench.guide.alter(Metal(camera_in_world=moved))
        began_s = time.monotonic()
        checks = check_record(bench, record, bench.placed.arms[-1])
        took_s = time.monotonic() - began_s
    noticed = not any(check.passed for check in checks)
    console.print(f"camera moved by {1e3 * np.linalg.norm(_MOVED_M):.0f} mm: check took {took_s:.0f} s")
    for check in checks:
        console.print(one_line(check))
    return 0 if record.passed and noticed else 1


def draw_metal(rig: Rig, rng: np.random.Generator) -> Metal:
    """Return metal that differs from the rig's embodiment in everything that a session finds."""
    embodiment = rig.load_embodiment()
    cameras: dict[str, Pose] = {}
    for camera in embodiment.cameras:
        off = _shifted(camera.pose_in_world(), rng.uniform(-0.025, 0.025, 3), rng.uniform(-2.5, 2.5, 3))
        cameras[camera.name] = to_pose(off)
    zeros = {}
    for arm in embodiment.arms:
        values = np.zeros(6)
        values[_OFF_JOINT] = rng.choice([-1, 1]) * rng.uniform(0.005, 0.02)
        zeros[arm.name] = tuple(values.tolist())
    return msgspec.convert(
        {
            "camera_in_world": msgspec.to_builtins(cameras),
            "joint_zeros_rad": zeros,
            "command_delays_s": {arm.name: rng.uniform(0.0, 0.05) for arm in embodiment.arms},
            "stamp_offsets_s": {name: rng.uniform(0.0, 0.04) for name in cameras},
            "deliveries_s": {name: rng.uniform(0.05, 0.09) for name in cameras},
        },
        Metal,
    )


def compared(record: SessionRecord, truth: TwinTruth) -> Table:
    """Return what was found beside what is true."""
    table = Table("what", "true", "found", "difference")
    for kind, found, true in (
        ("camera", record.camera_in_world, truth.camera_in_world),
        ("base", record.base_in_world, truth.base_in_world),
    ):
        for name, pose in found.items():
            apart_mm, turned_deg = difference(to_matrix(pose), to_matrix(true[name]))
            places = [", ".join(f"{value:.4f}" for value in each.xyz_m) for each in (true[name], pose)]
            table.add_row(f"{kind} {name}, m", *places, f"{apart_mm:.3f} mm, {turned_deg:.3f} deg")
    for arm, values in record.joint_zeros_rad.items():
        true_deg, found_deg = (np.degrees(each) for each in (truth.joint_zeros_rad[arm], values))
        texts = [", ".join(f"{value:.3f}" for value in each) for each in (true_deg, found_deg)]
        worst = float(np.abs(found_deg - true_deg).max())
        table.add_row(f"joint zeros {arm}, deg", *texts, f"{worst:.4f} deg at most")
    for name, seconds in record.delays_s.items():
        true_s = truth.delays_s[name]
        table.add_row(
            f"delay {name}, ms",
            f"{1e3 * true_s:.1f}",
            f"{1e3 * seconds:.1f}",
            f"{1e3 * (seconds - true_s):+.1f} ms",
        )
    return table


def _shifted(pose: np.ndarray, xyz_m: np.ndarray, rpy_deg: np.ndarray) -> np.ndarray:
    moved = pose.copy()
    moved[:3, 3] += xyz_m
    moved[:3, :3] = moved[:3, :3] @ Rotation.from_euler("xyz", rpy_deg, degrees=True).as_matrix()
    return moved


if __name__ == "__main__":
    raise SystemExit(main())
