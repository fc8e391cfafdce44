"""Demonstrations: what a set holds, that it is the expert's doing, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from sim_training.demonstrations import (
    DT_S,
    MANIFEST,
    DemonstrationSet,
    Manifest,
    Settings,
    collect,
)
from sim_training.episode import play
from sim_training.expert import Expert
from sim_training.world import World
from simplevla.embodiment import Embodiment
from simplevla.errors import ConfigError, RecordError
from simplevla.trial import Strategy

SEEDS = [3, 1]


def settings(embodiment: Embodiment, **changes: object) -> Settings:
    return Settings(task="move_can_pot", embodiment=embodiment, cameras=("head",), **changes)


@pytest.fixture(scope="module")
def collected(tmp_path_factory, dual: Embodiment) -> tuple[Path, Manifest]:
    """Return a set that two processes collected, and its manifest."""
    path = tmp_path_factory.mktemp("set") / "demonstrations"
    seen = []
    manifest = collect(
        path, settings(dual), SEEDS, workers=2, progress=lambda tried, kept: seen.append((tried, kept))
    )
    assert seen == [(1, 1), (2, 2)]
    return path, manifest


def test_a_set_says_what_it_holds(collected: tuple[Path, Manifest]) -> None:
    path, manifest = collected
    assert DemonstrationSet(path).manifest == manifest
    assert manifest.tried == 2
    assert [entry.seed for entry in manifest.episodes] == sorted(SEEDS)
    assert all(entry.strategy is Strategy.GRASP for entry in manifest.episodes)
    assert sorted(p.name for p in path.iterdir()) == [
        MANIFEST,
        "episode_000001.npz",
        "episode_000003.npz",
    ]


def test_episodes_hold_pictures_states_and_the_experts_plans(
    collected: tuple[Path, Manifest], blind: World
) -> None:
    for demonstration in DemonstrationSet(collected[0]):
        samples = len(demonstration.states)
        assert demonstration.images.shape == (samples, 1, 240, 320, 3)
        assert demonstration.targets.shape == (samples, 5, 14)
        assert demonstration.instruction == "move the can next to the pot"
        blind.reset(demonstration.seed)
        expert, success = Expert(blind, blind.task), False
        for state, targets in zip(demonstration.states, demonstration.targets, strict=True):
            assert blind.positions() == pytest.approx(state, abs=1e-6)
            plan = expert.plan(5)
            assert plan == pytest.approx(targets, abs=1e-6)
            success = play(blind, plan, DT_S).success
        assert success


def test_samples_can_be_denser_and_perturbed(tmp_path: Path, dual: Embodiment, blind: World) -> None:
    manifest = collect(tmp_path / "a", settings(dual, observe_every=1, perturbation_m=0.008), [2])
    (entry,) = manifest.episodes
    assert entry.samples == entry.actions
    demonstration = DemonstrationSet(tmp_path / "a").load(0)
    blind.reset(2)
    clean = Expert(blind, blind.task).plan(5)
    assert demonstration.targets[0] == pytest.approx(clean, abs=1e-6)
    play(blind, clean, DT_S)
    strayed = np.abs(demonstration.states[5] - blind.positions())
    assert 1e-3 < strayed.max() < 0.3


def test_an_altered_set_is_refused(collected: tuple[Path, Manifest], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in collected[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    episode = copy / "episode_000001.npz"
    raw = bytearray(episode.read_bytes())
    raw[len(raw) // 2] ^= 1
    episode.write_bytes(raw)
    with pytest.raises(RecordError, match="altered"):
        DemonstrationSet(copy).load(0)
    episode.unlink()
    with pytest.raises(RecordError, match="episode_000001"):
        DemonstrationSet(copy).load(0)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["episodes"][0]["file"] = "../episode_000001.npz"
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RecordError, match="collect"):
        DemonstrationSet(copy)


def test_a_folder_without_a_set_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="holds no demonstrations"):
        DemonstrationSet(tmp_path)


@pytest.mark.parametrize(
    ("changes", "seeds", "message"),
    [
        ({}, [10_000], "evaluation"),
        ({}, [-1], "training"),
        ({}, [1, 1], "twice"),
        ({"observe_every": 3}, [1], "divide"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    tmp_path: Path, dual: Embodiment, changes: dict, seeds: list[int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        collect(tmp_path / "set", settings(dual, **changes), seeds)
    assert not (tmp_path / "set").exists()


def test_a_set_is_never_overwritten(collected: tuple[Path, Manifest], dual: Embodiment) -> None:
    with pytest.raises(ConfigError, match="already"):
        collect(collected[0], settings(dual), [5])
