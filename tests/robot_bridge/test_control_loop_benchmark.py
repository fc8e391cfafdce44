"""The benchmark of the control loop: the robot it makes up, and the policy that sways it."""

from __future__ import annotations

import numpy as np

from benchmarks.control_loop import sway_policy, time_executor, write_rig
from policy_server.served_policy import example_observation
from robot_bridge.rig import load_rig
from simplevla.motion import MotionLimits


def test_its_rig_has_as_many_cameras_as_asked_for_and_ports_of_its_own(tmp_path):
    rig = load_rig(str(write_rig(tmp_path, 3)))
    robot = rig.load_embodiment()
    assert [camera.name for camera in robot.cameras] == ["head", "side1", "side2"]
    assert set(rig.cameras) == {"head", "side1", "side2"}
    assert rig.twin is not None
    assert rig.twin.control != load_rig("twin").twin.control


def test_its_policy_sways_within_the_limits_and_from_chunk_to_chunk():
    robot = load_rig("twin").load_embodiment()
    policy = sway_policy(robot)
    observation = example_observation(policy.manifest)
    chunk, _ = policy.answer(observation)
    limits = MotionLimits.of(robot)
    assert (chunk.actions >= limits.lower - 1e-6).all()  # float32
    assert (chunk.actions <= limits.upper + 1e-6).all()
    assert (np.abs(np.diff(chunk.actions, axis=0)) / chunk.dt_s <= limits.velocity).all()
    assert np.ptp(chunk.actions, axis=0).max() > 0.1


def test_the_executor_is_timed_on_chunks_that_it_takes():
    per_chunk_ms, per_turn_ms = time_executor(load_rig("twin").load_embodiment(), rounds=5)
    assert per_chunk_ms > per_turn_ms > 0
