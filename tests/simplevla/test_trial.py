"""Trials: what an index keeps, and which of them count in a rate."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from simplevla.errors import RecordError
from simplevla.intervals import wilson
from simplevla.trial import (
    INDEX_NAME,
    FailureCode,
    LatencySplit,
    Outcome,
    Strategy,
    Trial,
    TrialIndex,
    load_index,
    save_index,
)


def trial(outcome, **changes):
    """Return one trial that ended in ``outcome``."""
    one = Trial(
        id="0001",
        task="move_can_pot",
        rig="twin",
        embodiment="piper_dual",
        policy_id="ab" * 32,
        instruction="move the can next to the pot",
        seed=3,
        operator="",
        started_ns=1_700_000_000_000_000_000,
        duration_s=12.5,
        actions=105,
        outcome=outcome,
        failure=FailureCode.NONE if outcome is Outcome.SUCCESS else FailureCode.TIME_LIMIT,
        strategy=Strategy.GRASP,
        latency=LatencySplit(
            capture_to_request_ms=10.0,
            request_to_reply_ms=40.0,
            inference_ms=30.0,
            reply_to_bus_ms=3.0,
            total_ms=53.0,
        ),
        limits={"velocity": 2},
        recording="0001/0001.mcap",
    )
    return msgspec.structs.replace(one, **changes)


@given(st.lists(st.sampled_from(list(Outcome)), max_size=30))
def test_an_index_comes_back_as_it_was(tmp_path_factory, outcomes):
    folder = tmp_path_factory.mktemp("run")
    index = TrialIndex(trials=tuple(trial(o, id=str(i)) for i, o in enumerate(outcomes)))
    save_index(index, folder)
    assert load_index(folder) == index


@given(st.lists(st.sampled_from(list(Outcome)), max_size=60))
def test_only_successes_and_failures_count(outcomes):
    rate = TrialIndex(trials=tuple(map(trial, outcomes))).success()
    assert rate.successes == outcomes.count(Outcome.SUCCESS)
    assert rate.trials == rate.successes + outcomes.count(Outcome.FAILURE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("not json", "is not an index"),
        ('{"trials": [{"id": 3}], "schema": 1}', "is not an index"),
        ('{"trials": [], "schema": 99}', "schema 99"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text, says):
    if text is not None:
        (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(RecordError, match=says):
        load_index(tmp_path)


# Wilson (1927), figures as the score-interval formula gives them.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (9, 10, 0.596, 0.982),
        (45, 50, 0.786, 0.957),
        (0, 5, 0.0, 0.434),
        (5, 5, 0.566, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_intervals(successes, trials, low, high):
    rate = wilson(successes, trials)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=5e-4)


@given(st.integers(0, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_wilson_interval_holds_the_rate_and_mirrors(counts):
    successes, trials = counts
    rate, mirror = wilson(successes, trials), wilson(trials - successes, trials)
    assert 0 <= rate.low <= rate.rate + 1e-12
    assert rate.rate <= rate.high + 1e-12 <= 1 + 2e-12
    assert (rate.low, rate.high) == pytest.approx((1 - mirror.high, 1 - mirror.low))
    if trials:
        theirs = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        assert (rate.low, rate.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 2), (1, 0)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match="cannot be"):
        wilson(successes, trials)


def test_a_rate_is_written_with_its_interval():
    assert str(wilson(9, 10)) == "9/10 = 90.0 % (95 % interval 59.6-98.2 %)"
