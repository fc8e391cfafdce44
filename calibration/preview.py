"""The live picture with the corners that were found and what of the picture they have covered so far.

In a window where there is a display; always in a file, which any picture viewer follows.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.detection import Detection, draw_detection
from simplevla.files import write_atomic

_EVERY_S = 0.5
_CELLS = (8, 6)
_SEEN = (40, 180, 90)


class Preview:
    """A window or a file. A context manager.

    Args:
        folder: gets ``preview.png``.
        window: whether to open a window as well; by default where there is a display.
    """

    def __init__(self, folder: Path, *, window: bool | None = None) -> None:
        self._path = folder / "preview.png"
        has_display = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
        self._window = has_display if window is None else window
        self._written_s = float("-inf")
        self._covered: dict[str, NDArray[np.bool_]] = {}

    def __enter__(self) -> Preview:
        return self

    def __exit__(self, *_: object) -> None:
        if self._window:
            cv2.destroyAllWindows()

    def show(self, camera: str, image: NDArray[np.uint8], found: Detection | None, text: str) -> None:
        """Show a picture, (H, W, 3) uint8 RGB, with the corners found in it and a line of text."""
        columns, rows = _CELLS
        covered = self._covered.setdefault(camera, np.zeros((rows, columns), dtype=bool))
        height, width = image.shape[:2]
        if found is not None:
            x, y = (found.corners_px / (width, height) * (columns, rows)).astype(int).T
            covered[np.clip(y, 0, rows - 1), np.clip(x, 0, columns - 1)] = True
        if time.monotonic() - self._written_s < _EVERY_S and found is None:
            return
        self._written_s = time.monotonic()
        picture = image if found is None else draw_detection(image, found)
        drawn = _annotated(picture, covered, f"{camera}: {text}, {100 * covered.mean():.0f} % covered")
        write_atomic(self._path, cv2.imencode(".png", drawn)[1].tobytes())
        if self._window:
            cv2.imshow("simplevla calibrate", drawn)
            cv2.waitKey(1)


def _annotated(picture: NDArray[np.uint8], covered: NDArray[np.bool_], text: str) -> NDArray[np.uint8]:
    """Return a BGR copy with the covered cells tinted and a line of text at the bottom."""
    out = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    height, width = out.shape[:2]
    tint = cv2.resize(covered.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    mask = tint.astype(bool)
    out[mask] = (0.8 * out[mask] + 0.2 * np.array(_SEEN)).astype(np.uint8)
    cv2.rectangle(out, (0, height - 24), (width, height), (30, 30, 30), -1)
    cv2.putText(out, text, (8, height - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (240, 240, 240), 1, cv2.LINE_AA)
    return np.asarray(out, np.uint8)
