"""Evaluation on scenes that training may see and on those that are held out of it."""

from pathlib import Path

import numpy as np
import pytest

from sim_training.evaluation import Report, Share, load_report
from sim_training.generalisation import (
    Generalisation,
    chosen_splits,
    evaluate_splits,
    load_generalisation,
    save_generalisation,
    trained_on,
)
from sim_training.randomisation import Randomisation
from sim_training.splits import Scenes, Split
from simplevla.action_chunk import ActionChunk
from simplevla.embodiment import load_embodiment
from simplevla.errors import BundleError, ConfigError
from simplevla.intervals import wilson
from simplevla.observation import Observation


class Idle:
    """Stays where it is and needs no pictures."""

    id = "idle"
    cameras = ()

    def __init__(self) -> None:
        self.embodiment = load_embodiment("piper_single")

    def act(self, observation: Observation) -> ActionChunk:
        return ActionChunk(np.tile(observation.state, (100, 1)), 0.1, observation.capture_ns, self.id)


def report(wins: int, scenes: Scenes) -> Report:
    share = Share(*wilson(wins, 20))
    return Report(
        policy_id="a", task="move_can_pot", embodiment="piper_dual", randomisation=(), seed=10_000,
        success=share, pushcuts=share, strategies={}, failures={}, mean_actions=None, episodes=(),
        scenes=scenes,
    )  # fmt: skip


def test_each_part_is_evaluated_on_its_own_scenes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate_splits(
        Idle,
        "click_bell",
        chosen_splits("click_bell", "all"),
        episodes=1,
        randomisation=Randomisation(latency=True),
        progress=lambda done, wins: seen.append((done, wins)),
    )
    assert seen == [(1, 0), (2, 0), (3, 0)]
    assert result.seen.scenes is Scenes.SEEN
    assert {name: part.scenes for name, part in result.unseen.items()} == {
        "spatial": Scenes.UNSEEN_SPATIAL,
        "object": Scenes.UNSEEN_OBJECT,
    }
    for part in (result.seen, *result.unseen.values()):
        assert (part.success.successes, part.success.trials, part.seed) == (0, 1, 10_000)
        assert part.randomisation == ("latency",)
    assert {result.seen.episodes[0].region, result.unseen["spatial"].episodes[0].region} == {
        "right near",
        "right far",
    }
    save_generalisation(result, tmp_path / "splits.json")
    assert load_generalisation(tmp_path / "splits.json") == result
    with pytest.raises(ConfigError, match="evaluate again"):
        load_report(tmp_path / "splits.json")


def test_the_table_gives_each_rate_with_its_interval() -> None:
    result = Generalisation(
        seen=report(18, Scenes.SEEN),
        unseen={"spatial": report(9, Scenes.UNSEEN_SPATIAL), "goal": report(3, Scenes.UNSEEN_GOAL)},
    )
    head, *rows = result.table().splitlines()
    assert head.split() == ["scenes", "success"]
    assert [row.split("  ")[0] for row in rows] == ["seen", "unseen, spatial", "unseen, goal"]
    assert "18/20 = 90.0 %" in rows[0]
    assert all("95 % interval" in row for row in rows)


def test_splits_are_chosen_by_name() -> None:
    assert chosen_splits("move_can_pot", "all") == (Split.SPATIAL, Split.OBJECT, Split.GOAL)
    assert chosen_splits("move_can_pot", "goal, spatial,goal") == (Split.GOAL, Split.SPATIAL)
    with pytest.raises(ConfigError, match="spatial, object, goal, all"):
        chosen_splits("move_can_pot", "colour")
    with pytest.raises(ConfigError, match="spatial, object"):
        chosen_splits("click_bell", "goal")


def test_a_file_that_is_none_and_a_bundle_that_is_none_are_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text("{}")
    with pytest.raises(ConfigError, match="evaluate again"):
        load_generalisation(tmp_path / "splits.json")
    with pytest.raises(BundleError):
        trained_on(tmp_path)
