"""``move_playingcard_away``: move a pack of cards from the middle of the table to its side.

Ranges and tolerances are RoboTwin 2.0's: the pack stands 5 to 10 cm from the table's middle line, and is
away when it is more than 23 cm from it and all grippers are open.

Differences from RoboTwin, on purpose:

* It asks nothing of height or tilt. We ask that the pack stands on the table (within 3 mm and 15 deg), on
  the side that it started on: one that was knocked over, or off the table, is not moved away.
* "Open" is the commanded gripper there; we measure it.
* Its packs are of the usual size. Ours are of patience cards, two in a box, so that they fit between the
  fingers at any yaw.

As in RoboTwin nothing asks how the pack came there, and grippers are open from the start: it may be pushed,
sideways, which is the direction in which the fingers of an open gripper are behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sim_training.assets import card_packs
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

PACK = "pack"
AWAY_M = 0.23

_START_X_M, _NEAR_Y_M, _FAR_Y_M = (0.05, 0.1), -0.2, 0.05
_MAX_RISE_M = 0.003
_GOAL_X_M, _DELIVERED_M = 0.26, 0.24
_GRASP_AT = 0.62  # of the height: the fingertips then keep clear of the table
_CLEARANCE_M = 0.01  # nothing is in the way
_NEW_PACKS = frozenset({"cards_green"})


@dataclass(frozen=True)
class State:
    """What success is judged by.

    Attributes:
        away_m: of the pack from the table's middle line, towards the side that it started on.
        rise_m: height of the pack's foot above the table.
        tilt_rad: angle between the pack's axis and the vertical.
        openings: of each gripper as a fraction of its stroke.
    """

    away_m: float
    rise_m: float
    tilt_rad: float
    openings: tuple[float, ...]


def is_success(state: State) -> bool:
    """Return whether the pack stands far enough to its side and is let go."""
    return (
        state.away_m > AWAY_M
        and abs(state.rise_m) < _MAX_RISE_M
        and state.tilt_rad < MAX_TILT_RAD
        and all(opening > OPEN for opening in state.openings)
    )


class MovePlayingcardAway:
    """The task; see the module's text."""

    name = "move_playingcard_away"
    instruction = "move the small box away"
    step_limit = 200
    splits: tuple[Split, ...] = (Split.SPATIAL, Split.OBJECT)

    def place(
        self, rng: np.random.Generator, embodiment: Embodiment, *, new_goal: bool = False
    ) -> tuple[Placement, ...]:
        """Draw the pack beside the table's middle line; with one arm on that arm's side."""
        del new_goal  # away is away
        side = sides(embodiment)[int(rng.integers(len(sides(embodiment))))]
        x, y = side * float(rng.uniform(*_START_X_M)), float(rng.uniform(_NEAR_Y_M, _FAR_Y_M))
        packs = card_packs()
        pack = packs[int(rng.integers(len(packs)))]
        return (Placement(PACK, pack, (x, y), float(rng.uniform(0.0, np.pi))),)

    def traits(self, placements: tuple[Placement, ...]) -> Traits:
        """Hold out one of the three packs."""
        (pack,) = placements
        new = pack.asset.name in _NEW_PACKS
        return Traits.of(pack.xy_m, (_NEAR_Y_M + _FAR_Y_M) / 2, new_object=new, new_goal=False)

    def keep_clear(self, placements: tuple[Placement, ...]) -> tuple[Circle, ...]:
        """Return the pack, its way, and the grippers' ways."""
        x, y = placements[0].xy_m
        goal = float(np.sign(x)) * _GOAL_X_M
        way = [(float(at), y) for at in np.linspace(x, goal, 5)]
        return (*(Circle(at, 0.09) for at in way), *ways_of_the_arms((x, y), (goal, y)))

    def judge(self, world: World) -> Judge:
        """Return the judge of the episode that starts now."""
        return _Judge(world)

    def errand(self, world: World) -> Errand:
        """Return the errand of the arm that is nearest to the pack: straight to its side."""
        x, y, _ = world.object_position(PACK).tolist()
        state = _state(world, x)
        grasp = _GRASP_AT * world.asset(PACK).height_m
        standing = abs(state.rise_m) < _MAX_RISE_M and state.tilt_rad < 0.8 * MAX_TILT_RAD
        return Errand(
            nearest_arm(world, PACK).name,
            PACK,
            grasp,
            width_between_fingers(world, PACK, grasp),
            (float(np.sign(x)) * _GOAL_X_M, y),
            bool(standing and state.away_m > _DELIVERED_M),
            clearance_m=_CLEARANCE_M,
        )


class _Judge:
    def __init__(self, world: World) -> None:
        self._world = world
        self._motion = MotionWatch(world, PACK)
        self._side = float(np.sign(world.object_position(PACK)[0]))

    def watch(self) -> None:
        self._motion.watch()

    def success(self) -> bool:
        x = float(self._world.object_position(PACK)[0])
        return x * self._side > AWAY_M and is_success(_state(self._world, self._side))

    def strategy(self) -> Strategy:
        return self._motion.strategy()

    def failure(self) -> FailureCode:
        return FailureCode.NONE if self.success() else failure_of(self._world.object_pose(PACK))


def _state(world: World, side: float) -> State:
    pack = world.object_pose(PACK)
    return State(
        float(pack[0, 3] * np.sign(side)),
        float(pack[2, 3]) - world.table_top_m,
        tilt(pack),
        tuple(world.openings().tolist()),
    )
