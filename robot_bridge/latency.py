"""What a recording says of its chunks: how long each took from exposure to bus, and what limits did."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robot_bridge.recording import Recording
from simplevla.trial import LatencySplit

LEGS = ("capture to request", "wire and processing", "inference", "chunk to bus")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChunkTrace:
    """One chunk's way; times in ns of the system clock.

    Attributes:
        index: of the chunk in its trial.
        capture_ns: exposure of the observation.
        request_ns: the observation left for the server.
        reply_ns: the chunk was back.
        inference_ms: the network's part of that, as the server measured it.
        bus_ns: the first setpoint of this chunk went out; None if none did.
        executed: actions that were played.
    """

    index: int
    capture_ns: int
    request_ns: int
    reply_ns: int
    inference_ms: float
    bus_ns: int | None
    executed: int


@dataclass(frozen=True)
class Leg:
    """Median and 95th percentile of one leg over many chunks, ms."""

    name: str
    median_ms: float
    p95_ms: float


def read_traces(recording: Recording) -> tuple[ChunkTrace, ...]:
    """Return the chunks of a recording in order: what the policy node and the arm node said of each.

    Both name a chunk by the stamp of its trajectory. A chunk that either says nonsense about is left
    out, with a warning.
    """
    executed = {status.stamp_ns: status.values for status in recording.statuses.get("arms/executed", ())}
    traces = []
    for status in recording.statuses.get("policy/chunks", ()):
        asked, played = status.values, executed.get(status.stamp_ns, {})
        try:
            traces.append(
                ChunkTrace(
                    index=int(asked["index"]),
                    capture_ns=int(asked["capture_ns"]),
                    request_ns=int(asked["request_ns"]),
                    reply_ns=int(asked["reply_ns"]),
                    inference_ms=float(asked["inference_ms"]),
                    bus_ns=int(played["first_setpoint_ns"]) if "first_setpoint_ns" in played else None,
                    executed=int(played.get("executed", 0)),
                )
            )
        except (KeyError, ValueError) as error:
            _logger.warning("%s: chunk at %d left out: %s", recording.path, status.stamp_ns, error)
    return tuple(traces)


def count_limit_events(recording: Recording) -> dict[str, int]:
    """Return {cause: how often it began to act on a joint} over a recording."""
    causes = (status.name.removeprefix("limits: ") for status in recording.statuses.get("arms/limits", ()))
    return dict(sorted(Counter(causes).items()))


def legs_ms(traces: Sequence[ChunkTrace]) -> NDArray[np.float64]:
    """Return (N, 4) ms of every leg in ``LEGS`` for the N chunks that reached the bus."""
    rows = [
        (
            (trace.request_ns - trace.capture_ns) / 1e6,
            (trace.reply_ns - trace.request_ns) / 1e6 - trace.inference_ms,
            trace.inference_ms,
            (trace.bus_ns - trace.reply_ns) / 1e6,
        )
        for trace in traces
        if trace.bus_ns is not None
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(LEGS))


def summarise(traces: Sequence[ChunkTrace]) -> list[Leg]:
    """Return every leg and then the total; nothing if no chunk reached the bus."""
    legs = legs_ms(traces)
    if not len(legs):
        return []
    columns = [*zip(LEGS, legs.T, strict=True), ("total", legs.sum(axis=1))]
    return [
        Leg(name, float(np.median(values)), float(np.percentile(values, 95))) for name, values in columns
    ]


def split(traces: Sequence[ChunkTrace]) -> LatencySplit | None:
    """Return the medians that a trial's index keeps; None if no chunk reached the bus."""
    legs = legs_ms(traces)
    if not len(legs):
        return None
    return LatencySplit(
        capture_to_request_ms=float(np.median(legs[:, 0])),
        request_to_reply_ms=float(np.median(legs[:, 1] + legs[:, 2])),
        inference_ms=float(np.median(legs[:, 2])),
        reply_to_bus_ms=float(np.median(legs[:, 3])),
        total_ms=float(np.median(legs.sum(axis=1))),
    )


def one_line(traces: Sequence[ChunkTrace]) -> str:
    """Return the medians on one line, for a terminal."""
    found = split(traces)
    if found is None:
        return "no chunk reached the bus"
    return (
        f"capture -> {found.capture_to_request_ms:.1f} ms -> request -> {found.request_to_reply_ms:.1f} ms "
        f"(inference {found.inference_ms:.1f} ms) -> chunk -> {found.reply_to_bus_ms:.1f} ms -> bus; "
        f"{found.total_ms:.1f} ms in all"
    )
