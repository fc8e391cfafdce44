"""How often a process that ends by itself may be started again, before that is no help any more."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

DELAY_S = 1.0
_MOST, _WITHIN_S = 3, 120.0


class Respawns:
    """Counts the starts of one process; at most three in two minutes.

    Args:
        clock: s, never running backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=_MOST)

    def allowed(self) -> bool:
        """Return whether it may be started once more, and count that if so."""
        now_s = self._clock()
        if len(self._times) == _MOST and now_s - self._times[0] < _WITHIN_S:
            return False
        self._times.append(now_s)
        return True
