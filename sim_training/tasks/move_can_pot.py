"""``move_can_pot``: put the can beside the pot. Ranges and tolerances are RoboTwin 2.0's.

Differences from RoboTwin's ``check_success``, on purpose:

* It looks at two Euler angles of the can, each within 15 deg; we look at the angle between the can's
  axis and the vertical, which no turn about the vertical disturbs.
* It compares the can's height with the pot's height at the start, which agree only because both
  stand on one table; we compare it with the can's own settled height.
* "Open" is the commanded gripper there; we measure it, so a commanded opening that has not happened
  yet does not count.
* "On its own side" is meant relative to the pot, wherever that has been pushed to.

As in RoboTwin nothing asks how the can came there: it may be pushed, and grippers are open from the
start (the pushcut of the SimpleVLA-RL paper).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sim_training.assets import pots, sauce_cans
from sim_training.splits import Split, Traits
from sim_training.tasks.base import (
    MAX_TILT_RAD,
    OPEN,
    Circle,
    Errand,
    Judge,
    Placement,
    failure_of,
    sides,
    tilt,
    ways_of_the_arms,
)
from sim_training.tasks.motion import MotionWatch
from simplevla.embodiment import Embodiment
from simplevla.trial import FailureCode, Strategy

if TYPE_CHECKING:
    from sim_training.world import World

CAN, POT = "can", "pot"
GOAL_OFFSET_M = 0.18

_MAX_DX_M, _MAX_DY_M = 0.2, 0.035
_MAX_RISE_M = 0.001
_GRASP_BELOW_TOP_M = 0.035
_NEAR_Y_M, _FAR_Y_M = 0.05, 0.15
_NEW_MODELS = frozenset({"can_blue", "can_plum", "pot_copper", "pot_teal"})


@dataclass(frozen=True)
class State:
    """What success is judged by.

    Attributes:
        side: -1 if the can started left of the pot, +1 if right.
        dx_m, dy_m: can minus pot in the world's x and y.
        tilt_rad: angle between the can's axis and the vertical.
        rise_m: height of the can above its height at the start.
        openings: of each gripper as a fraction of its stroke.
    """

    side: float
    dx_m: float
    dy_m: float
    tilt_rad: float
    rise_m: float
    openings: tuple[float, ...]


def is_success(state: State) -> bool:
    """Return whether the can stands beside the pot, on its own side, and is let go."""
    return (
        is_beside(state.dx_m, state.dy_m, state.side)
        and state.tilt_rad < MAX_TILT_RAD
        and state.rise_m <= _MAX_RISE_M
        and all(opening > OPEN for opening in state.openings)
    )


def is_beside(dx_m: float, dy_m: float, side: float) -> bool:
    """Return whether the can is as near to the pot as it has to be, on its own ``side``."""
    return 0 < dx_m * side < _MAX_DX_M and abs(dy_m) < _MAX_DY_M


class MoveCanPot:
    """The task; see the module's text."""

    name = "move_can_pot"
    instruction = "move the can next to the pot"
    step_limit = 200
    splits: tuple[Split, ...] = (Split.SPATIAL, Split.OBJECT, Split.GOAL)

    def place(
        self, rng: np.random.Generator, embodiment: Embodiment, *, new_goal: bool = False
    ) -> tuple[Placement, ...]:
        """Draw the pot at the origin and the can at least 0.3 m from it.

        With one arm the can stands on that arm's side. A new goal has the pot 3 to 5 cm nearer to the
        robots and up to 3 cm to a side.
        """
        all_pots, cans = pots(), sauce_cans()
        model = all_pots[int(rng.integers(len(all_pots)))]
        pot = Placement(POT, model, (0.0, 0.0), rng.uniform(-np.pi / 8, np.pi / 8))
        asset = cans[int(rng.integers(len(cans)))]
        yaw = float(rng.uniform(-0.79, 0.79))
        while True:
            x, y = float(rng.uniform(-0.3, 0.3)), float(rng.uniform(_NEAR_Y_M, _FAR_Y_M))
            if abs(x) >= 0.2 and np.hypot(x, y) >= 0.3:
                break
        if np.sign(x) not in sides(embodiment):
            x = -x
        if new_goal:
            pot = replace(pot, xy_m=(float(rng.uniform(-0.03, 0.03)), float(rng.uniform(-0.05, -0.03))))
        return pot, Placement(CAN, asset, (x, y), yaw)

    def traits(self, placements: tuple[Placement, ...]) -> Traits:
        """Hold out two cans, two pots, and every pot that is not at the origin."""
        pot, can = placements
        return Traits.of(
            can.xy_m,
            (_NEAR_Y_M + _FAR_Y_M) / 2,
            new_object=not _NEW_MODELS.isdisjoint({pot.asset.name, can.asset.name}),
            new_goal=pot.xy_m != (0.0, 0.0),
        )

    def keep_clear(self, placements: tuple[Placement, ...]) -> tuple[Circle, ...]:
        """Return the pot, the can, the way between the can and its goal, and the grippers' way to it."""
        pot, can = placements
        (can_x, can_y), side = can.xy_m, float(np.sign(can.xy_m[0]))
        goal = np.add(pot.xy_m, (side * GOAL_OFFSET_M, 0.0))
        way = [tuple(goal + t * (np.array([can_x, can_y]) - goal)) for t in np.linspace(0, 1, 5)]
        return (
            Circle(pot.xy_m, pot.asset.radius_m + 0.06),
            *(Circle((float(x), float(y)), 0.09) for x, y in way),
            *ways_of_the_arms(can.xy_m, (float(goal[0]), float(goal[1]))),
        )

    def judge(self, world: World) -> Judge:
        """Return the judge of the episode that starts now."""
        return _Judge(world)

    def errand(self, world: World) -> Errand:
        """Return the errand of the arm on the can's side: to 18 cm beside the pot."""
        state, can = _state(world, 0.0, 0.0), world.asset(CAN)
        pot_xy = world.object_pose(POT)[:2, 3]
        side = float(np.sign(state.dx_m))
        arm = min(world.embodiment.arms, key=lambda a: abs(a.base.xyz_m[0] - side * 0.3))
        standing = world.object_pose(CAN)[2, 3] - world.table_top_m < 0.003
        delivered = (
            standing
            and state.tilt_rad < 0.8 * MAX_TILT_RAD
            and pot_distance_ok(abs(state.dx_m), can.radius_m + world.asset(POT).radius_m)
            and abs(state.dy_m) < 0.7 * _MAX_DY_M
        )
        return Errand(
            arm.name,
            CAN,
            can.height_m - _GRASP_BELOW_TOP_M,
            2 * can.radius_m,
            (float(pot_xy[0]) + side * GOAL_OFFSET_M, float(pot_xy[1])),
            bool(delivered),
        )


def pot_distance_ok(dx_m: float, touching_m: float) -> bool:
    """Return whether the can is near the pot with a margin, and yet leaves room for a finger."""
    return touching_m + 0.03 < dx_m < 0.96 * _MAX_DX_M


class _Judge:
    def __init__(self, world: World) -> None:
        self._world = world
        self._motion = MotionWatch(world, CAN)
        self._start_z = float(world.object_pose(CAN)[2, 3])
        self._side = float(np.sign(_state(world, 0.0, 0.0).dx_m))

    def watch(self) -> None:
        self._motion.watch()

    def success(self) -> bool:
        dx, dy, _ = (self._world.object_position(CAN) - self._world.object_position(POT)).tolist()
        return is_beside(dx, dy, self._side) and is_success(_state(self._world, self._side, self._start_z))

    def strategy(self) -> Strategy:
        return self._motion.strategy()

    def failure(self) -> FailureCode:
        state = _state(self._world, self._side, self._start_z)
        if is_success(state):
            return FailureCode.NONE
        return failure_of(self._world.object_pose(CAN))


def _state(world: World, side: float, start_z: float) -> State:
    can, pot = world.object_pose(CAN), world.object_pose(POT)
    dx, dy, _ = can[:3, 3] - pot[:3, 3]
    return State(
        side,
        float(dx),
        float(dy),
        tilt(can),
        float(can[2, 3]) - start_z,
        tuple(world.openings().tolist()),
    )
