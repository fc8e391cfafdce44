"""A new task is one file and one line: the one that docs/tasks.md shows works as it stands there."""

import importlib.util
import re
from pathlib import Path

import pytest

from sim_training import tasks
from sim_training.demonstrations import DT_S
from sim_training.episode import play
from sim_training.expert import Expert
from sim_training.randomisation import Randomisation
from sim_training.world import World
from simplevla.embodiment import Embodiment
from simplevla.trial import FailureCode, Strategy

DOC = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the file and the line that the page shows; return the task's name."""
    chapter = DOC.read_text(encoding="utf-8").partition("## A task of your own")[2]
    source, line = re.findall(r"```python\n(.*?)```", chapter, flags=re.DOTALL)
    path = tmp_path / "cup_to_middle.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("cup_to_middle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    key, value = line.strip().rstrip(",").split(": ")
    assert (key, value) == ("CupToMiddle.name", "CupToMiddle")
    monkeypatch.setitem(tasks._TASKS, module.CupToMiddle.name, module.CupToMiddle)
    return "cup_to_middle"


def test_the_task_on_the_page_works(shown: str, dual: Embodiment) -> None:
    assert shown in tasks.task_names()
    randomisation = Randomisation.of(["clutter", "table_height"], scenes="seen")
    with World(dual, tasks.load_task(shown), randomisation=randomisation, render=False) as world:
        world.reset(1)
        assert world.region in ("left far", "right near")
        assert world.failure() is FailureCode.TIME_LIMIT
        expert, actions, success = Expert(world, world.task), 0, False
        while actions < world.task.step_limit and not success:
            played = play(world, expert.plan(5), DT_S)
            actions, success = actions + played.actions, played.success
        assert success
        assert world.strategy() is Strategy.GRASP
        assert world.failure() is FailureCode.NONE


def test_the_page_shows_every_task_and_its_picture() -> None:
    text = DOC.read_text(encoding="utf-8")
    for task in tasks.task_names():
        assert f"images/task_{task}.png" in text
        assert (DOC.parent / "images" / f"task_{task}.png").is_file()
