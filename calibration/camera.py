"""A pinhole camera with lens distortion, in OpenCV's convention.

Pixels: the centre of the first pixel is (0, 0), as in OpenCV and librealsense. Frame: x right, y down,
z forward, m.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cv2
import msgspec
import numpy as np
import yaml
from msgspec import Meta
from numpy.typing import ArrayLike

from calibration.geometry import Array
from simplevla.config import Config, load_yaml
from simplevla.embodiment import Camera, Positive
from simplevla.files import write_atomic

INTRINSICS = ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3")

_HALF_PIXEL = 0.5

Side = Annotated[int, Meta(ge=16, le=8192)]


class CameraModel(Config):
    """Intrinsics: pinhole in pixels, and k1, k2, p1, p2, k3 of the Brown-Conrady model."""

    width: Side
    height: Side
    fx: Positive
    fy: Positive
    cx: float
    cy: float
    distortion: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)

    @classmethod
    def of_renderer(cls, camera: Camera) -> CameraModel:
        """Return what OpenCV finds in pictures that a renderer makes with ``camera``'s intrinsics.

        A renderer counts from the corner of the first pixel, so its principal point lies half a
        pixel further from zero.
        """
        return cls(
            width=camera.width,
            height=camera.height,
            fx=camera.fx,
            fy=camera.fy,
            cx=camera.cx - _HALF_PIXEL,
            cy=camera.cy - _HALF_PIXEL,
        )

    @classmethod
    def of_embodiment(cls, camera: Camera) -> CameraModel:
        """Return the nominal intrinsics of ``camera``, taken as OpenCV and librealsense count."""
        return cls(
            width=camera.width, height=camera.height, fx=camera.fx, fy=camera.fy, cx=camera.cx, cy=camera.cy
        )

    @classmethod
    def of_values(cls, values: ArrayLike, width: int, height: int) -> CameraModel:
        """Return the camera with the (9,) values in the order of ``INTRINSICS``."""
        fx, fy, cx, cy, *distortion = np.asarray(values, dtype=np.float64).tolist()
        return cls(width=width, height=height, fx=fx, fy=fy, cx=cx, cy=cy, distortion=tuple(distortion))

    def values(self) -> Array:
        """Return (9,) the intrinsics in the order of ``INTRINSICS``."""
        return np.array([self.fx, self.fy, self.cx, self.cy, *self.distortion])

    def matrix(self) -> Array:
        """Return the (3, 3) camera matrix."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]])

    def coefficients(self) -> Array:
        """Return (5,) the distortion coefficients as OpenCV takes them."""
        return np.array(self.distortion)

    def project_with_slopes(self, points_m: Array) -> tuple[Array, Array, Array]:
        """Project (N, 3) points in the camera's frame, with derivatives.

        Returns:
            (N, 2) pixels; (N, 2, 3) their change with the point, px/m; (N, 2, 9) their change with the
            intrinsics, in the order of ``INTRINSICS``.
        """
        pixels, slopes = cv2.projectPoints(
            points_m.reshape(-1, 1, 3), np.zeros(3), np.zeros(3), self.matrix(), self.coefficients()
        )
        seen = np.asarray(pixels, np.float64).reshape(-1, 2)
        by_pixel = np.asarray(slopes, np.float64).reshape(
            len(points_m), 2, -1
        )  # rotation, translation, fx fy cx cy, distortion
        return seen, by_pixel[..., 3:6], by_pixel[..., 6:15]

    def project(self, points_m: ArrayLike) -> Array:
        """Return (N, 2) the pixels of (N, 3) points in the camera's frame."""
        points = np.asarray(points_m, dtype=np.float64).reshape(-1, 1, 3)
        pixels, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), self.matrix(), self.coefficients())
        return np.asarray(pixels, dtype=np.float64).reshape(-1, 2)


def load_camera(path: Path) -> CameraModel:
    """Return the camera in a YAML file.

    Raises:
        ConfigError: the file is missing or breaks the schema.
    """
    return load_yaml(path, CameraModel)


def save_camera(camera: CameraModel, path: Path) -> None:
    """Write ``camera`` as YAML, whole or not at all."""
    write_atomic(path, yaml.safe_dump(msgspec.to_builtins(camera), sort_keys=False).encode())
