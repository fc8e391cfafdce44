"""The guess of a server's clock is off by no more than half of the quickest exchange, and follows drift."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policy_server.clock import ServerClock

MS = 1_000_000
TRAVELS = st.lists(st.tuples(st.integers(0, 500 * MS), st.integers(0, 500 * MS)), min_size=1, max_size=20)


@given(st.integers(-(10**15), 10**15), TRAVELS, st.integers(0, 50 * MS))
def test_the_quickest_exchange_says_how_far_it_may_be_off(ahead: int, travels, spent: int) -> None:
    clock, now = ServerClock(), 10**15
    for there, back in travels:
        asked, now = now, now + there + spent + back
        clock.hear(now - back + ahead, asked, now, spent)
    parted = 2e-4 * 1000 * MS * len(travels)  # what a guess is allowed to grow old by while they pass
    assert abs(clock.ahead_ns - ahead) <= min(there + back for there, back in travels) / 2 + parted + 1


def test_a_slow_answer_changes_nothing_and_a_clock_that_drifts_is_followed() -> None:
    clock = ServerClock()
    clock.hear(5_000 * MS, 0, 2 * MS)
    assert clock.ahead_ns == 4_999 * MS
    clock.hear(5_100 * MS, 3 * MS, 203 * MS)  # it travelled for 200 ms
    assert clock.ahead_ns == 4_999 * MS
    later = 3_600_000 * MS
    clock.hear(later + 5_100 * MS, later, later + 200 * MS)
    assert clock.ahead_ns == 5_000 * MS  # after an hour the old guess may be off by more than 100 ms
