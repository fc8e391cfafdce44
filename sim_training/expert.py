"""A scripted expert that looks where things are and says what to do next: pick and place, or a press.

The expert keeps no phase. Each decision follows from where the tool, the gripper and the object are
now, so that it continues from wherever a perturbation or another policy left off, and so that a
policy without memory can imitate it. For several actions ahead it plays its own decisions forward
on a simple model: the tool goes where it is sent, a closing gripper stops at the object, and a held
object moves along.

The tool keeps the orientation it has at home and moves in straight lines, except for the funnel that
leads it onto the approach line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from sim_training.tasks.base import Errand, Press, Task
from sim_training.world import World
from simplevla.embodiment import Arm
from simplevla.kinematics.chain import arm_chain

Array = NDArray[np.float64]

ACTION_DT_S = 0.1

_FREE_M = 0.024  # a step of 0.1 s: 0.24 m/s in the free, slower near the object
_NEAR_M = 0.011
_JOINT_RAD = 0.09  # a joint, an action: near the base a short way of the tool is a long one of the joints
_CLOSE_M, _OPEN_M = 0.012, 0.013  # gripper, an action; under the Piper's 0.14 m/s
_CLOSED_M, _WIDE_M = 0.024, 0.070
_READY_M = 0.060  # opened enough to go around the object, and to count as let go
_STANDOFF_M = 0.09  # from where the tool approaches in a straight line
_FUNNEL = 4.0  # stand-off for each metre beside the approach line
_AT_GOAL_M = 0.010
_OVER_GOAL_M = 0.05  # from here on a raised goal is what the object comes down on
_ON_TABLE_M = 0.003
_PRESS_M = 0.002  # how far below the table the object's foot is sent, to be sure it stands
_FALLEN_COS = np.cos(np.deg2rad(25))

# With the tool as at home the lowest corner of the closed fingers is 19 mm below the tool's origin.
_FINGERTIP_M = 0.019
_SHUT_M = 0.006
_ABOVE_M = 0.030  # from where a press goes straight down
_BESIDE_M = 0.006
_PUSH_M = 0.012  # how far below its point a press is sent, to be sure of a touch


@dataclass(frozen=True, eq=False)
class _Scene:
    """What the expert decides a pick and place by; world frame, m.

    Attributes:
        tool: (3,) place of the tool.
        opening: gripper.
        foot: (3,) foot of the object.
        axis: (3,) unit vector along the object, from foot to top.
        table_z: height of the table.
    """

    tool: Array
    opening: float
    foot: Array
    axis: Array
    table_z: float
    errand: Errand

    def decide(self, home_tool: Array) -> tuple[Array, float]:
        """Return where the tool goes next, (3,), and the gripper's next opening."""
        return _decide(self, home_tool)

    def after(self, tool: Array, opening: float) -> _Scene:
        """Return the scene after the tool and the gripper went where they were sent."""
        near = np.linalg.norm(self.tool - self.foot - self.errand.grasp_height_m * self.axis) < 0.02
        held = near and self.opening < self.errand.width_m + 0.003
        foot = self.foot + (tool - self.tool if held and opening < self.errand.width_m else 0.0)
        foot[2] = max(foot[2], _support(self))
        if near and opening < self.errand.width_m:
            opening = self.errand.width_m
        return replace(self, tool=tool, opening=opening, foot=foot)


@dataclass(frozen=True, eq=False)
class _Button:
    """What the expert decides a press by: the tool (3,), its gripper, and where to press (3,); world, m."""

    tool: Array
    opening: float
    point: Array

    def decide(self, home_tool: Array) -> tuple[Array, float]:
        """Close on the way to above the point, then go down through it."""
        del home_tool
        shut = max(0.0, self.opening - _CLOSE_M)
        offset = self.tool - self.point - [0.0, 0.0, _FINGERTIP_M]
        beside = float(np.hypot(*offset[:2]))
        down = beside < _BESIDE_M or (beside < 2 * _BESIDE_M and offset[2] < 0.8 * _ABOVE_M)
        if down and self.opening < _SHUT_M:
            return _towards(self.tool, self.tool - offset - [0.0, 0.0, _PUSH_M], _NEAR_M), shut
        above = self.tool - offset + [0.0, 0.0, _ABOVE_M]
        if beside > _BESIDE_M and offset[2] < 0.5 * _ABOVE_M:
            above[:2] = self.tool[:2]  # up first, so as not to sweep against what is to be pressed
        return _towards(self.tool, above, _FREE_M), shut

    def after(self, tool: Array, opening: float) -> _Button:
        """Return the same after the tool and the gripper went where they were sent."""
        return replace(self, tool=tool, opening=opening)


class Expert:
    """The expert of one task in one world.

    It reads the world's true state: object poses, tool pose, gripper opening.
    """

    def __init__(self, world: World, task: Task) -> None:
        self._world = world
        self._task = task

    def plan(self, k: int) -> Array:
        """Return (k, D) absolute joint targets from now on, one every ``ACTION_DT_S``; rad and m.

        Arms without an errand are sent home.
        """
        embodiment = self._world.embodiment
        errand = self._task.errand(self._world)
        arm, part = next((a, p) for a, p in embodiment.slices() if a.name == errand.arm)
        home_tool, to_base = _home_tool_in_world(arm), np.linalg.inv(_base(arm))
        limits = np.array([[j.lower_rad, j.upper_rad] for j in arm.joints]).T
        joints = self._world.positions()[part][:-1]
        scene = _look(self._world, errand)
        targets = np.tile(embodiment.home(), (k, 1))
        for target in targets:
            tool, opening = scene.decide(home_tool)
            last, pose = joints, home_tool.copy()
            pose[:3, 3] = tool
            joints = arm_chain(arm).inverse_nearest(to_base @ pose, last, *limits)
            widest = float(np.abs(joints - last).max())
            if widest > _JOINT_RAD:
                tool = scene.tool + (tool - scene.tool) * (_JOINT_RAD / widest)
                pose[:3, 3] = tool
                joints = arm_chain(arm).inverse_nearest(to_base @ pose, last, *limits)
            target[part] = [*joints, opening]
            scene = scene.after(tool, opening)
        return targets


def _decide(scene: _Scene, home_tool: Array) -> tuple[Array, float]:
    """Return where the tool goes next, (3,), and the gripper's next opening."""
    approach = home_tool[:3, 0]
    grasp, along, beside = _relation(scene, approach)
    around = abs(along) < 0.014 and beside < 0.014
    held = around and scene.opening < scene.errand.width_m + 0.003
    rise = scene.foot[2] - _support(scene)
    standing = rise < _ON_TABLE_M
    if scene.axis[2] < _FALLEN_COS or rise < -0.1:
        return _towards(scene.tool, home_tool[:3, 3], _FREE_M), _opened(scene)
    if standing and (scene.errand.delivered or (held and _distance_to_goal(scene) < _AT_GOAL_M)):
        letting_go = around and scene.opening < _READY_M
        return scene.tool if letting_go else _retreat(scene, home_tool, along), _opened(scene)
    if held:
        return _carry(scene), _closed(scene)
    closing = around and scene.opening < _WIDE_M - 0.004
    if closing or (abs(along) < 0.006 and beside < 0.005):
        return grasp, _closed(scene)
    return _approach(scene, approach, grasp, along, beside)


def _relation(scene: _Scene, approach: Array) -> tuple[Array, float, float]:
    """Return the grasp point (3,), how far past it the tool is, and how far beside the line."""
    grasp = scene.foot + scene.errand.grasp_height_m * scene.axis
    offset = scene.tool - grasp
    along = float(offset @ approach)
    return grasp, along, float(np.linalg.norm(offset - along * approach))


def _approach(
    scene: _Scene, approach: Array, grasp: Array, along: float, beside: float
) -> tuple[Array, float]:
    """Go to the grasp point through a funnel that opens against the approach direction."""
    if scene.opening < _READY_M and along > -0.07:
        back = scene.tool if beside > 0.1 else scene.tool - _NEAR_M * approach
        return back, _opened(scene)
    standoff = float(np.clip(_FUNNEL * (beside - 0.003), 0.0, _STANDOFF_M))
    close = beside < 0.05 and along > -0.13
    step = _NEAR_M if close else _FREE_M
    return _towards(scene.tool, grasp - standoff * approach, step), _opened(scene)


def _carry(scene: _Scene) -> Array:
    """Lift, move across as the object comes clear of the table, and lower at the goal."""
    distance = _distance_to_goal(scene)
    rise = scene.foot[2] - _support(scene)
    level = scene.errand.clearance_m * float(np.clip((distance - _AT_GOAL_M) / 0.03, 0.0, 1.0)) - _PRESS_M
    free = 1.0 if level <= 0 else float(np.clip((rise + 0.004) / (0.8 * level), 0.0, 1.0))
    across = np.array(scene.errand.goal_xy_m) - scene.foot[:2]
    across *= min(1.0, 0.9 * _FREE_M * free / max(distance, 1e-9))
    up = float(np.clip(level - rise, -(_NEAR_M if rise < 0.03 else _FREE_M), 0.8 * _FREE_M))
    return scene.tool + np.array([*across, up])


def _retreat(scene: _Scene, home_tool: Array, along: float) -> Array:
    if -_STANDOFF_M < along < 0.03:
        return scene.tool - _FREE_M * home_tool[:3, 0]
    return _towards(scene.tool, home_tool[:3, 3], _FREE_M)


def _opened(scene: _Scene) -> float:
    return min(_WIDE_M, scene.opening + _OPEN_M)


def _closed(scene: _Scene) -> float:
    return max(_CLOSED_M, scene.opening - _CLOSE_M)


def _support(scene: _Scene) -> float:
    """Return the height of what is below the object: the table, or the goal if that is raised."""
    over = _distance_to_goal(scene) < _OVER_GOAL_M
    return scene.table_z + (scene.errand.goal_rise_m if over else 0.0)


def _distance_to_goal(scene: _Scene) -> float:
    return float(np.hypot(*(np.array(scene.errand.goal_xy_m) - scene.foot[:2])))


def _towards(start: Array, end: Array, step: float) -> Array:
    way = end - start
    return start + way * min(1.0, step / max(float(np.linalg.norm(way)), 1e-9))


def _look(world: World, errand: Errand | Press) -> _Scene | _Button:
    arm = next(i for i, a in enumerate(world.embodiment.arms) if a.name == errand.arm)
    tool = world.tool_pose(errand.arm)[:3, 3]
    opening = float(world.openings()[arm]) * world.embodiment.arms[arm].gripper.stroke_m
    if isinstance(errand, Press):
        return _Button(tool, opening, np.array(errand.point_m))
    thing = world.object_pose(errand.object)
    return _Scene(tool, opening, thing[:3, 3], thing[:3, 2], world.table_top_m, errand)


def _home_tool_in_world(arm: Arm) -> Array:
    return _base(arm) @ arm_chain(arm).forward(arm.home_rad)


def _base(arm: Arm) -> Array:
    return _base_matrix(arm.base.xyz_m, arm.base.rpy_rad)


@lru_cache(maxsize=8)
def _base_matrix(xyz_m: tuple[float, ...], rpy_rad: tuple[float, ...]) -> Array:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", rpy_rad).as_matrix()
    matrix[:3, 3] = xyz_m
    return matrix
