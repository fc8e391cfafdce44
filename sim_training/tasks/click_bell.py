"""``click_bell``: press the button of a desk bell with the closed gripper. Ranges are RoboTwin 2.0's.

Done at the moment at which the gripper of the arm on the bell's side is closed and presses on the bell
from above, within 25 mm of the button across the table and 30 mm in height.

Differences from RoboTwin, on purpose:

* There any contact near the button counts, a brush along the dome as well. We ask that the bell is
  pressed down: the impulse of the touch points more down than aside.
* "Closed" is the commanded gripper there; we measure it.

The bell stands fast, so nothing is grasped or pushed: the strategy of a success is a touch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sim_training.assets import bells
from sim_training.splits import Split, Traits
from sim_training.tasks.base import Circle, Judge, Placement, Press, sides, ways_of_the_arms
from simplevla.embodiment import Arm, Embodiment
from simplevla.trial import FailureCode, Strategy

if TYPE_CHECKING:
    from sim_training.world import Touch, World

BELL = "bell"

_CLOSED = 0.2
_MAX_ACROSS_M, _MAX_HEIGHT_M = 0.025, 0.03
_MIN_X_M, _MAX_X_M = 0.05, 0.25
_NEAR_Y_M, _FAR_Y_M = -0.2, 0.0
_LOOK_FROM_M = 0.08  # the tool is nowhere near the bell while it is farther than this above the button
_NEW_MODEL = "bell_steel"


def is_click(touch: Touch, point_m: tuple[float, float, float], arm: str) -> bool:
    """Return whether a touch of the bell is a press of ``arm`` on the button at ``point_m``."""
    across, height = np.hypot(*(touch.point_m - point_m)[:2]), abs(touch.point_m[2] - point_m[2])
    down, aside = -touch.impulse_ns[2], np.hypot(*touch.impulse_ns[:2])
    return bool(
        touch.link.startswith(f"{arm}/")
        and across < _MAX_ACROSS_M
        and height < _MAX_HEIGHT_M
        and down > aside
    )


class ClickBell:
    """The task; see the module's text."""

    name = "click_bell"
    instruction = "click the bell"
    step_limit = 200
    splits: tuple[Split, ...] = (Split.SPATIAL, Split.OBJECT)

    def place(
        self, rng: np.random.Generator, embodiment: Embodiment, *, new_goal: bool = False
    ) -> tuple[Placement, ...]:
        """Draw one of two bells, 5 to 25 cm to the left or right; with one arm on that arm's side."""
        del new_goal  # the bell is object and goal in one
        model = bells()[int(rng.integers(len(bells())))]
        side = sides(embodiment)[int(rng.integers(len(sides(embodiment))))]
        xy = side * float(rng.uniform(_MIN_X_M, _MAX_X_M)), float(rng.uniform(_NEAR_Y_M, _FAR_Y_M))
        return (Placement(BELL, model, xy, float(rng.uniform(-np.pi, np.pi)), fixed=True),)

    def traits(self, placements: tuple[Placement, ...]) -> Traits:
        """Hold one of the bells out."""
        (bell,) = placements
        return Traits.of(
            bell.xy_m,
            (_NEAR_Y_M + _FAR_Y_M) / 2,
            new_object=bell.asset.name == _NEW_MODEL,
            new_goal=False,
        )

    def keep_clear(self, placements: tuple[Placement, ...]) -> tuple[Circle, ...]:
        """Return the bell and the gripper's way to it."""
        (bell,) = placements
        return Circle(bell.xy_m, 0.12), *ways_of_the_arms(bell.xy_m)

    def judge(self, world: World) -> Judge:
        """Return the judge of the episode that starts now."""
        return _Judge(world)

    def errand(self, world: World) -> Press:
        """Return the press of the arm on the bell's side."""
        return Press(_arm(world).name, _button(world))


class _Judge:
    def __init__(self, world: World) -> None:
        self._world = world
        self._arm, self._point = _arm(world), _button(world)
        self._index = world.embodiment.arms.index(self._arm)
        self._clicked = False

    def watch(self) -> None:
        pass  # a click is an instant: success() sees it

    def success(self) -> bool:
        """Return whether the bell has been clicked; it stays so."""
        self._clicked = self._clicked or self._clicking()
        return self._clicked

    def strategy(self) -> Strategy:
        return Strategy.TOUCH if self._clicked else Strategy.NONE

    def failure(self) -> FailureCode:
        return FailureCode.NONE if self.success() else FailureCode.TIME_LIMIT

    def _clicking(self) -> bool:
        if self._world.tool_pose(self._arm.name)[2, 3] > self._point[2] + _LOOK_FROM_M:
            return False
        if self._world.openings()[self._index] >= _CLOSED:
            return False
        return any(is_click(touch, self._point, self._arm.name) for touch in self._world.touches(BELL))


def _arm(world: World) -> Arm:
    """Return the arm on the bell's side."""
    side = float(np.sign(world.object_position(BELL)[0]))
    return min(world.embodiment.arms, key=lambda arm: abs(arm.base.xyz_m[0] - side * 0.3))


def _button(world: World) -> tuple[float, float, float]:
    x, y, foot = world.object_position(BELL).tolist()
    return x, y, foot + world.asset(BELL).height_m
