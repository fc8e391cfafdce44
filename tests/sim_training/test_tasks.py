"""What holds for every task: placements, parts of scenes, the expert, and the table of tasks."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim_training.assets import small_things
from sim_training.demonstrations import DT_S
from sim_training.episode import play
from sim_training.expert import Expert
from sim_training.randomisation import PLACEMENT_KEY, generator
from sim_training.splits import Scenes, Split, draw_scene
from sim_training.tasks import (
    click_bell,
    load_task,
    move_playingcard_away,
    place_a2b,
    place_empty_cup,
    task_names,
)
from sim_training.tasks.base import Placement
from sim_training.world import Touch, World
from simplevla.embodiment import load_embodiment
from simplevla.errors import ConfigError
from simplevla.kinematics.chain import arm_chain
from simplevla.trial import FailureCode, Strategy

EMBODIMENTS = {name: load_embodiment(name) for name in ("piper_dual", "piper_single")}
SEEDS = st.integers(0, 2**31 - 1)


def placed(
    task: str, seed: int, embodiment: str = "piper_dual", scenes: Scenes = Scenes.ALL
) -> dict[str, Placement]:
    drawn = draw_scene(load_task(task), generator(seed, PLACEMENT_KEY), EMBODIMENTS[embodiment], scenes)
    return {placement.name: placement for placement in drawn}


def distance(first: Placement, second: Placement) -> float:
    return float(np.hypot(*np.subtract(first.xy_m, second.xy_m)))


def test_there_are_the_tasks_that_the_paper_transfers_and_those_with_pushcuts() -> None:
    assert task_names() == [
        "click_bell",
        "move_can_pot",
        "move_playingcard_away",
        "place_a2b_left",
        "place_a2b_right",
        "place_empty_cup",
    ]
    for name in task_names():
        assert load_task(name).name == name
    with pytest.raises(ConfigError, match="click_bell"):
        load_task("make_coffee")


@given(SEEDS, st.sampled_from(["place_a2b_left", "place_a2b_right"]))
def test_a_and_b_stand_where_robotwin_puts_them(seed: int, task: str) -> None:
    side = -1 if task.endswith("left") else 1
    things = placed(task, seed)
    a, b = things["a"], things["b"]
    assert abs(a.xy_m[0]) <= 0.22
    for thing in (a, b):
        assert -0.2 <= thing.xy_m[1] <= 0
    if a.xy_m[0] * side > 0:
        assert abs(b.xy_m[0]) <= 0.1
    else:
        assert 0.18 <= -side * b.xy_m[0] <= 0.23
    assert abs(a.xy_m[1] - b.xy_m[1]) >= 0.1
    assert distance(a, b) > 0.19 or (a.xy_m[0] - b.xy_m[0]) * side < 0
    assert a.asset.name != b.asset.name.removesuffix("_black")


@given(SEEDS)
def test_the_bell_stands_fast_where_robotwin_puts_it(seed: int) -> None:
    bell = placed("click_bell", seed)["bell"]
    assert 0.05 <= abs(bell.xy_m[0]) <= 0.25
    assert -0.2 <= bell.xy_m[1] <= 0
    assert bell.fixed


@given(SEEDS)
def test_the_cup_and_the_coaster_stand_where_robotwin_puts_them(seed: int) -> None:
    things = placed("place_empty_cup", seed)
    cup, coaster = things["cup"], things["coaster"]
    side = np.sign(cup.xy_m[0])
    assert 0.15 <= side * cup.xy_m[0] <= 0.3
    assert -0.05 <= side * coaster.xy_m[0] <= 0.1
    for thing in (cup, coaster):
        assert -0.2 <= thing.xy_m[1] <= 0.05
    assert distance(cup, coaster) >= 0.1
    assert coaster.fixed
    assert not cup.fixed


@given(SEEDS)
def test_the_pack_stands_where_robotwin_puts_it(seed: int) -> None:
    pack = placed("move_playingcard_away", seed)["pack"]
    assert 0.05 <= abs(pack.xy_m[0]) <= 0.1
    assert -0.2 <= pack.xy_m[1] <= 0.05
    assert not pack.fixed


@pytest.mark.parametrize("task", task_names())
def test_both_sides_and_every_model_occur_and_one_arm_gets_its_own_side(task: str) -> None:
    first, *_ = placed(task, 0)
    moved = "can" if task == "move_can_pot" else first
    scenes = [placed(task, seed) for seed in range(150)]
    assert {np.sign(scene[moved].xy_m[0]) for scene in scenes} == {-1, 1}
    counts = {"click_bell": 2, "move_can_pot": 5, "move_playingcard_away": 3, "place_empty_cup": 1}
    assert len({scene[moved].asset.name for scene in scenes}) == counts.get(task, 12)
    assert all(placed(task, seed, "piper_single")[moved].xy_m[0] > 0 for seed in range(20))


@settings(max_examples=40)
@given(SEEDS, st.sampled_from(task_names()), st.sampled_from(sorted(EMBODIMENTS)))
def test_each_part_of_the_scenes_holds_out_what_it_says(seed: int, name: str, embodiment: str) -> None:
    task = load_task(name)
    for scenes in (Scenes.SEEN, *(Scenes.unseen(split) for split in task.splits)):
        drawn = draw_scene(task, generator(seed, PLACEMENT_KEY), EMBODIMENTS[embodiment], scenes)
        traits = task.traits(drawn)
        assert traits.held_out == (set() if scenes is Scenes.SEEN else {scenes.held_out})
        seen_region = traits.region in ("left far", "right near")
        assert seen_region == (scenes is not Scenes.UNSEEN_SPATIAL)


def test_what_a_task_does_not_hold_out_is_refused() -> None:
    for task, scenes in (("click_bell", Scenes.UNSEEN_GOAL), ("place_empty_cup", Scenes.UNSEEN_OBJECT)):
        with pytest.raises(ConfigError, match="spatial"):
            placed(task, 0, scenes=scenes)
    assert Scenes.ALL.held_out is None
    assert Scenes.unseen(Split.GOAL) is Scenes.UNSEEN_GOAL


def test_seen_models_and_goals_are_those_that_are_not_held_out() -> None:
    seen = [placed("move_can_pot", seed, scenes=Scenes.SEEN) for seed in range(60)]
    assert {scene["can"].asset.name for scene in seen} == {"can_tomato", "can_pesto", "can_mustard"}
    assert {scene["pot"].xy_m for scene in seen} == {(0.0, 0.0)}
    moved = [placed("move_can_pot", seed, scenes=Scenes.UNSEEN_GOAL)["pot"].xy_m for seed in range(20)]
    assert all(-0.05 <= y <= -0.03 and abs(x) <= 0.03 for x, y in moved)
    kinds = [placed("place_a2b_left", seed, scenes=Scenes.UNSEEN_OBJECT) for seed in range(20)]
    for scene in kinds:
        assert {p.asset.name.removesuffix("_black") for p in scene.values()} & {"house", "candle", "barrel"}


A2B_DONE = place_a2b.State(dx_m=-0.13, dy_m=0.0, tilt_rad=0.0, rise_m=0.0, openings=(1.0, 1.0))


@pytest.mark.parametrize(
    ("change", "success"),
    [
        ({}, True),
        ({"dx_m": 0.13}, False),
        ({"dx_m": -0.081}, True),
        ({"dx_m": -0.079}, False),
        ({"dx_m": -0.201}, False),
        ({"dy_m": 0.049}, True),
        ({"dy_m": -0.051}, False),
        ({"tilt_rad": np.deg2rad(16)}, False),
        ({"rise_m": 0.003}, False),
        ({"openings": (0.8, 1.0)}, False),
    ],
)
def test_a_beside_b(change: dict, success: bool) -> None:
    state = replace(A2B_DONE, **change)
    assert place_a2b.is_success(state, -1.0) == success
    assert place_a2b.is_success(replace(state, dx_m=-state.dx_m), 1.0) == success


CUP_DONE = place_empty_cup.State(distance_m=0.0, gap_m=0.0, tilt_rad=0.0, openings=(1.0,))


@pytest.mark.parametrize(
    ("change", "success"),
    [
        ({"distance_m": 0.034}, True),
        ({"distance_m": 0.036}, False),
        ({"gap_m": 0.004}, False),
        ({"gap_m": -0.004}, False),
        ({"tilt_rad": np.deg2rad(16)}, False),
        ({"openings": (0.79,)}, False),
    ],
)
def test_the_cup_on_the_coaster(change: dict, success: bool) -> None:
    assert place_empty_cup.is_success(replace(CUP_DONE, **change)) == success


PACK_DONE = move_playingcard_away.State(away_m=0.25, rise_m=0.0, tilt_rad=0.0, openings=(1.0, 1.0))


@pytest.mark.parametrize(
    ("change", "success"),
    [
        ({}, True),
        ({"away_m": 0.231}, True),
        ({"away_m": 0.229}, False),
        ({"away_m": -0.25}, False),
        ({"rise_m": 0.004}, False),
        ({"rise_m": -0.2}, False),
        ({"tilt_rad": np.deg2rad(16)}, False),
        ({"openings": (1.0, 0.79)}, False),
    ],
)
def test_the_pack_away_from_the_middle(change: dict, success: bool) -> None:
    assert move_playingcard_away.is_success(replace(PACK_DONE, **change)) == success


@pytest.mark.parametrize(
    ("link", "impulse", "point", "click"),
    [
        ("right/finger1", (0.0, 0.0, -0.01), (0.1, -0.1, 0.79), True),
        ("right/finger2", (0.005, 0.0, -0.01), (0.12, -0.1, 0.77), True),
        ("right/finger1", (0.02, 0.0, -0.01), (0.1, -0.1, 0.79), False),
        ("right/finger1", (0.0, 0.0, 0.01), (0.1, -0.1, 0.79), False),
        ("right/finger1", (0.0, 0.0, -0.01), (0.126, -0.1, 0.79), False),
        ("right/finger1", (0.0, 0.0, -0.01), (0.1, -0.1, 0.755), False),
        ("left/finger1", (0.0, 0.0, -0.01), (0.1, -0.1, 0.79), False),
    ],
)
def test_a_click_comes_from_above_by_the_arm_of_that_side(
    link: str, impulse: tuple, point: tuple, click: bool
) -> None:
    touch = Touch(link, np.array(impulse), np.array(point))
    assert click_bell.is_click(touch, (0.1, -0.1, 0.79), "right") == click


def attempt(world: World) -> tuple[bool, int]:
    expert, done, success = Expert(world, world.task), 0, False
    while done < world.task.step_limit and not success:
        played = play(world, expert.plan(5), DT_S)
        done, success = done + played.actions, played.success
    return success, done


@pytest.mark.parametrize(
    ("task", "strategy"),
    [
        ("move_playingcard_away", Strategy.GRASP),
        ("place_a2b_left", Strategy.GRASP),
        ("place_a2b_right", Strategy.GRASP),
        ("place_empty_cup", Strategy.GRASP),
        ("click_bell", Strategy.TOUCH),
    ],
)
@pytest.mark.parametrize("embodiment", sorted(EMBODIMENTS))
def test_the_expert_does_it_as_it_should_be_done(task: str, strategy: Strategy, embodiment: str) -> None:
    with World(EMBODIMENTS[embodiment], load_task(task), render=False) as world:
        world.reset(1)
        assert not world.success()
        assert world.failure() is FailureCode.TIME_LIMIT
        assert world.strategy() is Strategy.NONE
        success, actions = attempt(world)
        assert success
        assert actions < 90
        assert world.strategy() is strategy
        assert world.failure() is FailureCode.NONE


def test_the_gripper_has_to_be_closed_to_click() -> None:
    with World(EMBODIMENTS["piper_single"], load_task("click_bell"), render=False) as world:
        world.reset(1)
        expert = Expert(world, world.task)
        for _ in range(10):
            plan = expert.plan(5)
            plan[:, -1] = 0.07
            if play(world, plan, DT_S).success:
                pytest.fail("clicked with an open gripper")


def test_a_thing_that_is_moved_to_its_goal_by_hand_counts_and_one_that_lies_does_not() -> None:
    with World(EMBODIMENTS["piper_dual"], load_task("place_a2b_left"), render=False) as world:
        world.reset(2)
        a, b = world.object_pose("a"), world.object_pose("b")
        a[:2, 3] = b[0, 3] - 0.13, b[1, 3]
        world.set_object_pose("a", a)
        assert world.success()
        lying = b.copy()
        lying[:3, :3] = [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]
        world.set_object_pose("b", lying)
        assert not world.success()
        gone = a.copy()
        gone[2, 3] = 0.3
        world.set_object_pose("a", gone)
        assert world.failure() is FailureCode.DROPPED


class OneShoveAway(place_a2b.PlaceA2BLeft):
    """The same task with A a short shove away from success."""

    def place(self, rng, embodiment, *, new_goal=False):
        a, b = super().place(rng, embodiment, new_goal=new_goal)
        return replace(a, asset=small_things()[6], xy_m=(0.17, -0.05)), replace(b, xy_m=(0.40, -0.05))


def shove(world: World, *corners: tuple[float, float, float]) -> None:
    """Lead the open gripper of the one arm along straight lines; the tool points as at home."""
    arm = world.embodiment.arms[0]
    chain = arm_chain(arm)
    limits = np.array([(j.lower_rad, j.upper_rad) for j in arm.joints]).T
    pose, joints = chain.forward(arm.home_rad), np.array(arm.home_rad)
    for start, end in pairwise(np.array(corners)):
        for point in np.linspace(start, end, 150):
            right, away, up = point - arm.base.xyz_m
            pose[:3, 3] = away, -right, up
            joints = chain.inverse_nearest(pose, joints, *limits)
            world.set_targets([*joints, 0.07])
            world.step()
            if world.success():
                return


def test_a_shove_can_place_a_beside_b() -> None:
    with World(EMBODIMENTS["piper_single"], OneShoveAway(), render=False) as world:
        world.reset(1)
        shove(world, (0.3, -0.13, 0.94), (0.06, -0.05, 0.9), (0.06, -0.05, 0.775), (0.14, -0.05, 0.775))
        assert world.success()
        assert world.strategy() is Strategy.PUSH


def test_an_open_gripper_can_push_the_pack_away() -> None:
    with World(EMBODIMENTS["piper_single"], load_task("move_playingcard_away"), render=False) as world:
        world.reset(14)
        x, y, z = world.object_position("pack")
        shove(world, (0.3, -0.13, 0.94), (x, y, z + 0.1), (x, y, z + 0.027), (0.32, y, z + 0.027))
        assert world.success()
        assert world.strategy() is Strategy.PUSH


def test_what_stands_fast_can_be_put_elsewhere_and_stays_there() -> None:
    with World(EMBODIMENTS["piper_single"], load_task("place_empty_cup"), render=False) as world:
        world.reset(1)
        coaster = world.object_pose("coaster")
        coaster[:3, 3] += (0.02, 0.0, 0.1)
        world.set_object_pose("coaster", coaster)
        world.step(20)
        assert world.object_pose("coaster") == pytest.approx(coaster, abs=1e-6)
