"""The arms stay off the table and off each other, and may always back out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robot_bridge.chunk_execution import smooth_move
from robot_bridge.clearance import Box, Margins, Workspace
from robot_bridge.limits import Cause, Limiter
from simplevla.embodiment import load_embodiment
from simplevla.kinematics.chain import arm_chain

DT = 0.005
ROBOT = load_embodiment("piper_dual")
LOWER, UPPER = ROBOT.position_limits()
WORKSPACE = Workspace(ROBOT)


def low_pose() -> np.ndarray:
    """Return home with the left tool moved straight down to 20 cm below the table."""
    arm, part = ROBOT.slices()[0]
    chain = arm_chain(arm)
    pose = chain.forward(arm.home_rad)
    pose[2, 3] -= 0.4
    goal = ROBOT.home()
    goal[part.start : part.stop - 1] = chain.inverse_nearest(
        pose, arm.home_rad, LOWER[part][:-1], UPPER[part][:-1]
    )
    return goal


def crossed_pose() -> np.ndarray:
    """Return a pose in which both arms reach for the other one's base."""
    goal = ROBOT.home()
    goal[[0, 7]] = -1.5, 1.5
    goal[[1, 8]] = 1.8
    goal[[2, 9]] = -1.0
    return goal


def folded_pose() -> np.ndarray:
    """Return a pose in which the left gripper would lie in its own column."""
    goal = ROBOT.home()
    goal[1:6] = 0.3, -0.1, 0.0, 1.2, 0.0
    return goal


def test_home_is_clear_and_the_bad_poses_are_not():
    assert min(WORKSPACE.heights(ROBOT.home())) > 0.1
    assert WORKSPACE.gap(ROBOT.home()) > 0.3
    assert min(WORKSPACE.heights(low_pose())) < -0.05
    assert WORKSPACE.gap(crossed_pose()) < -0.02
    assert WORKSPACE.self_gap(ROBOT.home()) > 0.05
    assert WORKSPACE.self_gap(folded_pose()) < 0


def test_heights_agree_with_kinematics():
    arm, part = ROBOT.slices()[1]
    tool = arm_chain(arm).forward(ROBOT.home()[part][:-1])
    above_table = tool[2, 3] + arm.base.xyz_m[2] - 0.74
    assert WORKSPACE.heights(ROBOT.home())[1] == pytest.approx(above_table, abs=0.05)
    assert WORKSPACE.heights(ROBOT.home())[1] < above_table


def test_a_wrist_below_the_table_counts_though_the_gripper_is_above_it():
    pose = ROBOT.home()
    pose[[1, 2, 4]] = 3.0, -2.4, -1.0
    arm, part = ROBOT.slices()[0]
    tool = arm_chain(arm).forward(pose[part][:-1])
    assert tool[2, 3] + arm.base.xyz_m[2] > 0.74 + 0.1
    assert -0.03 < WORKSPACE.heights(pose)[0] < 0


@pytest.mark.parametrize(
    ("goal", "cause", "clearance", "margin"),
    [
        (low_pose(), Cause.TABLE, lambda q: min(WORKSPACE.heights(q)), Margins().table_m),
        (crossed_pose(), Cause.ARMS, WORKSPACE.gap, Margins().arms_m),
        (folded_pose(), Cause.SELF, WORKSPACE.self_gap, Margins().self_m),
    ],
    ids=["table", "arms", "self"],
)
def test_holds_at_the_margin_and_backs_out(goal, cause, clearance, margin):
    limiter = Limiter(ROBOT, WORKSPACE)
    limiter.reset(ROBOT.home())
    nearest = np.inf
    for _ in range(800):
        setpoint = limiter.admit(goal, limiter.position, DT)
        nearest = min(nearest, clearance(setpoint.positions))
    assert cause in {event.cause for event in setpoint.events}
    assert margin - 1e-3 < nearest < margin + 0.02
    for _ in range(800):
        setpoint = limiter.admit(ROBOT.home(), limiter.position, DT)
    assert np.array_equal(setpoint.positions, ROBOT.home())
    assert setpoint.events == ()


def test_a_tool_stays_in_its_box_and_comes_back_in():
    arm, part = ROBOT.slices()[0]
    tool = (
        arm.base.xyz_m
        + np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
        @ (arm_chain(arm).forward(ROBOT.home()[part][:-1])[:3, 3])
    )
    box = Box((-2, -2, 0), (float(tool[0]) + 0.05, 2, 2))
    limiter = Limiter(ROBOT, Workspace(ROBOT, box=box))
    limiter.reset(ROBOT.home())
    beyond = ROBOT.home()
    beyond[0] -= 1.2
    for goal, inside in ((beyond, False), (ROBOT.home(), True)):
        for _ in range(400):
            setpoint = limiter.admit(goal, limiter.position, DT)
        causes = {event.cause for event in setpoint.events if event.joint == "left"}
        assert causes == (set() if inside else {Cause.WORKSPACE})
    np.testing.assert_array_equal(setpoint.positions[part], ROBOT.home()[part])


def test_only_the_arm_that_is_low_is_held():
    limiter = Limiter(ROBOT, WORKSPACE)
    limiter.reset(ROBOT.home())
    goal = low_pose()
    goal[7] += 0.5
    for _ in range(800):
        setpoint = limiter.admit(goal, limiter.position, DT)
    assert setpoint.positions[7] == goal[7]
    assert [event.joint for event in setpoint.events if event.cause == Cause.TABLE] == ["left"]


def test_a_start_inside_the_margin_can_only_be_left():
    low = ROBOT.home() + 0.35 * (low_pose() - ROBOT.home())
    while min(WORKSPACE.heights(low)) > 0:
        low = low + 0.02 * (low_pose() - ROBOT.home())
    limiter = Limiter(ROBOT, WORKSPACE)
    start = limiter.reset(low).positions
    for _ in range(50):
        held = limiter.admit(low_pose(), start, DT).positions
    assert np.array_equal(held, start)
    for _ in range(800):
        setpoint = limiter.admit(ROBOT.home(), limiter.position, DT)
    assert np.array_equal(setpoint.positions, ROBOT.home())


@pytest.mark.parametrize("bent", [0.0, 0.3, -0.3])
def test_an_arm_that_was_parked_folded_may_leave(bent):
    parked = np.zeros(ROBOT.dimension)
    parked[[4, 11]] = bent
    assert WORKSPACE.self_gap(parked) < Margins().self_m
    limiter = Limiter(ROBOT, WORKSPACE)
    limiter.reset(parked)
    move = smooth_move(
        parked, ROBOT.home(), speed=0.3 * ROBOT.velocity_limits(),
        acceleration=0.3 * ROBOT.acceleration_limits(), dt_s=DT, start_s=0.0, stamp_ns=1,
    )  # fmt: skip
    for wanted in move.targets:
        setpoint = limiter.admit(wanted, limiter.position, DT)
        assert setpoint.events == ()
    assert np.array_equal(setpoint.positions, ROBOT.home())


poses = st.tuples(*(st.floats(low, high) for low, high in zip(LOWER, UPPER, strict=True))).map(np.array)


PASSING = [  # two arms at full speed, nearest between points at which the way was once judged
    np.array([2.5, 0.25, -2.25, 0, 0, 0, 0, 0, 1, -1, 0, 0, 0, 0]),
    np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, 0, 0]),
]


@settings(max_examples=15, deadline=None)
@given(st.lists(poses, min_size=1, max_size=3))
@example(PASSING)
def test_no_sequence_of_poses_brings_the_setpoints_below_the_table_or_into_an_arm(goals):
    limiter = Limiter(ROBOT, WORKSPACE)
    limiter.reset(ROBOT.home())
    for goal in goals:
        for tick in range(150):
            positions = limiter.admit(goal, limiter.position, DT).positions
            if tick % 5 == 0:
                assert min(WORKSPACE.heights(positions)) > 0.75 * Margins().table_m
                assert WORKSPACE.gap(positions) > 0.75 * Margins().arms_m
                assert WORKSPACE.self_gap(positions) > 0


BOX = Box((-0.3, -0.75, 0.76), (0.3, 0.1, 1.3))
SHARES = st.lists(st.floats(0, 1), min_size=14, max_size=14).map(np.array)


@given(
    start=SHARES,
    goal=SHARES,
    part=st.sampled_from([0.01, 0.1, 1.0]),
    steps=st.integers(1, 30),
    box=st.sampled_from([None, BOX]),
)
@settings(max_examples=50)
def test_what_is_vouched_for_is_what_would_be_found(start, goal, part, steps, box):
    """Along short and long ways through everything that can be hit, a memory changes no verdict."""
    carried = {"left": np.array([[0.05, 0.0, 0.02], [0.0, 0.03, -0.04]])}
    remembers = Workspace(ROBOT, box=box, carried=carried)
    start, goal = (LOWER + share * (UPPER - LOWER) for share in (start, goal))
    goal = start + part * (goal - start)
    now = start
    for s in np.linspace(0, 1, steps):
        pose = start + s * (goal - start)
        way = np.linspace(pose, pose + 0.02 * (goal - start), 3)
        assert remembers.unsafe(way, now) == Workspace(ROBOT, box=box, carried=carried).unsafe(way, now)
        now = pose


@given(start=SHARES, goal=SHARES, part=st.floats(0, 0.2))
def test_no_distance_changes_by_more_than_the_joints_can_move_a_point(start, goal, part):
    """What vouching stands on."""
    start, goal = (LOWER + share * (UPPER - LOWER) for share in (start, goal))
    goal = start + part * (goal - start)
    each = np.abs(goal - start) @ WORKSPACE._travel + 1e-9
    heights = np.subtract(WORKSPACE.heights(goal), WORKSPACE.heights(start))
    assert (np.abs(heights) <= each).all()
    assert abs(WORKSPACE.gap(goal) - WORKSPACE.gap(start)) <= each.sum()
    assert abs(WORKSPACE.self_gap(goal) - WORKSPACE.self_gap(start)) <= each.max()


def test_most_turns_of_a_motion_are_vouched_for(monkeypatch):
    measured = []
    gaps = Workspace._gaps
    monkeypatch.setattr(Workspace, "_gaps", lambda *args: measured.append(args) or gaps(*args))
    limiter = Limiter(ROBOT, Workspace(ROBOT))
    limiter.reset(ROBOT.home())
    right = (np.arange(14) > 6) & (np.arange(14) < 13)
    for i in range(500):
        wanted = ROBOT.home() + 0.05 * right * (1 - np.cos(0.02 * i))
        assert not limiter.admit(wanted, limiter.position, DT).events
    assert 0 < len(measured) < 100
