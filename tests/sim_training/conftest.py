"""Worlds are shared where a test does not mind what happened in them: each reset builds them anew."""

from collections.abc import Iterator

import pytest

from sim_training.tasks import load_task
from sim_training.world import World
from simplevla.embodiment import Embodiment, load_embodiment


@pytest.fixture(scope="session")
def dual() -> Embodiment:
    return load_embodiment("piper_dual")


@pytest.fixture(scope="session")
def single() -> Embodiment:
    return load_embodiment("piper_single")


@pytest.fixture(scope="session")
def blind(dual: Embodiment) -> Iterator[World]:
    """A world without cameras."""
    with World(dual, load_task("move_can_pot"), render=False) as world:
        yield world


@pytest.fixture(scope="session")
def seeing(dual: Embodiment) -> Iterator[World]:
    """A world with cameras; its first picture compiles shaders, which takes seconds."""
    with World(dual, load_task("move_can_pot")) as world:
        yield world
