"""Chunks played offline: what the seam figures measure, and what each mode gives on a recorded stream."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.seams import MadeUpPolicy, Setting, compare
from robot_bridge.chunk_stream import ChunkStream, RecordedAnswer, RecordedPolicy, read_stream
from robot_bridge.execution_modes import Execution, ExecutionMode
from robot_bridge.recording import read_recording
from robot_bridge.replay import replay, seam_steps
from simplevla.embodiment import load_embodiment
from simplevla.errors import RecordError

ROBOT = load_embodiment("piper_single")
JOINTS = np.arange(7) < 6
STREAM = Path(__file__).parent / "data/chunk_stream"  # a trial's answers alone: receding, horizon 1
SETTING = Setting(actions=60, seed=1)


def test_a_jump_of_the_acceleration_is_found_only_at_its_seam():
    times = np.arange(1, 801) * 0.005
    speed = np.where(times < 2.0, 0.0, 0.3)  # stands, then moves at once
    positions = list(np.outer(np.cumsum(speed) * 0.005, np.ones(7)))
    figures = {"tick_s": 0.005, "window_s": 0.1, "near_s": 0.2}
    assert seam_steps(positions, [2.0], JOINTS, **figures)[0] == pytest.approx(3.0, rel=0.05)
    assert seam_steps(positions, [3.0], JOINTS, **figures)[0] == pytest.approx(0.0, abs=1e-6)


def test_real_time_chunking_lowers_the_largest_step_and_does_not_stand_and_wait():
    found = compare(
        lambda: MadeUpPolicy(ROBOT, SETTING), ROBOT, start=ROBOT.home(), actions=60, latency_s=(0.1, 0.3)
    )
    synchronous, real_time = found[ExecutionMode.SYNCHRONOUS], found[ExecutionMode.REAL_TIME]
    assert real_time.wanted.max() <= synchronous.wanted.max() / 3
    assert real_time.sent.max() < synchronous.sent.max()
    assert (real_time.held, real_time.refused) == (0, 0)
    assert real_time.duration_s < synchronous.duration_s


@pytest.mark.parametrize("seed", [0, 1])
def test_a_recorded_trial_is_played_again_in_every_mode(seed):
    robot = load_embodiment("piper_dual")
    stream = read_stream(read_recording(STREAM, images=False))
    assert (len(stream.answers), stream.length, stream.dt_s) == (60, 61, pytest.approx(0.1))
    found = compare(
        lambda: RecordedPolicy(stream, robot),
        robot,
        start=stream.start,
        actions=60,
        latency_s=(0.1, 0.3),
        seed=seed,
    )
    synchronous, real_time = found[ExecutionMode.SYNCHRONOUS], found[ExecutionMode.REAL_TIME]
    assert real_time.wanted.max() <= synchronous.wanted.max() / 3
    assert np.median(real_time.sent) <= np.median(synchronous.sent) / 3
    assert all(seams.refused == 0 for seams in found.values())
    assert real_time.held == 0


def test_between_two_recorded_answers_the_newest_one_counts_and_beyond_it_the_next():
    robot = load_embodiment("piper_single")
    start = robot.home()
    answers = tuple(
        RecordedAnswer(first, start + first + np.arange(3)[:, None] / 10) for first in (0, 2, 4)
    )
    policy = RecordedPolicy(ChunkStream(answers, 0.1, start, np.array([0.1])), robot)
    assert (policy.act(start, 1, None)[:, 0] - start[0]).tolist() == pytest.approx([0.1, 0.2, 2.1])
    assert (policy.act(start, 6, None)[:, 0] - start[0]).tolist() == pytest.approx([4.2, 4.2, 4.2])
    committed = (start + 0.05)[None].astype(np.float32)
    assert policy.act(start, 0, committed)[0] == pytest.approx(committed[0])


def test_a_recording_without_answers_or_of_another_robot_is_refused():
    recording = read_recording(STREAM, images=False)
    with pytest.raises(RecordError, match="has no answers"):
        read_stream(dataclasses.replace(recording, trajectories={}))
    with pytest.raises(RecordError, match="the stream has 14 values"):
        RecordedPolicy(read_stream(recording), load_embodiment("piper_single"))


@pytest.mark.parametrize("mode", [ExecutionMode.REAL_TIME, ExecutionMode.ENSEMBLING])
def test_answers_far_too_late_find_the_arms_holding_and_the_episode_goes_on(mode):
    latencies = np.random.default_rng(0).choice([0.05, 2.5], 500)
    seams = replay(
        MadeUpPolicy(ROBOT, dataclasses.replace(SETTING, actions=200)),
        ROBOT,
        Execution(mode),
        start=ROBOT.home(),
        actions=60,
        latencies_s=latencies,
    )
    assert seams.held > 0
    assert seams.refused > 0  # older than 2 s
