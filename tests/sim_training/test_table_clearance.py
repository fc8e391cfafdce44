"""What is simulated keeps as clear of the table as the limits before the bus do, and is else left alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_bridge.clearance import Workspace
from robot_bridge.limits import Cause, Limiter
from sim_training.episode import play, setpoints
from sim_training.table_clearance import TableClearance
from sim_training.tasks import load_task
from sim_training.tasks.base import TABLE_TOP_M
from sim_training.world import PHYSICS_DT_S, World
from simplevla.embodiment import load_embodiment
from simplevla.kinematics.arm_shape import TABLE_MARGIN_M, ArmShape

ROBOT = load_embodiment("piper_single")
CLEARANCE = TableClearance(ROBOT)
SHAPE = ArmShape(ROBOT.arms[0])
LOWER, UPPER = ROBOT.position_limits()
DT_S = 0.1


def heights(path: np.ndarray, table_top_m: float = TABLE_TOP_M) -> np.ndarray:
    """Return (T,) how high above the table the arm's lowest point is, m."""
    return SHAPE.heights(path) - table_top_m


def driven(targets: np.ndarray, table_top_m: float = TABLE_TOP_M) -> np.ndarray:
    (path,) = setpoints(CLEARANCE, ROBOT.home()[None], targets[None], DT_S, np.array([table_top_m]))
    return path


def lunge() -> np.ndarray:
    """Return (K, D) targets that lead into the table: shoulder forward and down."""
    low = ROBOT.home()
    low[1] += 1.2
    assert heights(low[None])[0] < -0.05
    return ROBOT.home() + (low - ROBOT.home()) * np.linspace(0.1, 1, 15)[:, None]


@settings(max_examples=40)
@given(st.lists(st.lists(st.floats(0, 1), min_size=7, max_size=7), min_size=1, max_size=4))
def test_whatever_is_wanted_nothing_comes_lower_than_the_margin(shares: list[list[float]]) -> None:
    path = driven(LOWER + np.array(shares) * (UPPER - LOWER))
    assert heights(path).min() > TABLE_MARGIN_M - 2e-4  # a way is judged at some of its points


def test_it_ends_where_the_limits_before_the_bus_end() -> None:
    targets = lunge()
    path = driven(targets)
    assert heights(path).min() < TABLE_MARGIN_M + 2e-3
    limiter = Limiter(ROBOT, Workspace(ROBOT))
    limiter.reset(ROBOT.home())
    corner, reached = ROBOT.home(), []
    for target in [*targets, *targets[-1:].repeat(5, axis=0)]:
        for share in np.linspace(0, 1, 26)[1:]:
            safe = limiter.admit(corner + (target - corner) * share, limiter.position, PHYSICS_DT_S)
            reached.append(safe.positions)
        corner = target
    assert limiter.counts[Cause.TABLE] > 0
    assert heights(np.array(reached)).min() == pytest.approx(heights(path).min(), abs=2e-3)
    assert np.abs(reached[-1] - path[-1]).max() < 0.03


def test_who_stays_clear_is_left_alone_beside_one_who_does_not() -> None:
    start, tops = np.tile(ROBOT.home(), (2, 1)), np.full(2, TABLE_TOP_M)
    raised = np.tile(ROBOT.home() - np.eye(7)[1] * 0.1, (15, 1))
    low, clear = setpoints(CLEARANCE, start, np.stack([lunge(), raised]), DT_S, tops)
    assert np.array_equal(clear, driven(raised))
    assert np.array_equal(low, driven(lunge()))
    np.testing.assert_allclose(clear[-1], raised[-1], atol=1e-4)
    assert np.abs(low[-1] - lunge()[-1]).max() > 0.1


def test_a_lower_table_lets_an_arm_come_lower() -> None:
    assert heights(driven(lunge(), TABLE_TOP_M - 0.03)).min() < heights(driven(lunge())).min() - 0.02


def test_who_stands_too_low_may_come_up_and_no_lower() -> None:
    low = lunge()[-1]
    up, down = ROBOT.home()[None], (low + np.eye(7)[1] * 0.1)[None]
    tops = np.array([TABLE_TOP_M])
    (rises,) = setpoints(CLEARANCE, low[None], up[None], 1.0, tops)
    (stays,) = setpoints(CLEARANCE, low[None], down[None], 1.0, tops)
    assert heights(rises)[-1] > 0.1
    assert np.array_equal(stays[-1], low)


def test_an_episode_is_played_so() -> None:
    with World(ROBOT, load_task("click_bell"), render=False) as world:
        world.reset(0)
        play(world, lunge(), DT_S)
        assert heights(world.targets()[None])[0] > TABLE_MARGIN_M - 2e-4
