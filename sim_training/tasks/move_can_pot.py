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

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sim_training.assets import pots, sauce_cans
from sim_training.tasks.base import TABLE_TOP_M, Circle, Errand, Judge, MotionWatch, Placement
from simplevla.embodiment import Embodiment
from simplevla.trial import FailureCode, Strategy

if TYPE_CHECKING:
    from sim_training.world import World

CAN, POT = "can", "pot"
GOAL_OFFSET_M = 0.18

_MAX_DX_M, _MAX_DY_M = 0.2, 0.035
_MAX_TILT_RAD = float(np.deg2rad(15))
_MAX_RISE_M = 0.001
_OPEN = 0.8
_GRASP_BELOW_TOP_M = 0.035


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
        state.dx_m * state.side > 0
        and abs(state.dx_m) < _MAX_DX_M
        and abs(state.dy_m) < _MAX_DY_M
        and state.tilt_rad < _MAX_TILT_RAD
        and state.rise_m <= _MAX_RISE_M
        and all(opening > _OPEN for opening in state.openings)
    )


class MoveCanPot:
    """The task; see the module's text."""

    name = "move_can_pot"
    instruction = "move the can next to the pot"
    step_limit = 200

    def place(self, rng: np.random.Generator, embodiment: Embodiment) -> tuple[Placement, ...]:
        """Draw the pot at the origin and the can at least 0.3 m from it.

        With one arm the can stands on that arm's side.
        """
        all_pots, cans = pots(), sauce_cans()
        pot = Placement(
            POT, all_pots[int(rng.integers(len(all_pots)))], (0.0, 0.0), rng.uniform(-np.pi / 8, np.pi / 8)
        )
        asset = cans[int(rng.integers(len(cans)))]
        yaw = float(rng.uniform(-0.79, 0.79))
        while True:
            x, y = float(rng.uniform(-0.3, 0.3)), float(rng.uniform(0.05, 0.15))
            if abs(x) >= 0.2 and np.hypot(x, y) >= 0.3:
                break
        sides = {float(np.sign(arm.base.xyz_m[0])) for arm in embodiment.arms}
        if np.sign(x) not in sides:
            x = -x
        return pot, Placement(CAN, asset, (x, y), yaw)

    def keep_clear(self, placements: tuple[Placement, ...]) -> tuple[Circle, ...]:
        """Return the pot, the can, the way between the can and its goal, and the grippers' way to it."""
        pot, can = placements
        (can_x, can_y), side = can.xy_m, float(np.sign(can.xy_m[0]))
        goal = np.array([side * GOAL_OFFSET_M, 0.0])
        way = [tuple(goal + t * (np.array([can_x, can_y]) - goal)) for t in np.linspace(0, 1, 5)]
        approach = [(can_x, can_y - d) for d in (0.1, 0.2, 0.3)] + [(goal[0], -d) for d in (0.1, 0.2, 0.3)]
        homes = [(x, y) for x in (-0.3, 0.3) for y in (-0.15, -0.25, -0.35)]
        return (
            Circle(pot.xy_m, pot.asset.radius_m + 0.06),
            *(Circle((float(x), float(y)), 0.09) for x, y in way + approach + homes),
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
            and state.tilt_rad < 0.8 * _MAX_TILT_RAD
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
        return is_success(_state(self._world, self._side, self._start_z))

    def strategy(self) -> Strategy:
        return self._motion.strategy()

    def failure(self) -> FailureCode:
        state = _state(self._world, self._side, self._start_z)
        if is_success(state):
            return FailureCode.NONE
        if self._world.object_pose(CAN)[2, 3] < TABLE_TOP_M - 0.1:
            return FailureCode.DROPPED
        if state.tilt_rad >= _MAX_TILT_RAD:
            return FailureCode.NOT_UPRIGHT
        return FailureCode.TIME_LIMIT


def _state(world: World, side: float, start_z: float) -> State:
    can, pot = world.object_pose(CAN), world.object_pose(POT)
    dx, dy, _ = can[:3, 3] - pot[:3, 3]
    return State(
        side,
        float(dx),
        float(dy),
        float(np.arccos(np.clip(can[2, 2], -1, 1))),
        float(can[2, 3]) - start_z,
        tuple(world.openings().tolist()),
    )
