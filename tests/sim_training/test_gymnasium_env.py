"""The tasks as Gymnasium environments."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from sim_training.expert import Expert
from sim_training.gymnasium_env import TaskEnv, register
from sim_training.tasks import load_task, task_names
from simplevla.errors import ChunkError, ConfigError


def make(task: str, **options: object) -> gymnasium.Env:
    return gymnasium.make(f"sim_training.gymnasium_env:simplevla/{task}-v0", **options)


def test_every_task_is_known_and_registering_again_changes_nothing() -> None:
    register()
    for task in task_names():
        assert gymnasium.spec(f"simplevla/{task}-v0").kwargs == {"task": task}


def test_gymnasium_checks_it() -> None:
    env = make("click_bell", embodiment="piper_single", chunk_length=5, render_mode="rgb_array").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(Casting input|not within the recommended range).*")
        check_env(env, skip_close_check=True)
    env.close()


def test_the_expert_earns_the_reward_and_the_info_tells_how() -> None:
    env = make("move_can_pot", embodiment="piper_single", chunk_length=5, cameras=())
    observation, info = env.reset(options={"episode": 10_003})
    assert info["episode"] == 10_003
    assert observation["instruction"] == load_task("move_can_pot").instruction
    assert observation in env.observation_space
    world = env.unwrapped._world
    expert = Expert(world, world.task)
    rewards, ended, cut = [], False, False
    while not (ended or cut):
        observation, reward, ended, cut, info = env.step(expert.plan(5).astype(np.float32))
        rewards.append(reward)
    assert (ended, cut) == (True, False)
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
    assert (info["success"], info["strategy"], info["failure"]) == (True, "grasp", "none")
    env.close()


def test_an_episode_is_cut_at_the_tasks_limit() -> None:
    env = make("click_bell", embodiment="piper_single", chunk_length=120, cameras=())
    observation, _ = env.reset(seed=1)
    hold = np.tile(observation["state"], (120, 1))
    assert env.step(hold)[1:4] == (0.0, False, False)
    _, reward, ended, cut, info = env.step(hold)
    assert (reward, ended, cut, info["actions"]) == (0.0, False, True, 200)
    env.close()


def test_seeds_of_training_and_evaluation_are_apart() -> None:
    for evaluation in (False, True):
        env = TaskEnv("click_bell", embodiment="piper_single", cameras=(), evaluation=evaluation)
        episodes = [env.reset(seed=3 if first else None)[1]["episode"] for first in (True, False, False)]
        again = env.reset(seed=3)[1]["episode"]
        env.close()
        assert again == episodes[0]
        assert len(set(episodes)) == 3
        assert all((episode >= 10_000) == evaluation for episode in episodes)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        TaskEnv(chunk_length=0)
    with pytest.raises(ConfigError, match="without cameras"):
        TaskEnv(cameras=(), render_mode="rgb_array")
    with pytest.raises(ConfigError, match="unseen_goal"):
        TaskEnv(scenes="new")
    env = TaskEnv("click_bell", embodiment="piper_single", cameras=())
    env.reset(seed=1)
    with pytest.raises(ChunkError):
        env.step(np.full(7, np.nan, np.float32))
    env.close()
