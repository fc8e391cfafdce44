"""The simulated scene: a table, the arms of an embodiment, the things of a task, and cameras.

World frame: x right, y away from the robots, z up, metres. Table, wall, lights and time step are
RoboTwin's. Every reset builds the scene anew, which costs milliseconds and leaves no trace of the
episode before, so that a seed gives the same trajectory whatever came first.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's CPU renderer: threads cost more than they bring

try:
    import sapien
except ImportError as error:
    from simplevla.errors import MissingExtraError

    raise MissingExtraError("sapien", "sim") from error

from sim_training import room
from sim_training.assets import Asset
from sim_training.randomisation import PLACEMENT_KEY, Randomisation, Variation, draw, generator
from sim_training.splits import draw_scene
from sim_training.table_clearance import TableClearance
from sim_training.tasks.base import TABLE_TOP_M, Circle, Judge, Placement, Task
from simplevla.embodiment import Arm, Embodiment
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


class Touch(NamedTuple):
    """Where a robot link (``arm/link``) touches a thing.

    Attributes:
        impulse_ns: (3,) what the link gave the thing in the last physics step, world frame, N s.
        point_m: (3,) where, world frame.
    """

    link: str
    impulse_ns: Array
    point_m: Array


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
        self.clearance = TableClearance(embodiment)
        self.fingers: dict[str, tuple[str, str]] = {}
        self.seed = -1
        self._render = render
        self._scene: Any = None
        self._steps = 0
        self._late: deque[list[float]] = deque()
        self._exposed: tuple[str, ...] = ()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the scene and its memory back."""
        self._await_pictures()
        self._scene = None
        self._arms: list[_SimulatedArm] = []
        self._bodies: dict[str, Any] = {}
        self._cameras: dict[str, Any] = {}
        self._drawn: dict[str, NDArray[np.uint8]] = {}

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
        self.variation = variation = draw(self.randomisation, seed, cameras=len(self.embodiment.cameras))
        self.table_top_m = TABLE_TOP_M + variation.table_height_m
        self._scene = _new_scene(self._render)
        room.add_room(self._scene, variation, self.table_top_m, render=self._render)
        self._arms = [
            _SimulatedArm(self._scene, arm, self._render, variation) for arm in self.embodiment.arms
        ]
        self.fingers = {arm.name: arm.fingers for arm in self._arms}
        self._drives = [drive for arm in self._arms for drive in arm.drives]
        self._placements = draw_scene(
            self.task, generator(seed, PLACEMENT_KEY), self.embodiment, self.randomisation.scenes
        )
        for placement in self._placements:
            self._add_object(placement, variation)
        self._add_strays(variation)
        if self._render:
            room.add_lights(self._scene, variation, self.embodiment.cameras)
            for camera, shift in zip(self.embodiment.cameras, variation.cameras, strict=True):
                self._cameras[camera.name] = room.add_camera(self._scene, camera, shift)
        start = self.embodiment.home() if positions is None else np.asarray(positions, dtype=np.float64)
        self.place_arms(start)
        self._late.clear()
        self.set_targets(start)
        self._scene_steps(_SETTLE_STEPS)
        self._late.extend([self._row] * round(variation.setpoint_delay_s / PHYSICS_DT_S))
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

    @property
    def region(self) -> str:
        """The region of the table that the scene started in, as the task names it."""
        return self.task.traits(self._placements).region

    def place_arms(self, positions: ArrayLike) -> None:
        """Put the arms at ``positions`` (D,) at once, at rest; no physics happens."""
        values = np.asarray(positions, dtype=np.float64)
        for arm, (_, part) in zip(self._arms, self.embodiment.slices(), strict=True):
            arm.place(values[part])

    def set_targets(self, targets: ArrayLike) -> None:
        """Set the drive targets, (D,); they hold until they are set again.

        With the randomisation ``actuation`` the drives learn of them some physics steps later.
        """
        self._targets = np.array(targets, dtype=np.float64)
        self._row = self._rows(self._targets[None])[0]
        if not self._late:
            self._drive(self._row)

    def targets(self) -> Array:
        """Return the (D,) drive targets that were set last."""
        return self._targets.copy()

    def step(self, n: int = 1) -> None:
        """Advance physics by ``n`` steps of ``PHYSICS_DT_S``."""
        for _ in range(n):
            if self._late:
                self._late.append(self._row)
                self._drive(self._late.popleft())
            self._scene.step()
            self._steps += 1
            if self._steps % _WATCH_EVERY == 0:
                self._judge.watch()

    def follow(self, setpoints: Array) -> tuple[int, bool]:
        """Play (T, D) drive targets, one a physics step, until success.

        Returns how many were played and whether success came. The same as ``set_targets`` and ``step``
        for each, with nothing computed twice: this is where a rollout spends its time.
        """
        rows = self._rows(setpoints)
        for number, row in enumerate(rows):
            self._row = row
            if not self._late:
                self._drive(row)
            self.step()
            if self._judge.success():
                self._targets = setpoints[number].copy()
                return number + 1, True
        if rows:
            self._targets = setpoints[-1].copy()
        return len(rows), False

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

    def object_position(self, name: str) -> Array:
        """Return where the foot of a thing of the task is, (3,) in the world; quicker than its pose."""
        place: Array = self._bodies[name].entity_pose.p.astype(np.float64)
        return place

    def set_object_pose(self, name: str, pose: ArrayLike) -> None:
        """Put a thing of the task at a (4, 4) pose in the world, at rest."""
        body = self._bodies[name]
        body.entity.pose = sapien.Pose(np.asarray(pose, dtype=np.float32))
        if not next(p.fixed for p in self._placements if p.name == name):
            body.linear_velocity = body.angular_velocity = np.zeros(3)

    def asset(self, name: str) -> Asset:
        """Return what a thing of the task is made of."""
        return next(p.asset for p in self._placements if p.name == name)

    def touches(self, name: str) -> list[Touch]:
        """Return where robot links press on a thing."""
        found = []
        for contact in self._scene.physx_system.get_contacts():
            first, second = (body.entity.name for body in contact.bodies)
            if name not in (first, second):
                continue
            link, sign = (second, 1.0) if first == name else (first, -1.0)
            if "/" not in link:
                continue
            # PhysX gives the impulse on the first body.
            for point in contact.points:
                if point.impulse.any():
                    impulse = sign * point.impulse.astype(np.float64)
                    found.append(Touch(link, impulse, point.position.astype(np.float64)))
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

    @property
    def drawing(self) -> bool:
        """Whether a picture that was exposed has not been developed."""
        return bool(self._exposed)

    def expose(self, *cameras: str) -> None:
        """Begin pictures of the world as it is now; drawing goes on beside the caller.

        What was exposed before is waited for: SAPIEN may not change a scene that it still draws, and
        has ended the process with a segmentation fault where it did.

        Raises:
            EmbodimentError: there is no such camera.
            UnavailableError: the world was made without cameras.
        """
        for camera in cameras:
            self.embodiment.camera(camera)
        if not self._render:
            raise UnavailableError("this world was made without cameras", "make it with render=True")
        self._await_pictures()
        self._exposed = cameras
        self._scene.update_render()
        for camera in cameras:
            self._drawn.pop(camera, None)
            self._cameras[camera].take_picture()

    def develop(self, camera: str) -> NDArray[np.uint8]:
        """Return the picture that was last exposed; waits until it is drawn. See :meth:`render`.

        Raises:
            UnavailableError: none was exposed since the last one was developed.
        """
        if camera in self._exposed:
            self._exposed = tuple(name for name in self._exposed if name != camera)
            return room.rgb(self._cameras[camera])
        if camera not in self._drawn:
            raise UnavailableError(f"camera {camera!r} has exposed no picture", "expose one first")
        return self._drawn.pop(camera)

    def _await_pictures(self) -> None:
        for camera in self._exposed:
            self._drawn[camera] = room.rgb(self._cameras[camera])
        self._exposed = ()

    def move_camera(self, camera: str, position_m: ArrayLike, look_at_m: ArrayLike) -> None:
        """Move a camera of the embodiment; "up" in its picture is towards world +z."""
        self.embodiment.camera(camera)
        self._cameras[camera].entity.pose = room.look_at(position_m, look_at_m)

    def place_camera(self, camera: str, pose: ArrayLike) -> None:
        """Put the optical frame of a camera of the embodiment at ``pose`` (4, 4) in the world, m."""
        self.embodiment.camera(camera)
        self._cameras[camera].entity.pose = room.of_optical_frame(np.asarray(pose, dtype=np.float64))

    def attach(self, shapes: Sequence[Any], pose: ArrayLike, link: tuple[str, str] | None = None) -> None:
        """Show render shapes in the present scene, until the next reset.

        Args:
            shapes: SAPIEN's; nothing touches them.
            pose: (4, 4) where they are, in the frame of the link, else of the world; m.
            link: (arm, link) on which they ride.

        Raises:
            EmbodimentError: there is no such link.
        """
        room.attach(self._scene, shapes, np.asarray(pose, dtype=np.float64), link and "/".join(link))

    def view(
        self, position_m: ArrayLike, look_at_m: ArrayLike, *, width: int, height: int, fov_deg: float
    ) -> NDArray[np.uint8]:
        """Return one picture from anywhere, with a nicer shader than the robot's cameras have."""
        return room.view(self._scene, position_m, look_at_m, width=width, height=height, fov_deg=fov_deg)

    def set_joint_response(
        self, arm: str, frequencies_rad_s: Sequence[float], dampings: Sequence[float]
    ) -> None:
        """Let the joints of ``arm`` follow their targets so in the present scene.

        Each is a second-order system, x'' = f^2 (target - x) - 2 d f x', with the frequencies f (n,) and
        the dampings d (n,); critical damping is 1.
        """
        next(each for each in self._arms if each.name == arm).respond(frequencies_rad_s, dampings)

    def _rows(self, targets: Array) -> list[list[float]]:
        """Return (T, D) targets as what the drives take, each gripper's opening as two halves."""
        parts = []
        for _, columns in self.embodiment.slices():
            half = targets[:, columns.stop - 1, None] / 2
            parts += [targets[:, columns][:, :-1], half, half]
        rows: list[list[float]] = np.concatenate(parts, axis=1).tolist()
        return rows

    def _drive(self, row: list[float]) -> None:
        for drive, value in zip(self._drives, row, strict=True):
            drive(value)

    def _scene_steps(self, n: int) -> None:
        for _ in range(n):
            self._scene.step()

    def _add_object(self, placement: Placement, variation: Variation) -> None:
        asset = placement.asset
        physx, gap_m = sapien.physx, 0.0 if placement.fixed else 0.0005
        body = physx.PhysxRigidStaticComponent() if placement.fixed else physx.PhysxRigidDynamicComponent()
        _attach_hulls(body, asset, variation.friction_factor)
        if not placement.fixed:
            body.mass = asset.mass_kg * variation.mass_factor
            body.cmass_local_pose = sapien.Pose([0, 0, asset.height_m / 2])
            body.inertia = asset.inertia() * variation.mass_factor
        pose = _standing(placement.xy_m, placement.yaw_rad, self.table_top_m + gap_m)
        room.add_entity(self._scene, placement.name, pose, body, *self._look(asset))
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
            room.add_entity(self._scene, f"stray{i}", pose, body, *self._look(stray.asset))

    def _look(self, asset: Asset) -> list[Any]:
        return [room.look_of(asset)] if self._render else []


class _SimulatedArm:
    """One arm in a scene: drives, measurements, and the names of its fingers."""

    def __init__(self, scene: Any, arm: Arm, render: bool, variation: Variation) -> None:
        self.arm = arm
        self.name = arm.name
        builder = _arm_builder(str(share_dir() / "urdf" / arm.urdf), render)
        builder.set_scene(scene)
        builder.set_initial_pose(_pose_of_base(arm))
        articulation = builder.build(fix_root_link=True, build_mimic_joints=False)
        self._articulation = articulation
        self._name_links(variation.friction_factor)
        joints = articulation.active_joints
        order = {joint.name: i for i, joint in enumerate(joints)}
        missing = [joint.name for joint in arm.joints if joint.name not in order]
        sliding = [i for i, joint in enumerate(joints) if joint.type == "prismatic"]
        if missing or len(sliding) != 2:
            raise EmbodimentError(
                f"arm {arm.name}: {arm.urdf} lacks {', '.join(missing) or 'two fingers on sliding joints'}",
                "name the joints as the URDF does",
            )
        self._joints = joints
        self._revolute = [order[joint.name] for joint in arm.joints]
        self._sliding = sliding
        self.fingers: tuple[str, str] = tuple(joints[i].child_link.entity.name for i in sliding)  # type: ignore[assignment]
        frequency = _JOINT_FREQUENCY_RAD_S * float(np.sqrt(variation.drive_gain))
        self.respond([frequency] * len(self._revolute), [1.0] * len(self._revolute))
        for i in sliding:
            joints[i].set_drive_properties(
                _FINGER_STIFFNESS_N_M, _FINGER_DAMPING_NS_M, _FINGER_FORCE_N, mode="force"
            )
        self.drives = [joints[i].set_drive_target for i in (*self._revolute, *sliding)]
        self._tool = articulation.find_link_by_name(arm.tool_link)

    def respond(self, frequencies_rad_s: Sequence[float], dampings: Sequence[float]) -> None:
        for i, frequency, damping in zip(self._revolute, frequencies_rad_s, dampings, strict=True):
            stiffness, friction = frequency**2, 2 * damping * frequency
            self._joints[i].set_drive_properties(stiffness, friction, mode="acceleration")

    def place(self, values: Array) -> None:
        joints = np.zeros(len(self.drives))
        joints[self._revolute] = values[:-1]
        joints[self._sliding] = values[-1] / 2
        self._articulation.set_qpos(joints)

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


def _new_scene(render: bool) -> Any:
    sapien.physx.set_scene_config(enable_enhanced_determinism=True)
    sapien.physx.set_body_config(solver_position_iterations=10, solver_velocity_iterations=1)
    sapien.physx.set_shape_config(contact_offset=0.005)
    systems: list[Any] = [sapien.physx.PhysxCpuSystem()]
    if render:
        systems.append(room.new_render_system())
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
                record.material.base_color = room.linear(record.material.base_color[:3])
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


def _standing(xy_m: tuple[float, float], yaw_rad: float, z_m: float) -> Any:
    return sapien.Pose([*xy_m, z_m], [np.cos(yaw_rad / 2), 0, 0, np.sin(yaw_rad / 2)])


def _pose_of_base(arm: Arm) -> Any:
    quaternion = Rotation.from_euler("xyz", arm.base.rpy_rad).as_quat(scalar_first=True)
    return sapien.Pose(arm.base.xyz_m, quaternion)
