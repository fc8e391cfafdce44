"""One whole run through everything: twin, vendor libraries, DDS, policy server, trials, report.

The command that a user types is run as a user runs it. Real are SAPIEN, piper_sdk on a CAN bus,
pyrealsense2, rclpy over Fast DDS, ZMQ and the network; only the metal is not.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from robot_bridge.latency import legs_ms, read_traces
from robot_bridge.recording import INTERRUPTED, Recording, read_recording
from simplevla.bundle import Bundle, load_bundle
from simplevla.embodiment import load_embodiment
from simplevla.files import share_dir
from simplevla.trial import Outcome, Trial, load_index

for library in ("rclpy", "sapien", "pyrealsense2", "piper_sdk", "zmq", "torch"):
    pytest.importorskip(library)

pytestmark = [pytest.mark.slow, pytest.mark.realtime]

STEP_LIMIT = 60
FOLLOWS_WITHIN_NS = 1_000_000_000
TASK = "move_can_pot"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """The policy that ships."""
    return load_bundle(share_dir() / "bundles" / TASK)


def start_trials(bundle: Bundle, out: Path, trials: int) -> subprocess.Popen:
    """Start the command as a user types it; torch computes, so that nothing has to be compiled first."""
    command = (sys.executable, "-m", "simplevla", "trial", "--twin", "--backend", "torch")
    options = {"bundle": bundle.path, "out": out, "trials": trials, "step-limit": STEP_LIMIT}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [*command, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


@pytest.fixture(scope="module")
def run(bundle, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a run of one trial."""
    out = tmp_path_factory.mktemp("end_to_end") / "run"
    process = start_trials(bundle, out, trials=1)
    try:
        said, logged = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, f"{said}\n{logged}\n{logs(out)}"
    return out, said


def logs(out: Path) -> str:
    return "\n".join(f"== {p.name}\n{p.read_text()[-2000:]}" for p in sorted(out.glob("logs/*.log")))


@pytest.fixture(scope="module")
def trial(run) -> Trial:
    (trial,) = load_index(run[0]).trials
    return trial


@pytest.fixture(scope="module")
def recording(run, trial) -> Recording:
    return read_recording(run[0] / trial.recording)


def test_the_trial_is_judged_and_counted(run, trial, bundle):
    out, said = run
    assert trial.outcome in (Outcome.SUCCESS, Outcome.FAILURE)
    assert trial.policy_id == bundle.id
    assert trial.outcome is Outcome.SUCCESS or trial.actions == STEP_LIMIT
    assert trial.seed == 10_000
    assert 0.05 < trial.real_time_factor <= 1.1
    for line in ("success           ", "latency           capture -> ", "report            "):
        assert line in said
    assert not (out / INTERRUPTED).exists()


def test_everything_is_recorded(recording, trial, bundle):
    counts = recording.counts
    length = bundle.manifest.chunk_length
    played = math.ceil(trial.actions / length)
    # Success may be seen when the next chunk is on its way, of which nothing is played then.
    assert counts["policy/chunks"] == counts["joint_trajectory"]
    assert counts["policy/chunks"] in {played, played + 1}
    assert counts["arms/executed"] >= counts["policy/chunks"]
    assert counts["joint_states"] > 20 * trial.duration_s
    assert counts["setpoints"] > 20 * trial.duration_s
    assert counts["head/color/image_raw/compressed"] > 2 * trial.duration_s
    assert counts["head/color/camera_info"] > 0
    assert counts["policy/state"] > 0
    assert counts["diagnostics"] > 0
    assert recording.dropped == {}


def test_the_arms_moved_as_they_were_told_and_within_their_limits(recording):
    embodiment = load_embodiment("piper_dual")
    commanded, measured = recording.commanded, recording.measured
    assert list(commanded.names) == list(measured.names) == embodiment.names()
    joints = [i for i, name in enumerate(embodiment.names()) if not name.endswith("gripper")]
    assert np.ptp(measured.position[:, joints], axis=0).max() > 0.2
    # A joint is where it was told to be a moment ago: it may still be on its way when the trial ends.
    recent = commanded.position[commanded.stamp_ns > measured.stamp_ns[-1] - FOLLOWS_WITHIN_NS]
    assert (measured.position[-1] > recent.min(axis=0) - 0.05)[joints].all()
    assert (measured.position[-1] < recent.max(axis=0) + 0.05)[joints].all()
    lower, upper = embodiment.position_limits()
    assert (commanded.position >= lower - 1e-6).all()
    assert (commanded.position <= upper + 1e-6).all()
    # Stamps are taken after sending and may shake by a few ms: speed is judged over tenths of a second.
    step = 10
    seconds = (commanded.stamp_ns[step:] - commanded.stamp_ns[:-step])[:, None] / 1e9
    moved = np.abs(commanded.position[step:] - commanded.position[:-step])
    assert (moved <= embodiment.velocity_limits() * (seconds + 0.05)).all()


def test_every_chunk_can_be_followed_from_exposure_to_bus(recording, trial, bundle):
    traces = read_traces(recording)
    legs = legs_ms(traces)
    assert len(legs) == len(traces) == recording.counts["policy/chunks"]
    assert (legs > 0).all()
    assert [trace.index for trace in traces] == list(range(len(traces)))
    assert sum(trace.executed for trace in traces) >= 0.9 * trial.actions
    assert {s.values["policy_id"] for s in recording.statuses["policy/chunks"]} == {bundle.id}
    assert trial.latency.total_ms == pytest.approx(float(np.median(legs.sum(axis=1))))


def test_the_report_shows_it(run, trial, bundle):
    out, _ = run
    page = (out / "report.html").read_text(encoding="utf-8")
    assert bundle.id in page
    for picture in ("trial_000_0_sheet.jpg", "trial_000.webp", "trial_000_joints.png", "latency.png"):
        assert f"media/{picture}" in page
        assert (out / "media" / picture).stat().st_size > 5_000
    assert f"{trial.recording}/{trial.recording}.mcap" in page


def test_an_impatient_ctrl_c_ends_a_run_in_order(bundle, tmp_path):
    out = tmp_path / "run"
    process = start_trials(bundle, out, trials=3)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "running" in line:
                break
        time.sleep(2)
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        _, logged = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, logged
    assert "Traceback" not in logged
    # An index is written with the first trial that ends.
    finished = [t.id for t in load_index(out).trials] if (out / "index.json").exists() else []
    assert list((out / INTERRUPTED).iterdir()) == [out / INTERRUPTED / f"trial_{len(finished):03}"]
    assert [path.name for path in sorted(out.glob("trial_*"))] == finished
    assert running_with(str(out)) == []
    for name in ("twin", "server", "arms", "policy"):
        assert "Traceback" not in (out / "logs" / f"{name}.log").read_text(), logs(out)


def running_with(word: str) -> list[str]:
    """Return the command lines of the processes that have ``word`` in theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if any(word.encode() in each for each in words):
                found.append(b" ".join(words).decode(errors="replace"))
    return found
