"""The loop: it learns, it goes on after a kill, and what it samples is what was asked for."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sim_training.grpo import curriculum
from sim_training.grpo.actor import LocalActor
from sim_training.grpo.checkpoint import checkpoints, load_progress
from sim_training.grpo.driver import learn
from sim_training.grpo.experience import Answer, Episode, Looks
from sim_training.grpo.settings import GrpoSettings, SamplingSettings, UpdateSettings
from sim_training.history import Iteration, read_history
from sim_training.seeds import FIRST_EVALUATION_SEED, FIRST_VALIDATION_SEED
from simplevla.bundle import Bundle
from simplevla.errors import ConfigError


def make_settings(iterations: int, *, sampling: dict[str, Any] | None = None, **rest: Any) -> GrpoSettings:
    return GrpoSettings(
        iterations=iterations,
        sampling=SamplingSettings(**{"groups": 6, "temperature": 1.0, **(sampling or {})}),
        update=UpdateSettings(mini_batch=16, micro_batch=16, learning_rate=1e-3),
        **{"evaluate_every": 0, "tracking": (), **rest},
    )


Run = Callable[..., list[Iteration]]


@pytest.fixture
def run(bundle: Bundle, lamps: Any) -> Run:
    """Return what runs the loop in a folder and returns the history there."""

    def go(folder: Path, settings: GrpoSettings, environments: Any = None) -> list[Iteration]:
        varied = bundle.manifest.action_codec().varied
        with LocalActor(bundle, lamps.instructions, settings) as actor:
            learn(actor, environments or lamps(), varied, settings, folder)
        return read_history(folder)

    return go


def test_grpo_solves_a_small_task(run: Run, tmp_path: Path) -> None:
    settings = make_settings(
        14, sampling={"groups": 12}, evaluate_every=14, evaluation_episodes=40, tracking=("tensorboard",)
    )
    history = run(tmp_path / "grpo", settings)
    assert history[0].sampled.rate.rate < 0.5
    assert history[-1].sampled.rate.rate > 0.9
    assert history[-1].greedy is not None
    assert history[-1].greedy.rate.rate == 1.0
    assert history[-1].sampled.strategies == {"push": history[-1].sampled.successes}
    assert history[-1].regions.keys() == {"bright", "dark"}
    assert history[0].ratio > 0
    assert list((tmp_path / "grpo/tensorboard").glob("events*"))
    assert len(checkpoints(tmp_path / "grpo")) == 2


def test_a_run_that_was_killed_becomes_the_run_that_was_not(run: Run, lamps: Any, tmp_path: Path) -> None:
    settings = make_settings(5, sampling={"retry_unanimous": True, "groups": 4, "round_groups": 5})
    whole = run(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", settings, lamps(dies_in=4))
    assert 3 <= len(read_history(tmp_path / "cut")) < 5
    shutil.copytree(checkpoints(tmp_path / "cut")[-1], tmp_path / "cut/.iteration-000004.left")
    resumed = run(tmp_path / "cut", settings)
    assert not list((tmp_path / "cut").glob(".iteration-*"))
    assert [untimed(i) for i in resumed] == [untimed(i) for i in whole]
    one, other = (load_file(tmp_path / name / "policy.safetensors") for name in ("whole", "cut"))
    assert all((one[name] == other[name]).all() for name in one)


def untimed(iteration: Iteration) -> dict[str, Any]:
    return {
        name: getattr(iteration, name)
        for name in iteration.__struct_fields__
        if name not in {"seconds", "elapsed_s"}
    }


def test_surplus_groups_wait_for_the_next_update_and_failed_ones_are_tried_again(
    run: Run, lamps: Any, tmp_path: Path
) -> None:
    played = lamps()
    sampling = {"groups": 2, "round_groups": 8, "retry_unanimous": True}
    history = run(tmp_path, make_settings(1, sampling=sampling), played)
    assert history[0].kept_groups > history[0].updated_groups == 2
    state = load_progress(checkpoints(tmp_path)[-1])
    assert len(state.ready) == history[0].kept_groups - 2
    assert all(t.log_probs is not None for group in state.ready for t in group)
    assert not any(t.success for group in state.failed for t in group)

    again = lamps()
    run(tmp_path, make_settings(2, sampling=sampling | {"groups": 20}), again)
    retried = {group[0].episode.seed for group in state.failed}
    assert {e.seed for e in again.collected if e.member >= 8} == retried
    assert load_progress(checkpoints(tmp_path)[-1]).ready == []


def test_rounds_are_sampled_until_there_is_enough_to_learn_from(run: Run, tmp_path: Path) -> None:
    history = run(tmp_path, make_settings(1, sampling={"groups": 6, "round_groups": 2, "rounds": 20}))
    assert history[0].updated_groups == 6
    assert 6 <= history[0].groups < 40


def test_without_dynamic_sampling_every_group_is_used(run: Run, tmp_path: Path) -> None:
    history = run(tmp_path, make_settings(1, sampling={"dynamic": False}))
    assert history[0].kept_groups == history[0].updated_groups == 6


def test_correction_and_divergence_run_in_the_loop(run: Run, tmp_path: Path) -> None:
    settings = GrpoSettings(
        iterations=2,
        sampling=SamplingSettings(groups=4, temperature=1.0),
        update=UpdateSettings(
            mini_batch=16, micro_batch=16, learning_rate=1e-3, rollout_correction="token", kl=0.1, epochs=2
        ),
        evaluate_every=0,
        tracking=(),
    )
    history = run(tmp_path, settings)
    assert sum(i.updated_groups for i in history) > 0
    assert all(np.isfinite(i.loss) and i.gradient_norm > 0 for i in history if i.updated_groups)


def test_training_evaluation_and_validation_use_different_states(
    run: Run, lamps: Any, tmp_path: Path
) -> None:
    environments = lamps()
    run(tmp_path, make_settings(1, evaluate_every=1, evaluation_episodes=10), environments)
    seeds = [episode.seed for episode in environments.collected]
    training, validation = set(seeds[:-10]), set(seeds[-10:])
    assert max(training) < FIRST_VALIDATION_SEED <= min(validation)
    assert max(validation) < FIRST_EVALUATION_SEED


def test_attempts_get_less_and_less_time_and_evaluations_all_of_it(
    run: Run, lamps: Any, tmp_path: Path
) -> None:
    environments = lamps()
    settings = make_settings(
        3,
        evaluate_every=3,
        evaluation_episodes=4,
        sampling={"dynamic": False, "horizon": 40, "final_horizon": 20},
    )
    history = run(tmp_path, settings, environments)
    assert environments.horizons == [40, 30, 20, 0]
    assert [iteration.horizon for iteration in history] == [40, 30, 20]


def test_the_best_policy_is_delivered_if_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    settings = make_settings(2, evaluate_every=1, evaluation_episodes=4, deliver="best")
    run(tmp_path, settings)
    best, policy = (load_file(tmp_path / f"{name}.safetensors") for name in ("best", "policy"))
    assert all((best[name] == policy[name]).all() for name in best)


def test_a_damaged_checkpoint_is_named(run: Run, tmp_path: Path) -> None:
    run(tmp_path, make_settings(1))
    (checkpoints(tmp_path)[-1] / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="iteration-000001"):
        run(tmp_path, make_settings(2))


def test_the_curriculum_prefers_regions_of_middling_success() -> None:
    seeds = curriculum.draw_seeds(
        400,
        (0, 1),
        region_of=lambda seed: "even" if seed % 2 == 0 else "odd",
        success={"even": 0.5, "odd": 1.0},
    )
    assert len(set(seeds)) == 400
    assert np.mean([seed % 2 == 0 for seed in seeds]) > 0.7
    assert any(seed % 2 for seed in seeds)  # solved regions are still looked at


def test_seeds_are_drawn_anew_each_iteration_and_the_same_each_time() -> None:
    assert curriculum.draw_seeds(5, (0, 1, 0)) == curriculum.draw_seeds(5, (0, 1, 0))
    assert curriculum.draw_seeds(5, (0, 1, 0)) != curriculum.draw_seeds(5, (0, 2, 0))
    first = curriculum.draw_seeds(5, (0, 1, 0))
    assert not set(first) & set(curriculum.draw_seeds(5, (0, 1, 0), avoid=first))


def test_a_regions_success_is_remembered_for_a_while(lamps: Any) -> None:
    success = {"bright": 1.0}
    played = lamps().collect([Episode(0)], _fail)
    curriculum.remember(success, played, 0.8)
    assert success == pytest.approx({"bright": 0.8})


def _fail(looks: Looks) -> Answer:
    return Answer(np.full((len(looks), 2, 7), 100, np.uint8))
