"""The estimate that most views agree on, and the names of those that do not agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.geometry import Array
from calibration.refinement import Estimate, Model, Pictures, arm_scale, evaluate, fit, noise_scales
from calibration.starts import start

LEAST_INLIERS = 2 / 3  # fewer views than this part agreeing is no agreement

_MEDIAN_CHI2, _CUT_CHI2 = 5.348, 24.1  # of 6 degrees of freedom: median, and exceeded once in 2000
_ROUNDS = 12
_MOST_SCALE = 6.0  # a noise more times the expected than this is no noise


@dataclass(frozen=True, eq=False)
class Agreement:
    """An estimate and the views behind it.

    Attributes:
        inliers: (N,) which views agree.
        consistent: whether enough views agree, with about the noise that was expected.
    """

    estimate: Estimate
    inliers: NDArray[np.bool_]
    consistent: bool


def agree(
    model: Model,
    rng: np.random.Generator,
    *,
    pictures: Pictures | None = None,
    scaled: Sequence[str] | None = None,
) -> Agreement:
    """Return what most views agree on.

    From a start that most views bear out, views are left out and taken in again, and the noise is
    estimated from those that are in, until nothing changes.

    Args:
        model: unknowns and data.
        rng: of the groups of views that starting values are drawn from.
        pictures: the corners, for the last fits.
        scaled: the sources of noise whose size is estimated, the arm's by default; others are as given.
    """
    scaled = list(model.arm.parts()) if scaled is None else scaled
    camera, board = start(model, rng)
    first = evaluate(model, camera, board)
    scales = dict(first.scales)
    middle = float(np.sqrt(np.median(first.distances) / _MEDIAN_CHI2))
    scales |= dict.fromkeys(scaled, float(np.clip(middle, 1.0, _MOST_SCALE)))
    estimate = fit(model, camera, board, weights=_trusted(first.distances / middle**2), scales=scales)
    inliers = estimate.distances < _CUT_CHI2
    for _ in range(_ROUNDS):
        weights = inliers.astype(np.float64)
        if inliers.sum() >= 4:
            scales = noise_scales(model, estimate, weights, of=scaled)
        estimate = fit(
            model,
            estimate.camera,
            estimate.board,
            weights=weights,
            scales=scales,
            offsets_rad=estimate.offsets_rad,
        )
        now = estimate.distances < _CUT_CHI2
        if (now == inliers).all():
            break
        inliers = now
    if pictures is not None and inliers.sum() >= 4:
        estimate = _polished(model, estimate, inliers, pictures, scaled)
    enough = inliers.sum() >= LEAST_INLIERS * len(inliers)
    plausible = arm_scale(model, estimate.scales) < _MOST_SCALE
    return Agreement(estimate, inliers, bool(enough and plausible))


def _polished(
    model: Model,
    estimate: Estimate,
    inliers: NDArray[np.bool_],
    pictures: Pictures,
    scaled: Sequence[str],
) -> Estimate:
    """Return the estimate that minimises the reprojection error itself, of the views that agree."""
    keep = np.flatnonzero(inliers)
    part, few = model.subset(keep), pictures.of(keep)
    ones = np.ones(len(keep))
    found = estimate
    for _ in range(2):
        start_from: dict[str, Any] = {
            "scales": found.scales,
            "offsets_rad": found.offsets_rad,
            "pictures": few,
        }
        found = fit(part, found.camera, found.board, **start_from)
        scales = noise_scales(part, found, ones, of=scaled, pictures=few)
        found = fit(part, found.camera, found.board, **start_from | {"scales": scales})
    whole = evaluate(model, found.camera, found.board, offsets_rad=found.offsets_rad, scales=found.scales)
    return replace(whole, covariance=found.covariance)


def _trusted(distances: Array) -> Array:
    """Return (N,) weights that fall off for views far from the start (Geman and McClure)."""
    return (_CUT_CHI2 / (_CUT_CHI2 + distances)) ** 2
