"""Pictures as JPEG, for thin links between robot and server. It loses a little: never the default."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simplevla.errors import MissingExtraError, ObservationError


def encode_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Return ``image`` (H, W, 3) RGB as the bytes of a JPEG file (N,).

    Args:
        image: what was seen.
        quality: 1 to 100.

    Raises:
        ObservationError: it is no such image, or quality is out of range.
        MissingExtraError: Pillow is not installed.
    """
    from_array = _pillow().fromarray
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not 1 <= quality <= 100:
        raise ObservationError(
            f"{image.dtype} {image.shape} cannot be sent as JPEG of quality {quality}",
            "send RGB images with a quality of 1 to 100",
        )
    stream = io.BytesIO()
    from_array(np.ascontiguousarray(image)).save(stream, "JPEG", quality=quality)
    return np.frombuffer(stream.getvalue(), np.uint8)


def decode_jpeg(data: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Return the picture (height, width, 3) RGB in ``data`` (N,).

    The size that the file claims is read first, and nothing is unpacked unless it is the one expected.

    Raises:
        ObservationError: it is no JPEG, of another size or without three colours, or damaged.
        MissingExtraError: Pillow is not installed.
    """
    image = _pillow()
    try:
        with image.open(io.BytesIO(data.tobytes()), formats=("JPEG",)) as picture:
            if picture.size != (width, height) or picture.mode != "RGB":
                have = "x".join(map(str, picture.size))
                raise ObservationError(
                    f"the JPEG is {picture.mode} {have}, not RGB {width}x{height}",
                    "send RGB in the size that the embodiment names",
                )
            return np.asarray(picture, dtype=np.uint8)
    except ObservationError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds, some of them bare
        raise ObservationError(f"not a sound JPEG: {error}"[:200], "send the whole file") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("Pillow", "robot") from error
    return Image
