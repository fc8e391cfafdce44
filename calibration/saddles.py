"""Corners of a printed chessboard to hundredths of a pixel.

Four edges meet in a corner, and along each of them the picture's gradient is across the line that leads
to the corner: ``g . (x - c) = 0`` (Foerstner and Guelch 1987, which OpenCV's ``cornerSubPix`` solves as
well, in an upright rectangle). On a ChArUco board there are markers beside the edges. A rectangle that is
wide enough to hold a good length of edge holds edges of markers too, most of all on a tilted board, and
they pull the corner by up to a pixel. Here the window is a cross of bands along the four edges, as the
board's homography foreshortens them, and no wider than what is free of markers.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.geometry import Array

_ARM = 0.3  # of a square: how far along the edges; further, a lens bends them
_RIM_PX = 2.3  # kept from a marker, whose own edge is blurred and differentiated as wide as that
_LEAST_PX = 1.0  # half the width of a band at least
_MOST_REACH_PX = 40
_STEPS, _DONE_PX = 8, 1e-3
_FAR = 0.15  # of a square, and at least 2 px: a corner that goes further was pulled by something else


def refined(grey: NDArray[np.uint8], corners_px: Array, squares: Array, gap: float) -> Array:
    """Return (K, 2) the corners, px, refined from within a pixel or two; one that is lost stays.

    Args:
        grey: (H, W) uint8 the picture.
        corners_px: (K, 2) about where they are, K at least 4, not in one line.
        squares: (K, 2) where they are on the board, counted in squares.
        gap: how far from an edge a marker begins, as a part of a square.
    """
    slopes = _slopes(squares, corners_px)
    to_board = np.linalg.inv(slopes)
    across = 1 / np.linalg.norm(
        to_board, axis=2
    )  # px a square, across the lines on which one coordinate is fixed
    wide = np.maximum(gap - _RIM_PX / across, _LEAST_PX / across)
    long = np.maximum(_ARM, 2 * _LEAST_PX / across)
    reach = int(np.ceil(min(_ARM * np.abs(slopes).sum(axis=2).max() + 2, _MOST_REACH_PX)))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    around = np.stack([x.ravel(), y.ravel()], axis=1)
    right, down = (cv2.Sobel(grey, cv2.CV_32F, *axis, ksize=3) for axis in ((1, 0), (0, 1)))
    last = np.array(grey.shape[::-1]) - 2
    found = corners_px.copy()
    for _ in range(_STEPS):
        pixels = np.rint(found).astype(np.int64)[:, None] + around
        inside = ((pixels >= 1) & (pixels <= last)).all(axis=2)
        column, row = np.moveaxis(np.clip(pixels, 1, last), 2, 0)
        gradient = np.stack([right[row, column], down[row, column]], axis=2).astype(np.float64)
        offsets = pixels - found[:, None]
        away = np.abs(offsets @ np.swapaxes(to_board, 1, 2))
        first, second = (_band(away, across, wide, long, axis) for axis in (0, 1))
        weighted = gradient * (np.maximum(first, second) * inside)[..., None]
        information = np.swapaxes(weighted, 1, 2) @ gradient
        information += 1e-9 * np.trace(information, axis1=1, axis2=2)[:, None, None] * np.eye(
            2
        ) + 1e-9 * np.eye(2)
        pulled = np.swapaxes(weighted, 1, 2) @ np.sum(gradient * offsets, axis=2, keepdims=True)
        step = np.linalg.solve(information, pulled)[..., 0]
        found = found + step
        if np.abs(step).max() < _DONE_PX:
            break
    lost = ~(np.linalg.norm(found - corners_px, axis=1) < np.maximum(2.0, _FAR * across.min(axis=1)))
    found[lost] = corners_px[lost]
    return np.asarray(found, np.float64)


def _slopes(squares: Array, corners_px: Array) -> Array:
    """Return (K, 2, 2) how pixels change with squares at each corner, by the board's homography."""
    matrix: Any = cv2.findHomography(squares, corners_px, 0)[0]
    ahead = np.concatenate([squares, np.ones((len(squares), 1))], axis=1) @ matrix.T
    at = ahead[:, :2, None] / ahead[:, 2:, None]
    return np.asarray((matrix[:2, :2] - at * matrix[2, :2]) / ahead[:, 2:, None], np.float64)


def _band(away: Array, across: Array, wide: Array, long: Array, axis: int) -> Array:
    """Return (K, P) the weight of pixels in the band along the edge on which a coordinate is fixed.

    It falls from 1 to 0 within a pixel, so that it changes smoothly while a corner moves.
    """
    other = 1 - axis
    narrow = (wide[:, None, axis] - away[..., axis]) * across[:, None, axis]
    short = (long[:, None, other] - away[..., other]) * across[:, None, other]
    inside: Array = np.clip(narrow + 0.5, 0.0, 1.0) * np.clip(short + 0.5, 0.0, 1.0)
    return inside
