"""What a server's monotonic clock shows, guessed from what it said and how long the saying took."""

from __future__ import annotations

_DRIFT = 1e-4  # how far two machines' clocks part at the most, s/s: two crystals of 50 ppm each


class ServerClock:
    """Keeps the best guess: that of the exchange that travelled for the shortest time.

    The server's answer left it somewhere between the question and the arrival, so that half of the travel
    is how far a guess may be off (RFC 5905, section 10, the clock filter). It grows old as clocks part.

    Attributes:
        ahead_ns: the server's clock less this machine's.
    """

    def __init__(self) -> None:
        self.ahead_ns = 0
        self._off_ns = float("inf")
        self._heard_ns = 0

    def hear(self, shown_ns: int, asked_ns: int, now_ns: int, spent_ns: int = 0) -> None:
        """Take in that the server's clock showed ``shown_ns`` as its answer left.

        Args:
            shown_ns: on the server's clock.
            asked_ns, now_ns: when the question left and when the answer came, on this machine's.
            spent_ns: how long the server had the question.
        """
        off_ns = max(0, now_ns - asked_ns - spent_ns) / 2
        if off_ns <= self._off_ns + _DRIFT * (now_ns - self._heard_ns):
            self.ahead_ns = shown_ns + round(off_ns) - now_ns
            self._off_ns, self._heard_ns = off_ns, now_ns
