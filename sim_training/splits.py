"""Parts of a task's scenes that training can leave out, so that generalisation can be measured.

A split holds scenes out by one property: *spatial*, where the thing to be moved starts; *object*, of
which models the scene is made; *goal*, where it has to go. What a task holds out it says itself
(:class:`Traits`); docs/tasks.md lists it. Training on the part ``seen`` sees nothing of what any
split holds out. The unseen part of a split differs from it in that one property alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from simplevla.errors import ConfigError

if TYPE_CHECKING:
    from sim_training.tasks.base import Placement, Task
    from simplevla.embodiment import Embodiment

_MOST_DRAWS = 10_000


class Split(str, Enum):
    """By what scenes are held out."""

    SPATIAL = "spatial"
    OBJECT = "object"
    GOAL = "goal"


class Scenes(str, Enum):
    """Which of a task's scenes occur: all, those that training may see, or one split's unseen part."""

    ALL = "all"
    SEEN = "seen"
    UNSEEN_SPATIAL = "unseen_spatial"
    UNSEEN_OBJECT = "unseen_object"
    UNSEEN_GOAL = "unseen_goal"

    @property
    def held_out(self) -> Split | None:
        """The split whose unseen part this is; None for the others."""
        return Split(self.value.removeprefix("unseen_")) if self.value.startswith("unseen_") else None

    @classmethod
    def unseen(cls, split: Split) -> Scenes:
        """Return the unseen part of a split."""
        return cls(f"unseen_{split.value}")


@dataclass(frozen=True)
class Traits:
    """What tells the scenes of a task apart.

    Attributes:
        region: where the thing to be moved starts, such as ``left near``.
        held_out: the splits to whose unseen part the scene belongs.
    """

    region: str
    held_out: frozenset[Split]

    @classmethod
    def of(
        cls, start_xy_m: tuple[float, float], middle_y_m: float, *, new_object: bool, new_goal: bool
    ) -> Traits:
        """Return the traits of a scene whose thing starts at ``start_xy_m``.

        Left and right, near and far (beyond ``middle_y_m``) make four regions; left near and right
        far are held out, so that training sees both arms and both depths, and not each of the one
        with each of the other.
        """
        x, y = start_xy_m
        left, far = x < 0, y > middle_y_m
        held_out = ((Split.SPATIAL, left != far), (Split.OBJECT, new_object), (Split.GOAL, new_goal))
        return cls(
            f"{'left' if left else 'right'} {'far' if far else 'near'}",
            frozenset(split for split, unseen in held_out if unseen),
        )


def draw_scene(
    task: Task, rng: np.random.Generator, embodiment: Embodiment, scenes: Scenes
) -> tuple[Placement, ...]:
    """Return the first scene that ``rng`` draws of those wanted.

    Raises:
        ConfigError: the task has no such part.
    """
    require_split(task, scenes)
    for _ in range(_MOST_DRAWS):
        placements = task.place(rng, embodiment, new_goal=scenes is Scenes.UNSEEN_GOAL)
        if _belongs(task.traits(placements), scenes):
            return placements
    raise ConfigError(f"{task.name} has no scenes {scenes.value!r}", "choose other scenes")


def require_split(task: Task, scenes: Scenes) -> None:
    """Check that a task has the part ``scenes``.

    Raises:
        ConfigError: it has not; the message lists the splits that it has.
    """
    if scenes.held_out is not None and scenes.held_out not in task.splits:
        names = ", ".join(split.value for split in task.splits) or "none"
        raise ConfigError(
            f"{task.name} holds nothing out by {scenes.held_out.value}",
            f"choose one of its splits: {names}",
        )


def _belongs(traits: Traits, scenes: Scenes) -> bool:
    if scenes is Scenes.ALL:
        return True
    wanted = frozenset() if scenes.held_out is None else frozenset({scenes.held_out})
    return traits.held_out == wanted
