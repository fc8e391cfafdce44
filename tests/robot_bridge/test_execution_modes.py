"""The rules by which chunks become motion: when to look, what is committed, what the arms get."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robot_bridge.execution_modes import ChunkPlan, DelayEstimate, Execution, ExecutionMode
from simplevla.errors import ChunkError, ConfigError

S = 1_000_000_000
DT = 0.1
K = 5


def plan_of(mode: ExecutionMode, *, horizon: int = 0, delays: list[float] = (), limit: int = 100, **more):
    known = DelayEstimate()
    for delay_s in delays:
        known.add(delay_s)
    return ChunkPlan(Execution(mode, horizon, **more), known, step_limit=limit, begin_ns=S)


def answer(first: int, *, offset: float = 0.0) -> np.ndarray:
    """K targets that say which action they are for."""
    return np.repeat(np.arange(first, first + K, dtype=np.float32)[:, None] + offset, 2, axis=1)


def ask(plan: ChunkPlan, executed: int, now_s: float, *, age_s: float = 0.1, offset: float = 0.0):
    """Look and take the answer at once; return what was committed and what is handed over."""
    committed = plan.commit(executed)
    now_ns = round(now_s * S)
    hand = plan.take(
        answer(plan.asked, offset=offset), DT, capture_ns=now_ns - round(age_s * S), now_ns=now_ns
    )
    return committed, hand


def test_synchronously_all_of_a_chunk_is_played_and_the_next_look_is_after_it():
    plan = plan_of(ExecutionMode.SYNCHRONOUS, settle_s=0.02)
    assert plan.look_ns() == S
    committed, hand = ask(plan, 0, 1.2)
    assert committed is None
    assert hand.targets[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert hand.start_ns == pytest.approx(1.205 * S)
    assert not plan.goes_on
    plan.rest_at(5, hand.ends_ns + 20_000_000)
    assert plan.look_ns() == pytest.approx(1.725 * S)
    committed, hand = ask(plan, 5, 2.0)
    assert (committed, hand.first, hand.held) == (None, 5, False)


def test_a_receding_horizon_plays_the_first_actions_alone():
    assert len(ask(plan_of(ExecutionMode.RECEDING), 0, 1.2)[1].targets) == K // 2
    assert len(ask(plan_of(ExecutionMode.RECEDING, horizon=3), 0, 1.2)[1].targets) == 3


def test_in_real_time_what_the_arms_have_is_committed_and_the_answer_goes_on_behind_it():
    plan = plan_of(ExecutionMode.REAL_TIME, delays=[0.1] * 20)
    _, first = ask(plan, 0, 1.1)
    assert plan.goes_on
    # 0.1 s of delay and one action: two actions before the end of what the arms have.
    assert plan.look_ns() == pytest.approx(first.ends_ns - 0.2 * S, abs=0.01 * S)
    committed, hand = ask(plan, 3, plan.look_ns() / S + 0.1)
    assert committed[:, 0].tolist() == [3, 4]
    # Action 4 is not under way yet and may still be rounded off towards what follows it.
    assert hand.targets[:, 0].tolist() == [4, 5, 6, 7]
    assert (hand.first, hand.splice, hand.held) == (4, 5, False)
    assert hand.start_ns == pytest.approx(first.ends_ns - DT * S, abs=1)


def test_in_real_time_corners_are_rounded_off_and_what_is_nearly_due_stays():
    """Targets 0 to 4, then a jump by 8: the last target that can still change goes to meet it."""
    plan = plan_of(ExecutionMode.REAL_TIME, delays=[0.1] * 20)
    _, first = ask(plan, 0, 1.1)
    end_s = first.ends_ns / S
    _, hand = ask(plan, 3, end_s - 0.1, offset=8.0)
    assert hand.targets[:, 0].tolist() == pytest.approx([6, 11, 14, 15])  # of 4 | 13, 14, 15
    plan = plan_of(ExecutionMode.REAL_TIME, delays=[0.1] * 20)
    ask(plan, 0, 1.1)
    _, hand = ask(plan, 3, end_s - 0.05, offset=8.0)
    assert hand.first == hand.splice == 5
    assert hand.start_ns == first.ends_ns
    assert hand.targets[:, 0].tolist() == pytest.approx([11, 14, 15])


@pytest.mark.parametrize("mode", [mode for mode in ExecutionMode if mode is not ExecutionMode.REAL_TIME])
def test_in_other_modes_targets_are_the_policys_own(mode):
    chunk = np.array([[0.0], [1.0], [0.0], [1.0], [0.0]], np.float32)
    plan = plan_of(mode, horizon=5 if mode is ExecutionMode.RECEDING else 0)
    plan.commit(0)
    assert plan.take(chunk, DT, capture_ns=S, now_ns=S).targets.tolist() == chunk.tolist()


@given(st.lists(st.tuples(st.floats(0.0, 0.5), st.integers(-5, 5)), min_size=2, max_size=12))
def test_in_real_time_stamps_rise_and_every_action_stays_due_in_order(steps):
    """Whenever answers come: each hand-over is newer, and none takes back what was promised sooner."""
    plan, now_s, executed = plan_of(ExecutionMode.REAL_TIME, delays=[0.1] * 20), 1.1, 0
    hand = None
    for wait_s, offset in steps:
        before, plan_end = hand, plan.planned
        executed = max(executed, plan.due(round(now_s * S)))
        _, hand = ask(plan, executed, now_s, offset=float(offset))
        assert hand.splice == plan_end
        assert hand.first + len(hand.targets) == plan.planned
        if before is not None:
            assert hand.start_ns > before.start_ns
            assert before.first < hand.first <= hand.splice
            due_ns = hand.reached_ns(hand.first + 1)
            assert hand.first == hand.splice or due_ns == before.reached_ns(hand.first + 1)
            assert due_ns > now_s * S
        now_s = max(now_s + wait_s, plan.look_ns() / S)


def test_what_is_due_goes_on_from_one_chunk_to_the_next():
    plan = plan_of(ExecutionMode.REAL_TIME, delays=[0.1] * 20)
    assert plan.due(S) == 0
    _, first = ask(plan, 0, 1.1)
    _, second = ask(plan, 3, 1.4)
    assert [plan.due(first.start_ns + round(t * S)) for t in (-0.1, 0.05, 0.35, 0.55, 9.0)] == [
        0,
        0,
        3,
        5,
        8,
    ]
    plan.rest_at(4, second.ends_ns)
    assert plan.due(second.ends_ns) == 4


def test_a_late_answer_is_played_from_where_the_arms_hold():
    plan = plan_of(ExecutionMode.REAL_TIME, delays=[0.1] * 20)
    _, first = ask(plan, 0, 1.1)
    late_s = first.ends_ns / S + 0.3
    committed, hand = ask(plan, 3, late_s, age_s=0.5)
    assert len(committed) == 2
    assert (hand.first, hand.held) == (5, True)
    assert hand.start_ns == pytest.approx((late_s + 0.005) * S, abs=10)
    assert hand.targets[:, 0].tolist() == [5, 6, 7]


@pytest.mark.parametrize("mode", list(ExecutionMode))
def test_an_answer_to_an_old_observation_is_refused_and_the_plan_stays(mode):
    plan = plan_of(mode, max_age_s=1.0)
    with pytest.raises(ChunkError, match=r"its observation is 1\.50 s old"):
        ask(plan, 0, 3.0, age_s=1.5)
    assert (plan.newest, plan.planned, plan.look_ns()) == (None, 0, 3 * S)


def test_an_answer_never_is_asked_for_that_would_be_committed_whole():
    plan = plan_of(ExecutionMode.REAL_TIME, delays=[2.0] * 20)
    ask(plan, 0, 1.1)
    committed, hand = ask(plan, 0, 1.2)  # the arms have said nothing yet, or begin just now
    assert (len(committed), plan.asked) == (K - 1, 1)
    assert (hand.splice, plan.planned) == (5, 6)


def test_chunks_too_short_for_the_delay_are_played_slower_but_not_beyond_half_the_pace():
    assert ask(plan_of(ExecutionMode.REAL_TIME, delays=[0.1] * 20), 0, 1.01)[1].dt_s == DT
    slow = ask(plan_of(ExecutionMode.REAL_TIME, delays=[0.2] * 20), 0, 1.2)[
        1
    ].dt_s  # by a policy of 0.5 s chunks
    assert slow == pytest.approx(2 * 0.2 / (K - 1.5), rel=0.06)
    assert ask(plan_of(ExecutionMode.REAL_TIME, delays=[9.0] * 20), 0, 1.2)[1].dt_s == 2 * DT
    assert ask(plan_of(ExecutionMode.SYNCHRONOUS, delays=[9.0] * 20), 0, 1.2)[1].dt_s == DT


def test_ensembling_takes_the_mean_of_all_answers_for_an_action_and_older_ones_count_more():
    plan = plan_of(ExecutionMode.ENSEMBLING, delays=[0.1] * 20)
    committed, first = ask(plan, 0, 1.1)
    assert committed is None
    now_s = first.start_ns / S + 0.15
    assert plan.look_ns() == first.start_ns  # at once
    _, hand = ask(plan, 1, now_s, offset=1.0)
    # Action 1 is being played; from 2 on both answers count, and 5 is known from the new one alone.
    assert (hand.first, hand.start_ns) == (2, pytest.approx(first.start_ns + 0.2 * S))
    share = np.exp(-0.1) / (1 + np.exp(-0.1))
    assert hand.targets[:, 0] == pytest.approx([2 + share, 3 + share, 4 + share, 6.0])


def test_ensembling_refuses_an_answer_whose_actions_have_all_been_played():
    plan = plan_of(ExecutionMode.ENSEMBLING, delays=[0.1] * 20)
    ask(plan, 0, 1.1)
    plan.commit(0)
    with pytest.raises(ChunkError, match="everything in it has been executed"):
        plan.take(answer(0), DT, capture_ns=S, now_ns=round(1.9 * S))


def test_arms_that_stopped_keep_what_they_did_and_the_rest_is_forgotten():
    plan = plan_of(ExecutionMode.REAL_TIME, delays=[0.1] * 20)
    ask(plan, 0, 1.1)
    plan.rest_at(2, round(1.8 * S))
    assert (plan.planned, plan.newest, plan.look_ns()) == (2, None, round(1.8 * S))
    committed, hand = ask(plan, 2, 2.0)
    assert (committed, hand.first, hand.targets[0, 0]) == (None, 2, 2)


def test_no_more_than_the_step_limit_is_handed_over():
    plan = plan_of(ExecutionMode.REAL_TIME, delays=[0.1] * 20, limit=7)
    ask(plan, 0, 1.1)
    assert not plan.complete
    _, hand = ask(plan, 3, 1.4)
    assert (hand.first + len(hand.targets), plan.complete, plan.goes_on) == (7, True, False)


def test_the_delay_is_estimated_high_and_a_spike_is_forgotten():
    delays = DelayEstimate()
    assert delays.seconds() == 0.0
    delays.add(0.1)
    assert (delays.seconds(), delays.typical_s()) == pytest.approx((0.2, 0.2))  # one says little
    for _ in range(19):
        delays.add(0.1)
    assert delays.seconds() == pytest.approx(0.105)
    delays.add(5.0)
    assert delays.seconds() == pytest.approx(0.105)
    delays.add(5.0)
    assert delays.seconds() > 4
    for _ in range(20):
        delays.add(0.08)
    assert (delays.seconds(), delays.typical_s()) == pytest.approx((0.084, 0.084))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"mode": ExecutionMode.SYNCHRONOUS, "horizon": 3}, "has no horizon"),
        ({"mode": ExecutionMode.RECEDING, "horizon": -1}, "horizon of -1"),
        ({"max_age_s": 0.0}, "out of range"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, reason):
    with pytest.raises(ConfigError, match=reason):
        Execution(**values)
