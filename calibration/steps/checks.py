"""What every step says of its checks, and how poses are compared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simplevla.session_record import Check

Array = NDArray[np.float64]


def one_line(check: Check) -> str:
    """Return a check in words."""
    figures = ", ".join(
        f"{name} {value:.3g}" + (f" (limit {check.limits[name]:g})" if name in check.limits else "")
        for name, value in check.figures.items()
    )
    return f"{'pass' if check.passed else 'FAIL'}  {check.name}: {figures}"


def difference(a: Array, b: Array) -> tuple[float, float]:
    """Return how far apart two (4, 4) poses are, mm, and by how much they are turned, deg."""
    turn = a[:3, :3].T @ b[:3, :3]
    sine = 0.5 * np.linalg.norm([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    angle = np.arctan2(sine, 0.5 * (np.trace(turn) - 1))
    return 1e3 * float(np.linalg.norm(a[:3, 3] - b[:3, 3])), float(np.degrees(angle))
