"""A flat picture in the scene, such as a calibration board, and a camera as imperfect as a real one.

A panel's frame: origin at the picture's top left corner, x right, y down, z into the paper, m.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import sapien
from numpy.typing import ArrayLike, NDArray

from sim_training import room
from sim_training.randomisation import Randomisation, draw
from sim_training.world import World
from simplevla.embodiment import Camera

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]

_THICKNESS_M = 0.002
_BACK = (0.5, 0.5, 0.5, 1.0)
_OVERSAMPLING = 2  # rendered pixels for one of the camera, each way
_MARGIN = 1.12  # how much wider the rendered view is than what the lens shows
_UNDISTORT_STEPS = 20


def add_panel(
    world: World,
    picture: Picture,
    size_m: tuple[float, float],
    *,
    link: tuple[str, str] | None = None,
    pose: ArrayLike,
) -> None:
    """Show a flat picture in the present scene, until the next reset; nothing touches it.

    Args:
        world: where.
        picture: (H, W, 3) or (H, W) uint8, sRGB.
        size_m: its width and height, m.
        link: (arm, link) on which it rides; at rest in the world by default.
        pose: (4, 4) of the panel's frame in the frame of the link, else of the world.

    Raises:
        EmbodimentError: there is no such link.
    """
    world.attach(_panel(picture, size_m), pose, link)


@dataclass(frozen=True)
class Optics:
    """What a lens and a sensor do to a picture.

    Attributes:
        pinhole: fx, fy, cx, cy, px from the first pixel's centre; those of the studio's camera by default.
        distortion: k1, k2, p1, p2, k3 of the Brown-Conrady model.
        blur_px: standard deviation of the blur, px.
        exposure: factor on the light.
        noise: standard deviation of the sensor's noise, of 255.
    """

    pinhole: tuple[float, float, float, float] | None = None
    distortion: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)
    blur_px: float = 0.0
    exposure: float = 1.0
    noise: float = 0.0


class Studio:
    """A room with one panel and one camera, both put where they are wanted, picture by picture.

    Args:
        camera: its size and its intrinsics; pixels count from the corner of the first one.
        picture: (H, W) or (H, W, 3) uint8 what the panel shows.
        size_m: the panel's width and height, m.
        seed: decides colours and lights of the room.
    """

    def __init__(self, camera: Camera, picture: Picture, size_m: tuple[float, float], *, seed: int) -> None:
        self._camera = camera
        variation = draw(Randomisation.all(), seed, cameras=1)
        self._scene: Any = sapien.Scene([sapien.physx.PhysxCpuSystem(), room.new_render_system()])
        room.add_room(self._scene, variation, 0.74, render=True)
        room.add_lights(self._scene, variation, (camera,))
        self._panel = room.add_entity(
            self._scene, "panel", sapien.Pose(), room.look_of_shapes(_panel(picture, size_m))
        )
        fine, wide = _OVERSAMPLING, _MARGIN
        width, height = round(camera.width * fine * wide), round(camera.height * fine * wide)
        self._offset = ((width - camera.width * fine) / 2, (height - camera.height * fine) / 2)
        self._component = sapien.render.RenderCameraComponent(width, height, room.shader("minimal"))
        self._component.set_perspective_parameters(
            0.02,
            20.0,
            camera.fx * fine,
            camera.fy * fine,
            camera.cx * fine + self._offset[0],
            camera.cy * fine + self._offset[1],
            0.0,
        )
        self._eye = room.add_entity(self._scene, "camera", sapien.Pose(), self._component)
        self._maps: dict[Any, tuple[Any, Any]] = {}  # of the last lens

    def __enter__(self) -> Studio:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scene = self._component = self._eye = self._panel = None

    def picture(
        self, camera: ArrayLike, panel: ArrayLike, optics: Optics, rng: np.random.Generator
    ) -> Picture:
        """Return (H, W, 3) uint8 RGB what the camera sees.

        Args:
            camera: (4, 4) pose of its optical frame (x right, y down, z forward) in the room, m.
            panel: (4, 4) pose of the panel's frame in the room, m.
            optics: lens and sensor.
            rng: of the sensor's noise.
        """
        self._eye.pose = room.of_optical_frame(np.asarray(camera, dtype=np.float64))
        self._panel.pose = sapien.Pose(np.asarray(panel, dtype=np.float64))
        self._scene.update_render()
        self._component.take_picture()
        sharp = room.rgb(self._component)
        lens = self._lens(optics)
        bent = cv2.remap(sharp, *lens, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if optics.blur_px > 0:
            bent = cv2.GaussianBlur(bent, (0, 0), optics.blur_px * _OVERSAMPLING)
        size = (self._camera.width, self._camera.height)
        small = cv2.resize(bent, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        # Light adds up before the sensor's curve, so exposure acts on linear values.
        lit = 255 * np.clip((small / 255) ** 2.2 * optics.exposure, 0, 1) ** (1 / 2.2)
        lit += optics.noise * rng.standard_normal(lit.shape, dtype=np.float32)
        return np.round(np.clip(lit, 0, 255)).astype(np.uint8)

    def _lens(self, optics: Optics) -> tuple[Any, Any]:
        """Return for each fine pixel of the distorted picture where it is in the rendered one."""
        camera, fine = self._camera, _OVERSAMPLING
        own = (camera.fx, camera.fy, camera.cx - 0.5, camera.cy - 0.5)
        key = (optics.pinhole or own, optics.distortion)
        if key not in self._maps:
            y, x = np.mgrid[: camera.height * fine, : camera.width * fine].astype(np.float64)
            # Centres of fine pixels, in the camera's pixels counted from the first one's centre.
            seen = np.stack([(x + 0.5) / fine - 0.5, (y + 0.5) / fine - 0.5], axis=-1).reshape(-1, 1, 2)
            criteria = (cv2.TERM_CRITERIA_COUNT, _UNDISTORT_STEPS, 0)
            straight = cv2.undistortPointsIter(
                seen, _matrix(key[0]), np.array(optics.distortion), np.eye(3), _matrix(own), criteria
            ).reshape(*x.shape, 2)
            fine_px = (straight + 0.5) * fine - 0.5 + np.array(self._offset)
            self._maps = {
                key: cv2.convertMaps(
                    fine_px[..., 0].astype(np.float32), fine_px[..., 1].astype(np.float32), cv2.CV_16SC2
                )
            }
        return self._maps[key]


def _matrix(pinhole: tuple[float, float, float, float]) -> Array:
    fx, fy, cx, cy = pinhole
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def _panel(picture: Picture, size_m: tuple[float, float]) -> list[Any]:
    """Return the render shapes of a thin plate that shows ``picture`` towards -z."""
    width, height = size_m
    colour = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
    alpha = np.full((*colour.shape[:2], 1), 255, np.uint8)
    paper = sapien.render.RenderMaterial(
        base_color=[1, 1, 1, 1], roughness=0.9, specular=0.05, metallic=0.0
    )
    paper.base_color_texture = sapien.render.RenderTexture2D(
        np.ascontiguousarray(np.concatenate([colour, alpha], axis=2)),
        "R8G8B8A8Unorm",
        mipmap_levels=max(1, int(np.log2(min(colour.shape[:2])))),  # or a board far away aliases
        filter_mode="linear",
        srgb=True,
    )
    vertices = np.array([[0, 0, 0], [width, 0, 0], [width, height, 0], [0, height, 0]], np.float32)
    face = sapien.render.RenderShapeTriangleMesh(
        vertices,
        np.array([[0, 2, 1], [0, 3, 2]], np.uint32),
        np.tile(np.array([[0, 0, -1]], np.float32), (4, 1)),
        np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32),
        paper,
    )
    back = sapien.render.RenderShapeBox(
        [width / 2, height / 2, _THICKNESS_M / 2], sapien.render.RenderMaterial(base_color=list(_BACK))
    )
    back.local_pose = sapien.Pose([width / 2, height / 2, 0.0005 + _THICKNESS_M / 2])
    return [face, back]
