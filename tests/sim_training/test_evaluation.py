"""Evaluation: deterministic, counted right, guarded against training seeds and nonsense."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from sim_training.cli import EVALUATE
from sim_training.demonstrations import DT_S
from sim_training.episode import play
from sim_training.evaluation import evaluate, load_report, rate, record_video, save_report
from sim_training.expert import Expert
from sim_training.randomisation import Randomisation
from sim_training.tasks import load_task
from sim_training.world import World
from simplevla.action_chunk import ActionChunk
from simplevla.embodiment import load_embodiment
from simplevla.errors import BundleError, ChunkError, ConfigError
from simplevla.observation import Observation
from simplevla.trial import FailureCode, Strategy

K = 5


class Replay:
    """Plays what the expert did in the same episode, and holds where it knows nothing."""

    id = "replay"
    cameras = ("head",)

    def __init__(self) -> None:
        self.embodiment = load_embodiment("piper_dual")
        self._plans: dict[str, np.ndarray] = {}

    def act(self, observation: Observation) -> ActionChunk:
        seed, start = observation.episode, observation.last_action + 1
        if seed == "10001":
            actions = np.tile(observation.state, (K, 1))
        else:
            actions = self._plan(seed)[start : start + K]
        return ActionChunk(actions.astype(np.float32), DT_S, observation.capture_ns, self.id)

    def _plan(self, seed: str) -> np.ndarray:
        if seed not in self._plans:
            task, plans, success = load_task("move_can_pot"), [], False
            with World(self.embodiment, task, render=False) as world:
                world.reset(int(seed))
                while not success:
                    plans.append(Expert(world, task).plan(K).astype(np.float32))
                    success = play(world, plans[-1], DT_S).success
            self._plans[seed] = np.concatenate(plans)
        return self._plans[seed]


class Broken(Replay):
    """Answers what no robot could follow."""

    def act(self, observation: Observation) -> ActionChunk:
        return ActionChunk(np.full((K, 14), np.nan, np.float32), DT_S, observation.capture_ns, self.id)


def test_what_succeeded_once_succeeds_again_and_the_rest_counts_as_failed(tmp_path: Path) -> None:
    seen = []
    report = evaluate(
        Replay,
        "move_can_pot",
        episodes=2,
        progress=lambda done, wins: seen.append((done, wins)),
    )
    assert seen == [(1, 1), (2, 1)]
    won, lost = report.episodes
    assert (won.seed, won.success, won.failure, won.strategy) == (
        10_000,
        True,
        FailureCode.NONE,
        Strategy.GRASP,
    )
    assert (lost.success, lost.failure, lost.strategy) == (False, FailureCode.TIME_LIMIT, Strategy.NONE)
    assert lost.actions == 200
    assert won.actions < 80
    assert report.mean_actions == won.actions
    assert report.strategies == {"grasp": 1, "none": 1}
    assert report.failures == {"time_limit": 1}
    assert str(rate(report.success)).startswith("1/2 = 50.0 %")
    save_report(report, tmp_path / "out.json")
    assert load_report(tmp_path / "out.json") == report


def test_a_policy_that_answers_nonsense_is_stopped() -> None:
    with pytest.raises(ChunkError, match="finite"):
        evaluate(Broken, "move_can_pot", episodes=1)


def test_training_seeds_are_refused() -> None:
    with pytest.raises(ConfigError, match="10000"):
        evaluate(Replay, "move_can_pot", episodes=1, seed=9_999)


def test_unknown_tasks_and_empty_evaluations_are_refused() -> None:
    with pytest.raises(ConfigError, match="move_can_pot"):
        evaluate(Replay, "make_coffee", episodes=1)
    with pytest.raises(ConfigError, match="at least one"):
        evaluate(Replay, "move_can_pot", episodes=0)


def test_a_report_that_is_none_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(ConfigError, match="evaluate again"):
        load_report(tmp_path / "out.json")


def test_a_video_shows_the_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr("sim_training.evaluation._VIDEO_EPISODES", 1)
    record_video(
        Replay, "move_can_pot", tmp_path / "video.mp4", seed=10_000, randomisation=Randomisation.none()
    )
    video = cv2.VideoCapture(str(tmp_path / "video.mp4"))
    frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    ok, frame = video.read()
    assert ok
    assert frame.shape == (240, 320, 3)
    assert 20 < frames < 80


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    EVALUATE.configure(parser)
    return parser.parse_args(words)


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(ConfigError, match="move_can_pot"):
        EVALUATE.run(arguments("bundle", "--task", "make_coffee", "--json", str(out)))
    with pytest.raises(ConfigError, match="lights"):
        EVALUATE.run(arguments("bundle", "--randomise", "weather", "--json", str(out)))
    with pytest.raises(BundleError, match="not a policy bundle"):
        EVALUATE.run(arguments(str(tmp_path / "bundle"), "--json", str(out)))
    assert not out.exists()
    for words in (["bundle", "--seed", "5"], ["bundle", "--episodes", "0"], []):
        with pytest.raises(SystemExit):
            arguments(*words)
        assert capsys.readouterr().err
