"""The scripted expert: it succeeds, recovers and keeps to the robot's limits."""

import numpy as np
import pytest

from sim_training.demonstrations import DT_S
from sim_training.episode import play
from sim_training.expert import Expert
from sim_training.tasks import load_task
from sim_training.tasks.move_can_pot import CAN
from sim_training.world import World
from simplevla.embodiment import Embodiment
from simplevla.errors import ChunkError
from simplevla.trial import Strategy


def attempt(world: World, sigma_rad: float = 0.0, seed: int = 0) -> tuple[bool, int]:
    """Let the expert try the episode that ``world`` was reset to, with noise on what is executed."""
    rng, expert = np.random.default_rng(seed), Expert(world, world.task)
    done, success = 0, False
    while done < world.task.step_limit and not success:
        plan = expert.plan(5)
        noise = np.outer(np.arange(1, 6) / 5, rng.normal(0, sigma_rad, plan.shape[1]))
        noise[:, [i for i, name in enumerate(world.embodiment.names()) if "gripper" in name]] = 0
        played = play(world, plan + noise, DT_S)
        done, success = done + played.actions, played.success
    return success, done


@pytest.mark.parametrize("seed", range(6))
def test_the_expert_grasps_and_places(blind: World, seed: int) -> None:
    blind.reset(seed)
    success, actions = attempt(blind)
    assert success
    assert actions < 80
    assert blind.strategy() is Strategy.GRASP


def test_the_expert_comes_back_from_perturbations(blind: World) -> None:
    outcomes = []
    for seed in range(8):
        blind.reset(seed)
        outcomes.append(attempt(blind, sigma_rad=0.012, seed=seed)[0])
    assert sum(outcomes) >= 7


def test_the_expert_starts_from_anywhere(blind: World, dual: Embodiment) -> None:
    rng = np.random.default_rng(0)
    for seed in range(3):
        start = dual.home() + rng.normal(0, 0.1, dual.dimension)
        start[[6, 13]] = 0.03
        blind.reset(seed, positions=np.clip(start, *dual.position_limits()))
        assert attempt(blind)[0]


def test_a_can_that_slipped_is_grasped_again(blind: World) -> None:
    blind.reset(1)
    start = blind.object_pose(CAN)
    expert = Expert(blind, blind.task)
    while blind.object_pose(CAN)[2, 3] < start[2, 3] + 0.02:
        play(blind, expert.plan(5), DT_S)
    blind.set_object_pose(CAN, start)
    assert attempt(blind)[0]


def test_one_arm_does_it_too(single: Embodiment) -> None:
    with World(single, load_task("move_can_pot"), render=False) as world:
        for seed in (0, 1):
            world.reset(seed)
            assert attempt(world)[0]


def test_the_idle_arm_is_sent_home(blind: World, dual: Embodiment) -> None:
    blind.reset(0)
    plan = Expert(blind, blind.task).plan(7)
    assert plan.shape == (7, 14)
    idle = slice(7, 14) if blind.object_pose(CAN)[0, 3] < 0 else slice(0, 7)
    assert (plan[:, idle] == dual.home()[idle]).all()


def test_the_expert_stays_within_the_robots_limits(blind: World, dual: Embodiment) -> None:
    lower, upper = dual.position_limits()
    joints = [i for i in range(dual.dimension) if i not in (6, 13)]
    for seed in range(3):
        blind.reset(seed)
        expert, last, success = Expert(blind, blind.task), blind.targets(), False
        while not success:
            plan = expert.plan(5)
            assert ((plan >= lower) & (plan <= upper)).all()
            speed = np.abs(np.diff(np.vstack([last, plan]), axis=0)) / DT_S
            assert (speed[:, joints] < 0.7 * dual.velocity_limits()[joints]).all()
            success, last = play(blind, plan, DT_S).success, plan[-1]


def test_a_slow_target_is_followed_in_a_straight_line_and_the_arms_come_to_rest(
    blind: World, dual: Embodiment
) -> None:
    blind.reset(0)
    goal = dual.home()
    goal[0] += 0.02
    played = play(blind, [goal], 0.1)
    assert played == (1, False)
    assert 0.1 < blind.time_s < 0.3
    assert blind.targets() == pytest.approx(goal)


def test_a_far_target_is_not_reached_faster_than_the_limits_allow(blind: World, dual: Embodiment) -> None:
    blind.reset(0)
    before = dual.home()
    goal = before.copy()
    goal[[0, 6]] = [before[0] + 1.0, 0.0]
    play(blind, [goal], 0.1)
    moved, t = np.abs(blind.targets() - before), blind.time_s
    farthest = np.minimum(dual.velocity_limits() * t, dual.acceleration_limits() * t**2 / 2)
    assert (moved <= 1.02 * farthest).all()
    assert (moved[[0, 6]] > 0).all()
    play(blind, [goal] * 10, 0.1)
    assert blind.targets() == pytest.approx(goal, abs=1e-4)


@pytest.mark.parametrize("actions", [np.zeros((5, 13)), np.zeros(14), np.full((1, 14), np.nan)])
def test_actions_of_another_form_are_refused(blind: World, actions: np.ndarray) -> None:
    blind.reset(0)
    with pytest.raises(ChunkError):
        play(blind, actions, 0.1)
