"""Who was answered at once looks again for a moment; everybody else sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from policy_server.waiting import Patience

pytestmark = pytest.mark.by_the_clock


@pytest.fixture(autouse=True)
def _two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})


class Source:
    """Has something from ``after`` looks on, and notes for how long each look was allowed to sleep."""

    def __init__(self, after: int, takes_s: float = 0.0) -> None:
        self.after = after
        self.takes_s = takes_s
        self.slept_s: list[float] = []

    def look(self, timeout_s: float) -> list[str]:
        self.slept_s.append(timeout_s)
        if timeout_s:
            time.sleep(self.takes_s)
            return ["it"]
        return ["it"] if len(self.slept_s) > self.after else []


def waited(patience: Patience, source: Source) -> Callable[[float], list[str]]:
    return lambda timeout_s: patience.wait(source.look, timeout_s)


def test_what_is_there_is_returned_without_waiting() -> None:
    source = Source(after=0)
    assert waited(Patience(), source)(1.0) == ["it"]
    assert source.slept_s == [0.0]


def test_without_time_nothing_is_waited_for() -> None:
    source = Source(after=5)
    assert waited(Patience(), source)(0.0) == []
    assert source.slept_s == [0.0]


def test_who_was_answered_at_once_looks_before_it_sleeps() -> None:
    patience = Patience(spin_s=1.0)
    assert waited(patience, Source(after=99))(5.0) == ["it"]  # at first it sleeps
    source = Source(after=7)
    assert waited(patience, source)(5.0) == ["it"]
    assert source.slept_s == [0.0] * 8


def test_who_had_to_wait_sleeps_the_next_time() -> None:
    patience = Patience(spin_s=0.01)
    assert waited(patience, Source(after=99, takes_s=0.03))(5.0) == ["it"]
    source = Source(after=99)
    assert waited(patience, source)(5.0) == ["it"]
    assert source.slept_s == [0.0, 5.0]


def test_who_is_told_to_forget_sleeps_the_next_time() -> None:
    patience = Patience(spin_s=1.0)
    waited(patience, Source(after=99))(5.0)
    patience.forget()
    source = Source(after=7)
    assert waited(patience, source)(5.0) == ["it"]
    assert source.slept_s == [0.0, 5.0]


def test_with_one_processor_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    patience = Patience(spin_s=1.0)
    waited(patience, Source(after=99))(5.0)
    source = Source(after=7)
    waited(patience, source)(5.0)
    assert source.slept_s == [0.0, 5.0]


def test_looking_ends_after_its_time_and_can_be_left_out() -> None:
    patience = Patience(spin_s=0.005)
    waited(patience, Source(after=99))(5.0)
    source = Source(after=10**9)
    assert waited(patience, source)(5.0) == ["it"]
    assert source.slept_s[-1] == 5.0
    never = Patience(spin_s=0.0)
    for _ in range(3):
        source = Source(after=99)
        waited(never, source)(5.0)
        assert source.slept_s == [0.0, 5.0]
