"""The simulated scene: a table, the arms of an embodiment, the things of a task, and cameras.

World frame: x right, y away from the robots, z up, metres. Table, wall, lights and time step are
RoboTwin's. Every reset builds the scene anew, which costs milliseconds and leaves no trace of the
episode before, so that a seed gives the same trajectory whatever came first.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's CPU renderer: threads cost more than they bring

try:
    import sapien
except ImportError as error:
    from simplevla.errors import MissingExtraError

    raise MissingExtraError("sapien", "sim") from error

from sim_training.assets import Asset, Mesh, Visual, box
from sim_training.randomisation import (
    PLACEMENT_KEY,
    CameraShift,
    Randomisation,
    Surface,
    Variation,
    draw,
    generator,
)
from sim_training.tasks.base import TABLE_TOP_M, Circle, Judge, Placement, Task
from simplevla.embodiment import Arm, Camera, Embodiment
from simplevla.errors import EmbodimentError, UnavailableError
from simplevla.files import share_dir
from simplevla.trial import FailureCode, Strategy

Array = NDArray[np.float64]

PHYSICS_DT_S = 1 / 250

_WATCH_EVERY = 5  # physics steps between two looks of the judge
_SETTLE_STEPS = 50
_MAX_STRAYS = 6

# A joint answers like a critically damped spring of this frequency: a setpoint that moves steadily
# is followed 2 / frequency = 33 ms late.
_JOINT_FREQUENCY_RAD_S = 60.0
_FINGER_STIFFNESS_N_M = 2000.0
_FINGER_DAMPING_NS_M = 14.0
_FINGER_FORCE_N = 15.0
_PAD_FRICTION = 1.0
_LINK_FRICTION = 0.5
_TABLE_FRICTION = 0.5

_TABLE_SIZE_M = (1.2, 0.7, 0.05)
_WALL_CENTRE_M, _WALL_HALF_M = (0.0, 1.0, 1.5), (3.0, 0.6, 1.5)
_LIGHT_DIRECTION = (0.0, 0.5, -1.0)
_POINT_LIGHTS_M = ((1.0, 0.0, 1.8), (-1.0, 0.0, 1.8))
_AMBIENT, _DIRECTIONAL, _POINT = 0.45, 1.5, 0.9
_NEAR_M, _FAR_M = 0.05, 20.0


class World:
    """One scene that can be reset, driven, stepped and looked at.

    A (D,) vector is in the embodiment's order: joints in rad, gripper as total opening in m.

    Args:
        embodiment: the robot.
        task: what stands on the table and what counts as success.
        randomisation: what differs from episode to episode.
        render: whether cameras work; without them no graphics driver is needed.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        task: Task,
        *,
        randomisation: Randomisation | None = None,
        render: bool = True,
    ) -> None:
        self.embodiment = embodiment
        self.task = task
        self.randomisation = randomisation or Randomisation.none()
        self.fingers: dict[str, tuple[str, str]] = {}
        self.seed = -1
        self._render = render
        self._scene: Any = None
        self._steps = 0

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the scene and its memory back."""
        self._scene = None
        self._arms: list[_SimulatedArm] = []
        self._bodies: dict[str, Any] = {}
        self._cameras: dict[str, Any] = {}

    def reset(self, seed: int, positions: ArrayLike | None = None) -> None:
        """Begin the episode ``seed``: build the scene, place the arms, let things settle.

        Args:
            seed: decides where things stand, and all that is random.
            positions: (D,) where the arms are; at home by default.

        Raises:
            UnavailableError: pictures are wanted and no graphics driver works.
        """
        self.close()
        self.seed = seed
        variation = draw(self.randomisation, seed, cameras=len(self.embodiment.cameras))
        self.table_top_m = TABLE_TOP_M + variation.table_height_m
        self._scene = _new_scene(self._render)
        self._add_room(variation)
        self._arms = [
            _SimulatedArm(self._scene, arm, self._render, variation.friction_factor)
            for arm in self.embodiment.arms
        ]
        self.fingers = {arm.name: arm.fingers for arm in self._arms}
        self._placements = self.task.place(generator(seed, PLACEMENT_KEY), self.embodiment)
        for placement in self._placements:
            self._add_object(placement, variation)
        self._add_strays(variation)
        if self._render:
            self._add_lights(variation)
            for camera, shift in zip(self.embodiment.cameras, variation.cameras, strict=True):
                self._add_camera(camera, shift)
        start = self.embodiment.home() if positions is None else np.asarray(positions, dtype=np.float64)
        for arm, (_, part) in zip(self._arms, self.embodiment.slices(), strict=True):
            arm.place(start[part])
        self.set_targets(start)
        self._scene_steps(_SETTLE_STEPS)
        self._steps = 0
        self._judge: Judge = self.task.judge(self)

    @property
    def time_s(self) -> float:
        """Simulated time since the reset."""
        return self._steps * PHYSICS_DT_S

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where the task's things stood at the reset."""
        return self._placements

    def set_targets(self, targets: ArrayLike) -> None:
        """Set the drive targets, (D,); they hold until they are set again."""
        values = np.asarray(targets, dtype=np.float64)
        for arm, (_, part) in zip(self._arms, self.embodiment.slices(), strict=True):
            arm.set_targets(values[part])
        self._targets = values.copy()

    def targets(self) -> Array:
        """Return the (D,) drive targets that hold now."""
        return self._targets.copy()

    def step(self, n: int = 1) -> None:
        """Advance physics by ``n`` steps of ``PHYSICS_DT_S``."""
        for _ in range(n):
            self._scene.step()
            self._steps += 1
            if self._steps % _WATCH_EVERY == 0:
                self._judge.watch()

    def positions(self) -> Array:
        """Return the measured (D,) positions."""
        return np.concatenate([arm.positions() for arm in self._arms])

    def velocities(self) -> Array:
        """Return the measured (D,) velocities; rad/s and m/s."""
        return np.concatenate([arm.velocities() for arm in self._arms])

    def openings(self) -> Array:
        """Return (arms,) the measured opening of each gripper as a fraction of its stroke."""
        return np.array([a.positions()[-1] / a.arm.gripper.stroke_m for a in self._arms])

    def tool_pose(self, arm: str) -> Array:
        """Return the measured (4, 4) pose of an arm's tool link in the world."""
        return next(a for a in self._arms if a.name == arm).tool_pose()

    def object_pose(self, name: str) -> Array:
        """Return the (4, 4) pose of a thing of the task in the world; its origin is its foot."""
        matrix: Array = self._bodies[name].entity_pose.to_transformation_matrix().astype(np.float64)
        return matrix

    def set_object_pose(self, name: str, pose: ArrayLike) -> None:
        """Put a thing of the task at a (4, 4) pose in the world, at rest."""
        body = self._bodies[name]
        body.entity.pose = sapien.Pose(np.asarray(pose, dtype=np.float32))
        body.linear_velocity = body.angular_velocity = np.zeros(3)

    def asset(self, name: str) -> Asset:
        """Return what a thing of the task is made of."""
        return next(p.asset for p in self._placements if p.name == name)

    def touching(self, name: str, impulse_ns: float) -> set[str]:
        """Return the robot links (``arm/link``) that press on a thing with at least ``impulse_ns``."""
        found: set[str] = set()
        for contact in self._scene.physx_system.get_contacts():
            first, second = (body.entity.name for body in contact.bodies)
            if name not in (first, second):
                continue
            other = second if first == name else first
            if "/" in other and other not in found:
                total = np.sum([point.impulse for point in contact.points], axis=0)
                if np.linalg.norm(total) >= impulse_ns:
                    found.add(other)
        return found

    def success(self) -> bool:
        """Return whether the task is fulfilled at this instant."""
        return self._judge.success()

    def strategy(self) -> Strategy:
        """Return how the object was moved so far."""
        return self._judge.strategy()

    def failure(self) -> FailureCode:
        """Return why the task is not fulfilled now; ``NONE`` if it is."""
        return self._judge.failure()

    def render(self, camera: str) -> NDArray[np.uint8]:
        """Return what a camera of the embodiment sees, (H, W, 3) uint8 RGB.

        Raises:
            EmbodimentError: there is no such camera.
            UnavailableError: the world was made without cameras.
        """
        self.expose(camera)
        return self.develop(camera)

    def expose(self, camera: str) -> None:
        """Begin a picture of the world as it is now; drawing goes on beside the caller.

        Raises:
            EmbodimentError: there is no such camera.
            UnavailableError: the world was made without cameras.
        """
        self.embodiment.camera(camera)
        if not self._render:
            raise UnavailableError("this world was made without cameras", "make it with render=True")
        self._scene.update_render()
        self._cameras[camera].take_picture()

    def develop(self, camera: str) -> NDArray[np.uint8]:
        """Return the picture that was last exposed; waits until it is drawn. See :meth:`render`."""
        return _rgb(self._cameras[camera])

    def move_camera(self, camera: str, position_m: ArrayLike, look_at_m: ArrayLike) -> None:
        """Move a camera of the embodiment; "up" in its picture is towards world +z."""
        self.embodiment.camera(camera)
        self._cameras[camera].entity.pose = _look_at(position_m, look_at_m)

    def view(
        self, position_m: ArrayLike, look_at_m: ArrayLike, *, width: int, height: int, fov_deg: float
    ) -> NDArray[np.uint8]:
        """Return one picture from anywhere, with a nicer shader than the robot's cameras have."""
        component = sapien.render.RenderCameraComponent(width, height, _shader("default"))
        component.set_fovy(np.deg2rad(fov_deg), True)
        component.near, component.far = _NEAR_M, _FAR_M
        entity = sapien.Entity()
        entity.add_component(component)
        entity.pose = _look_at(position_m, look_at_m)
        self._scene.add_entity(entity)
        try:
            self._scene.update_render()
            component.take_picture()
            return _rgb(component)
        finally:
            self._scene.remove_entity(entity)

    def _scene_steps(self, n: int) -> None:
        for _ in range(n):
            self._scene.step()

    def _add_room(self, variation: Variation) -> None:
        friction = _TABLE_FRICTION * variation.friction_factor
        size, top = np.array(_TABLE_SIZE_M), self.table_top_m
        half = tuple(size / 2)
        table_z = top - half[2]
        self._add_static("table", [(half, (0.0, 0.0, table_z), variation.table)], friction)
        legs = [
            (
                (0.025, 0.025, table_z / 2 - 0.0125),
                (x, y, table_z / 2 - 0.0125),
                Surface((0.70, 0.69, 0.67)),
            )
            for x in (-0.55, 0.55)
            for y in (-0.3, 0.3)
        ]
        self._add_static("legs", legs, friction)
        self._add_static("wall", [(_WALL_HALF_M, _WALL_CENTRE_M, variation.wall)], friction)
        floor = ((4.0, 4.0, 0.01), (0.0, 0.0, -0.01), Surface((0.45, 0.44, 0.43)))
        self._add_static("ground", [floor], friction)

    def _add_static(self, name: str, boxes: list[Any], friction: float) -> None:
        material = sapien.physx.PhysxMaterial(friction, friction, 0.0)
        body = sapien.physx.PhysxRigidStaticComponent()
        look = sapien.render.RenderBodyComponent() if self._render else None
        for half, centre, surface in boxes:
            shape = sapien.physx.PhysxCollisionShapeBox(half_size=half, material=material)
            shape.local_pose = sapien.Pose(centre)
            body.attach(shape)
            if look is not None:
                look.attach(_shape(box(half, centre), _paint(surface)))
        self._add_entity(name, body, look, sapien.Pose())

    def _add_object(self, placement: Placement, variation: Variation) -> None:
        asset = placement.asset
        body = sapien.physx.PhysxRigidDynamicComponent()
        _attach_hulls(body, asset, variation.friction_factor)
        body.mass = asset.mass_kg * variation.mass_factor
        body.cmass_local_pose = sapien.Pose([0, 0, asset.height_m / 2])
        body.inertia = asset.inertia() * variation.mass_factor
        pose = _standing(placement.xy_m, placement.yaw_rad, self.table_top_m + 0.0005)
        self._add_entity(placement.name, body, self._look(asset), pose)
        self._bodies[placement.name] = body

    def _add_strays(self, variation: Variation) -> None:
        reserved = self.task.keep_clear(self._placements)
        taken = list(reserved)
        for i, stray in enumerate(variation.strays):
            here = Circle(stray.xy_m, stray.asset.radius_m)
            if len(taken) - len(reserved) >= _MAX_STRAYS:
                break
            if any(
                np.hypot(*np.subtract(c.xy_m, here.xy_m)) < c.radius_m + here.radius_m + 0.01 for c in taken
            ):
                continue
            taken.append(here)
            body = sapien.physx.PhysxRigidStaticComponent()
            _attach_hulls(body, stray.asset, variation.friction_factor)
            pose = _standing(stray.xy_m, stray.yaw_rad, self.table_top_m)
            self._add_entity(f"stray{i}", body, self._look(stray.asset), pose)

    def _look(self, asset: Asset) -> Any:
        if not self._render:
            return None
        look = sapien.render.RenderBodyComponent()
        for visual in asset.visuals:
            look.attach(_shape(visual.mesh, _material(visual)))
        return look

    def _add_entity(self, name: str, body: Any, look: Any, pose: Any) -> None:
        entity = sapien.Entity()
        entity.name = name
        entity.add_component(body)
        if look is not None:
            entity.add_component(look)
        entity.pose = pose
        self._scene.add_entity(entity)

    def _add_lights(self, variation: Variation) -> None:
        sun, *lamps = (np.array(colour) for colour in variation.light_colours)
        self._scene.set_ambient_light([_AMBIENT] * 3)
        self._scene.add_directional_light(
            _LIGHT_DIRECTION, _DIRECTIONAL * sun, shadow=True, shadow_scale=1.2, shadow_map_size=1024
        )
        for position, lamp in zip(_POINT_LIGHTS_M, lamps, strict=True):
            self._scene.add_point_light(position, _POINT * lamp, shadow=False)

    def _add_camera(self, camera: Camera, shift: CameraShift) -> None:
        component = sapien.render.RenderCameraComponent(camera.width, camera.height, _shader("minimal"))
        component.set_perspective_parameters(
            _NEAR_M, _FAR_M, camera.fx, camera.fy, camera.cx, camera.cy, 0.0
        )
        entity = sapien.Entity()
        entity.add_component(component)
        offset = np.eye(4)
        offset[:3, :3] = Rotation.from_euler("xyz", shift.rpy_rad).as_matrix()
        offset[:3, 3] = shift.xyz_m
        entity.pose = _look_at(camera.position_m, camera.look_at_m) * sapien.Pose(offset)
        self._scene.add_entity(entity)
        self._cameras[camera.name] = component


class _SimulatedArm:
    """One arm in a scene: drives, measurements, and the names of its fingers."""

    def __init__(self, scene: Any, arm: Arm, render: bool, friction_factor: float) -> None:
        self.arm = arm
        self.name = arm.name
        builder = _arm_builder(str(share_dir() / "urdf" / arm.urdf), render)
        builder.set_scene(scene)
        builder.set_initial_pose(_pose_of_base(arm))
        articulation = builder.build(fix_root_link=True, build_mimic_joints=False)
        self._articulation = articulation
        self._name_links(friction_factor)
        joints = articulation.active_joints
        order = {joint.name: i for i, joint in enumerate(joints)}
        missing = [joint.name for joint in arm.joints if joint.name not in order]
        sliding = [i for i, joint in enumerate(joints) if joint.type == "prismatic"]
        if missing or len(sliding) != 2:
            raise EmbodimentError(
                f"arm {arm.name}: {arm.urdf} lacks {', '.join(missing) or 'two fingers on sliding joints'}",
                "name the joints as the URDF does",
            )
        self._revolute = [order[joint.name] for joint in arm.joints]
        self._sliding = sliding
        self.fingers: tuple[str, str] = tuple(joints[i].child_link.entity.name for i in sliding)  # type: ignore[assignment]
        for i in self._revolute:
            frequency = _JOINT_FREQUENCY_RAD_S
            joints[i].set_drive_properties(frequency**2, 2 * frequency, mode="acceleration")
        for i in sliding:
            joints[i].set_drive_properties(
                _FINGER_STIFFNESS_N_M, _FINGER_DAMPING_NS_M, _FINGER_FORCE_N, mode="force"
            )
        self._drives = [joints[i] for i in (*self._revolute, *sliding)]
        self._tool = articulation.find_link_by_name(arm.tool_link)

    def place(self, values: Array) -> None:
        joints = np.zeros(len(self._drives))
        joints[self._revolute] = values[:-1]
        joints[self._sliding] = values[-1] / 2
        self._articulation.set_qpos(joints)

    def set_targets(self, values: Array) -> None:
        half = values[-1] / 2
        for drive, value in zip(self._drives, [*values[:-1].tolist(), half, half], strict=True):
            drive.set_drive_target(value)

    def positions(self) -> Array:
        return self._pick(self._articulation.qpos)

    def velocities(self) -> Array:
        return self._pick(self._articulation.qvel)

    def tool_pose(self) -> Array:
        matrix: Array = self._tool.entity_pose.to_transformation_matrix().astype(np.float64)
        return matrix

    def _pick(self, values: NDArray[np.float32]) -> Array:
        wide = values.astype(np.float64)
        return np.append(wide[self._revolute], wide[self._sliding].sum())

    def _name_links(self, friction_factor: float) -> None:
        sliding = {j.child_link.name for j in self._articulation.joints if j.type == "prismatic"}
        for link in self._articulation.links:
            link.entity.name = f"{self.name}/{link.name}"
            link.disable_gravity = True
            friction = _PAD_FRICTION if link.name in sliding else _LINK_FRICTION
            material = sapien.physx.PhysxMaterial(
                friction * friction_factor, friction * friction_factor, 0.0
            )
            for shape in link.collision_shapes:
                shape.physical_material = material


def _rgb(component: Any) -> NDArray[np.uint8]:
    colour = component.get_picture("Color")[..., :3]
    return np.round(np.clip(colour, 0, 1) * 255).astype(np.uint8)


def _new_scene(render: bool) -> Any:
    sapien.physx.set_scene_config(enable_enhanced_determinism=True)
    sapien.physx.set_body_config(solver_position_iterations=10, solver_velocity_iterations=1)
    sapien.physx.set_shape_config(contact_offset=0.005)
    systems: list[Any] = [sapien.physx.PhysxCpuSystem()]
    if render:
        try:
            systems.append(sapien.render.RenderSystem())
        except RuntimeError as error:
            raise UnavailableError(
                f"no graphics driver can draw the scene: {error}",
                "install Vulkan drivers (Debian, Ubuntu: mesa-vulkan-drivers 24.3 or newer)",
            ) from error
    scene = sapien.Scene(systems)
    scene.set_timestep(PHYSICS_DT_S)
    return scene


@lru_cache(maxsize=8)
def _arm_builder(urdf: str, render: bool) -> Any:
    if not Path(urdf).is_file():
        raise EmbodimentError(f"there is no robot model {urdf}", "correct the embodiment's urdf")
    loader = sapien.Scene([sapien.physx.PhysxCpuSystem()]).create_urdf_loader()
    builders, _, _ = loader.parse(urdf)
    builder = builders[0]
    for link in builder.link_builders:
        if not render:
            link.visual_records.clear()
        for record in link.visual_records:
            if record.material is not None:
                record.material.base_color = _linear(record.material.base_color[:3])
                record.material.roughness, record.material.specular = 0.5, 0.5
    return builder


def _attach_hulls(body: Any, asset: Asset, friction_factor: float) -> None:
    friction = asset.friction * friction_factor
    material = sapien.physx.PhysxMaterial(friction, friction, 0.0)
    for hull in asset.hulls:
        body.attach(
            sapien.physx.PhysxCollisionShapeConvexMesh(
                vertices=hull.astype(np.float32), scale=[1, 1, 1], material=material
            )
        )


def _shape(mesh: Mesh, material: Any) -> Any:
    return sapien.render.RenderShapeTriangleMesh(
        mesh.vertices, mesh.triangles, mesh.normals, mesh.uvs, material
    )


def _material(visual: Visual) -> Any:
    return sapien.render.RenderMaterial(
        base_color=_linear(visual.colour),
        roughness=visual.roughness,
        specular=0.5,
        metallic=visual.metallic,
    )


def _paint(surface: Surface) -> Any:
    material = sapien.render.RenderMaterial(
        base_color=_linear(surface.colour), roughness=0.9, specular=0.1, metallic=0.0
    )
    if surface.texture is not None:
        alpha = np.full((*surface.texture.shape[:2], 1), 255, np.uint8)
        material.base_color_texture = sapien.render.RenderTexture2D(
            np.concatenate([surface.texture, alpha], axis=2), "R8G8B8A8Unorm", srgb=True
        )
    return material


def _linear(colour: ArrayLike) -> list[float]:
    """Return an sRGB colour as the linear RGBA that the renderer computes with (gamma 2.2)."""
    return [*(float(c) ** 2.2 for c in np.asarray(colour)), 1.0]


def _shader(name: str) -> str:
    return str(Path(sapien.__file__).parent / "vulkan_shader" / name)


def _standing(xy_m: tuple[float, float], yaw_rad: float, z_m: float) -> Any:
    return sapien.Pose([*xy_m, z_m], [np.cos(yaw_rad / 2), 0, 0, np.sin(yaw_rad / 2)])


def _pose_of_base(arm: Arm) -> Any:
    quaternion = Rotation.from_euler("xyz", arm.base.rpy_rad).as_quat(scalar_first=True)
    return sapien.Pose(arm.base.xyz_m, quaternion)


def _look_at(position_m: ArrayLike, look_at_m: ArrayLike) -> Any:
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
