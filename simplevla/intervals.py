"""Intervals for success rates, so that no rate is reported without its uncertainty."""

from __future__ import annotations

from typing import NamedTuple

from scipy.stats import binomtest


class Rate(NamedTuple):
    """A success rate with its Wilson score interval."""

    successes: int
    trials: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.successes}/{self.trials} = {100 * self.rate:.1f} % "
            f"(95 % interval {100 * self.low:.1f}-{100 * self.high:.1f} %)"
        )


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Rate:
    """Return the rate and its Wilson interval (Wilson 1927); zero trials give the interval [0, 1].

    Raises:
        ValueError: not 0 <= successes <= trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials cannot be")
    if trials == 0:
        return Rate(0, 0, 0.0, 0.0, 1.0)
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Rate(successes, trials, successes / trials, float(interval.low), float(interval.high))
