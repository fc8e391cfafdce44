"""What the chunk player promises about the setpoints it wants."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robot_bridge.chunk_execution import ChunkPlayer, Trajectory, smooth_move
from simplevla.errors import ChunkError

HOLD = np.array([0.5, -0.5])


def trajectory(start: float, targets: list[list[float]], *, dt: float = 0.1, stamp: int = 1) -> Trajectory:
    return Trajectory(start, dt, np.asarray(targets, dtype=float), stamp)


targets = st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=2), min_size=1, max_size=6)
hundredths = st.integers(-30, 50)  # starts and spacings on a grid of 10 ms bound the slope of late splices
offers = st.lists(st.tuples(hundredths, targets, st.integers(1, 30)), min_size=1, max_size=5)


def test_leaves_and_reaches_its_targets_at_rest_and_then_holds():
    player = ChunkPlayer(HOLD)
    player.offer(trajectory(10.0, [[1.5, -0.5], [1.5, 0.5]]), now_s=9.9)
    wanted = {t: player.wanted(t).tolist() for t in (9.95, 10.0, 10.05, 10.1, 10.15, 10.2, 99.0)}
    assert wanted == {
        9.95: [0.5, -0.5],
        10.0: [0.5, -0.5],
        10.05: pytest.approx([1.0, -0.5]),
        10.1: pytest.approx([1.5, -0.5]),
        10.15: pytest.approx([1.5, 0.0]),
        10.2: pytest.approx([1.5, 0.5]),
        99.0: [1.5, 0.5],
    }


def test_steady_targets_are_passed_at_a_steady_speed():
    player = ChunkPlayer(HOLD)
    player.offer(trajectory(0.0, [[0.5 + 0.1 * i, -0.5] for i in range(1, 6)]), now_s=0.0)
    inner = [player.wanted(t)[0] for t in np.linspace(0.1, 0.4, 31)]
    assert inner == pytest.approx(list(np.linspace(0.6, 0.9, 31)))


@settings(max_examples=40, deadline=None)
@given(offers)
@example(
    [(0, [[0.0, 1.0]], 1), (-30, [[0.0, 0.0]] * 3, 10)]
)  # the last target is due now, but for rounding
@example(
    [(0, [[0.0, 0.0]], 1)] * 3
    + [(16, [[0.0, 0.0]] * 3 + [[0.0, 1.0], [0.0, 0.0]], 1), (1, [[0.0, 0.0]], 1)]
)  # a target before the new ones is
def test_neither_position_nor_velocity_nor_acceleration_jumps_where_chunks_meet(offered):
    player = ChunkPlayer(HOLD)
    for stamp, (lead, points, spacing) in enumerate(offered):
        now = 0.2 * stamp
        before = player.motion(now)
        knots = [now + (lead + i * spacing) / 100 for i in range(len(points) + 1)]
        try:
            player.offer(trajectory(knots[0], points, dt=spacing / 100, stamp=stamp), now)
        except ChunkError:
            assert knots[-1] <= now + 1e-9  # all of it had passed
        for value, went_on in zip(player.motion(now), before, strict=True):
            assert value == pytest.approx(went_on, rel=1e-9, abs=1e-6)
        instant = 1e-9
        for knot in (k for k in knots if k > now):
            left, right = player.motion(knot - instant), player.motion(knot + instant)
            for name, unit in (("position", 1.0), ("velocity", 1e2), ("acceleration", 1e4)):
                # Targets a few rad and 10 ms apart mean up to 1e7 rad/s3.
                assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-3, abs=1e-4 * unit)


@settings(max_examples=40, deadline=None)
@given(offers)
def test_nothing_leaves_the_bounds_however_chunks_meet(offered):
    bounds = np.array([-3.0, -3.0]), np.array([3.0, 3.0])
    player = ChunkPlayer(HOLD, bounds)
    for stamp, (lead, points, spacing) in enumerate(offered):
        now = 0.2 * stamp
        before = player.wanted(now)
        with contextlib.suppress(ChunkError):
            player.offer(trajectory(now + lead / 100, points, dt=spacing / 100, stamp=stamp), now)
        assert player.wanted(now) == pytest.approx(before, abs=1e-9)
        for t in np.linspace(now, now + 0.2, 41):
            assert ((bounds[0] - 1e-9 <= player.wanted(t)) & (player.wanted(t) <= bounds[1] + 1e-9)).all()


@settings(max_examples=40, deadline=None)
@given(targets, st.floats(0.01, 1.0))
def test_a_chunk_played_from_rest_stays_between_its_targets(points, dt):
    player = ChunkPlayer(HOLD)
    player.offer(trajectory(0.0, points, dt=dt), now_s=0.0)
    knots = [HOLD, *np.asarray(points, dtype=float)]
    for i, (left, right) in enumerate(itertools.pairwise(knots)):
        low, high = np.minimum(left, right) - 1e-9, np.maximum(left, right) + 1e-9
        for t in np.linspace(i * dt, (i + 1) * dt, 11):
            assert ((low <= player.wanted(t)) & (player.wanted(t) <= high)).all()


@given(targets, st.floats(0.01, 1.0), st.floats(0, 1e4))
def test_silence_holds_the_last_target_for_ever(points, dt, later):
    player = ChunkPlayer(HOLD)
    player.offer(trajectory(0.0, points, dt=dt), now_s=0.0)
    end = dt * len(points)
    assert np.array_equal(player.wanted(end * 1.000001 + later), np.asarray(points[-1]))
    assert player.done(end * 1.000001 + later)


def test_a_new_trajectory_replaces_the_rest_from_its_start_on():
    player = ChunkPlayer([0.0, 0.0])
    player.offer(trajectory(0.0, [[1, 0], [2, 0], [3, 0]], stamp=1), now_s=0.0)
    player.offer(trajectory(0.1, [[0, 1]], stamp=2), now_s=0.05)
    assert player.wanted(0.10) == pytest.approx([1.0, 0])
    assert player.wanted(0.20) == pytest.approx([0, 1])
    assert player.wanted(0.30) == pytest.approx([0, 1])
    assert player.played(0.08) == ((1, 0),)
    assert player.played(0.15) == ((1, 1), (2, 0))
    assert player.played(0.25) == ((1, 1), (2, 1))


def test_a_chunk_that_goes_on_where_the_last_one_ends_leaves_no_seam_if_it_comes_in_time():
    ramp = [[0.1 * i] for i in range(1, 7)]
    whole, joined = ChunkPlayer([0.0]), ChunkPlayer([0.0])
    whole.offer(trajectory(0.0, ramp, stamp=1), now_s=0.0)
    joined.offer(trajectory(0.0, ramp[:3], stamp=1), now_s=0.0)
    for t in np.linspace(0.0, 0.7, 71):
        if t == pytest.approx(0.19):
            joined.offer(trajectory(0.3, ramp[3:], stamp=2), now_s=t)
        assert joined.wanted(t) == pytest.approx(whole.wanted(t), abs=1e-9)
    assert joined.played(0.35) == ((1, 3), (2, 0))


def test_a_late_trajectory_skips_what_has_passed_and_counts_the_rest():
    player = ChunkPlayer([0.0])
    skipped = player.offer(trajectory(0.0, [[1], [2], [3]], stamp=1), now_s=0.15)
    assert skipped == 1
    assert player.wanted(0.15) == pytest.approx([0])
    assert player.wanted(0.2) == pytest.approx([2])
    assert [player.played(t) for t in (0.15, 0.16, 0.25, 0.35, 9.0)] == [
        (), ((1, 0),), ((1, 1),), ((1, 2),), ((1, 2),),
    ]  # fmt: skip


def test_a_target_that_is_due_at_once_is_made_for_by_way_of_the_next():
    player = ChunkPlayer([0.0])
    player.offer(trajectory(0.0, [[1], [1.1], [1.2]], stamp=1), now_s=0.099)
    assert player.wanted(0.101)[0] < 0.1
    assert player.wanted(0.2) == pytest.approx([1.1])
    assert player.played(0.15) == ((1, 1),)


def test_stale_trajectories_are_refused_with_the_reason():
    player = ChunkPlayer([0.0])
    player.offer(trajectory(0.0, [[1], [2]], stamp=5), now_s=0.0)
    with pytest.raises(ChunkError, match="not newer than the one that plays"):
        player.offer(trajectory(1.0, [[9]], stamp=5), now_s=0.0)
    with pytest.raises(ChunkError, match=r"last target was due 0\.500 s ago"):
        player.offer(trajectory(0.0, [[1], [2]], stamp=6), now_s=0.7)
    assert player.wanted(0.2) == pytest.approx([2])
    player.hold([4.0])
    assert player.wanted(0.2) == pytest.approx([4])
    assert player.played(0.2) == ()


@pytest.mark.parametrize(
    ("points", "dt", "reason"),
    [
        ([[0.0, np.nan]], 0.1, "target 0 is not finite"),
        ([], 0.1, "shape"),
        ([0.0, 1.0], 0.1, "shape"),
        ([[0.0, 0.0]], 0.0, "apart"),
        ([[0.0, 0.0]], np.nan, "apart"),
    ],
)
def test_a_malformed_trajectory_cannot_be_made(points, dt, reason):
    with pytest.raises(ChunkError, match=reason):
        trajectory(0.0, points, dt=dt)


def test_targets_for_another_robot_are_refused():
    with pytest.raises(ChunkError, match="targets have 3 values, the arms have 2"):
        ChunkPlayer(HOLD).offer(trajectory(0.0, [[0, 0, 0]]), now_s=0.0)


positions = st.lists(st.floats(-3, 3), min_size=2, max_size=2)


@given(positions, positions)
def test_a_smooth_move_ends_exactly_at_its_goal_within_speed_and_acceleration(start, goal):
    speed, acceleration, dt = np.array([1.0, 0.5]), np.array([3.0, 2.0]), 0.005
    move = smooth_move(
        np.array(start), np.array(goal),
        speed=speed, acceleration=acceleration, dt_s=dt, start_s=0.0, stamp_ns=1,
    )  # fmt: skip
    assert (move.targets[-1] == goal).all()
    steps = np.diff(np.vstack([start, move.targets]), axis=0) / move.dt_s
    assert (np.abs(steps) <= speed + 1e-6).all()
    assert (np.abs(np.diff(steps, axis=0)) / move.dt_s <= acceleration * 1.001 + 1e-6).all()
