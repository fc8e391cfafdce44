"""Chunks played offline: what the seam figures measure, and what each mode gives on a recorded stream."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.seams import MadeUpPolicy, Setting, compare
from robot_bridge.execution_modes import Execution, ExecutionMode
from robot_bridge.replay import replay, seam_steps
from simplevla.embodiment import load_embodiment

ROBOT = load_embodiment("piper_single")
JOINTS = np.arange(7) < 6
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
