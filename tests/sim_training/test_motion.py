"""How a thing came to where it is: carried by two fingers that oppose each other, or pushed."""

import numpy as np
import pytest

from sim_training.tasks.motion import MotionWatch, strategy_of
from sim_training.world import Touch
from simplevla.trial import Strategy

FIRST, SECOND, PALM = "arm/finger1", "arm/finger2", "arm/palm"


class Written:
    """A thing whose place and touches a test writes down: what a watch asks a world for."""

    def __init__(self) -> None:
        self.fingers = {"arm": (FIRST, SECOND)}
        self.place = np.array([0.2, 0.1, 0.74])
        self.pressed: dict = {}
        self.looks = 0

    def object_position(self, name: str) -> np.ndarray:
        assert name == "can"
        return self.place.copy()

    def touches(self, name: str) -> list[Touch]:
        assert name == "can"
        self.looks += 1
        return [Touch(link, np.array(push, float), np.zeros(3)) for link, push in self.pressed.items()]

    def move(self, watch: MotionWatch, way: tuple[float, float, float], pressed: dict) -> None:
        """Move the thing in steps of 2 mm while the robot's links press on it as told."""
        self.pressed = pressed
        steps = max(1, round(float(np.linalg.norm(way)) / 0.002))
        for _ in range(steps):
            self.place += np.array(way) / steps
            watch.watch()


GRIP = {FIRST: (0.04, 0.001, 0.002), SECOND: (-0.04, 0.0, 0.002)}
SHOVE = {FIRST: (0.0, 0.03, 0.0), SECOND: (0.002, 0.03, 0.0)}


@pytest.fixture
def scene() -> Written:
    return Written()


@pytest.fixture
def watch(scene: Written) -> MotionWatch:
    return MotionWatch(scene, "can")


def test_what_two_fingers_lift_or_carry_is_grasped(scene: Written, watch: MotionWatch) -> None:
    scene.move(watch, (0, 0, 0.02), GRIP)
    assert watch.strategy() is Strategy.GRASP


def test_what_two_fingers_drag_along_the_table_is_grasped(scene: Written, watch: MotionWatch) -> None:
    scene.move(watch, (-0.04, 0, 0), GRIP)
    assert watch.strategy() is Strategy.GRASP


def test_a_shove_with_both_fingertips_is_a_push(scene: Written, watch: MotionWatch) -> None:
    scene.move(watch, (0, 0.1, 0), SHOVE)
    assert watch.strategy() is Strategy.PUSH


@pytest.mark.parametrize("pressed", [{PALM: (0.0, 0.01, 0.0)}, {FIRST: (0.01, 0.0, 0.0)}])
def test_a_shove_with_any_link_is_a_push(scene: Written, watch: MotionWatch, pressed: dict) -> None:
    scene.move(watch, (0, 0.02, 0), pressed)
    assert watch.strategy() is Strategy.PUSH


def test_what_rolls_on_counts_for_whoever_set_it_going(scene: Written, watch: MotionWatch) -> None:
    scene.move(watch, (0, 0.004, 0), SHOVE)
    assert watch.strategy() is Strategy.NONE
    scene.move(watch, (0, 0.05, 0), {})
    assert watch.strategy() is Strategy.PUSH


def test_a_knock_before_a_long_carry_is_still_a_grasp(scene: Written, watch: MotionWatch) -> None:
    scene.move(watch, (0, 0.03, 0), SHOVE)
    scene.move(watch, (0, 0, 0.05), GRIP)
    scene.move(watch, (-0.1, 0, 0), GRIP)
    assert watch.strategy() is Strategy.GRASP


def test_a_short_lift_before_a_long_shove_is_a_push(scene: Written, watch: MotionWatch) -> None:
    scene.move(watch, (0, 0, 0.01), GRIP)
    scene.move(watch, (0, 0, -0.01), {})
    scene.move(watch, (-0.1, 0, 0), SHOVE)
    assert watch.strategy() is Strategy.PUSH


def test_what_moves_untouched_or_hardly_is_neither(scene: Written, watch: MotionWatch) -> None:
    scene.move(watch, (0.05, 0, 0), {})
    scene.move(watch, (0.008, 0, 0), SHOVE)
    assert watch.strategy() is Strategy.NONE


def test_contacts_are_looked_at_only_while_the_thing_moves(scene: Written, watch: MotionWatch) -> None:
    scene.pressed = GRIP
    for _ in range(100):
        watch.watch()
    assert scene.looks == 0
    scene.move(watch, (0.01, 0, 0), GRIP)
    assert scene.looks == 5


def test_pushing_the_other_thing_is_a_push_unless_the_object_was_grasped() -> None:
    moved, other = Written(), Written()
    watches = MotionWatch(moved, "can"), MotionWatch(other, "can")
    other.move(watches[1], (0.05, 0, 0), SHOVE)
    assert strategy_of(*watches) is Strategy.PUSH
    moved.move(watches[0], (0, 0, 0.03), GRIP)
    assert strategy_of(*watches) is Strategy.GRASP
