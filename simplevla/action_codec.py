"""Between continuous actions and the 256 bins that a discrete-token policy predicts.

The binning is OpenVLA's (openvla ``action_tokenizer.py``): values in [-1, 1], bin edges
``linspace(-1, 1, 256)``, and the 255 midpoints as centres; the 256th logit decodes as the last
centre. Normalisation is OpenVLA-OFT's: ``0.5 (a + 1) (high - low + 1e-8) + low``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 256
_EDGES = np.linspace(-1.0, 1.0, BINS)
_CENTRES = np.append((_EDGES[:-1] + _EDGES[1:]) / 2, (_EDGES[-2] + _EDGES[-1]) / 2)
_EPSILON = 1e-8


@dataclass(frozen=True)
class ActionCodec:
    """Statistics of the training actions, and the two directions of the code.

    Attributes:
        low, high: (D,) range that is spread over the bins, in the action's units.
        varied: (D,) False where the action never varied: such a dimension always decodes to the
            middle of its range, whatever the policy says, and carries no gradient.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    varied: NDArray[np.bool_]

    def __post_init__(self) -> None:
        shapes = {self.low.shape, self.high.shape, self.varied.shape}
        if len(shapes) != 1 or self.low.ndim != 1:
            raise ValueError(f"low, high and varied must be (D,) of one length, got {shapes}")
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all()):
            raise ValueError("low and high must be finite")
        if (self.high < self.low).any() or (self.high <= self.low)[self.varied].any():
            raise ValueError("high must be above low wherever the action varies")

    @classmethod
    def fit(cls, actions: ArrayLike, *, min_range: ArrayLike, margin: float = 0.0) -> ActionCodec:
        """Return the codec of ``actions`` (N, D).

        Args:
            min_range: scalar or (D,); a dimension whose range is not larger counts as not varied.
            margin: fraction of the range added on either side.
        """
        values = np.asarray(actions, dtype=np.float64)
        low, high = values.min(axis=0), values.max(axis=0)
        varied = (high - low) > np.broadcast_to(np.asarray(min_range, dtype=np.float64), low.shape)
        pad = np.where(varied, margin * (high - low), 0.0)
        return cls(low - pad, high + pad, varied)

    def encode(self, actions: ArrayLike) -> NDArray[np.int64]:
        """Return the bins (..., D) in 0..254 of ``actions`` (..., D); values out of range are clipped."""
        values = np.asarray(actions, dtype=np.float64)
        unit = 2 * (values - self.low) / (self.high - self.low + _EPSILON) - 1
        unit = np.where(self.varied, np.clip(unit, -1, 1), 0.0)
        return np.clip(np.digitize(unit, _EDGES) - 1, 0, BINS - 2)

    def decode(self, bins: ArrayLike) -> NDArray[np.float64]:
        """Return the actions (..., D) of ``bins`` (..., D) in 0..255.

        Raises:
            ValueError: a bin is out of range.
        """
        index = np.asarray(bins)
        if index.size and (index.min() < 0 or index.max() >= BINS):
            raise ValueError(f"bins must be in 0..{BINS - 1}")
        unit = np.where(self.varied, _CENTRES[index], 0.0)
        return 0.5 * (unit + 1) * (self.high - self.low + _EPSILON) + self.low

    def resolution(self) -> NDArray[np.float64]:
        """Return (D,) the width of one bin, in the action's units."""
        return np.where(self.varied, (self.high - self.low) / (BINS - 1), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, for a manifest."""
        return {"low": self.low.tolist(), "high": self.high.tolist(), "varied": self.varied.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ActionCodec:
        """Return the codec that :meth:`to_dict` described; ValueError if it is not one."""
        return cls(
            np.asarray(data["low"], dtype=np.float64),
            np.asarray(data["high"], dtype=np.float64),
            np.asarray(data["varied"], dtype=bool),
        )


def bin_centres() -> NDArray[np.float64]:
    """Return the (256,) normalised value in [-1, 1] that each bin decodes to."""
    return _CENTRES.copy()
