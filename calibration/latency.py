"""How late things are, from a swing that arm, bus and camera all saw.

Two signals of one motion differ by a shift in time. It is found by least squares: the later signal is a
parabola of ``earlier(t - delay)`` with all three coefficients free, so that only the shape counts: a joint
that turns moves a board in a picture nearly along a line, and nearly in proportion. The delay's standard
deviation follows from the curvature of the cost and from the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from simplevla.errors import CalibrationError

Vector = NDArray[np.float64]

SEARCH_S = (-0.15, 0.35)  # delays that are looked for
_GRID_S = 0.002
_LEAST_POINTS = 12
_STEP_S = 1e-3
_WORST_FIT = 0.1  # residual over signal, both RMS: above it the two do not show one motion


class NoCommonMotionError(CalibrationError):
    """Two recordings do not show the same motion, so that no delay can be read from them."""

    code = "no_common_motion"


@dataclass(frozen=True)
class Delay:
    """How much later one signal is than another.

    Attributes:
        seconds: the delay.
        std_s: its standard deviation.
        residual: what the fit leaves, as a part of the signal (RMS over RMS).
    """

    seconds: float
    std_s: float
    residual: float


def delay_between(earlier_ns: Vector, earlier: Vector, later_ns: Vector, later: Vector) -> Delay:
    """Return how much later ``later`` shows the motion of ``earlier``.

    Args:
        earlier_ns: (N,) rising times of the dense signal, ns.
        earlier: (N,) its values.
        later_ns: (M,) times of the other signal, ns; those too near the ends are left out.
        later: (M,) its values, in any unit and with any sign.

    Raises:
        NoCommonMotionError: there are too few common points, one signal does not move, or no delay
            within ``SEARCH_S`` makes them agree.
    """
    origin = earlier_ns[0]
    dense_s, sparse_s = (earlier_ns - origin) / 1e9, (later_ns - origin) / 1e9
    inside = (sparse_s - SEARCH_S[1] >= dense_s[0]) & (sparse_s - SEARCH_S[0] <= dense_s[-1])
    times, values = sparse_s[inside], later[inside]
    if len(times) < _LEAST_POINTS or np.ptp(earlier) < 1e-9 or np.ptp(values) < 1e-9:
        raise NoCommonMotionError(
            f"{len(times)} usable points, {_LEAST_POINTS} are needed, on both of which something moves",
            "swing longer or further, and keep the board in the picture",
        )

    def cost(delay_s: float) -> float:
        return float((_residual(np.interp(times - delay_s, dense_s, earlier), values) ** 2).sum())

    grid = np.arange(*SEARCH_S, _GRID_S)
    start = float(grid[int(np.argmin([cost(delay) for delay in grid]))])
    found = minimize_scalar(
        cost, bounds=(start - 2 * _GRID_S, start + 2 * _GRID_S), method="bounded", options={"xatol": 1e-6}
    )
    delay_s, least = float(found.x), float(found.fun)
    variance = least / max(len(times) - 4, 1)
    curvature = (cost(delay_s + _STEP_S) - 2 * least + cost(delay_s - _STEP_S)) / _STEP_S**2
    residual = float(np.sqrt(least / len(times)) / np.std(values))
    inside_search = SEARCH_S[0] + _GRID_S < delay_s < SEARCH_S[1] - _GRID_S
    if not inside_search or residual > _WORST_FIT or curvature <= 0:
        raise NoCommonMotionError(
            f"no delay from {SEARCH_S[0]:g} to {SEARCH_S[1]:g} s makes the two agree "
            f"(best {1e3 * delay_s:.0f} ms, which leaves {100 * residual:.0f} % unexplained)",
            "check that both recordings are of the same swing, and that the arm alone moved the board",
        )
    return Delay(delay_s, float(np.sqrt(2 * variance / curvature)), residual)


def principal(points: Vector) -> Vector:
    """Return (M,) how far each of (M, 2) points is along the direction in which they vary most."""
    centred = points - points.mean(axis=0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    along: Vector = centred @ direction
    return along


def swing(
    centre: Vector, joint: int, *, amplitude: float, period_s: float, cycles: int, dt_s: float
) -> Vector:
    """Return (K, D) targets that swing one joint about ``centre`` and end there.

    The swing swells within the first cycle and fades within the last, so that it starts and ends at
    rest.
    """
    duration_s = cycles * period_s
    t = np.arange(1, round(duration_s / dt_s) + 1) * dt_s
    edge = np.clip(np.minimum(t, duration_s - t) / period_s, 0.0, 1.0)
    envelope = edge**2 * (3 - 2 * edge)
    targets = np.tile(centre, (len(t), 1))
    targets[:, joint] += amplitude * envelope * np.sin(2 * np.pi * t / period_s)
    return targets


def _residual(model: Vector, values: Vector) -> Vector:
    """Return (M,) what is left of ``values`` after the best parabola of ``model``."""
    design = np.stack([np.ones_like(model), model, model**2], axis=1)
    solution, *_ = np.linalg.lstsq(design, values, rcond=None)
    left: Vector = values - design @ solution
    return left
