"""Actions to joint targets and back, in every space, for one and two arms."""

from __future__ import annotations

from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from simplevla.bundle import ActionSpaceName
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.errors import EmbodimentError
from simplevla.kinematics import arm_chain, from_joint_targets, to_joint_targets, tool_poses

SPACES = get_args(ActionSpaceName)
EMBODIMENTS = {name: load_embodiment(name) for name in ("piper_single", "piper_dual")}
K = 5

spaces = st.sampled_from(SPACES)
robots = st.sampled_from(sorted(EMBODIMENTS)).map(EMBODIMENTS.__getitem__)
seeds = st.integers(0, 2**32 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)


def plan(embodiment: Embodiment, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a state (D,) well inside the limits and K targets (K, D) that wander from it."""
    rng = np.random.default_rng(seed)
    lower, upper = embodiment.position_limits()
    middle = lower + rng.uniform(0.25, 0.75, len(lower)) * (upper - lower)
    steps = rng.uniform(-0.01, 0.01, (K, len(lower))) * (upper - lower)
    return middle, middle + np.cumsum(steps, axis=0)


@given(spaces, robots, seeds)
@settings(deadline=None, max_examples=60)
def test_targets_survive_the_way_to_actions_and_back(space, embodiment, seed):
    state, targets = plan(embodiment, seed)
    actions = from_joint_targets(space, targets, state, embodiment)
    assert actions.shape == targets.shape
    assert actions.dtype == np.float64
    again = to_joint_targets(space, actions, state, embodiment)
    assert again.shape == targets.shape
    assert again.dtype == np.float32
    if space == "ee_delta":  # other joints may hold the same pose where the wrist is straight
        for wanted, got in zip(targets, again, strict=True):
            want, have = tool_poses(wanted, embodiment), tool_poses(got, embodiment)
            for arm in want:
                np.testing.assert_allclose(have[arm], want[arm], atol=2e-4)
    else:
        np.testing.assert_allclose(again, targets, atol=1e-6)


@given(spaces, robots, seeds)
@settings(deadline=None, max_examples=60)
def test_actions_survive_the_way_to_targets_and_back(space, embodiment, seed):
    state, targets = plan(embodiment, seed)
    actions = from_joint_targets(space, targets, state, embodiment)
    again = from_joint_targets(
        space, to_joint_targets(space, actions, state, embodiment), state, embodiment
    )
    np.testing.assert_allclose(again, actions, atol=2e-4)


@given(robots, seeds)
@settings(deadline=None, max_examples=30)
def test_no_change_keeps_the_pose_and_the_gripper_is_absolute(embodiment, seed):
    state, _ = plan(embodiment, seed)
    grippers = [part.stop - 1 for _, part in embodiment.slices()]
    for space in ("joint_delta", "ee_delta"):
        actions = np.zeros((K, embodiment.dimension))
        actions[:, grippers] = 0.03
        targets = to_joint_targets(space, actions, state, embodiment)
        assert targets[:, grippers] == pytest.approx(0.03)
        expected = state.copy()
        expected[grippers] = 0.03
        np.testing.assert_allclose(targets, np.tile(expected, (K, 1)), atol=1e-6)


@pytest.mark.parametrize("name", sorted(EMBODIMENTS))
def test_ee_deltas_add_up_in_the_base_frame(name):
    embodiment = EMBODIMENTS[name]
    home = embodiment.home()
    step_m, turn = np.array([0.01, -0.005, 0.002]), np.array([0.0, 0.0, 0.02])
    actions = np.tile(home, (K, 1))
    for _, part in embodiment.slices():
        actions[:, part.start : part.start + 6] = np.concatenate([step_m, turn])
    targets = to_joint_targets("ee_delta", actions, home, embodiment)
    before = tool_poses(home, embodiment)
    for i, target in enumerate(targets, start=1):
        for arm, pose in tool_poses(target, embodiment).items():
            np.testing.assert_allclose(pose[:3, 3], before[arm][:3, 3] + i * step_m, atol=1e-5)
            turned = Rotation.from_rotvec(i * turn).as_matrix() @ before[arm][:3, :3]
            np.testing.assert_allclose(pose[:3, :3], turned, atol=1e-5)


def test_each_arm_follows_its_own_actions():
    embodiment = EMBODIMENTS["piper_dual"]
    home = embodiment.home()
    actions = np.tile(home, (K, 1))
    actions[:, :6] = actions[:, 7:13] = 0.0
    actions[:, 7] = 0.01
    targets = to_joint_targets("ee_delta", actions, home, embodiment)
    np.testing.assert_allclose(targets[:, :7], np.tile(home[:7], (K, 1)), atol=1e-6)
    assert tool_poses(targets[-1], embodiment)["right"][0, 3] == pytest.approx(
        tool_poses(home, embodiment)["right"][0, 3] + K * 0.01, abs=1e-5
    )


@given(spaces, robots, seeds, st.lists(finite, min_size=7 * 3, max_size=7 * 3))
@settings(deadline=None, max_examples=80)
def test_any_finite_action_gives_finite_targets_within_the_limits(space, embodiment, seed, values):
    rows = np.tile(np.array(values).reshape(3, 7), (1, len(embodiment.arms)))
    rng = np.random.default_rng(seed)
    lower, upper = embodiment.position_limits()
    state = lower + rng.uniform(-0.1, 1.1, len(lower)) * (upper - lower)  # a little outside, too
    targets = to_joint_targets(space, rows, state, embodiment)
    assert np.isfinite(targets).all()
    assert (targets.astype(np.float64) >= lower).all()
    assert (targets.astype(np.float64) <= upper).all()


def test_out_of_reach_does_not_wind_up():
    """After ten steps into the void, one step back moves the arm back at once."""
    embodiment = EMBODIMENTS["piper_single"]
    home = embodiment.home()
    away, back = np.tile(home, (30, 1)), home.copy()
    away[:, :6], back[:6] = [0.05, 0, 0, 0, 0, 0], [-0.05, 0, 0, 0, 0, 0]
    targets = to_joint_targets("ee_delta", np.vstack([away, back]), home, embodiment)
    forward_m = [tool_poses(target, embodiment)["right"][0, 3] for target in targets]
    assert forward_m[-2] < 0.8
    assert forward_m[-2] - forward_m[-1] == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("convert", [to_joint_targets, from_joint_targets])
def test_what_does_not_fit_is_named(convert):
    embodiment = EMBODIMENTS["piper_dual"]
    home = embodiment.home()
    chunk = np.tile(home, (K, 1))
    with pytest.raises(EmbodimentError, match=r"shape \(5, 7\), not \(K, 14\)"):
        convert("ee_delta", chunk[:, :7], home, embodiment)
    with pytest.raises(EmbodimentError, match=r"state has shape \(7,\), not \(14,\)"):
        convert("ee_delta", chunk, home[:7], embodiment)
    with pytest.raises(EmbodimentError, match="not finite"):
        convert("joint_delta", chunk * np.nan, home, embodiment)
    with pytest.raises(EmbodimentError, match=r"unknown action space 'velocity' -> .*ee_delta"):
        convert("velocity", chunk, home, embodiment)


def test_ee_delta_needs_six_joints():
    full = EMBODIMENTS["piper_single"]
    short = msgspec.structs.replace(
        full.arms[0], joints=full.arms[0].joints[:5], home_rad=full.arms[0].home_rad[:5]
    )
    embodiment = msgspec.structs.replace(full, arms=(short,))
    with pytest.raises(EmbodimentError, match="six joints"):
        to_joint_targets("ee_delta", np.zeros((1, 6)), np.zeros(6), embodiment)


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_a_chunk_is_followed_pose_by_pose(seed):
    """A chunk gives what asking for each tool pose in turn, from the target before, gives."""
    embodiment = EMBODIMENTS["piper_single"]
    arm = embodiment.arms[0]
    chain = arm_chain(arm)
    lower, upper = (limits[:6] for limits in embodiment.position_limits())
    rng = np.random.default_rng(seed)
    q, _ = plan(embodiment, seed)
    actions = np.tile(q, (K, 1))
    actions[:, :6] = rng.uniform(-1, 1, (K, 6)) * ([0.03] * 3 + [0.1] * 3)
    targets = to_joint_targets("ee_delta", actions, q, embodiment)
    before = q[:6]
    for target, action in zip(targets, actions, strict=True):
        pose = chain.forward(before)
        pose[:3, 3] += action[:3]
        pose[:3, :3] = Rotation.from_rotvec(action[3:6]).as_matrix() @ pose[:3, :3]
        before = chain.inverse_nearest(pose, before, lower, upper)
        np.testing.assert_allclose(target[:6], before, atol=1e-5)
