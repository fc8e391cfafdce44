"""What brings a camera's frames to the network's size.

On its own, because those who only look (simulations, pictures for pretraining) need this part of the
network and not transformers, whose import takes longer than all else that they import.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class Resample(nn.Module):
    """Centred crop and antialiased bilinear resize, as two matrix products.

    Equal to cropping and ``torch.nn.functional.interpolate(..., mode="bilinear", antialias=True)``,
    but every back end can compile it, and the crop need not fall on whole pixels.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, source: tuple[int, int], target: tuple[int, int], crop_area: float) -> None:
        super().__init__()
        side = math.sqrt(crop_area)
        rows = resize_matrix(source[0], target[0], side)
        columns = resize_matrix(source[1], target[1], side)
        self.register_buffer("rows", torch.from_numpy(rows).float(), persistent=False)
        self.register_buffer("columns", torch.from_numpy(columns.T.copy()).float(), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Return (..., 3, h, w) float32 in 0..1 of ``frames`` (..., H, W, 3) uint8."""
        image = frames.to(self.rows.dtype).movedim(-1, -3)
        return (self.rows @ (image @ self.columns)) * (1 / 255)


def resize_matrix(source: int, target: int, side: float) -> NDArray[np.float64]:
    """Return the (target, source) weights of an antialiased linear resize of the centred part.

    Args:
        side: fraction of the source's length that is kept.
    """
    scale = source * side / target
    centres = source * (1 - side) / 2 + (np.arange(target) + 0.5) * scale
    reach = max(scale, 1.0)
    distance = np.abs(np.arange(source)[None] + 0.5 - centres[:, None]) / reach
    weights = np.clip(1 - distance, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
