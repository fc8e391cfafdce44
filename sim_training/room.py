"""What a scene looks like and what stands still in it: table, wall and floor, lights, paint and cameras.

Table, wall and lights are RoboTwin's. Colours are sRGB outside this file and linear inside the renderer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sapien
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from sim_training.assets import Asset, Mesh, Visual, box
from sim_training.randomisation import CameraShift, Surface, Variation
from simplevla.embodiment import Camera, Vec3
from simplevla.errors import EmbodimentError, UnavailableError

_TABLE_FRICTION = 0.5
_TABLE_SIZE_M = (1.2, 0.7, 0.05)
_WALL_CENTRE_M, _WALL_HALF_M = (0.0, 1.0, 1.5), (3.0, 0.6, 1.5)
_LIGHT_DIRECTION = (0.0, 0.5, -1.0)
_POINT_LIGHTS_M = ((1.0, 0.0, 1.8), (-1.0, 0.0, 1.8))
_AMBIENT, _DIRECTIONAL, _POINT = 0.45, 1.5, 0.9
_NEAR_M, _FAR_M = 0.05, 20.0
_ROWS_AT_ONCE = 16

# Half the shadow's texels save a third of the time of a small picture, in which one pixel covers several.
_SHADOW_TEXELS, _SMALL_SHADOW_TEXELS, _SMALL_WIDTH_PX = 1024, 512, 160


class _Block(NamedTuple):
    """A box that stands still: half of its size, its centre in the world, and its paint."""

    half_m: Vec3
    centre_m: Vec3
    surface: Surface


def new_render_system() -> Any:
    """Return what draws a scene.

    Raises:
        UnavailableError: no graphics driver works.
    """
    try:
        return sapien.render.RenderSystem()
    except RuntimeError as error:
        raise UnavailableError(
            f"no graphics driver can draw the scene: {error}",
            "install Vulkan drivers (Debian, Ubuntu: mesa-vulkan-drivers 24.3 or newer)",
        ) from error


def add_room(scene: Any, variation: Variation, table_top_m: float, *, render: bool) -> None:
    """Add table, legs, wall and floor."""
    friction = _TABLE_FRICTION * variation.friction_factor
    half: Vec3 = (_TABLE_SIZE_M[0] / 2, _TABLE_SIZE_M[1] / 2, _TABLE_SIZE_M[2] / 2)
    table_z = table_top_m - half[2]
    leg = Surface((0.70, 0.69, 0.67))
    leg_half, leg_z = (0.025, 0.025, table_z / 2 - 0.0125), table_z / 2 - 0.0125
    legs = [_Block(leg_half, (x, y, leg_z), leg) for x in (-0.55, 0.55) for y in (-0.3, 0.3)]
    floor = _Block((4.0, 4.0, 0.01), (0.0, 0.0, -0.01), Surface((0.45, 0.44, 0.43)))
    for name, blocks in (
        ("table", [_Block(half, (0.0, 0.0, table_z), variation.table)]),
        ("legs", legs),
        ("wall", [_Block(_WALL_HALF_M, _WALL_CENTRE_M, variation.wall)]),
        ("ground", [floor]),
    ):
        _add_static(scene, name, blocks, friction, render=render)


def add_lights(scene: Any, variation: Variation, cameras: tuple[Camera, ...]) -> None:
    """Add the sun with its shadow, as fine as the widest of ``cameras`` can show, and two lamps."""
    sun, *lamps = (np.array(colour) for colour in variation.light_colours)
    small = max(camera.width for camera in cameras) <= _SMALL_WIDTH_PX
    scene.set_ambient_light([_AMBIENT] * 3)
    scene.add_directional_light(
        _LIGHT_DIRECTION,
        _DIRECTIONAL * sun,
        shadow=True,
        shadow_scale=1.2,
        shadow_map_size=_SMALL_SHADOW_TEXELS if small else _SHADOW_TEXELS,
    )
    for position, lamp in zip(_POINT_LIGHTS_M, lamps, strict=True):
        scene.add_point_light(position, _POINT * lamp, shadow=False)


def add_camera(scene: Any, camera: Camera, shift: CameraShift) -> Any:
    """Add a camera of the embodiment, off its nominal pose by ``shift``, and return its component."""
    component = sapien.render.RenderCameraComponent(camera.width, camera.height, shader("minimal"))
    component.set_perspective_parameters(_NEAR_M, _FAR_M, camera.fx, camera.fy, camera.cx, camera.cy, 0.0)
    offset = np.eye(4)
    offset[:3, :3] = Rotation.from_euler("xyz", shift.rpy_rad).as_matrix()
    offset[:3, 3] = shift.xyz_m
    pose = of_optical_frame(camera.pose_in_world()) * sapien.Pose(offset)
    add_entity(scene, camera.name, pose, component)
    return component


def view(
    scene: Any, position_m: ArrayLike, look_at_m: ArrayLike, *, width: int, height: int, fov_deg: float
) -> NDArray[np.uint8]:
    """Return one picture from anywhere, with a nicer shader than the robot's cameras have."""
    component = sapien.render.RenderCameraComponent(width, height, shader("default"))
    component.set_fovy(np.deg2rad(fov_deg), True)
    component.near, component.far = _NEAR_M, _FAR_M
    entity = add_entity(scene, "view", look_at(position_m, look_at_m), component)
    try:
        scene.update_render()
        component.take_picture()
        return rgb(component)
    finally:
        scene.remove_entity(entity)


def rgb(component: Any) -> NDArray[np.uint8]:
    """Return the picture that a camera took, (H, W, 3) uint8; waits until it is drawn."""
    colour = component.get_picture("Color")[..., :3]
    picture = np.empty(colour.shape, np.uint8)
    # A few rows at a time. Whole temporary pictures are new memory each time, and having the system map
    # that, beside the threads that draw, took a third of the time of a twin's main thread.
    for top in range(0, len(colour), _ROWS_AT_ONCE):
        rows = np.clip(colour[top : top + _ROWS_AT_ONCE], 0, 1)
        rows *= 255
        picture[top : top + _ROWS_AT_ONCE] = np.rint(rows, out=rows)
    return picture


def look_of(asset: Asset) -> Any:
    """Return the render component of an asset."""
    look = sapien.render.RenderBodyComponent()
    for visual in asset.visuals:
        look.attach(_shape(visual.mesh, _material(visual)))
    return look


def look_of_shapes(shapes: Sequence[Any]) -> Any:
    """Return a render component of render shapes; where they are in it cannot be changed any more."""
    look = sapien.render.RenderBodyComponent()
    for shape in shapes:
        look.attach(shape)
    return look


def add_entity(scene: Any, name: str, pose: Any, *components: Any) -> Any:
    """Add a thing made of ``components`` to the scene and return it."""
    entity = sapien.Entity()
    entity.name = name
    for component in components:
        entity.add_component(component)
    entity.pose = pose
    scene.add_entity(entity)
    return entity


def attach(scene: Any, shapes: Sequence[Any], pose: NDArray[np.float64], to: str | None) -> None:
    """Show ``shapes`` at ``pose`` (4, 4), m, on the entity named ``to``, or at rest in the world.

    Raises:
        EmbodimentError: there is no such entity.
    """
    for shape in shapes:
        shape.local_pose = sapien.Pose(pose) * shape.local_pose
    look = look_of_shapes(shapes)
    if to is None:
        add_entity(scene, "look", sapien.Pose(), look)
        return
    for entity in scene.entities:
        if entity.name == to:
            entity.add_component(look)
            return
    raise EmbodimentError(f"there is no {to} in the scene", "name an arm and a link of its URDF")


def look_at(position_m: ArrayLike, look_at_m: ArrayLike) -> Any:
    """Return the pose of a SAPIEN camera (x forward, y left, z up)."""
    position = np.asarray(position_m, dtype=np.float64)
    forward = np.asarray(look_at_m, dtype=np.float64) - position
    forward /= np.linalg.norm(forward)
    left = np.cross((0.0, 0.0, 1.0), forward)
    left /= np.linalg.norm(left)
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([forward, left, np.cross(forward, left)], axis=1)
    matrix[:3, 3] = position
    return sapien.Pose(matrix)


def of_optical_frame(pose: NDArray[np.float64]) -> Any:
    """Return the pose of a SAPIEN camera whose optical frame (x right, y down, z ahead) is at (4, 4)."""
    matrix = pose.copy()
    matrix[:3, :3] = np.stack([pose[:3, 2], -pose[:3, 0], -pose[:3, 1]], axis=1)
    return sapien.Pose(matrix)


def linear(colour: ArrayLike) -> list[float]:
    """Return an sRGB colour as the linear RGBA that the renderer computes with (gamma 2.2)."""
    return [*(float(c) ** 2.2 for c in np.asarray(colour)), 1.0]


def _add_static(scene: Any, name: str, blocks: list[_Block], friction: float, *, render: bool) -> None:
    material = sapien.physx.PhysxMaterial(friction, friction, 0.0)
    body = sapien.physx.PhysxRigidStaticComponent()
    look = sapien.render.RenderBodyComponent() if render else None
    for half, centre, surface in blocks:
        shape = sapien.physx.PhysxCollisionShapeBox(half_size=half, material=material)
        shape.local_pose = sapien.Pose(centre)
        body.attach(shape)
        if look is not None:
            look.attach(_shape(box(half, centre), _paint(surface)))
    add_entity(scene, name, sapien.Pose(), body, *([] if look is None else [look]))


def _shape(mesh: Mesh, material: Any) -> Any:
    return sapien.render.RenderShapeTriangleMesh(
        mesh.vertices, mesh.triangles, mesh.normals, mesh.uvs, material
    )


def _material(visual: Visual) -> Any:
    return sapien.render.RenderMaterial(
        base_color=linear(visual.colour),
        roughness=visual.roughness,
        specular=0.5,
        metallic=visual.metallic,
    )


def _paint(surface: Surface) -> Any:
    material = sapien.render.RenderMaterial(
        base_color=linear(surface.colour), roughness=0.9, specular=0.1, metallic=0.0
    )
    if surface.texture is not None:
        alpha = np.full((*surface.texture.shape[:2], 1), 255, np.uint8)
        material.base_color_texture = sapien.render.RenderTexture2D(
            np.concatenate([surface.texture, alpha], axis=2), "R8G8B8A8Unorm", srgb=True
        )
    return material


def shader(name: str) -> str:
    """Return the folder of one of SAPIEN's shaders."""
    return str(Path(sapien.__file__).parent / "vulkan_shader" / name)
