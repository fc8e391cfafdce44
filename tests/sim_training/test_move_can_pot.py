"""The task: placements, the success test, and what is told from contacts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_training.randomisation import PLACEMENT_KEY, generator
from sim_training.tasks import load_task, task_names
from sim_training.tasks.base import Placement
from sim_training.tasks.move_can_pot import CAN, POT, MoveCanPot, State, is_success
from sim_training.world import World
from simplevla.embodiment import load_embodiment
from simplevla.errors import ConfigError
from simplevla.kinematics.chain import arm_chain
from simplevla.trial import FailureCode, Strategy

EMBODIMENTS = {name: load_embodiment(name) for name in ("piper_dual", "piper_single")}
SEEDS = st.integers(0, 2**31 - 1)
DONE = State(side=1.0, dx_m=0.18, dy_m=0.0, tilt_rad=0.0, rise_m=0.0, openings=(1.0, 1.0))


def placed(seed: int, embodiment: str = "piper_dual") -> dict[str, Placement]:
    rng = generator(seed, PLACEMENT_KEY)
    return {p.name: p for p in MoveCanPot().place(rng, EMBODIMENTS[embodiment])}


@given(SEEDS)
def test_the_can_and_the_pot_stand_where_robotwin_puts_them(seed: int) -> None:
    things = placed(seed)
    x, y = things[CAN].xy_m
    assert 0.2 <= abs(x) <= 0.3
    assert 0.05 <= y <= 0.15
    assert np.hypot(x, y) >= 0.3
    assert abs(things[CAN].yaw_rad) <= 0.79
    assert things[POT].xy_m == (0.0, 0.0)
    assert abs(things[POT].yaw_rad) <= np.pi / 8


@given(SEEDS)
def test_one_arm_gets_the_can_on_its_own_side(seed: int) -> None:
    assert placed(seed, "piper_single")[CAN].xy_m[0] > 0


def test_both_sides_and_every_model_occur() -> None:
    scenes = [placed(seed) for seed in range(200)]
    assert {np.sign(s[CAN].xy_m[0]) for s in scenes} == {-1, 1}
    assert len({s[CAN].asset.name for s in scenes}) == 5
    assert len({s[POT].asset.name for s in scenes}) == 7


@given(SEEDS)
def test_a_seed_always_places_alike(seed: int) -> None:
    first, again = placed(seed), placed(seed)
    assert [(p.xy_m, p.yaw_rad, p.asset.name) for p in first.values()] == [
        (p.xy_m, p.yaw_rad, p.asset.name) for p in again.values()
    ]


def test_the_expert_end_state_is_success() -> None:
    assert is_success(DONE)
    assert is_success(replace(DONE, side=-1.0, dx_m=-0.18))


@pytest.mark.parametrize(
    "change",
    [
        {"dx_m": -0.18},
        {"dx_m": 0.2},
        {"dy_m": 0.036},
        {"dy_m": -0.036},
        {"tilt_rad": np.deg2rad(15.1)},
        {"rise_m": 0.0011},
        {"openings": (1.0, 0.8)},
        {"openings": (0.79, 1.0)},
    ],
)
def test_each_condition_alone_prevents_success(change: dict) -> None:
    assert not is_success(replace(DONE, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"dx_m": 0.199},
        {"dy_m": 0.034},
        {"tilt_rad": np.deg2rad(14.9)},
        {"rise_m": 0.001},
        {"rise_m": -0.01},
        {"openings": (0.81, 0.81)},
    ],
)
def test_success_reaches_to_the_edge_of_each_tolerance(change: dict) -> None:
    assert is_success(replace(DONE, **change))


def test_the_judge_sees_the_can_in_the_world(blind: World) -> None:
    blind.reset(1)
    start = blind.object_pose(CAN)
    assert not blind.success()
    assert blind.strategy() is Strategy.NONE
    assert blind.failure() is FailureCode.TIME_LIMIT

    goal = start.copy()
    goal[:2, 3] = 0.18 * np.sign(start[0, 3]), 0.0
    blind.set_object_pose(CAN, goal)
    assert blind.success()
    assert blind.failure() is FailureCode.NONE
    other_side = goal.copy()
    other_side[0, 3] *= -1
    blind.set_object_pose(CAN, other_side)
    assert not blind.success()

    lying = start.copy()
    lying[:3, :3] = [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]
    lying[2, 3] += 0.03
    blind.set_object_pose(CAN, lying)
    blind.step(50)
    assert blind.failure() is FailureCode.NOT_UPRIGHT
    gone = start.copy()
    gone[:3, 3] = 0.0, -0.8, 0.5
    blind.set_object_pose(CAN, gone)
    blind.step(50)
    assert blind.failure() is FailureCode.DROPPED


class CanBesideTheGoal(MoveCanPot):
    """The same task with the can a short push away from success."""

    def place(self, rng, embodiment, **wanted):
        pot, can = super().place(rng, embodiment, **wanted)
        return pot, replace(can, xy_m=(0.23, 0.0))


def test_success_by_shoving_is_a_push() -> None:
    embodiment = EMBODIMENTS["piper_single"]
    (arm, _), *_ = embodiment.slices()
    chain = arm_chain(arm)
    limits = np.array([(j.lower_rad, j.upper_rad) for j in arm.joints]).T
    home = chain.forward(arm.home_rad)
    with World(embodiment, CanBesideTheGoal(), render=False) as world:
        world.reset(3)
        joints = np.array(arm.home_rad)
        for start, end in (
            ((0.36, -0.1, 0.90), (0.36, 0.0, 0.90)),
            ((0.36, 0.0, 0.90), (0.36, 0.0, 0.785)),
            ((0.36, 0.0, 0.785), (0.25, 0.0, 0.785)),
            ((0.25, 0.0, 0.785), (0.30, 0.0, 0.785)),
        ):
            for point in np.linspace(start, end, 250):
                pose = home.copy()
                right, away, up = point - arm.base.xyz_m
                pose[:3, 3] = away, -right, up
                joints = chain.inverse_nearest(pose, joints, *limits)
                world.set_targets([*joints, 0.07])
                world.step()
                if world.success():
                    break
        assert world.success()
        assert world.strategy() is Strategy.PUSH


def test_an_unknown_task_is_named_with_those_that_exist() -> None:
    assert "move_can_pot" in task_names()
    with pytest.raises(ConfigError, match="move_can_pot"):
        load_task("make_coffee")
