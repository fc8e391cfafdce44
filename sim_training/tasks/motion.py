"""How a thing came to where it is, told from contacts: grasped or pushed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from simplevla.trial import Strategy

if TYPE_CHECKING:
    from sim_training.world import Touch

_STEP_M = 0.001  # of travel, after which contacts are looked at again
_PRESS_NS = 1e-5  # impulse of one physics step that counts as a touch, N s
_OPPOSED_COS = -0.5  # two fingers hold what they press from opposite sides, to within 60 deg
_LIFTED_M = 0.005
_CARRIED_M = 0.03
_MOVED_M = 0.01


class Scene(Protocol):
    """What a watch has to know of a world: see :class:`sim_training.world.World`."""

    @property
    def fingers(self) -> dict[str, tuple[str, str]]:
        """The two fingers of each arm."""

    def object_position(self, name: str) -> NDArray[np.float64]:
        """Return where the foot of a thing is, (3,); world, m."""

    def touches(self, name: str) -> list[Touch]:
        """Return where robot links press on a thing."""


class MotionWatch:
    """Accounts for the way of one thing: how much of it was carried, and how much pushed.

    After each millimetre of travel the contacts say what moves the thing. Two fingers of one gripper
    that press on it from opposite sides *carry* it; any other touch of a robot *pushes* it, be it a
    shove, a knock in passing or a drag by one finger; what it slides, rolls or falls on untouched
    counts for whatever moved it last. While a thing rests, watching costs one look at its place.

    ``GRASP``: it was lifted off by more than 5 mm or moved by more than 3 cm in the fingers, and no
    less of its way was carried than pushed. ``PUSH``: more than 1 cm was pushed and it was not
    grasped. ``NONE``: neither. With ``success`` a ``PUSH`` is a pushcut.
    """

    def __init__(self, world: Scene, name: str) -> None:
        self._world = world
        self._name = name
        self._start = self._last = world.object_position(name)
        self._carried_m = self._pushed_m = 0.0
        self._lifted = self._held = self._touched = False

    def watch(self) -> None:
        """Take note of the contacts and the place of the thing now."""
        place = self._world.object_position(self._name)
        step = place - self._last
        length = float(np.sqrt(step @ step))
        if length < _STEP_M:
            return
        self._last = place
        self._look()
        if self._held:
            self._carried_m += length
            self._lifted |= bool(place[2] - self._start[2] > _LIFTED_M)
        elif self._touched:
            self._pushed_m += length

    def strategy(self) -> Strategy:
        """Return the verdict so far."""
        grasped = self._lifted or self._carried_m > _CARRIED_M
        if grasped and self._carried_m >= self._pushed_m:
            return Strategy.GRASP
        return Strategy.PUSH if self._pushed_m > _MOVED_M else Strategy.NONE

    def _look(self) -> None:
        pressed: dict[str, NDArray[np.float64]] = {}
        for touch in self._world.touches(self._name):
            pressed[touch.link] = pressed.get(touch.link, 0.0) + touch.impulse_ns
        pressed = {link: push for link, push in pressed.items() if np.linalg.norm(push) >= _PRESS_NS}
        if not pressed:
            return
        self._touched = True
        self._held = any(
            first in pressed and second in pressed and _opposed(pressed[first], pressed[second])
            for first, second in self._world.fingers.values()
        )


def strategy_of(moved: MotionWatch, *others: MotionWatch) -> Strategy:
    """Return how a task was done whose object is ``moved`` and whose other things may be pushed as well.

    ``GRASP`` if the object was grasped, else ``PUSH`` if anything was pushed.
    """
    if moved.strategy() is Strategy.GRASP:
        return Strategy.GRASP
    pushed = any(watch.strategy() is Strategy.PUSH for watch in (moved, *others))
    return Strategy.PUSH if pushed else Strategy.NONE


def _opposed(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    return float(first @ second) < _OPPOSED_COS * float(np.linalg.norm(first) * np.linalg.norm(second))
