"""Timing several ways to answer, interleaved: whatever else the machine does falls on all alike."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from policy_server.machine import processor

Times: TypeAlias = dict[str, NDArray[np.float64]]
_WARM_UP_ROUNDS = 10


def interleaved(
    asks: Mapping[str, Callable[[Any], object]],
    questions: Sequence[Any],
    rounds: int,
    *,
    warm_up_rounds: int = _WARM_UP_ROUNDS,
) -> Times:
    """Ask everyone each question in turn, and return {who: (rounds,) ms}, after a few that do not count.

    Garbage is collected before and not during: a pause would fall on one of them.
    """
    times: dict[str, list[float]] = {name: [] for name in asks}
    gc.collect()
    gc.disable()
    try:
        for index in range(-warm_up_rounds, rounds):
            for name, ask in asks.items():
                start = time.perf_counter()
                ask(questions[index % len(questions)])
                if index >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in times.items()}


def table(times: Times, title: str) -> str:
    """Return a Markdown table of medians, 99th percentiles and ratios to the first row."""
    first = float(np.median(next(iter(times.values()))))
    lines = [
        f"| {title} | p50 ms | p99 ms | p99 / p50 | times as fast |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in times.items():
        p50, p99 = np.percentile(values, [50, 99])
        lines.append(f"| {name} | {p50:.2f} | {p99:.2f} | {p99 / p50:.2f} | {first / p50:.2f} |")
    return "\n".join(lines)


def where() -> str:
    """Return what this machine is and how busy it is."""
    return f"{processor()}; {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
