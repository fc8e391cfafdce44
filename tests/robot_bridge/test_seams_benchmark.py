"""The offline comparison of modes of execution: what it measures, and what real-time chunking gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.seams import DelayEstimate, Setting, seam_steps, simulate
from simplevla.embodiment import load_embodiment

ROBOT = load_embodiment("piper_single")
JOINTS = np.arange(7) < 6
SETTING = Setting(actions=60, chunk=10, dt_s=0.1, latency_s=(0.1, 0.3), drift_rad=0.02, seed=1)


def largest(run) -> float:
    return seam_steps(run.wanted, run.seams_s, SETTING.dt_s, JOINTS).max()


def test_a_jump_of_the_acceleration_is_found_only_at_its_seam():
    times = np.arange(1, 801) * 0.005
    speed = np.where(times < 2.0, 0.0, 0.3)  # stands, then moves at once
    positions = list(np.outer(np.cumsum(speed) * 0.005, np.ones(7)))
    assert seam_steps(positions, [2.0], 0.1, JOINTS)[0] == pytest.approx(3.0, rel=0.05)
    assert seam_steps(positions, [3.0], 0.1, JOINTS)[0] == pytest.approx(0.0, abs=1e-6)


def test_real_time_chunking_lowers_the_largest_step_at_seams_to_a_third():
    synchronous, real_time = (simulate(mode, ROBOT, SETTING) for mode in ("synchronous", "real-time"))
    assert largest(real_time) <= largest(synchronous) / 3
    assert real_time.late == real_time.refused == 0
    assert len(real_time.wanted) < len(synchronous.wanted)  # nor does it stand and wait


def test_an_answer_later_than_all_that_was_committed_is_refused_and_the_arms_go_on():
    slow = dataclasses.replace(SETTING, latency_s=(0.05, 3.0))
    run = simulate("real-time", ROBOT, slow)
    assert run.late + run.refused > 0
    speed = np.abs(np.diff(run.sent, axis=0)) / 0.005
    assert (speed <= ROBOT.velocity_limits() + 1e-9).all()


def test_the_delay_is_estimated_high_and_a_spike_is_forgotten():
    delays = DelayEstimate(0.1)
    for _ in range(20):
        delays.add(0.12)
    assert delays.actions(0.1) == 2
    delays.add(5.0)
    for _ in range(20):
        delays.add(0.08)
    assert delays.actions(0.1) == 1
