"""What a task is: what stands where, what counts as done, and what an expert has to do.

A new task is one file beside this one: a class with the members of :class:`Task` and a judge, and
its name in ``tasks/__init__.py``. ``docs/tasks.md`` shows how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sim_training.assets import Asset, section
from sim_training.splits import Split, Traits
from simplevla.embodiment import Arm, Embodiment
from simplevla.trial import FailureCode, Strategy

if TYPE_CHECKING:
    from sim_training.world import World

TABLE_TOP_M = 0.74
OPEN = 0.8
"""A gripper opened by more than this part of its stroke is open (RoboTwin's figure)."""
MAX_TILT_RAD = float(np.deg2rad(15))
"""What leans less stands upright (RoboTwin's figure)."""

_LOST_M = 0.1  # so far below the table's top a thing has fallen off


@dataclass(frozen=True, eq=False)
class Placement:
    """One thing of a task and where it stands: (x, y) in the world, m, and yaw, rad.

    Attributes:
        fixed: it stands as if screwed down.
    """

    name: str
    asset: Asset
    xy_m: tuple[float, float]
    yaw_rad: float
    fixed: bool = False


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
        clearance_m: how high above the table to carry it.
        goal_rise_m: how high above the table the goal is.
    """

    arm: str
    object: str
    grasp_height_m: float
    width_m: float
    goal_xy_m: tuple[float, float]
    delivered: bool
    clearance_m: float = 0.05
    goal_rise_m: float = 0.0


@dataclass(frozen=True)
class Press:
    """A press with the closed gripper for the scripted expert: which arm, and on which point (world, m)."""

    arm: str
    point_m: tuple[float, float, float]


class Judge(Protocol):
    """Watches one episode of a task."""

    def watch(self) -> None:
        """Take note of the world as it is now; called every few physics steps."""

    def success(self) -> bool:
        """Return whether the world fulfils the task at this instant; called at every physics step."""

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
        splits: the ways in which scenes can be held out of training.
    """

    name: str
    instruction: str
    step_limit: int
    splits: tuple[Split, ...]

    def place(
        self, rng: np.random.Generator, embodiment: Embodiment, *, new_goal: bool = False
    ) -> tuple[Placement, ...]:
        """Draw what stands where.

        Args:
            rng: decides.
            embodiment: the robot; what is to be moved stands where it reaches.
            new_goal: a goal from outside the task's usual ones is wanted, for tasks whose usual goal
                never varies; the others take no notice.
        """

    def traits(self, placements: tuple[Placement, ...]) -> Traits:
        """Return the region that a scene starts in, and the splits whose unseen part it belongs to."""

    def keep_clear(self, placements: tuple[Placement, ...]) -> tuple[Circle, ...]:
        """Return where clutter must not stand."""

    def judge(self, world: World) -> Judge:
        """Return the judge of the episode that starts now in ``world``."""

    def errand(self, world: World) -> Errand | Press:
        """Return what there is to do from now on."""


def sides(embodiment: Embodiment) -> tuple[float, ...]:
    """Return on which sides of the table the robot has an arm: -1.0 left, 1.0 right."""
    return tuple(sorted({float(np.sign(arm.base.xyz_m[0])) for arm in embodiment.arms}))


def nearest_arm(world: World, name: str) -> Arm:
    """Return the arm whose tool is nearest to a thing: the one that has it, or the one to take it."""
    place = world.object_pose(name)[:3, 3]
    return min(
        world.embodiment.arms,
        key=lambda arm: float(np.linalg.norm(world.tool_pose(arm.name)[:3, 3] - place)),
    )


def width_between_fingers(world: World, name: str, height_m: float) -> float:
    """Return a standing thing's width at ``height_m`` along the world's x, along which fingers close; m."""
    outline = section(world.asset(name), height_m)
    along: NDArray[np.float64] = outline @ world.object_pose(name)[0, :2]
    return float(np.ptp(along))


def tilt(pose: NDArray[np.float64]) -> float:
    """Return the angle between the z axis of a (4, 4) pose and the vertical; rad."""
    return float(np.arccos(np.clip(pose[2, 2], -1, 1)))


def failure_of(pose: NDArray[np.float64]) -> FailureCode:
    """Return what is wrong with a thing at the (4, 4) ``pose``: it fell off, it lies, or time was short."""
    if pose[2, 3] < TABLE_TOP_M - _LOST_M:
        return FailureCode.DROPPED
    return FailureCode.NOT_UPRIGHT if tilt(pose) >= MAX_TILT_RAD else FailureCode.TIME_LIMIT


def ways_of_the_arms(*points: tuple[float, float]) -> tuple[Circle, ...]:
    """Return the patches over which grippers come to the ``points`` (world, m), and their homes."""
    approaches = [(x, y - d) for x, y in points for d in (0.1, 0.2, 0.3)]
    homes = [(x, y) for x in (-0.3, 0.3) for y in (-0.15, -0.25, -0.35)]
    return tuple(Circle((float(x), float(y)), 0.09) for x, y in approaches + homes)
