"""A whole training run, as small as it can be: to the end, after a kill, and what it refuses."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from sim_training import run_folder
from sim_training.evaluation import BundlePolicy
from sim_training.history import Iteration, read_history
from sim_training.run_folder import claim
from sim_training.run_record import read_run
from sim_training.stages import Run, reinforce
from sim_training.training import load_config, plan, run, show_plan
from simplevla.bundle import load_bundle
from simplevla.errors import ConfigError, SimplevlaError, UnavailableError
from simplevla.files import share_dir

pytestmark = pytest.mark.timeout(900)  # on a busy machine, processes that start take long

SMALL = """
name: small
task: move_can_pot
embodiment: piper_dual
cameras: [head]
network: tiny
action_space: ee_delta
chunk_length: 5
demonstrations: {episodes: 2, observe_every: 5}
corrections: {rounds: 1, episodes: 1, expert_share: 1.0}
pictures: {scenes: 2, poses: 2}
pretraining: {steps: 2, batch: 2, held_out: 0.5}
fine_tuning: {steps: 2, batch: 4, frozen_views: 1, learning_rate: 1e-3, threads: 1}
grpo:
  iterations: 2
  evaluate_every: 2
  evaluation_episodes: 1
  sampling: {group_size: 2, groups: 1, dynamic: false, horizon: 10, temperature: 1.2}
  update: {mini_batch: 2, micro_batch: 2, entropy: 0.01, learning_rate: 1e-3}
  placement: {environment_workers: 1, slots: 2}
evaluation: {episodes: 1, before: false, videos: 0}
"""


def learned(folder: Path) -> list[Iteration]:
    """Return the history without the time it took."""
    return [msgspec.structs.replace(it, seconds={}, elapsed_s=0.0) for it in read_history(folder / "grpo")]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def finished(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run(small, [], out) == 0
    return out


def test_a_run_goes_from_demonstrations_to_a_bundle_and_a_report(finished: Path, small: Path) -> None:
    bundle, record = load_bundle(finished / "bundle"), read_run(finished)
    provenance = bundle.manifest.provenance
    assert provenance.demonstrations == 3
    assert provenance.config["grpo"]["iterations"] == 2
    assert provenance.evaluation["success"]["trials"] == 1
    assert BundlePolicy(bundle).tasks == ("move_can_pot",)
    assert [it.iteration for it in record.history] == [0, 1]
    assert all(it.sampled.episodes == 2 for it in record.history)
    assert record.history[1].greedy is not None
    assert record.after is not None
    assert record.after.policy_id == load_bundle(finished / run_folder.GRPO_POLICY).id
    assert [entry.stage for entry in record.stages] == [stage.name for stage in plan(load_config(small))]
    assert list((finished / "grpo/tensorboard").rglob("events.out.tfevents.*"))
    assert (finished / run_folder.REPORT).read_text().count("data:image/") >= 5


def test_a_finished_run_is_not_made_again(
    finished: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert run(small, [], finished) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == names
    assert "[1/10] demonstrations: there already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="another configuration"):
        run(small, ["seed=1"], finished)


def test_what_is_missing_is_made_again_and_the_report_with_it(finished: Path, small: Path) -> None:
    identity = load_bundle(finished / "bundle").id
    shutil.rmtree(finished / "bundle")
    (finished / run_folder.REPORT).write_text("made while the run was under way")
    assert run(small, [], finished) == 0
    assert load_bundle(finished / "bundle").id == identity
    assert "data:image/" in (finished / run_folder.REPORT).read_text()
    assert [entry.stage for entry in read_run(finished).stages][-2:] == ["bundle", "report"]


def test_a_run_of_an_older_version_goes_on(small: Path, tmp_path: Path) -> None:
    config = load_config(small)
    with claim(tmp_path / "run", config):
        pass
    path = tmp_path / "run" / run_folder.CONFIG
    older = json.loads(path.read_text())
    del older["corrections"], older["grpo"]["sampling"]["keep_surplus"]
    path.write_text(json.dumps(older))
    with claim(tmp_path / "run", load_config(small, ["corrections={}"])) as begun:
        assert begun
    with pytest.raises(ConfigError, match="another"), claim(tmp_path / "run", config):
        pass


def test_a_run_that_was_killed_in_reinforcement_learning_ends_as_if_it_had_not_been(
    finished: Path, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    later = ("grpo", "policy-grpo", "evaluation.json", "bundle", "training_report.html")
    shutil.copytree(finished, out, ignore=lambda folder, _: later if Path(folder) == finished else ())
    command = [sys.executable, "-m", "simplevla", "train", "--config", str(small), "--out", str(out)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        wait_for(lambda: len(read_history(out / "grpo")) == 1, process)
        with pytest.raises(UnavailableError, match="another process"):
            run(small, [], out)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / run_folder.GRPO_POLICY).exists()
    reinforce(Run(out, load_config(small)))
    assert learned(out) == learned(finished)
    trained = load_bundle(out / run_folder.GRPO_POLICY).weights()
    for name, tensor in load_bundle(finished / run_folder.GRPO_POLICY).weights().items():
        np.testing.assert_array_equal(trained[name], tensor)


def test_reinforcement_learning_can_start_from_a_bundle(
    finished: Path, small: Path, tmp_path: Path
) -> None:
    start_here = [
        f"start_from={finished / run_folder.policy(0)}", "demonstrations=null", "pictures=null",
        "pretraining=null", "fine_tuning=null", "corrections={}",
    ]  # fmt: skip
    names = [stage.name for stage in plan(load_config(small, start_here))]
    assert names[:2] == ["reinforcement learning", "evaluation"]
    for override, words in (
        ("chunk_length=4", "chunk_length is 4"),
        ("action_space=joint_delta", "action_space is joint_delta"),
        ("embodiment=piper_single", "embodiment is piper_single"),
        ("network=openvla_oft_7b", "another network"),
        ("task=place_empty_cup", "knows no task"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(small, [*start_here, override], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_is_there(
    finished: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_plan(small, [], finished) == 0
    assert capsys.readouterr().out.count("there\n") == 10
    assert show_plan(small, ["grpo=null", "evaluation.videos=1"], None) == 0
    shown = capsys.readouterr().out
    assert shown.count("to do\n") == 10
    assert "videos" in shown
    assert "reinforcement" not in shown


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "no override"),
        ("unheard=1", "unheard"),
        ("fine_tuning.steps=0", "steps"),
        ("fine_tuning.steps.deep=1", "below a key"),
        ("evaluation.seed=3", "seed"),
        ("demonstrations.first_seed=10000", "first_seed"),
        ("demonstrations.first_seed=9999", "9999 to 10000"),
        ("corrections={rounds: 3, episodes: 2000}", "corrections would use"),
        ("action_space=torque", "action_space"),
        ("cameras=[nose]", "no camera"),
        ("task=fly", "unknown task"),
        ("embodiment=ant", "ant"),
        ("name=[", "YAML"),
        ("fine_tuning=null", "where the policy comes from"),
        ("pretraining=null", "pictures are for pretraining"),
        ("start_from=bundles/move_can_pot", "takes the place"),
        ("grpo.update.clip_hihg=0.3", "clip_hihg"),
        ("grpo.sampling.group_size=1", "group_size"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(small: Path, override: str, words: str) -> None:
    with pytest.raises(SimplevlaError, match=words):
        load_config(small, [override])


def test_overrides_replace_values(small: Path) -> None:
    config = load_config(small, ["fine_tuning.learning_rate=5e-4", "seed=7", "evaluation={episodes: 3}"])
    assert config.fine_tuning is not None
    assert (config.fine_tuning.learning_rate, config.seed, config.evaluation.episodes) == (5e-4, 7, 3)


@pytest.mark.parametrize(
    "path", sorted((share_dir() / "config/training").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_configuration_that_ships_is_valid(path: Path) -> None:
    config = load_config(path)
    assert plan(config)[-1].leaves == run_folder.REPORT


def test_another_folder_is_left_alone(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        run(small, [], tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        run(tmp_path / "absent.yaml", [], tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
