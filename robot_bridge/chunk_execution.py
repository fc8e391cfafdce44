"""Plays action chunks: which setpoint is wanted at a given time.

Two real-time domains meet here. The policy thinks in chunks and may be late; the arms want a setpoint
every few milliseconds. What is wanted is a piecewise linear function of time: from where the arms are
wanted when a trajectory starts to its first target, from target to target, and after the last one it
stays. A new trajectory replaces the rest of the old one from its start on, without a jump.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simplevla.errors import ChunkError

Vector = NDArray[np.float64]

_MAX_ACTIONS = 4096
_INSTANT_S = 1e-6


@dataclass(frozen=True)
class Trajectory:
    """Targets with their times; target i is to be reached at ``start_s + (i + 1) dt_s``.

    Attributes:
        start_s: when to set out for target 0, s of the player's clock.
        dt_s: time from target to target, s.
        targets: (K, D) float64 absolute positions; rad and m.
        stamp_ns: names the trajectory and orders it: a larger stamp answers a newer observation.
    """

    start_s: float
    dt_s: float
    targets: NDArray[np.float64]
    stamp_ns: int

    def __post_init__(self) -> None:
        targets = self.targets
        if targets.ndim != 2 or not 1 <= len(targets) <= _MAX_ACTIONS:
            raise ChunkError(
                f"targets have shape {targets.shape}, not (K, D)", f"send 1 to {_MAX_ACTIONS} targets"
            )
        if not np.isfinite(targets).all():
            bad = int(np.flatnonzero(~np.isfinite(targets).all(axis=1))[0])
            raise ChunkError(f"target {bad} is not finite", "check the policy")
        if not (np.isfinite(self.start_s) and 1e-3 <= self.dt_s <= 10):
            raise ChunkError(f"targets are {self.dt_s} s apart", "expected 0.001 to 10 s")

    def times(self) -> Vector:
        """Return (K,) when each target is to be reached, s."""
        return self.start_s + self.dt_s * np.arange(1, len(self.targets) + 1, dtype=np.float64)


def smooth_move(
    start: Vector,
    goal: Vector,
    *,
    speed: Vector,
    acceleration: Vector,
    dt_s: float,
    start_s: float,
    stamp_ns: int,
) -> Trajectory:
    """Return the minimum-jerk move from ``start`` to ``goal``, all joints arriving together.

    Its peak velocity is 15/8 d/T and its peak acceleration 10/sqrt(3) d/T^2 (Flash and Hogan 1985).

    Args:
        start: (D,) positions to set out from; rad and m.
        goal: (D,) positions to end at.
        speed: (D,) what no joint exceeds; rad/s and m/s.
        acceleration: (D,) likewise; rad/s2 and m/s2.
        dt_s: spacing of the targets, s.
        start_s: when to set out, s of the player's clock.
        stamp_ns: names the trajectory.
    """
    distance = np.abs(goal - start)
    duration_s = max(
        float((1.875 * distance / speed).max()),
        float(np.sqrt(10 / np.sqrt(3) * distance / acceleration).max()),
        2 * dt_s,
    )
    count = int(np.ceil(duration_s / dt_s))
    s = np.arange(1, count + 1)[:, None] / count
    blend = s**3 * (10 - 15 * s + 6 * s**2)
    targets = start + (goal - start) * blend
    targets[-1] = goal  # exactly: start + (goal - start) may be a rounding error beside it
    return Trajectory(start_s, dt_s, targets, stamp_ns)


class ChunkPlayer:
    """Holds what is to be done next; time is passed in and never runs backwards."""

    def __init__(self, hold: ArrayLike) -> None:
        """Start by holding ``hold`` (D,)."""
        self._dimension = len(np.asarray(hold))
        self.hold(hold)

    def hold(self, positions: ArrayLike) -> None:
        """Forget what was to be played and want ``positions`` (D,) from now on."""
        self._times = np.array([-np.inf])
        self._points: Vector = np.asarray(positions, dtype=np.float64).reshape(1, self._dimension).copy()
        self._trajectory: Trajectory | None = None
        self._begins_s = np.inf
        self._skipped = 0

    def offer(self, trajectory: Trajectory, now_s: float) -> int:
        """Play ``trajectory`` from its start on, or from now if its start has passed.

        Returns:
            How many of its first targets lie in the past already and are skipped.

        Raises:
            ChunkError: it is stale: every target lies in the past, or a newer one is known.
        """
        if trajectory.targets.shape[1] != self._dimension:
            raise ChunkError(
                f"targets have {trajectory.targets.shape[1]} values, the arms have {self._dimension}",
                "send targets for this embodiment",
            )
        if self._trajectory is not None and trajectory.stamp_ns <= self._trajectory.stamp_ns:
            raise ChunkError(
                f"stale: it is not newer than the one that plays (by "
                f"{(self._trajectory.stamp_ns - trajectory.stamp_ns) / 1e6:.1f} ms)",
                "send trajectories in order",
            )
        times = trajectory.times()
        # A target due now, but for rounding, is past: reaching it in no time at all would be a jump.
        skipped = int(np.searchsorted(times, now_s + _INSTANT_S, side="right"))
        if skipped == len(times):
            raise ChunkError(
                f"stale: its last target was due {now_s - times[-1]:.3f} s ago",
                "check the clocks and the delay of the policy",
            )
        begins = max(now_s, trajectory.start_s)
        kept = np.flatnonzero((self._times > now_s) & (self._times < begins))
        self._points = np.concatenate(
            [
                self.wanted(now_s)[None],
                self._points[kept],
                self.wanted(begins)[None],
                trajectory.targets[skipped:],
            ]
        )
        self._times = np.concatenate([[now_s], self._times[kept], [begins], times[skipped:]])
        self._trajectory, self._begins_s, self._skipped = trajectory, begins, skipped
        return skipped

    def wanted(self, t_s: float) -> Vector:
        """Return (D,) what is wanted at ``t_s``: between two targets, or held before and after."""
        after = int(np.searchsorted(self._times, t_s, side="right"))
        if after == 0:
            return self._points[0].copy()
        if after == len(self._times):
            return self._points[-1].copy()
        begin, end = self._times[after - 1], self._times[after]
        fraction = (t_s - begin) / (end - begin)
        return self._points[after - 1] * (1 - fraction) + self._points[after] * fraction

    def playing(self, t_s: float) -> int | None:
        """Return the stamp of the newest trajectory once it has begun, None before that or in a hold."""
        if self._trajectory is None or t_s <= self._begins_s:
            return None
        return self._trajectory.stamp_ns

    def consumed(self, t_s: float) -> int:
        """Return how many targets of the newest trajectory were played by ``t_s``."""
        if self._trajectory is None:
            return 0
        return max(int(np.searchsorted(self._trajectory.times(), t_s, side="right")) - self._skipped, 0)

    def done(self, t_s: float) -> bool:
        """Return whether nothing is left to play at ``t_s``."""
        return bool(t_s >= self._times[-1])
