"""The tasks, by name. A new one is a file in this folder and a line here."""

from __future__ import annotations

from sim_training.tasks.base import Task
from sim_training.tasks.click_bell import ClickBell
from sim_training.tasks.move_can_pot import MoveCanPot
from sim_training.tasks.move_playingcard_away import MovePlayingcardAway
from sim_training.tasks.place_a2b import PlaceA2BLeft, PlaceA2BRight
from sim_training.tasks.place_empty_cup import PlaceEmptyCup
from simplevla.cli import require_choice

_TASKS: dict[str, type[Task]] = {
    MoveCanPot.name: MoveCanPot,
    MovePlayingcardAway.name: MovePlayingcardAway,
    PlaceA2BLeft.name: PlaceA2BLeft,
    PlaceA2BRight.name: PlaceA2BRight,
    ClickBell.name: ClickBell,
    PlaceEmptyCup.name: PlaceEmptyCup,
}


def task_names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(_TASKS)


def load_task(name: str) -> Task:
    """Return the task called ``name``.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    return _TASKS[require_choice("task", name, task_names())]()
