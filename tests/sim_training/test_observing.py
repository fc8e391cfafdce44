"""Observations recorded in simulation are what the policy saw, and can be read back as the server does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sim_training.observing import record_observations, save_observations
from simplevla.action_chunk import ActionChunk
from simplevla.embodiment import load_embodiment
from simplevla.observation import Observation, check_observation


class Still:
    """A policy that holds what it sees, and remembers it."""

    id = "still"
    embodiment = load_embodiment("piper_dual")
    cameras = ("head",)

    def __init__(self) -> None:
        self.states: list[np.ndarray] = []

    def act(self, observation: Observation) -> ActionChunk:
        self.states.append(observation.state)
        return ActionChunk(np.tile(observation.state, (20, 1)), 0.1, observation.capture_ns, self.id)


def test_what_the_policy_saw_is_written_whole_and_without_objects(tmp_path: Path) -> None:
    pytest.importorskip("sapien")
    policy = Still()
    observations = record_observations(policy, "move_can_pot", count=3, seed=5)
    assert len(observations) == 3
    for observation, state in zip(observations, policy.states, strict=False):
        check_observation(observation, policy.embodiment, policy.cameras)
        np.testing.assert_array_equal(observation.state, state)
    path = tmp_path / "recorded.npz"
    save_observations(path, observations)
    with np.load(path, allow_pickle=False) as data:
        assert set(data.files) == {"state", "instruction", "image/head"}
        assert data["image/head"].shape == (3, 240, 320, 3)
        assert data["image/head"].dtype == np.uint8
        np.testing.assert_array_equal(data["image/head"][1], observations[1].images["head"])
        assert [str(text) for text in data["instruction"]] == [o.instruction for o in observations]
