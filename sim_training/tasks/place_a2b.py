"""``place_a2b_left`` and ``place_a2b_right``: put one thing beside another.

Ranges and tolerances are RoboTwin 2.0's: A and B are two of twelve kinds, A anywhere in front of the
arms, B at least 0.1 m nearer or farther than A. Done when A's middle is 8 to 20 cm from B's, on the
wanted side, no more than 5 cm nearer or farther, and all grippers are open.

Differences from RoboTwin, on purpose:

* RoboTwin names the two in each episode's instruction. Here B is painted black, whatever its kind, so
  that one instruction tells them apart in every episode.
* It asks nothing else of A and B. We ask that both stand upright (within 15 deg) and that A stands on
  the table: one that was knocked over, or hangs in the air while the gripper opens, is not placed.
* "Open" is the commanded gripper there; we measure it.

As in RoboTwin nothing asks how A came there, and B need not be where it was: either may be pushed
(the paper's second pushcut).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sim_training.assets import small_black_things, small_things
from sim_training.splits import Split, Traits
from sim_training.tasks.base import (
    MAX_TILT_RAD,
    OPEN,
    Circle,
    Errand,
    Judge,
    Placement,
    failure_of,
    nearest_arm,
    sides,
    tilt,
    ways_of_the_arms,
    width_between_fingers,
)
from sim_training.tasks.motion import MotionWatch, strategy_of
from simplevla.embodiment import Embodiment
from simplevla.trial import FailureCode, Strategy

if TYPE_CHECKING:
    from sim_training.world import World

A, B = "a", "b"
GOAL_OFFSET_M = 0.13

_LEFT, _RIGHT = -1.0, 1.0
_MIN_M, _MAX_M, _MAX_DY_M = 0.08, 0.2, 0.05
_MAX_RISE_M = 0.002
_NEAR_Y_M, _FAR_Y_M = -0.2, 0.0
_REACH_X_M = 0.22
_BEYOND_X_M = (0.18, 0.23)  # where B stands if A is on the side that A shall go to ...
_MIDDLE_X_M = (-0.1, 0.1)  # ... and if it is not
_APART_M = 0.1
_NEW_KINDS = frozenset({"house", "candle", "barrel"})
_GRASP_AT = 0.55  # of the height


@dataclass(frozen=True)
class State:
    """What success is judged by.

    Attributes:
        dx_m, dy_m: A minus B in the world's x and y.
        tilt_rad: angle between the vertical and the axis of whichever leans more.
        rise_m: height of A above its height at the start.
        openings: of each gripper as a fraction of its stroke.
    """

    dx_m: float
    dy_m: float
    tilt_rad: float
    rise_m: float
    openings: tuple[float, ...]


def is_success(state: State, side: float) -> bool:
    """Return whether A stands beside B on the wanted ``side`` (-1 left, 1 right) and is let go."""
    return (
        is_beside(state.dx_m, state.dy_m, side)
        and state.tilt_rad < MAX_TILT_RAD
        and abs(state.rise_m) <= _MAX_RISE_M
        and all(opening > OPEN for opening in state.openings)
    )


def is_beside(dx_m: float, dy_m: float, side: float) -> bool:
    """Return whether A is on the wanted side of B and neither too near nor too far."""
    return dx_m * side > 0 and abs(dy_m) < _MAX_DY_M and _MIN_M < np.hypot(dx_m, dy_m) < _MAX_M


class PlaceA2BLeft:
    """A goes to the left of B; see the module's text."""

    name = "place_a2b_left"
    instruction = "place the coloured object to the left of the black object"
    step_limit = 200
    splits: tuple[Split, ...] = (Split.SPATIAL, Split.OBJECT, Split.GOAL)
    side = _LEFT

    def place(
        self, rng: np.random.Generator, embodiment: Embodiment, *, new_goal: bool = False
    ) -> tuple[Placement, ...]:
        """Draw A and B, two kinds, where one arm reaches both A and its goal.

        With one arm A stands on that arm's side.
        """
        del new_goal  # B stands elsewhere in each episode anyway
        kinds = len(small_things())
        a_kind = int(rng.integers(kinds))
        b_kind = (a_kind + int(rng.integers(1, kinds))) % kinds
        reachable = sides(embodiment)
        while True:
            a = float(rng.uniform(-_REACH_X_M, _REACH_X_M)), float(rng.uniform(_NEAR_Y_M, _FAR_Y_M))
            if np.sign(a[0]) not in reachable:
                a = -a[0], a[1]
            low, high = self._b_range(a[0])
            b = float(rng.uniform(low, high)), float(rng.uniform(_NEAR_Y_M, _FAR_Y_M))
            dx, dy = a[0] - b[0], a[1] - b[1]
            if abs(dy) >= _APART_M and (np.hypot(dx, dy) > _MAX_M - 0.01 or dx * self.side < 0):
                break
        a_yaw, b_yaw = rng.uniform(-np.pi, np.pi, 2)
        return (
            Placement(A, small_things()[a_kind], a, float(a_yaw)),
            Placement(B, small_black_things()[b_kind], b, float(b_yaw)),
        )

    def traits(self, placements: tuple[Placement, ...]) -> Traits:
        """Hold out three kinds as either thing, and the right half of where B may stand."""
        a, b = placements
        kinds = {placement.asset.name.removesuffix("_black") for placement in placements}
        low, high = self._b_range(a.xy_m[0])
        return Traits.of(
            a.xy_m,
            (_NEAR_Y_M + _FAR_Y_M) / 2,
            new_object=bool(kinds & _NEW_KINDS),
            new_goal=b.xy_m[0] > (low + high) / 2,
        )

    def keep_clear(self, placements: tuple[Placement, ...]) -> tuple[Circle, ...]:
        """Return both things, the way of A, and the grippers' ways."""
        a, b = placements
        goal = (b.xy_m[0] + self.side * GOAL_OFFSET_M, b.xy_m[1])
        way = [tuple(np.add(goal, t * np.subtract(a.xy_m, goal))) for t in np.linspace(0, 1, 5)]
        return (
            Circle(b.xy_m, b.asset.radius_m + 0.06),
            *(Circle((float(x), float(y)), 0.09) for x, y in way),
            *ways_of_the_arms(a.xy_m, goal),
        )

    def judge(self, world: World) -> Judge:
        """Return the judge of the episode that starts now."""
        return _Judge(world, self.side)

    def errand(self, world: World) -> Errand:
        """Return the errand of the arm that is nearest to A: over B if need be, to 13 cm beside it."""
        a, b = world.asset(A), world.asset(B)
        state, goal = _state(world, 0.0), world.object_pose(B)[:2, 3] + [self.side * GOAL_OFFSET_M, 0.0]
        standing = world.object_pose(A)[2, 3] - world.table_top_m < 0.003
        near_goal = is_beside(state.dx_m, state.dy_m / 0.7, self.side) and (
            a.radius_m + b.radius_m + 0.03 < abs(state.dx_m) < 0.96 * _MAX_M
        )
        grasp = _GRASP_AT * a.height_m
        return Errand(
            nearest_arm(world, A).name,
            A,
            grasp,
            width_between_fingers(world, A, grasp),
            (float(goal[0]), float(goal[1])),
            bool(standing and near_goal and state.tilt_rad < 0.8 * MAX_TILT_RAD),
            clearance_m=b.height_m + 0.025,
        )

    def _b_range(self, a_x_m: float) -> tuple[float, float]:
        low, high = _BEYOND_X_M
        if a_x_m * self.side > 0:
            return _MIDDLE_X_M
        return (low, high) if self.side < 0 else (-high, -low)


class PlaceA2BRight(PlaceA2BLeft):
    """A goes to the right of B; see the module's text."""

    name = "place_a2b_right"
    instruction = "place the coloured object to the right of the black object"
    side = _RIGHT


class _Judge:
    def __init__(self, world: World, side: float) -> None:
        self._world, self._side = world, side
        self._a, self._b = MotionWatch(world, A), MotionWatch(world, B)
        self._start_z = float(world.object_position(A)[2])

    def watch(self) -> None:
        self._a.watch()
        self._b.watch()

    def success(self) -> bool:
        dx, dy, _ = (self._world.object_position(A) - self._world.object_position(B)).tolist()
        return is_beside(dx, dy, self._side) and is_success(_state(self._world, self._start_z), self._side)

    def strategy(self) -> Strategy:
        return strategy_of(self._a, self._b)

    def failure(self) -> FailureCode:
        if is_success(_state(self._world, self._start_z), self._side):
            return FailureCode.NONE
        return failure_of(self._world.object_pose(A))


def _state(world: World, start_z: float) -> State:
    a, b = world.object_pose(A), world.object_pose(B)
    dx, dy, _ = (a[:3, 3] - b[:3, 3]).tolist()
    return State(dx, dy, max(tilt(a), tilt(b)), float(a[2, 3]) - start_z, tuple(world.openings().tolist()))
