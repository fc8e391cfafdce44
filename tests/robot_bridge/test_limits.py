"""The limits' promises, for any sequence of inputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_bridge.limits import Cause, Limiter, LimitEvent, LimitsError, SafeSetpoint
from simplevla.embodiment import Arm, Camera, Embodiment, Gripper, Joint, Pose
from simplevla.motion import FOLLOWING_DELAY_S, RAMP_S, MotionLimits, approach

DT = 0.005


def small_robot() -> Embodiment:
    """Return an arm of two joints, with limits that differ, and a gripper."""
    joints = (
        Joint(
            name="joint1",
            lower_rad=-1.0,
            upper_rad=2.0,
            max_velocity_rad_s=3.0,
            max_acceleration_rad_s2=5.0,
        ),
        Joint(
            name="joint2",
            lower_rad=-3.0,
            upper_rad=0.0,
            max_velocity_rad_s=1.0,
            max_acceleration_rad_s2=20.0,
        ),
    )
    arm = Arm(
        name="right",
        urdf="none.urdf",
        base=Pose(xyz_m=(0, 0, 0)),
        tool_link="tool",
        joints=joints,
        gripper=Gripper(stroke_m=0.07, max_velocity_m_s=0.2, max_acceleration_m_s2=2.0),
        home_rad=(0.0, -1.0),
        home_gripper_m=0.05,
    )
    camera = Camera(
        name="head",
        width=32,
        height=24,
        rate_hz=15,
        fx=30,
        fy=30,
        cx=16,
        cy=12,
        frame="head",
        position_m=(0, 0, 1),
        look_at_m=(0, 0, 0),
    )
    return Embodiment(name="small", description="", arms=(arm,), cameras=(camera,), control_rate_hz=200)


ROBOT = small_robot()
LOWER, UPPER = ROBOT.position_limits()
VELOCITY, ACCELERATION = ROBOT.velocity_limits(), ROBOT.acceleration_limits()

anything = st.one_of(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=3, max_size=3),
    st.tuples(*(st.floats(low - 0.1, high + 0.1) for low, high in zip(LOWER, UPPER, strict=True))).map(
        list
    ),
    st.lists(st.floats(-10, 10), max_size=5),
    st.just("no vector"),
)
elapsed = st.one_of(st.just(DT), st.floats(0.001, 0.02))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(anything, st.integers(1, 60), elapsed), min_size=1, max_size=8))
def test_any_wanted_sequence_gives_setpoints_within_every_limit(phases):
    limiter = Limiter(ROBOT)
    last = limiter.reset(ROBOT.home()).positions
    speed = np.zeros(3)
    for wanted, ticks, dt in phases:
        for _ in range(ticks):
            setpoint = limiter.admit(wanted, limiter.position, dt)
            now = setpoint.positions
            assert np.isfinite(now).all()
            assert (now >= LOWER).all()
            assert (now <= UPPER).all()
            step = (now - last) / dt
            assert (np.abs(step) <= VELOCITY + 1e-9).all()
            assert (np.abs(step - speed) <= ACCELERATION * dt + 1e-9).all()
            last, speed = now, step


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(*(st.floats(low, high) for low, high in zip(LOWER, UPPER, strict=True))),
        min_size=1,
        max_size=4,
    )
)
def test_a_feasible_smooth_trajectory_passes_unchanged(waypoints):
    limiter = Limiter(ROBOT)
    start = limiter.reset(ROBOT.home()).positions
    for waypoint in map(np.asarray, waypoints):
        for wanted in minimum_jerk(start, waypoint):
            setpoint = limiter.admit(wanted, wanted, DT)
            assert np.abs(setpoint.positions - wanted).max() < 1e-6  # braking onto a limit is rounded
            at_limits = (wanted < LOWER + 0.01) | (wanted > UPPER - 0.01)
            assert np.array_equal(setpoint.positions[~at_limits], wanted[~at_limits])
            assert setpoint.events == ()
        start = waypoint
    assert not limiter.counts


@settings(max_examples=20, deadline=None)
@given(*(st.floats(low, high) for low, high in zip(LOWER, UPPER, strict=True)))
def test_a_step_is_approached_without_overshoot_and_reached(a, b, c):
    goal = np.array([a, b, c])
    limiter = Limiter(ROBOT)
    start = limiter.reset(ROBOT.home()).positions
    tiny = 1.5 * ACCELERATION / RAMP_S * DT**3  # what jerk leaves open within a tick, below 0.2 mrad
    low, high = np.minimum(start, goal) - tiny, np.maximum(start, goal) + tiny
    for _ in range(1000):
        now = limiter.admit(goal, limiter.position, DT).positions
        assert ((low <= now) & (now <= high)).all()
    assert np.array_equal(now, goal)


def test_a_moving_target_is_caught_up_with_and_then_passes_unchanged():
    limiter = Limiter(ROBOT)
    start = limiter.reset(ROBOT.home()).positions
    ramp = [start + np.array([0.5, 0.0, 0.0]) * DT * (i + 1) for i in range(100)]
    for wanted in ramp:
        setpoint = limiter.admit(wanted, limiter.position, DT)
    assert np.array_equal(setpoint.positions, wanted)
    assert set(limiter.counts) <= {Cause.ACCELERATION, Cause.JERK}


@pytest.mark.parametrize(
    ("wanted", "event"),
    [
        ([0.0, np.nan, 0.0], LimitEvent(Cause.NOT_FINITE, "right_joint2")),
        ([np.inf, 0.0, 0.0], LimitEvent(Cause.NOT_FINITE, "right_joint1")),
        ([0.0, 0.0], LimitEvent(Cause.SHAPE)),
        (None, LimitEvent(Cause.NOT_FINITE)),
        ([[1], [2, 3]], LimitEvent(Cause.SHAPE)),
        ([2.5, -1.0, 0.05], LimitEvent(Cause.POSITION, "right_joint1")),
        ([0.5, -1.0, 0.05], LimitEvent(Cause.VELOCITY, "right_joint1")),
        ([0.001, -1.0, 0.05], LimitEvent(Cause.ACCELERATION, "right_joint1")),
        ([0.0001, -1.0, 0.05], LimitEvent(Cause.JERK, "right_joint1")),
    ],
)
def test_each_violation_is_named_and_counted(wanted, event):
    limiter = Limiter(ROBOT)
    limiter.reset(ROBOT.home())
    setpoint = limiter.admit(wanted, ROBOT.home(), DT)
    if wanted is None:  # numpy reads None as a scalar NaN: of a wrong shape all the same
        event = LimitEvent(Cause.SHAPE)
    assert setpoint.events == (event,)
    assert limiter.counts == {event.cause: 1}


def test_on_doubt_a_moving_arm_brakes_and_then_holds():
    limiter = Limiter(ROBOT)
    limiter.reset(ROBOT.home())
    for _ in range(100):
        moving = limiter.admit([2.0, -1.0, 0.05], limiter.position, DT).positions
    held = [limiter.admit([np.nan] * 3, limiter.position, DT).positions for _ in range(200)]
    assert moving[0] < held[0][0]
    assert np.array_equal(held[-1], held[-2])
    travelled = held[-1][0] - moving[0]
    assert travelled <= VELOCITY[0] ** 2 / (2 * ACCELERATION[0])


@pytest.mark.parametrize("dt", [0.0, -1.0, np.nan, np.inf])
def test_a_clock_that_makes_no_sense_changes_nothing(dt):
    limiter = Limiter(ROBOT)
    start = limiter.reset(ROBOT.home()).positions
    setpoint = limiter.admit(start + 0.5, start, dt)
    assert np.array_equal(setpoint.positions, start)
    assert setpoint.events == (LimitEvent(Cause.TIMING),)


def test_unknown_feedback_holds():
    limiter = Limiter(ROBOT)
    start = limiter.reset(ROBOT.home()).positions
    setpoint = limiter.admit(start + 1e-4, np.full(3, np.nan), DT)
    assert np.array_equal(setpoint.positions, start)
    assert setpoint.events == (LimitEvent(Cause.FEEDBACK),)


def test_a_blocked_joint_is_not_pushed_on_but_may_back_out():
    limiter = Limiter(ROBOT)
    stuck = limiter.reset(ROBOT.home()).positions
    for _ in range(1000):
        setpoint = limiter.admit([1.9, -1.0, 0.0], stuck, DT)
    assert LimitEvent(Cause.TRACKING, "right_joint1") in setpoint.events
    assert setpoint.positions[0] < 0.5 + VELOCITY[0] ** 2 / (2 * ACCELERATION[0])
    assert setpoint.positions[2] == 0.0  # a gripper is blocked whenever it holds something
    for _ in range(1000):
        setpoint = limiter.admit(stuck, stuck, DT)
    assert np.array_equal(setpoint.positions, stuck)


def test_the_first_setpoint_is_the_measured_pose_whatever_is_wanted():
    measured = np.array([0.3, -0.4, 0.01])
    assert np.array_equal(Limiter(ROBOT).admit([9, 9, 9], measured, DT).positions, measured)


def test_starting_outside_the_limits_is_refused_by_name():
    with pytest.raises(LimitsError, match=r"right_joint2 at 0\.500"):
        Limiter(ROBOT).reset([0.0, 0.5, 0.0])
    with pytest.raises(LimitsError, match="not known"):
        Limiter(ROBOT).reset([0.0, np.nan, 0.0])
    slightly = Limiter(ROBOT).reset([0.0, 0.01, -0.0005]).positions
    assert slightly.tolist() == [0.0, 0.0, 0.0]


def test_nobody_else_makes_a_safe_setpoint():
    safe = Limiter(ROBOT).reset(ROBOT.home())
    with pytest.raises(TypeError, match="Limiter"):
        SafeSetpoint(np.zeros(3))
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(safe, positions=np.zeros(3))
    with pytest.raises(ValueError, match="read-only"):
        safe.positions[0] = 1.0


def test_changing_the_callers_array_afterwards_changes_no_setpoint():
    limiter = Limiter(ROBOT)
    pose = ROBOT.home()
    setpoint = limiter.reset(pose)
    pose[:] = 9.0
    assert np.array_equal(setpoint.positions, ROBOT.home())
    assert np.array_equal(limiter.admit(ROBOT.home(), ROBOT.home(), DT).positions, ROBOT.home())


def minimum_jerk(start: np.ndarray, goal: np.ndarray) -> list[np.ndarray]:
    """Return setpoints from ``start`` to ``goal`` that use 80 % of the limits at most.

    Peak velocity 15/8 d/T, acceleration 10/sqrt(3) d/T^2 and jerk 60 d/T^3 (Flash and Hogan 1985).
    """
    distance = np.abs(goal - start)
    duration = max(
        (1.875 * distance / (0.8 * VELOCITY)).max(),
        np.sqrt(10 / np.sqrt(3) * distance / (0.8 * ACCELERATION)).max(),
        np.cbrt(60 * distance / (0.8 * ACCELERATION / RAMP_S)).max(),
        10 * DT,
    )
    steps = int(np.ceil(duration / DT))
    s = np.arange(1, steps + 1)[:, None] / steps
    blend = s**3 * (10 - 15 * s + 6 * s**2)
    return list(start + (goal - start) * blend)


def test_the_simulated_arms_move_as_the_limits_let_the_real_ones_move():
    """But for jerk, which only the real ones spare: less than a simulated joint follows late.

    At speeds that a joint can turn around within an action; beyond, both overshoot, each in its own time.
    """
    rng = np.random.default_rng(0)
    limits = MotionLimits.of(ROBOT)
    limiter = Limiter(ROBOT)
    position = limiter.reset([0.0, -1.0, 0.05]).positions.copy()
    velocity, before = np.zeros(3), position
    slope = np.zeros(3)
    for tick in range(400):
        if tick % 20 == 0:  # the targets of a policy, 10 a second, and straight lines between them
            slope = rng.normal(0.0, [0.2, 0.2, 0.02]) * DT
        wanted = before + slope
        velocity = approach(limits, position, velocity, before, wanted, DT).velocity
        position, before = position + velocity * DT, wanted
        admitted = limiter.admit(wanted, limiter.position, DT).positions
        assert (np.abs(admitted - position) < FOLLOWING_DELAY_S * np.array([0.9, 0.9, 0.09])).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            *(
                st.floats(low + 0.2 * (high - low), high - 0.2 * (high - low))
                for low, high in zip(LOWER, UPPER, strict=True)
            )
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(5, 300),
)
def test_jerk_is_limited_wherever_no_arm_brakes_for_its_safety(goals, ticks):
    limiter = Limiter(ROBOT)
    last = limiter.reset(ROBOT.home()).positions
    speed, force = np.zeros(3), np.zeros(3)
    for goal in goals:
        for _ in range(ticks):
            setpoint = limiter.admit(goal, limiter.position, DT)
            assert Cause.POSITION not in {event.cause for event in setpoint.events}
            step = (setpoint.positions - last) / DT
            change = (step - speed) / DT
            assert (np.abs(change - force) <= ACCELERATION / RAMP_S * DT + 1e-6).all()
            last, speed, force = setpoint.positions, step, change


def test_a_gripper_that_presses_too_hard_is_not_closed_further_but_may_open():
    limiter = Limiter(ROBOT)
    limiter.reset(ROBOT.home())
    closed = [0.0, -1.0, 0.0]
    for _ in range(50):
        moving = limiter.admit(closed, limiter.position, DT, effort=[0, 0, -1.0]).positions[2]
    for _ in range(100):
        setpoint = limiter.admit(closed, limiter.position, DT, effort=[0, 0, -1.3])
    assert LimitEvent(Cause.GRIP, "right_gripper") in setpoint.events
    assert moving - 0.2**2 / (2 * 2.0) - 1e-3 <= setpoint.positions[2] < moving
    assert setpoint.gripper_effort_nm == 1.0
    for _ in range(200):
        setpoint = limiter.admit(ROBOT.home(), limiter.position, DT, effort=[0, 0, -1.3])
    assert setpoint.positions[2] == ROBOT.home()[2]
