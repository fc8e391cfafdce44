"""What is computed from groups, beside values worked out by hand and verl's own functions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from sim_training.grpo import algorithm
from sim_training.grpo.experience import Episode, Trajectory
from sim_training.grpo.settings import GrpoSettings, SamplingSettings, UpdateSettings
from simplevla.config import build
from simplevla.errors import ConfigError

VARIED = np.array([True, False, True])


def trajectory(
    seed: int, success: bool, *, looks: int = 2, actions: int = 4, member: int = 0
) -> Trajectory:
    """Return one of a policy with K = 2 actions of D = 3 dimensions."""
    rng = np.random.default_rng([seed, member, looks])
    return Trajectory(
        episode=Episode(seed, member),
        seen=rng.integers(0, 256, (looks, 1, 3, 4, 4), dtype=np.uint8),
        proprio=rng.random((looks, 5), dtype=np.float32),
        prompt=0,
        bins=rng.integers(0, 255, (looks, 2, 3), dtype=np.uint8),
        actions=actions,
        success=success,
        log_probs=np.full((looks, 4), -2.0, np.float32),
    )


def test_the_mask_ends_with_the_finishing_action_and_not_with_its_chunk() -> None:
    mask = algorithm.token_mask(trajectory(0, True, actions=3), VARIED)
    # Two looks of two actions of two varied dimensions: the last action was never begun.
    assert mask.tolist() == [[True, True, True, True], [True, True, False, False]]


@given(st.integers(1, 6), st.integers(1, 12))
def test_the_mask_counts_the_varied_tokens_of_the_actions_that_were_begun(looks: int, actions: int) -> None:
    begun = min(actions, 2 * looks)
    assert (
        algorithm.token_mask(trajectory(0, True, looks=looks, actions=actions), VARIED).sum() == 2 * begun
    )


@pytest.mark.parametrize(("successes", "kept"), [(0, False), (1, True), (7, True), (8, False)])
def test_dynamic_sampling_keeps_groups_of_mixed_outcome(successes: int, kept: bool) -> None:
    group = [trajectory(0, i < successes) for i in range(8)]
    assert algorithm.worth_learning(group, SamplingSettings()) is kept
    assert algorithm.worth_learning(group, SamplingSettings(dynamic=False))


def test_advantages_are_the_groups_standard_scores_on_every_token_that_counts() -> None:
    first = [trajectory(0, i == 0, actions=3 if i == 0 else 4, member=i) for i in range(4)]
    second = [trajectory(1, i < 2, looks=1, actions=2, member=i) for i in range(4)]
    batch = algorithm.make_batch([*first, *second], VARIED, multiple=3)
    assert len(batch) == 9  # one row is empty
    algorithm.add_advantages(batch, normalise=True)
    advantages, mask = batch.batch["advantages"], batch.batch["loss_mask"]
    # Rewards 1 0 0 0: mean 1/4, standard deviation (n - 1) 1/2. Rewards 1 1 0 0: mean 1/2, 1/sqrt(3).
    by_hand = [1.5, -0.5, -0.5, -0.5, 0.8660, 0.8660, -0.8660, -0.8660]
    expected = torch.tensor([*by_hand, 0.0])[:, None] * mask
    torch.testing.assert_close(advantages, expected, atol=1e-4, rtol=0)
    assert mask[-1].sum() == 0

    vectorised, _ = get_adv_estimator_fn("grpo_vectorized")(
        token_level_rewards=batch.batch["rewards"][:, None],
        response_mask=mask,
        index=batch.non_tensor_batch["uid"],
    )
    torch.testing.assert_close(advantages, vectorised, atol=1e-4, rtol=0)


def test_advantages_without_normalisation_are_the_distance_from_the_mean() -> None:
    batch = algorithm.make_batch([trajectory(0, i == 0, member=i) for i in range(4)], VARIED)
    algorithm.add_advantages(batch, normalise=False)
    assert batch.batch["advantages"][:, 0].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_a_batch_holds_what_was_done_over_the_dimensions_that_vary() -> None:
    one, two = trajectory(3, True, looks=3), trajectory(4, False, looks=1)
    batch = algorithm.make_batch([one, two], VARIED).batch
    assert batch["bins"][0].tolist() == one.bins[:, :, [0, 2]].reshape(-1).tolist()
    assert batch["look_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert torch.equal(batch["seen"][1, 0], torch.from_numpy(two.seen[0]))
    assert batch["rollout_log_probs"][1].tolist() == [-2.0] * 4 + [0.0] * 8


def test_a_batch_without_all_log_probabilities_has_none() -> None:
    batch = algorithm.make_batch(
        [trajectory(0, True), replace(trajectory(1, True), log_probs=None)], VARIED
    )
    assert "rollout_log_probs" not in batch.batch


def test_log_probabilities_are_of_the_logits_over_the_temperature() -> None:
    logits = torch.zeros(1, 2, 256)
    logits[0, 1, 7] = 2.0
    log_probs, entropy = algorithm.token_log_probs(logits, torch.tensor([[3, 7]]), temperature=2.0)
    # The second token: e / (e + 255), as its logit of 2 is divided by 2.
    assert log_probs[0].tolist() == pytest.approx([-np.log(256), 1 - np.log(np.e + 255)], abs=1e-6)
    assert float(entropy[0, 0]) == pytest.approx(np.log(256), abs=1e-5)


def loss_of(ratio: float, advantage: float, **settings: object) -> float:
    old = torch.full((1, 4), -3.0)
    output = {"log_probs": old + float(np.log(ratio)), "entropy": torch.ones(1, 4)}
    data = {
        "loss_mask": torch.tensor([[1.0, 1.0, 0.0, 0.0]]),
        "old_log_probs": old,
        "advantages": torch.full((1, 4), advantage),
    }
    config = algorithm.actor_config(build(settings, UpdateSettings, source="test"), 8)
    return float(algorithm.policy_loss(output, data, config, dp_size=1)[0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.1, 1.0, -1.1),
        (1.5, 1.0, -1.28),  # clipped above, at clip_high
        (0.5, 1.0, -0.5),
        (0.5, -1.0, 0.8),  # clipped below, at 1 - clip_low
        (10.0, -1.0, 10.0),  # no dual clip
    ],
)
def test_the_loss_is_ppos_with_the_higher_clip(ratio: float, advantage: float, loss: float) -> None:
    assert loss_of(ratio, advantage) == pytest.approx(loss, rel=1e-5)


def test_the_entropy_bonus_lowers_the_loss() -> None:
    assert loss_of(1.1, 1.0, entropy=0.1) == pytest.approx(-1.2, rel=1e-5)


@pytest.mark.parametrize(("aggregation", "loss"), [("seq-mean-token-mean", -1.5), ("token-mean", -1.2)])
def test_every_trajectory_weighs_the_same_unless_asked_otherwise(aggregation: str, loss: float) -> None:
    # One trajectory of four tokens with advantage 1, one of one token with advantage 2.
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    zeros = torch.zeros(2, 4)
    settings = build({"loss_aggregation": aggregation}, UpdateSettings, source="test")
    value, sums = algorithm.policy_loss(
        {"log_probs": zeros, "entropy": zeros},
        {
            "loss_mask": mask,
            "old_log_probs": zeros,
            "advantages": torch.tensor([[1.0], [2.0]]).expand(2, 4),
        },
        algorithm.actor_config(settings, 8),
        dp_size=1,
    )
    assert float(value) == pytest.approx(loss)
    assert sums["tokens"] == 5


def test_correction_weighs_by_the_truncated_ratio_of_the_policies() -> None:
    batch = algorithm.make_batch([trajectory(0, True), trajectory(0, False, actions=1)], VARIED)
    old = batch.batch["rollout_log_probs"] + torch.log(torch.tensor([[1.5], [3.0]]))
    batch.batch["old_log_probs"] = old
    mean = algorithm.add_correction(batch, UpdateSettings(rollout_correction="token", correction_limit=2.0))
    weights = batch.batch["rollout_is_weights"]
    torch.testing.assert_close(weights[0], torch.full((8,), 1.5))
    assert weights[1].tolist() == [2.0, 2.0] + [0.0] * 6
    assert mean == pytest.approx((8 * 1.5 + 2 * 2.0) / 10, rel=1e-5)


def test_the_learning_rate_rises_and_falls_and_temperature_and_horizon_move() -> None:
    settings = GrpoSettings(
        iterations=11,
        update=UpdateSettings(learning_rate=1.0, warmup=1, decay=True),
        sampling=SamplingSettings(temperature=1.5, final_temperature=0.5, horizon=40, final_horizon=25),
    )
    assert settings.learning_rate(0) == 1.0
    assert settings.learning_rate(6) == pytest.approx(0.5)
    assert settings.learning_rate(11) == pytest.approx(0.0)
    assert [settings.temperature(i) for i in (0, 5, 10)] == pytest.approx([1.5, 1.0, 0.5])
    assert [settings.horizon(i) for i in (0, 1, 4, 10)] == [40, 38, 34, 25]
    assert GrpoSettings(iterations=2).horizon(1) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"update": {"mini_batch": 10, "micro_batch": 4}},
        {"placement": {"learners": 2}},
        {"placement": {"engine": "ray", "learners": 3}, "update": {"mini_batch": 8, "micro_batch": 4}},
        {"sampling": {"accuracy_low": 0.9, "accuracy_high": 0.1}},
        {"sampling": {"final_horizon": 20}},
        {"update": {"policy_loss": "mine"}},
        {"evaluate_every": 0, "deliver": "best"},
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        build({"iterations": 1, **wrong}, GrpoSettings, source="grpo")
