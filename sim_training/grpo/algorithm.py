"""GRPO over action tokens: groups that teach, batches, log-probabilities, advantages, the loss.

Pure functions. A token is one action dimension of one action; only dimensions that vary count, and of
an episode only the actions up to the one that finished it. The estimator of advantages, the policy
losses and their aggregation are verl's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo.core_algos import agg_loss, get_adv_estimator_fn, get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig, PolicyLossConfig

from sim_training.grpo.experience import Trajectory
from sim_training.grpo.settings import SamplingSettings, UpdateSettings

Group = list[Trajectory]

# verl's dual clip bounds the loss of unlikely bad actions, which SimpleVLA-RL does not: out of reach.
# DPPO truncates its importance weights with the same number, for which its paper has 20.
_NO_DUAL_CLIP = 1e6
_DPPO_TRUNCATION = 20.0


def group_by_seed(trajectories: Sequence[Trajectory]) -> list[Group]:
    """Return the trajectories of each initial state, in the order in which the states first appear."""
    groups: dict[int, Group] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.episode.seed, []).append(trajectory)
    return list(groups.values())


def accuracy(group: Group) -> float:
    """Return the share of the group's episodes that succeeded."""
    return sum(trajectory.success for trajectory in group) / len(group)


def worth_learning(group: Group, settings: SamplingSettings) -> bool:
    """Return whether dynamic sampling keeps the group: one of equal outcomes has no advantages."""
    if not settings.dynamic:
        return True
    return settings.accuracy_low <= accuracy(group) <= settings.accuracy_high


def token_mask(trajectory: Trajectory, varied: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (T, K * V) bool: the tokens of actions that were begun, over the V varied dimensions."""
    looks, chunk = trajectory.bins.shape[:2]
    begun = np.arange(looks * chunk).reshape(looks, chunk) < trajectory.actions
    return np.repeat(begun, int(varied.sum()), axis=1)


def make_batch(
    trajectories: Sequence[Trajectory], varied: NDArray[np.bool_], *, multiple: int = 1
) -> DataProto:
    """Return the trajectories as one batch, padded to the longest of them.

    Args:
        varied: (D,) which action dimensions count.
        multiple: the batch is filled with empty rows, which count for nothing, to a multiple of this.

    Returns:
        B rows of T looks of S = K * V tokens: ``seen`` (B, T, ...), ``proprio`` (B, T, P), ``prompts``
        (B,), ``bins`` (B, T * S) uint8, ``look_mask`` (B, T) bool, ``loss_mask`` (B, T * S) float32,
        ``rewards`` (B,) float32, ``rollout_log_probs`` (B, T * S) float32 if every trajectory has them; and
        ``uid`` (B,), the initial state, by which advantages are taken. Empty rows have a uid of their own.
    """
    if not trajectories:
        raise ValueError("a batch needs a trajectory")
    rows = -(-len(trajectories) // multiple) * multiple
    looks = max(trajectory.looks for trajectory in trajectories)
    first = trajectories[0]
    tokens = first.bins.shape[1] * int(varied.sum())
    arrays: dict[str, NDArray[Any]] = {
        "seen": np.zeros((rows, looks, *first.seen.shape[1:]), first.seen.dtype),
        "proprio": np.zeros((rows, looks, first.proprio.shape[1]), np.float32),
        "prompts": np.zeros(rows, np.int64),
        "bins": np.zeros((rows, looks, tokens), np.uint8),
        "look_mask": np.zeros((rows, looks), bool),
        "loss_mask": np.zeros((rows, looks, tokens), np.float32),
        "rewards": np.zeros(rows, np.float32),
    }
    if all(trajectory.log_probs is not None for trajectory in trajectories):
        arrays["rollout_log_probs"] = np.zeros((rows, looks, tokens), np.float32)
    for row, trajectory in enumerate(trajectories):
        upto = trajectory.looks
        arrays["seen"][row, :upto] = trajectory.seen
        arrays["proprio"][row, :upto] = trajectory.proprio
        arrays["prompts"][row] = trajectory.prompt
        arrays["bins"][row, :upto] = trajectory.bins[..., varied].reshape(upto, tokens)
        arrays["look_mask"][row, :upto] = True
        arrays["loss_mask"][row, :upto] = token_mask(trajectory, varied)
        arrays["rewards"][row] = trajectory.success
        if "rollout_log_probs" in arrays:
            arrays["rollout_log_probs"][row, :upto] = trajectory.log_probs
    for name in ("bins", "loss_mask", "rollout_log_probs"):
        if name in arrays:
            arrays[name] = arrays[name].reshape(rows, looks * tokens)
    uids = [f"state {trajectory.episode.seed}" for trajectory in trajectories]
    uids += [f"empty {row}" for row in range(len(trajectories), rows)]
    return DataProto.from_dict(
        {name: torch.from_numpy(value) for name, value in arrays.items()},
        non_tensors={"uid": np.array(uids, dtype=object)},
    )


def add_advantages(batch: DataProto, *, normalise: bool) -> None:
    """Add ``advantages`` (B, T * S): GRPO's, the same for every token of a trajectory that counts."""
    mask = batch.batch["loss_mask"]
    scores = torch.zeros_like(mask)
    scores[:, -1] = batch.batch["rewards"]  # verl sums the rewards of tokens, masked or not
    batch.batch["advantages"], _ = get_adv_estimator_fn("grpo")(
        token_level_rewards=scores,
        response_mask=mask,
        index=batch.non_tensor_batch["uid"],
        norm_adv_by_std_in_grpo=normalise,
    )


def add_correction(batch: DataProto, settings: UpdateSettings) -> float:
    """Add ``rollout_is_weights`` (B, T * S) from ``old_log_probs`` and ``rollout_log_probs``.

    Returns:
        The mean weight of a token.
    """
    mask = batch.batch["loss_mask"]
    weights, _ = compute_rollout_correction_weights(
        (batch.batch["old_log_probs"] - batch.batch["rollout_log_probs"]) * mask,
        mask,
        rollout_is=settings.rollout_correction,
        rollout_is_threshold=settings.correction_limit,
    )
    batch.batch["rollout_is_weights"] = weights
    return float((weights * mask).sum() / mask.sum().clamp_min(1))


def token_log_probs(logits: Tensor, bins: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (..., S) log-probabilities of ``bins`` (..., S) and (..., S) entropies, in nats.

    Args:
        logits: (..., S, 256); divided by the temperature.
    """
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    taken = log_probs.gather(-1, bins.long().unsqueeze(-1)).squeeze(-1)
    return taken, -(log_probs.exp() * log_probs).sum(dim=-1)


def actor_config(settings: UpdateSettings, group_size: int) -> ActorConfig:
    """Return the settings in verl's words, for its losses."""
    truncation = _DPPO_TRUNCATION if settings.policy_loss.startswith("dppo") else _NO_DUAL_CLIP
    return ActorConfig(
        strategy="fsdp2",
        rollout_n=group_size,
        ppo_mini_batch_size=settings.mini_batch,
        ppo_micro_batch_size_per_gpu=settings.micro_batch,
        clip_ratio=settings.clip_low,
        clip_ratio_low=settings.clip_low,
        clip_ratio_high=settings.clip_high,
        clip_ratio_c=truncation,
        loss_agg_mode=settings.loss_aggregation,
        entropy_coeff=settings.entropy,
        use_kl_loss=settings.kl > 0,
        kl_loss_coef=settings.kl,
        policy_loss=PolicyLossConfig(loss_mode=settings.policy_loss),
    )


def policy_loss(
    output: dict[str, Tensor], data: TensorDict | dict[str, Tensor], config: ActorConfig, **scale: Any
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a micro-batch and sums over its tokens, from which means are made.

    Args:
        output: ``log_probs`` and ``entropy`` (B, T * S) under the policy that learns.
        data: ``old_log_probs``, ``advantages`` and ``loss_mask`` (B, T * S); ``rollout_is_weights`` and
            ``ref_log_probs`` where they are wanted.
        scale: of the whole mini-batch, as verl's ``agg_loss`` takes it: ``dp_size``, ``batch_num_tokens``,
            ``global_batch_size``.
    """
    mask = data["loss_mask"]
    config.global_batch_info.update(scale)
    config.global_batch_info["loss_scale_factor"] = config.loss_scale_factor
    loss, figures = get_policy_loss_fn(config.policy_loss.loss_mode)(
        old_log_prob=data["old_log_probs"],
        log_prob=output["log_probs"],
        advantages=data["advantages"],
        response_mask=mask,
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=data.get("rollout_is_weights", None),
    )
    if config.entropy_coeff:
        bonus = agg_loss(output["entropy"], mask, config.loss_agg_mode, **config.global_batch_info)
        loss = loss - config.entropy_coeff * bonus
    if config.use_kl_loss:
        divergence = kl_penalty(output["log_probs"], data["ref_log_probs"], config.kl_loss_type)
        loss = loss + config.kl_loss_coef * agg_loss(
            divergence, mask, config.loss_agg_mode, **config.global_batch_info
        )
    tokens = float(mask.sum())
    ratio = (output["log_probs"].detach() - data["old_log_probs"]).exp()
    return loss, {
        "tokens": tokens,
        "ratio": float(((ratio - 1).abs() * mask).sum()),
        "entropy": float((output["entropy"].detach() * mask).sum()),
        "clip": float(figures.get("actor/pg_clipfrac", 0.0)) * tokens,
    }
