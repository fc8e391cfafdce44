"""``place_empty_cup``: put the cup on the coaster. Ranges and tolerances are RoboTwin 2.0's.

Done when the cup's foot is within 35 mm of the coaster's middle and 15 mm of its top, and all grippers
are open.

Differences from RoboTwin, on purpose:

* It does not ask that the cup stands. We do (within 15 deg), and that its foot rests on the coaster
  to within 3 mm rather than 15: a cup that hangs in the air while the gripper opens is not placed.
* "Open" is the commanded gripper there; we measure it.
* The coaster stands fast, as in RoboTwin's newest version and unlike the one that SimpleVLA-RL trained
  on, whose coaster can be pushed below the cup.
* RoboTwin's gripper takes the cup by its wall, one finger inside; this cup is narrow enough to be
  taken around its body.

A cup may be pushed over the coaster's bevelled rim, which is 4 mm high.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sim_training.assets import coaster, empty_cup
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
from sim_training.tasks.motion import MotionWatch
from simplevla.embodiment import Embodiment
from simplevla.trial import FailureCode, Strategy

if TYPE_CHECKING:
    from sim_training.world import World

CUP, COASTER = "cup", "coaster"

_MAX_DISTANCE_M, _MAX_GAP_M = 0.035, 0.003
_CUP_X_M, _COASTER_X_M = (0.15, 0.3), (-0.05, 0.1)  # on the right; mirrored on the left
_NEAR_Y_M, _FAR_Y_M = -0.2, 0.05
_APART_M = 0.1
_GRASP_HEIGHT_M = 0.042


@dataclass(frozen=True)
class State:
    """What success is judged by.

    Attributes:
        distance_m: of the cup's foot from the coaster's middle, across the table.
        gap_m: height of the cup's foot above the coaster's top.
        tilt_rad: angle between the cup's axis and the vertical.
        openings: of each gripper as a fraction of its stroke.
    """

    distance_m: float
    gap_m: float
    tilt_rad: float
    openings: tuple[float, ...]


def is_success(state: State) -> bool:
    """Return whether the cup stands on the coaster and is let go."""
    return (
        state.distance_m < _MAX_DISTANCE_M
        and abs(state.gap_m) < _MAX_GAP_M
        and state.tilt_rad < MAX_TILT_RAD
        and all(opening > OPEN for opening in state.openings)
    )


class PlaceEmptyCup:
    """The task; see the module's text."""

    name = "place_empty_cup"
    instruction = "place the empty cup on the coaster"
    step_limit = 200
    splits: tuple[Split, ...] = (Split.SPATIAL, Split.GOAL)

    def place(
        self, rng: np.random.Generator, embodiment: Embodiment, *, new_goal: bool = False
    ) -> tuple[Placement, ...]:
        """Draw the cup on one side and the coaster near the middle; with one arm on that arm's side."""
        del new_goal  # the coaster stands elsewhere in each episode anyway
        side = sides(embodiment)[int(rng.integers(len(sides(embodiment))))]
        while True:
            cup = side * float(rng.uniform(*_CUP_X_M)), float(rng.uniform(_NEAR_Y_M, _FAR_Y_M))
            goal = side * float(rng.uniform(*_COASTER_X_M)), float(rng.uniform(_NEAR_Y_M, _FAR_Y_M))
            if np.hypot(cup[0] - goal[0], cup[1] - goal[1]) >= _APART_M:
                break
        cup_yaw, goal_yaw = rng.uniform(-np.pi, np.pi, 2)
        return (
            Placement(CUP, empty_cup(), cup, float(cup_yaw)),
            Placement(COASTER, coaster(), goal, float(goal_yaw), fixed=True),
        )

    def traits(self, placements: tuple[Placement, ...]) -> Traits:
        """Hold out the half of the coaster's places that is farther from the arm."""
        cup, goal = placements
        far = goal.xy_m[0] * np.sign(cup.xy_m[0]) < sum(_COASTER_X_M) / 2
        return Traits.of(cup.xy_m, (_NEAR_Y_M + _FAR_Y_M) / 2, new_object=False, new_goal=bool(far))

    def keep_clear(self, placements: tuple[Placement, ...]) -> tuple[Circle, ...]:
        """Return the cup, the coaster, the way between them, and the grippers' ways."""
        cup, goal = placements
        way = [tuple(np.add(goal.xy_m, t * np.subtract(cup.xy_m, goal.xy_m))) for t in np.linspace(0, 1, 5)]
        return (
            *(Circle((float(x), float(y)), 0.09) for x, y in way),
            *ways_of_the_arms(cup.xy_m, goal.xy_m),
        )

    def judge(self, world: World) -> Judge:
        """Return the judge of the episode that starts now."""
        return _Judge(world)

    def errand(self, world: World) -> Errand:
        """Return the errand of the arm that is nearest to the cup: to the coaster's middle."""
        state, goal = _state(world), world.object_position(COASTER)
        delivered = (
            state.distance_m < 0.6 * _MAX_DISTANCE_M
            and abs(state.gap_m) < _MAX_GAP_M
            and state.tilt_rad < 0.8 * MAX_TILT_RAD
        )
        return Errand(
            nearest_arm(world, CUP).name,
            CUP,
            _GRASP_HEIGHT_M,
            width_between_fingers(world, CUP, _GRASP_HEIGHT_M),
            (float(goal[0]), float(goal[1])),
            bool(delivered),
            goal_rise_m=world.asset(COASTER).height_m,
        )


class _Judge:
    def __init__(self, world: World) -> None:
        self._world = world
        self._motion = MotionWatch(world, CUP)

    def watch(self) -> None:
        self._motion.watch()

    def success(self) -> bool:
        dx, dy, _ = (self._world.object_position(CUP) - self._world.object_position(COASTER)).tolist()
        return dx * dx + dy * dy < _MAX_DISTANCE_M**2 and is_success(_state(self._world))

    def strategy(self) -> Strategy:
        return self._motion.strategy()

    def failure(self) -> FailureCode:
        return FailureCode.NONE if self.success() else failure_of(self._world.object_pose(CUP))


def _state(world: World) -> State:
    cup, goal = world.object_pose(CUP), world.object_pose(COASTER)
    dx, dy, dz = (cup[:3, 3] - goal[:3, 3]).tolist()
    return State(
        float(np.hypot(dx, dy)),
        dz - world.asset(COASTER).height_m,
        tilt(cup),
        tuple(world.openings().tolist()),
    )
