"""Distances between capsules: segments with a radius, which links of an arm are drawn as."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

_POINT_M2 = 1e-12  # squared length below which a segment is a point
_PARALLEL = 1e-9  # share of the lengths' product below which any place of two parallel segments will do


def segment_distances(start_a: Points, end_a: Points, start_b: Points, end_b: Points) -> Points:
    """Return (P,) the distance of each segment a from its segment b.

    The nearest places of the two lines, brought back onto the segments one after the other (Ericson,
    Real-Time Collision Detection, 2005, 5.1.9). A segment may be a point.

    Args:
        start_a, end_a, start_b, end_b: (P, 3), m.
    """
    along_a, along_b, between = end_a - start_a, end_b - start_b, start_a - start_b
    aa, bb, ab = _dots(along_a, along_a), _dots(along_b, along_b), _dots(along_a, along_b)
    a_between, b_between = _dots(along_a, between), _dots(along_b, between)
    safe_aa, safe_bb = np.maximum(aa, _POINT_M2), np.maximum(bb, _POINT_M2)
    spread = aa * bb - ab * ab
    skew = spread > _PARALLEL * aa * bb
    line = (ab * b_between - a_between * bb) / np.where(skew, spread, 1.0)
    s = np.where(skew, _unit(line), 0.0)
    t = _unit((ab * s + b_between) / safe_bb)
    s = _unit((ab * t - a_between) / safe_aa)
    gaps = between + s[:, None] * along_a - t[:, None] * along_b
    distances: Points = np.sqrt(_dots(gaps, gaps))
    return distances


def _dots(a: Points, b: Points) -> Points:
    return np.einsum("ij,ij->i", a, b)


def _unit(values: Points) -> Points:
    return np.minimum(np.maximum(values, 0.0), 1.0)  # np.clip costs three times as much on few values
