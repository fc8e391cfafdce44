"""Intervals for success rates, so that no rate is reported without its uncertainty."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple


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

    Written out, for importing ``scipy.stats`` would take longer than all else that a node imports.

    Raises:
        ValueError: not 0 <= successes <= trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials cannot be")
    if trials == 0:
        return Rate(0, 0, 0.0, 0.0, 1.0)
    rate, z = successes / trials, NormalDist().inv_cdf(0.5 + confidence / 2)
    share = z * z / trials
    middle = rate + share / 2
    reach = z * math.sqrt(rate * (1 - rate) / trials + share / (4 * trials))
    # At the ends the bound is the rate itself, which rounding would miss.
    low = 0.0 if successes == 0 else (middle - reach) / (1 + share)
    high = 1.0 if successes == trials else (middle + reach) / (1 + share)
    return Rate(successes, trials, rate, low, high)
