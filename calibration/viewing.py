"""Which poses of an arm show the board to a camera without touching anything, and in which order.

The arms' geometry and the distances come from the bridge's clearance, which guards the way to the bus as
well; here they are kept with something to spare, so that no planned pose is refused on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.settings import Settings
from robot_bridge.clearance import Margins, Workspace
from simplevla.embodiment import Arm, Embodiment
from simplevla.kinematics import arm_chain
from simplevla.session_record import to_matrix

Array = NDArray[np.float64]

_LIMIT_MARGIN_RAD = 0.05
_WAY_STEP_RAD = 0.08  # between the points of a way that are looked at
_GRIPPER_RADIUS_M = 0.06  # spheres above this are the gripper's own, which holds the board by its edge
_PLATE_SPACING_M = 0.03
_RIM_M = 0.01


def plate_points(settings: Settings) -> Array:
    """Return (N, 3) points all over the board as it is clamped, in the tool frame, m."""
    width, height = settings.board.size_m
    xs = np.linspace(-_RIM_M, width + _RIM_M, round(width / _PLATE_SPACING_M) + 1)
    ys = np.linspace(-_RIM_M, height + _RIM_M, round(height / _PLATE_SPACING_M) + 1)
    x, y = np.meshgrid(xs, ys)
    points = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1)
    mount = to_matrix(settings.mount)
    in_tool: Array = points @ mount[:3, :3].T + mount[:3, 3]
    return in_tool


class Viewing:
    """Judges poses of one arm that shows the board to one camera; the other arms are at home.

    Args:
        embodiment: the robot.
        arm: which arm; it carries the board.
        camera_in_world: (4, 4) about where the camera's optical frame is, m.
        settings: the board, its mount, and what to keep clear.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        arm: Arm,
        camera_in_world: Array,
        settings: Settings,
    ) -> None:
        spare = settings.clearance_m
        self._workspace = Workspace(
            embodiment,
            margins=Margins(*(margin + spare for margin in dataclasses.astuple(Margins()))),
            carried={arm.name: plate_points(settings)},
        )
        self._home = embodiment.home()
        self.arm = arm
        self.part = next(part for each, part in embodiment.slices() if each.name == arm.name)
        self._chain = arm_chain(arm)
        self._base = to_matrix(arm.base)
        self._camera = camera_in_world[:3, 3]
        width, height = settings.board.size_m
        corners = np.array(
            [[0, 0, 0], [width, 0, 0], [0, height, 0], [width, height, 0], [width / 2, height / 2, 0]]
        )
        mount = to_matrix(settings.mount)
        self._corners = corners @ mount[:3, :3].T + mount[:3, 3]
        self.lower = np.array([joint.lower_rad for joint in arm.joints]) + _LIMIT_MARGIN_RAD
        self.upper = np.array([joint.upper_rad for joint in arm.joints]) - _LIMIT_MARGIN_RAD

    def whole(self, joints: Array) -> Array:
        """Return (D,) all arms' positions with this arm's joints at ``joints`` (n,), gripper closed."""
        positions = self._home.copy()
        positions[self.part] = [*joints, 0.0]
        return positions

    def allowed(self, joints: Array) -> bool:
        """Return whether the arm may stand at ``joints`` (n,) and nothing hides the board there."""
        inside = bool(((joints >= self.lower) & (joints <= self.upper)).all())
        return inside and self.clear(joints) and self._in_sight(joints)

    def clear(self, joints: Array) -> bool:
        """Return whether arm and board are clear, at ``joints`` (n,), of what the limits keep clear of."""
        return not self._workspace.unsafe(self.whole(joints), self._home)

    def way_clear(self, start: Array, goal: Array) -> bool:
        """Return whether the straight way in joint space from ``start`` to ``goal``, (n,), is clear."""
        count = int(np.ceil(np.abs(goal - start).max() / _WAY_STEP_RAD)) + 1
        return all(self.clear(start + s * (goal - start)) for s in np.linspace(0, 1, count))

    def route(self, start: Array, poses: Sequence[Array]) -> list[Array]:
        """Return the poses that can be reached, (n,) each, each after the nearest one before it.

        Where the straight way is not clear but those over home are, home is in between.
        """
        home = np.array(self.arm.home_rad)
        left, here, route = [np.asarray(pose) for pose in poses], start, []
        while left:
            left.sort(key=lambda pose, here=here: float(np.abs(pose - here).max()))  # type: ignore[misc]
            straight = next((pose for pose in left if self.way_clear(here, pose)), None)
            if straight is None and not np.array_equal(here, home) and self.way_clear(here, home):
                route.append(home)
                here = home
                continue
            if straight is None:
                break
            left = [pose for pose in left if pose is not straight]
            route.append(straight)
            here = straight
        while route and np.array_equal(route[-1], home):
            route.pop()
        return route

    def _in_sight(self, joints: Array) -> bool:
        """Return whether no link of an arm stands between the camera and the board."""
        tool = self._base @ self._chain.forward(joints)
        corners = self._corners @ tool[:3, :3].T + tool[:3, 3]
        centres, radii = self._workspace.spheres(self.whole(joints))
        links = radii < _GRIPPER_RADIUS_M
        rays = corners - self._camera
        away = centres[links] - self._camera
        along = np.clip(away @ rays.T / (rays**2).sum(axis=1), 0.0, 1.0)  # (S, C)
        nearest = self._camera + along[..., None] * rays
        distance = np.linalg.norm(centres[links][:, None] - nearest, axis=2)
        return bool((distance > radii[links][:, None]).all())
