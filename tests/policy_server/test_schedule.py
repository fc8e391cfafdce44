"""Whose turn it is: latest wins, deadlines, fairness, batches - with a clock of our own."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policy_server.schedule import DeadlineError, Job, Schedule, SupersededError
from simplevla.observation import Observation

NOTHING = Observation({}, np.zeros(1, np.float32), "", 0)


def job(client: str, arrived_s: float, deadline_s: float | None = None, policy: Any = "a") -> Job:
    return Job(client, NOTHING, policy, deadline_s, arrived_s, lambda _: None, lambda *_: None)


def answered(schedule: Schedule, start_s: float, took_s: float, times: int = 1) -> None:
    """Let the schedule see answers that took ``took_s``."""
    for _ in range(times):
        schedule.admit(job("warm", start_s), start_s)
        assert schedule.take(start_s)
        schedule.ended(start_s + took_s)


def test_the_latest_request_of_a_client_wins() -> None:
    schedule = Schedule()
    first, second = job("a", 0.0), job("a", 0.1)
    assert schedule.admit(first, 0.0) == []
    ((refused, error),) = schedule.admit(second, 0.1)
    assert refused is first
    assert isinstance(error, SupersededError)
    assert schedule.take(0.2) == [second]
    assert len(schedule) == 0


def test_who_asks_often_waits_as_long_as_the_others() -> None:
    schedule = Schedule()
    schedule.admit(job("patient", 0.0), 0.0)
    for index in range(5):
        schedule.admit(job("eager", 0.1 + index), 0.1 + index)
    turns = []
    for now_s in (6.0, 7.0):
        (taken,) = schedule.take(now_s)
        turns.append(taken.client)
        schedule.admit(job(str(taken.client), now_s), now_s)
        schedule.ended(now_s)
    assert turns == ["patient", "eager"]


def test_what_cannot_be_in_time_is_refused_at_once_with_the_reason() -> None:
    schedule = Schedule()
    answered(schedule, 0.0, 0.05, times=3)
    hopeless = job("a", 1.0, deadline_s=1.03)
    ((refused, error),) = schedule.admit(hopeless, 1.0)
    assert refused is hopeless
    assert isinstance(error, DeadlineError)
    assert "50 ms" in error.message
    assert schedule.admit(job("a", 1.0, deadline_s=1.06), 1.0) == []
    # The second in the queue would be ready after the first: 0.1 s from now.
    assert len(schedule.admit(job("b", 1.0, deadline_s=1.09), 1.0)) == 1
    assert schedule.admit(job("b", 1.0, deadline_s=1.11), 1.0) == []


def test_what_waited_too_long_is_refused_before_its_deadline_has_passed() -> None:
    schedule = Schedule()
    answered(schedule, 0.0, 0.05)
    schedule.admit(job("busy", 1.0), 1.0)
    schedule.take(1.0)
    waiting = job("a", 1.0, deadline_s=1.12)
    assert schedule.admit(waiting, 1.0) == []
    assert schedule.expired(1.05) == []
    assert schedule.patience_s(1.05) <= 0.07
    assert [late for late, _ in schedule.expired(1.09)] == [waiting]
    assert len(schedule) == 0


def test_a_slow_spell_is_forgotten() -> None:
    schedule = Schedule()
    answered(schedule, 0.0, 3.0, times=5)
    assert len(schedule.admit(job("a", 4.0, deadline_s=4.5), 4.0)) == 1
    assert schedule.admit(job("a", 9.0, deadline_s=9.5), 9.0) == []


def test_a_request_waits_a_moment_for_others_where_the_engine_takes_several() -> None:
    schedule = Schedule(max_batch=4, batch_wait_s=0.002)
    for client in "abc":
        schedule.admit(job(client, 0.0), 0.0)
    assert [each.client for each in schedule.take(0.0)] == ["a", "b", "c"]
    schedule.ended(0.01)
    # All three are known to ask: the first to come back waits for the others, but not for long.
    schedule.admit(job("a", 0.02), 0.02)
    assert schedule.take(0.02) == []
    assert 0 < schedule.patience_s(0.02) <= 0.002
    schedule.admit(job("b", 0.021), 0.021)
    assert schedule.take(0.021) == []
    assert [each.client for each in schedule.take(0.0221)] == ["a", "b"]


def test_one_client_alone_never_waits() -> None:
    schedule = Schedule(max_batch=4, batch_wait_s=1.0)
    for now_s in (0.0, 5.0, 5.1):
        schedule.admit(job("a", now_s), now_s)
        assert len(schedule.take(now_s)) == 1
        schedule.ended(now_s)


def test_a_batch_is_of_one_policy_and_no_second_one_runs_beside_it() -> None:
    schedule = Schedule(max_batch=4, batch_wait_s=0.0)
    schedule.admit(job("a", 0.0, policy="old"), 0.0)
    schedule.admit(job("b", 0.0, policy="new"), 0.0)
    schedule.admit(job("c", 0.0, policy="old"), 0.0)
    assert [each.client for each in schedule.take(0.0)] == ["a", "c"]
    assert schedule.take(0.0) == []
    schedule.ended(0.1)
    assert [each.client for each in schedule.take(0.1)] == ["b"]


def test_who_is_gone_is_forgotten() -> None:
    schedule = Schedule()
    schedule.admit(job("a", 0.0), 0.0)
    schedule.forget("a")
    schedule.forget("never seen")
    assert schedule.take(1.0) == []


# Drawing sixty steps can take longer on a busy machine than hypothesis expects.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcde"),
            st.floats(0, 0.1),
            st.none() | st.floats(0, 0.3),
            st.sampled_from(["ask", "take", "expire", "forget"]),
        ),
        max_size=60,
    ),
    st.integers(1, 3),
)
def test_every_request_is_answered_or_refused_once(
    steps: list[tuple[str, float, float | None, str]], max_batch: int
) -> None:
    schedule = Schedule(max_batch)
    now_s, asked, ended = 0.0, [], []
    for client, passed_s, allowed_s, what in steps:
        now_s += passed_s
        if what == "ask":
            asked.append(job(client, now_s, None if allowed_s is None else now_s + allowed_s))
            ended += [refused for refused, _ in schedule.admit(asked[-1], now_s)]
        elif what == "take":
            schedule.ended(now_s)
            taken = schedule.take(now_s)
            assert len(taken) <= max_batch
            ended += taken
        elif what == "expire":
            ended += [late for late, _ in schedule.expired(now_s)]
        else:
            gone = schedule.forget(client)
            ended += [gone] if gone else []
    schedule.ended(now_s)
    while len(schedule):
        now_s += 1
        ended += [late for late, _ in schedule.expired(now_s)] + schedule.take(now_s)
        schedule.ended(now_s)
    assert sorted(map(id, ended)) == sorted(map(id, asked))
