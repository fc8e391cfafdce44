"""Sets the twin's scene up for what its metal is like: cameras, a plate that is shown, an empty table."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from robot_bridge.twin.metal import EMPTY_TABLE, TABLE, Metal
from sim_training.splits import Split, Traits
from sim_training.tasks import load_task
from sim_training.tasks.base import Circle, Placement, Task
from sim_training.world import World
from simplevla.embodiment import Embodiment
from simplevla.errors import ConfigError, MissingExtraError
from simplevla.session_record import to_matrix
from simplevla.trial import FailureCode, Strategy


def load_scene(name: str) -> Task:
    """Return the task called ``name``, or the empty table.

    Raises:
        ConfigError: there is no such task.
    """
    return cast(Task, EmptyTable()) if name == EMPTY_TABLE else load_task(name)


def show(world: World, metal: Metal) -> None:
    """Put cameras and plate into the present scene, where ``metal`` says they are.

    Raises:
        ConfigError: the plate's picture cannot be read.
    """
    show_cameras(world, metal)
    plate = metal.plate
    if plate is None:
        return
    from sim_training.calibration_scene import add_panel

    arms = {arm.name: arm for arm in world.embodiment.arms}
    link = None if plate.holder == TABLE else (plate.holder, arms[plate.holder].tool_link)
    add_panel(world, _picture(plate.picture), plate.size_m, link=link, pose=to_matrix(plate.pose))


def show_cameras(world: World, metal: Metal) -> None:
    """Put the cameras of the present scene where ``metal`` says they are."""
    for name, pose in metal.camera_in_world.items():
        world.place_camera(name, to_matrix(pose))


class EmptyTable:
    """A scene with nothing on the table, in which nothing is to be done.

    It has what a world asks of a task; there is no errand for an expert and nothing to train on.
    """

    name = EMPTY_TABLE
    instruction = ""
    step_limit = 1
    splits: tuple[Split, ...] = ()

    def place(self, _rng: np.random.Generator, _embodiment: Embodiment, **_: bool) -> tuple[Placement, ...]:
        """Return nothing."""
        return ()

    def traits(self, _placements: tuple[Placement, ...]) -> Traits:
        """Return that there is nothing to tell apart."""
        return Traits("", frozenset())

    def keep_clear(self, _placements: tuple[Placement, ...]) -> tuple[Circle, ...]:
        """Return nothing."""
        return ()

    def judge(self, _world: World) -> NothingToJudge:
        """Return a judge that never finds success."""
        return NothingToJudge()


class NothingToJudge:
    """Judges a scene without a task."""

    def watch(self) -> None:
        """Look away."""

    def success(self) -> bool:
        """Return False."""
        return False

    def strategy(self) -> Strategy:
        """Return that nothing was moved."""
        return Strategy.NONE

    def failure(self) -> FailureCode:
        """Return that time will run out."""
        return FailureCode.TIME_LIMIT


def _picture(path: str) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8 RGB."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "robot") from error
    try:
        with Image.open(Path(path)) as image:
            return np.array(image.convert("RGB"), dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture {path} cannot be read: {error}", "give an image file") from error
