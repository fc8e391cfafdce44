"""A smooth path through targets: continuous in position, velocity and acceleration, so of bounded jerk.

Between two targets each value is a polynomial of degree five, held as its six Bezier points. Their first
and last three are set by position, velocity and acceleration at the two targets, so neighbours meet
without a step in any of them. A Bezier curve never leaves the range of its points (Farin, "Curves and
Surfaces for CAGD", 5th ed. 2002, ch. 5); velocities and accelerations at the targets are held so small
that these points, and with them the whole path, stay between the two targets: it never overshoots. The
only exception is the first piece of a path that begins in motion: it may run past, but not out of the
bounds that it is given.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_STEEPEST = (
    2.0  # times the lower of the two slopes at a target: with this b1 and b2 lie between the targets
)


class Motion(NamedTuple):
    """Position, velocity and acceleration at one instant, (D,) each; rad or m, and these over s and s2."""

    position: Vector
    velocity: Vector
    acceleration: Vector


class SmoothPath:
    """Passes through every target at its time, begins as it is told, and ends at rest at the last one."""

    def __init__(
        self, begin: Motion, times: Vector, points: Vector, lower: Vector | None, upper: Vector | None
    ) -> None:
        """Lay the path.

        Args:
            begin: the motion at ``times[0]``; its velocity and acceleration are given up as far as they
                would lead out of the bounds.
            times: (N,) increasing, s.
            points: (N, D) where to be at these times; the first is ``begin``'s position.
            lower, upper: (D,) bounds that the path never leaves if the targets lie within; None: no bounds.
        """
        self._times = times
        self._points = points
        self._pieces = _pieces(begin, times, points, lower, upper)

    @property
    def ends_s(self) -> float:
        """When it reaches the last target, s."""
        return float(self._times[-1])

    def between(self, after_s: float, before_s: float) -> tuple[Vector, Vector]:
        """Return times (M,) and points (M, D) of the targets strictly between two times."""
        kept = (self._times > after_s) & (self._times < before_s)
        return self._times[kept], self._points[kept]

    def position(self, t_s: float) -> Vector:
        """Return (D,) where to be at ``t_s``; before the path its begin, after it its last target."""
        if not self._moves(t_s):
            return self._rest(t_s)
        bezier, u, _ = self._piece(t_s)
        return _weights(u, 5) @ bezier

    def motion(self, t_s: float) -> Motion:
        """Return the motion at ``t_s``; at rest before and after the path."""
        if not self._moves(t_s):
            still = np.zeros(self._points.shape[1])
            return Motion(self._rest(t_s), still, still)
        bezier, u, span_s = self._piece(t_s)
        first = 5 * np.diff(bezier, axis=0) / span_s
        second = 4 * np.diff(first, axis=0) / span_s
        return Motion(_weights(u, 5) @ bezier, _weights(u, 4) @ first, _weights(u, 3) @ second)

    def _piece(self, t_s: float) -> tuple[Vector, float, float]:
        """Return the (6, D) Bezier points at ``t_s``, the part of their span that is over, and that, s."""
        piece = int(np.searchsorted(self._times, t_s, side="right")) - 1
        span_s = float(self._times[piece + 1] - self._times[piece])
        return self._pieces[piece], (t_s - float(self._times[piece])) / span_s, span_s

    def _moves(self, t_s: float) -> bool:
        return bool(self._times[0] <= t_s < self._times[-1])

    def _rest(self, t_s: float) -> Vector:
        return self._points[0 if t_s < self._times[0] else -1].copy()


def _weights(u: float, degree: int) -> Vector:
    """Return (degree + 1,) the Bernstein polynomials at ``u``."""
    return np.array([math.comb(degree, i) * u**i * (1 - u) ** (degree - i) for i in range(degree + 1)])


def _pieces(
    begin: Motion, times: Vector, points: Vector, lower: Vector | None, upper: Vector | None
) -> Vector:
    """Return (N - 1, 6, D) Bezier points."""
    spans = np.diff(times)[:, None]
    if not len(spans):
        return np.zeros((0, 6, points.shape[1]))
    slopes = np.diff(points, axis=0) / spans
    velocity = np.zeros_like(points)
    acceleration = np.zeros_like(points)
    velocity[1:-1] = _velocities(slopes, spans)
    acceleration[1:-1] = _accelerations(slopes, spans, velocity[1:-1])
    pieces = np.empty((len(spans), 6, points.shape[1]))
    start, end, h = slice(None, -1), slice(1, None), spans
    pieces[:, 0] = points[start]
    pieces[:, 1] = points[start] + velocity[start] * h / 5
    pieces[:, 2] = points[start] + velocity[start] * h * 2 / 5 + acceleration[start] * h**2 / 20
    pieces[:, 3] = points[end] - velocity[end] * h * 2 / 5 + acceleration[end] * h**2 / 20
    pieces[:, 4] = points[end] - velocity[end] * h / 5
    pieces[:, 5] = points[end]
    first = begin.position + begin.velocity * h[0] / 5
    second = begin.position + begin.velocity * h[0] * 2 / 5 + begin.acceleration * h[0] ** 2 / 20
    pieces[0, 1], pieces[0, 2] = (np.clip(b, lower, upper) for b in (first, second))
    return pieces


def _velocities(slopes: Vector, spans: Vector) -> Vector:
    """Return (N - 2, D) velocities at the inner targets: of the parabola through three, but not steep.

    Zero where the direction changes, and at most twice the lower slope.
    """
    before, after = slopes[:-1], slopes[1:]
    parabola = (before * spans[1:] + after * spans[:-1]) / (spans[:-1] + spans[1:])
    most = _STEEPEST * np.minimum(np.abs(before), np.abs(after)) * (before * after > 0)
    return np.clip(parabola, -most, most)


def _accelerations(slopes: Vector, spans: Vector, velocity: Vector) -> Vector:
    """Return (N - 2, D) accelerations at the inner targets: the parabola's, kept within the two pieces.

    The third Bezier point of a piece is p + 2/5 v h + 1/20 a h^2, seen from either of its ends; it must
    lie between the ends. Without acceleration it does, so both pieces agree on a range around zero.
    """
    wanted = 2 * (slopes[1:] - slopes[:-1]) / (spans[:-1] + spans[1:])
    low, high = np.full_like(wanted, -np.inf), np.full_like(wanted, np.inf)
    for steps, direction, h in (
        (slopes[1:] * spans[1:], 1.0, spans[1:]),
        (-slopes[:-1] * spans[:-1], -1.0, spans[:-1]),
    ):
        there = direction * velocity * h * 2 / 5
        low = np.maximum(low, (np.minimum(steps, 0) - there) * 20 / h**2)
        high = np.minimum(high, (np.maximum(steps, 0) - there) * 20 / h**2)
    return np.clip(wanted, np.minimum(low, 0), np.maximum(high, 0))
