"""What a task is: what stands where, what counts as done, and what an expert has to do.

A new task is one file beside this one: a class with the members of :class:`Task` and a judge, and
its name in ``tasks/__init__.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sim_training.assets import Asset
from simplevla.embodiment import Embodiment
from simplevla.trial import FailureCode, Strategy

if TYPE_CHECKING:
    from sim_training.world import World

TABLE_TOP_M = 0.74

_TOUCH_NS = 1e-5  # contact impulse of one physics step that counts as touching, N s
_MOVED_M = 0.01
_LIFTED_M = 0.005
_CARRIED_M = 0.03


@dataclass(frozen=True, eq=False)
class Placement:
    """One thing of a task and where it stands: (x, y) in the world, m, and yaw, rad."""

    name: str
    asset: Asset
    xy_m: tuple[float, float]
    yaw_rad: float


@dataclass(frozen=True)
class Circle:
    """A round patch of the table that has to stay free: centre in the world, m."""

    xy_m: tuple[float, float]
    radius_m: float


@dataclass(frozen=True, eq=False)
class Errand:
    """A pick and place for the scripted expert: which arm takes which object where.

    Attributes:
        grasp_height_m: where on the object's axis to grasp it, above its foot.
        width_m: the object's width between the fingers.
        goal_xy_m: where its foot shall stand, in the world.
        delivered: whether it stands where it counts, so that it can be let go.
    """

    arm: str
    object: str
    grasp_height_m: float
    width_m: float
    goal_xy_m: tuple[float, float]
    delivered: bool


class Judge(Protocol):
    """Watches one episode of a task."""

    def watch(self) -> None:
        """Take note of the world as it is now; called every few physics steps."""

    def success(self) -> bool:
        """Return whether the world fulfils the task at this instant."""

    def strategy(self) -> Strategy:
        """Return how the object was moved, judged from what was watched."""

    def failure(self) -> FailureCode:
        """Return why the task is not fulfilled now; ``NONE`` if it is."""


class Task(Protocol):
    """A task, the same for every episode.

    Attributes:
        name: as users type it.
        instruction: the canonical instruction.
        step_limit: actions after which an episode counts as failed.
    """

    name: str
    instruction: str
    step_limit: int

    def place(self, rng: np.random.Generator, embodiment: Embodiment) -> tuple[Placement, ...]:
        """Draw what stands where."""

    def keep_clear(self, placements: tuple[Placement, ...]) -> tuple[Circle, ...]:
        """Return where clutter must not stand."""

    def judge(self, world: World) -> Judge:
        """Return the judge of the episode that starts now in ``world``."""

    def errand(self, world: World) -> Errand:
        """Return what there is to do from now on."""


class MotionWatch:
    """Tells from contacts whether one object was grasped or pushed.

    ``GRASP``: two fingers of one gripper held the object, both touching it, while it was lifted off
    the table by more than 5 mm or carried along by more than 3 cm. ``PUSH``: it moved by more than
    1 cm, a robot link touched it, and it was never grasped. ``NONE``: neither. With ``success`` a
    ``PUSH`` is a pushcut.
    """

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self._start = world.object_pose(name)[:3, 3].copy()
        self._held_since: dict[str, NDArray[np.float64]] = {}
        self._touched = self._moved = self._grasped = False

    def watch(self) -> None:
        """Take note of the contacts and the place of the object now."""
        position = self._world.object_pose(self._name)[:3, 3]
        if np.linalg.norm(position[:2] - self._start[:2]) > _MOVED_M:
            self._moved = True
        if self._grasped:
            return
        touching = self._world.touching(self._name, _TOUCH_NS)
        self._touched |= bool(touching)
        for arm, fingers in self._world.fingers.items():
            if not set(fingers) <= touching:
                self._held_since.pop(arm, None)
                continue
            since = self._held_since.setdefault(arm, position.copy())
            lifted = position[2] - self._start[2] > _LIFTED_M
            carried = float(np.linalg.norm(position[:2] - since[:2])) > _CARRIED_M
            self._grasped |= bool(lifted or carried)

    def strategy(self) -> Strategy:
        """Return the verdict so far."""
        if self._grasped:
            return Strategy.GRASP
        return Strategy.PUSH if self._moved and self._touched else Strategy.NONE
