"""A whole training run, as small as it can be, and what it refuses."""

import json
from pathlib import Path

import pytest

from sim_training.evaluation import BundlePolicy
from sim_training.training import load_config, run
from simplevla.bundle import load_bundle
from simplevla.errors import ConfigError, NotBuiltYetError
from simplevla.files import share_dir

CONFIG = share_dir() / "config/training/move_can_pot.yaml"
SMALL = [
    "demonstrations.episodes=2", "demonstrations.observe_every=5", "demonstrations.workers=1",
    "demonstrations.perturbation_m=0.0", "pretraining.steps=2", "pretraining.batch=4",
    "pretraining.held_out=0.5", "fine_tuning.steps=2", "fine_tuning.batch=4", "fine_tuning.frozen_views=1",
    "corrections.rounds=1", "corrections.episodes=1", "corrections.expert_share=1.0",
    "corrections.workers=1", "evaluation.episodes=1", "evaluation.workers=1",
]  # fmt: skip


def test_a_run_goes_from_demonstrations_to_a_bundle_and_can_be_repeated(tmp_path: Path) -> None:
    assert run(CONFIG, SMALL, tmp_path / "run") == 0
    bundle = load_bundle(tmp_path / "run/bundle")
    provenance = bundle.manifest.provenance
    assert provenance.demonstrations == 3
    assert provenance.config["fine_tuning"]["steps"] == 2
    assert provenance.evaluation["success"]["trials"] == 1
    assert BundlePolicy(bundle).tasks == ("move_can_pot",)
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["task"] == "move_can_pot"
    assert run(CONFIG, SMALL, tmp_path / "run") == 0
    assert load_bundle(tmp_path / "run/bundle").id == bundle.id
    with pytest.raises(ConfigError, match="another configuration"):
        run(CONFIG, [*SMALL, "seed=1"], tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "no override"),
        ("unheard=1", "unheard"),
        ("fine_tuning.steps=0", "steps"),
        ("fine_tuning.steps.deep=1", "below a key"),
        ("evaluation.seed=3", "seed"),
        ("demonstrations.first_seed=10000", "first_seed"),
        ("action_space=torque", "action_space"),
        ("name=[", "YAML"),
    ],
)
def test_an_override_that_breaks_the_schema_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(CONFIG, [override])


def test_overrides_replace_values() -> None:
    config = load_config(CONFIG, ["fine_tuning.learning_rate=0.5", "seed=7"])
    assert (config.fine_tuning.learning_rate, config.seed) == (0.5, 7)


def test_grpo_says_that_it_is_planned(tmp_path: Path) -> None:
    with pytest.raises(NotBuiltYetError, match="planned"):
        run(CONFIG, ["grpo={}"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        run(CONFIG, SMALL, tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        run(tmp_path / "absent.yaml", [], tmp_path / "run")
