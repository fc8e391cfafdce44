"""Plays action chunks: which setpoint is wanted at a given time.

Two real-time domains meet here. The policy thinks in chunks and may be late; the arms want a setpoint
every few milliseconds. What is wanted follows a smooth path (:mod:`robot_bridge.smooth_path`) from where
the arms are wanted when a trajectory starts through target after target, at rest at the last one. A new
trajectory replaces the rest of the old one from its start on; the path is laid anew from the motion of
that moment, so that neither position nor velocity nor acceleration jumps. A chunk that comes before the
last target of the one before is due therefore leaves no seam at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robot_bridge.smooth_path import Motion, SmoothPath, Vector
from simplevla.errors import ChunkError

TOO_NEAR = 0.5  # of the time between two targets: a target due sooner is not made for

_MAX_ACTIONS = 4096
_INSTANT_S = 1e-6
_KEPT = 4  # trajectories whose progress is told


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
        dt_s: spacing of the targets, s; wider on a move of very many.
        start_s: when to set out, s of the player's clock.
        stamp_ns: names the trajectory.
    """
    distance = np.abs(goal - start)
    duration_s = max(
        float((1.875 * distance / speed).max()),
        float(np.sqrt(10 / np.sqrt(3) * distance / acceleration).max()),
        2 * dt_s,
    )
    count = min(int(np.ceil(duration_s / dt_s)), _MAX_ACTIONS)
    dt_s = max(dt_s, duration_s / count)
    s = np.arange(1, count + 1)[:, None] / count
    blend = s**3 * (10 - 15 * s + 6 * s**2)
    targets = start + (goal - start) * blend
    targets[-1] = goal  # exactly: start + (goal - start) may be a rounding error beside it
    return Trajectory(start_s, dt_s, targets, stamp_ns)


class Played(NamedTuple):
    """How many targets of the trajectory with this stamp were reached."""

    stamp_ns: int
    reached: int


class ChunkPlayer:
    """Holds what is to be done next; time is passed in and never runs backwards."""

    def __init__(self, hold: ArrayLike, bounds: tuple[Vector, Vector] | None = None) -> None:
        """Start by holding ``hold`` (D,).

        Args:
            hold: where.
            bounds: (D,) lower and upper positions that nothing between targets within them leaves.
        """
        self._dimension = len(np.asarray(hold))
        self._lower: Vector | None
        self._upper: Vector | None
        self._lower, self._upper = bounds if bounds is not None else (None, None)
        self.hold(hold)

    def hold(self, positions: ArrayLike) -> None:
        """Forget what was to be played and want ``positions`` (D,) from now on."""
        place = np.asarray(positions, dtype=np.float64).reshape(self._dimension).copy()
        self._path = self._through(Motion(place, 0 * place, 0 * place), np.array([-np.inf]), place[None])
        self._taken: tuple[_Taken, ...] = ()

    def offer(self, trajectory: Trajectory, now_s: float) -> int:
        """Play ``trajectory`` from its start on, or from now if its start has passed.

        The motion of this moment goes on without a step in velocity or acceleration. What the
        trajectories before wanted until the new one's start is still done.

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
        newest_ns = self._taken[-1].stamp_ns if self._taken else None
        if newest_ns is not None and trajectory.stamp_ns <= newest_ns:
            raise ChunkError(
                f"stale: it is not newer than the one that plays (by "
                f"{(newest_ns - trajectory.stamp_ns) / 1e6:.1f} ms)",
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
        self._taken = (
            *(taken.until(begins) for taken in self._taken if taken.begins_s < begins),
            _Taken(trajectory.stamp_ns, begins, times[skipped:]),
        )[-_KEPT:]
        self._lay(trajectory, skipped, begins, now_s)
        return skipped

    def wanted(self, t_s: float) -> Vector:
        """Return (D,) what is wanted at ``t_s``: between two targets, or held before and after."""
        return self._path.position(t_s)

    def motion(self, t_s: float) -> Motion:
        """Return what is wanted at ``t_s`` with its velocity and acceleration."""
        return self._path.motion(t_s)

    def played(self, t_s: float) -> tuple[Played, ...]:
        """Return how far each of the last trajectories came by ``t_s``, of those that have begun.

        Oldest first; nothing in a hold.
        """
        return tuple(
            Played(taken.stamp_ns, int(np.searchsorted(taken.times, t_s, side="right")))
            for taken in self._taken
            if taken.begins_s < t_s
        )

    def done(self, t_s: float) -> bool:
        """Return whether nothing is left to play at ``t_s``."""
        return bool(t_s >= self._path.ends_s)

    def _lay(self, trajectory: Trajectory, skipped: int, begins: float, now_s: float) -> None:
        """Lay the path from this moment through what is left of the old one and all of the new one."""
        times, targets = trajectory.times()[skipped:], trajectory.targets[skipped:]
        if trajectory.start_s < now_s:
            # Late: a target that is due at once is reached by nothing but a jerk; make for the one after.
            near = int(np.searchsorted(times, now_s + TOO_NEAR * trajectory.dt_s))
            near = min(near, len(times) - 1)
            times, targets = times[near:], targets[near:]
        motion = self._path.motion(now_s)
        # A target due now, but for rounding, would make a piece too short to hold the motion.
        kept_times, kept = self._path.between(now_s + _INSTANT_S, begins - _INSTANT_S)
        knots = [(np.array([now_s]), motion.position[None]), (kept_times, kept)]
        if begins > now_s + _INSTANT_S:
            knots.append((np.array([begins]), self._path.position(begins)[None]))
        knots.append((times, targets))
        self._path = self._through(
            motion, np.concatenate([t for t, _ in knots]), np.concatenate([p for _, p in knots])
        )

    def _through(self, motion: Motion, times: Vector, points: Vector) -> SmoothPath:
        return SmoothPath(motion, times, points, self._lower, self._upper)


@dataclass(frozen=True)
class _Taken:
    """A trajectory that was taken: from when on it counts, and when its targets are reached."""

    stamp_ns: int
    begins_s: float
    times: Vector

    def until(self, t_s: float) -> _Taken:
        """Return it without what is not reached by ``t_s``, when the next one takes over."""
        return replace(self, times=self.times[self.times <= t_s + _INSTANT_S])
