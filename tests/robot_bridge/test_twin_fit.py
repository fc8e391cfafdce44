"""How the joints follow is found from a recording, and a twin that is told so follows in the same way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from robot_bridge.recording import JointSeries, TrialRecorder, trial_topics
from robot_bridge.twin.fit import fit_arm, fit_recording
from robot_bridge.twin.metal import Metal
from robot_bridge.twin.stage import load_scene
from sim_training.world import PHYSICS_DT_S, World
from simplevla.cli import main
from simplevla.config import load_yaml
from simplevla.embodiment import load_embodiment
from simplevla.errors import RecordError

ROBOT = load_embodiment("piper_single")
START_NS = 1_790_000_000_000_000_000
FREQUENCIES = np.array([55.0, 48.0, 40.0, 33.0, 28.0, 60.0])
DAMPINGS = np.array([1.0, 0.9, 0.8, 1.1, 0.7, 1.2])
DELAY_S = 0.018
MICRO_S = 1e-4


def wanted_at(t: np.ndarray) -> np.ndarray:
    """Return (N, 7) set points: each joint swings in two ways of its own, after a moment of rest."""
    swing = np.arange(7) * 0.3
    waves = 0.2 * np.sin(2 * np.pi * (0.5 + 0.1 * np.arange(7)) * t[:, None] + swing) + 0.05 * np.sin(
        2 * np.pi * (2.0 + 0.2 * np.arange(7)) * t[:, None]
    )
    rise = np.clip(t / 0.5, 0.0, 1.0)[:, None] ** 2
    return ROBOT.home() + rise * waves * np.array([1, 1, 1, 1, 0.5, 1, 0.0])


def follow_step_by_step(seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Return times and (N, 7) positions of joints that follow: small steps of the equation itself."""
    times = np.arange(0.0, seconds, MICRO_S)
    held = np.floor(np.maximum(times - DELAY_S, 0.0) * ROBOT.control_rate_hz + 1e-6) / ROBOT.control_rate_hz
    late = wanted_at(held)  # each setpoint until the next
    x, v = late[0].copy(), np.zeros(7)
    out = late.copy()
    for i, u in enumerate(late):
        force = FREQUENCIES**2 * (u[:6] - x[:6]) - 2 * DAMPINGS * FREQUENCIES * v[:6]
        v[:6] += force * MICRO_S
        x[:6] += v[:6] * MICRO_S
        out[i, :6] = x[:6]
    return times, out


def record(folder: Path, seconds: float = 6.0) -> Path:
    """Write a recording of joints that follow in a known way."""
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_KILTED)
    kinds, kind = store.types, "sensor_msgs/msg/JointState"
    time_type, header_type = kinds["builtin_interfaces/msg/Time"], kinds["std_msgs/msg/Header"]
    times, positions = follow_step_by_step(seconds)
    rng = np.random.default_rng(0)
    with TrialRecorder(folder, "trial_000", trial_topics(ROBOT)) as recorder:
        for i in range(int(seconds * 100) - 1):
            for topic, late_s in (("setpoints", 0.0), ("joint_states", 0.0031)):
                at_s = i / 100 + late_s
                values = (
                    wanted_at(np.array([at_s]))[0]
                    if topic == "setpoints"
                    else positions[np.searchsorted(times, at_s)] + rng.normal(0, 1e-4, 7)
                )
                stamp = START_NS + round(at_s * 1e9)
                head = header_type(time_type(stamp // 10**9, stamp % 10**9), "")
                message = kinds[kind](head, ROBOT.names(), values, np.zeros(0), np.zeros(0))
                recorder.write(topic, bytes(store.serialize_cdr(message, kind)), stamp)
    return folder / "trial_000"


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("fit"))


def test_a_known_response_is_found(trial: Path) -> None:
    fit = fit_recording(trial, ROBOT)["right"]
    assert fit.moved.all()
    assert fit.delay_s == pytest.approx(DELAY_S, abs=5e-4)
    np.testing.assert_allclose(fit.frequencies_rad_s, FREQUENCIES, rtol=0.05)
    np.testing.assert_allclose(fit.dampings, DAMPINGS, rtol=0.05)
    assert fit.residual_rad < 2e-4
    assert fit.travel_rad > 0.01


def test_the_command_writes_what_the_twin_takes(
    trial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "metal.yaml"
    (mcap,) = trial.glob("*.mcap")
    assert main(["twin", "fit", str(mcap), "--rig", "twin_single", "--out", str(out)]) == 0
    assert "joint 5: 28." in capsys.readouterr().out
    metal = load_yaml(out, Metal)
    metal.check(ROBOT)
    assert metal.responses["right"].dampings[4] == pytest.approx(0.7, rel=0.03)
    assert 0.01 < metal.command_delays_s["right"] < DELAY_S
    assert main(["twin", "fit", str(trial), "--rig", "twin", "--out", str(out)]) == 2
    assert "name its rig" in capsys.readouterr().err


def test_a_recording_without_motion_is_refused(tmp_path: Path) -> None:
    with TrialRecorder(tmp_path, "empty", trial_topics(ROBOT)):
        pass
    with pytest.raises(RecordError, match="setpoints are of nothing"):
        fit_recording(tmp_path / "empty", ROBOT)


def test_the_twins_joints_follow_as_they_are_told_to() -> None:
    """From the fit into the simulated world and back out of it; one joint, for several push each other."""
    steps = int(4.0 / PHYSICS_DT_S)
    times = np.arange(steps) * PHYSICS_DT_S
    wanted = np.tile(ROBOT.home(), (steps, 1))
    wanted[:, 0] = wanted_at(times)[:, 0]
    with World(ROBOT, load_scene("empty_table"), render=False) as world:
        world.reset(0, ROBOT.home())
        world.set_joint_response("right", [25.0] * 6, [0.8] * 6)
        seen = []
        for row in wanted:
            world.set_targets(row)
            world.step(1)
            seen.append(world.positions())
    stamps = (times * 1e9).astype(np.int64)
    names = tuple(ROBOT.names())
    fit = fit_arm(
        JointSeries(names, stamps, wanted),
        JointSeries(names, stamps + round(PHYSICS_DT_S * 1e9), np.array(seen)),
        slice(0, 6),
        PHYSICS_DT_S,
    )
    assert fit is not None
    assert fit.moved.tolist() == [True] + [False] * 5
    late_s = fit.delay_s + 2 * fit.dampings[0] / fit.frequencies_rad_s[0]  # of a steady motion
    assert late_s == pytest.approx(2 * 0.8 / 25.0, rel=0.1)
    assert fit.residual_rad < 3e-3
    assert fit.travel_rad > 0.03
