"""Waiting for what may come at once: look again for a moment, then sleep.

To be woken costs tens of microseconds. Who was not kept waiting for longer than a moment the last time may
look again and again for that moment this time, before going to sleep; who waits for a robot's next
picture, or for a network that computes for milliseconds, sleeps at once. Not for what ZMQ brings: its own
threads need the processor for that, which whoever looks would take from them on a small machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

SPIN_S = 8e-4  # more than an answer takes whose way finds cold caches, less than any network computes

_Found = TypeVar("_Found")


class Patience:
    """One waiter's memory of how long it had to wait the last time."""

    def __init__(self, spin_s: float = SPIN_S) -> None:
        """Take the moment.

        Args:
            spin_s: the longest time that is spent looking before going to sleep, s; 0 for none. Nor is
                any where this process has one processor alone: whoever answers needs it.
        """
        self._spin_s = spin_s if len(os.sched_getaffinity(0)) > 1 else 0.0
        self._was_short = False

    def wait(self, look: Callable[[float], _Found], timeout_s: float) -> _Found:
        """Return what ``look`` finds, or nothing (a false value) after ``timeout_s``.

        Args:
            look: called with how long it may sleep, s, 0 for not at all.
            timeout_s: how long to wait in all, s.
        """
        found = look(0.0)
        if found or timeout_s <= 0:
            return found
        start_s = time.perf_counter()
        if self._was_short and timeout_s > self._spin_s:
            while not found and time.perf_counter() - start_s < self._spin_s:
                found = look(0.0)
        if not found:
            found = look(timeout_s)
        self._was_short = bool(found) and time.perf_counter() - start_s < self._spin_s
        return found

    def forget(self) -> None:
        """Sleep at once the next time."""
        self._was_short = False
