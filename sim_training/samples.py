"""Demonstrations on disk become what training reads from memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sim_training.demonstrations import DemonstrationSet
from simplevla.action_codec import ActionCodec
from simplevla.bundle import ActionSpaceName
from simplevla.embodiment import Embodiment
from simplevla.errors import ConfigError
from simplevla.kinematics.action_space import from_joint_targets
from simplevla.policy.processor import PromptEncoder, proprioception
from simplevla.policy.resample import Resample

if TYPE_CHECKING:
    from sim_training.pictures import Pictures

_MIN_TRANSLATION_M = 1e-3
_MIN_ROTATION_RAD = 0.04  # a tool that keeps its orientation sways by half of this as it follows
_MIN_OPENING_M = 1e-3
_CODEC_MARGIN = 0.02
_PROPRIO_MARGIN = 0.1


@dataclass(frozen=True)
class Samples:
    """What a network is trained on, images already resampled.

    Attributes:
        images: (N, n_cameras, 3, h, w) uint8.
        proprio: (N, P) float32.
        prompts: (N,) int64, which row of ``input_ids`` belongs to a sample.
        input_ids, attention_mask: (prompts, L) int64.
        actions: (N, K, D) float64 in the policy's action space.
        objects: (N, objects, 3) float32 where things stand; world frame, m.
        episodes: (N,) int64 index of the episode that a sample comes from.
    """

    images: Tensor
    proprio: Tensor
    prompts: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    actions: NDArray[np.float64]
    objects: Tensor
    episodes: NDArray[np.int64]

    def __len__(self) -> int:
        """Return N."""
        return len(self.proprio)


def load_samples(
    sets: Sequence[DemonstrationSet],
    embodiment: Embodiment,
    space: ActionSpaceName,
    resample: Resample,
    prompts: PromptEncoder,
) -> Samples:
    """Return every sample of ``sets``.

    Args:
        resample: the network's own; its output is kept rounded to 8 bits.
        prompts: encodes each set's instruction.

    Raises:
        RecordError: an episode is damaged.
        ConfigError: there is none, or a set is of another robot.
    """
    images, proprio, rows, actions, objects, episodes = [], [], [], [], [], []
    texts: list[str] = []
    for demonstrations in sets:
        if demonstrations.manifest.settings.embodiment.names() != embodiment.names():
            raise ConfigError(
                f"{demonstrations.path} shows another robot", f"collect for {embodiment.name}"
            )
        for demonstration in demonstrations:
            if demonstration.instruction not in texts:
                texts.append(demonstration.instruction)
            count = len(demonstration.states)
            with torch.no_grad():
                small = resample(torch.from_numpy(demonstration.images))
            images.append((small * 255).round().clamp(0, 255).to(torch.uint8))
            proprio += [proprioception(state, embodiment) for state in demonstration.states]
            rows += [texts.index(demonstration.instruction)] * count
            actions += [
                from_joint_targets(space, targets, state, embodiment)
                for targets, state in zip(demonstration.targets, demonstration.states, strict=True)
            ]
            objects.append(torch.from_numpy(demonstration.objects))
            episodes += [len(images) - 1] * count
    if not images:
        raise ConfigError("there are no demonstrations to learn from", "collect some first")
    encoded = [prompts(text) for text in texts]
    return Samples(
        torch.cat(images),
        torch.from_numpy(np.stack(proprio)),
        torch.tensor(rows),
        torch.from_numpy(np.stack([ids for ids, _ in encoded])),
        torch.from_numpy(np.stack([mask for _, mask in encoded])),
        np.stack(actions),
        torch.cat(objects),
        np.array(episodes),
    )


def fit_codec(samples: Samples, embodiment: Embodiment) -> ActionCodec:
    """Return the codec of the samples' actions; what hardly moves counts as not varied, and stays.

    A dimension that does not vary decodes to the middle of its range, which is set to the median here:
    a tool that only sways while it follows would else be turned a little by every action.
    """
    smallest = np.concatenate(
        [
            [*[_MIN_TRANSLATION_M] * 3, *[_MIN_ROTATION_RAD] * (len(arm.joints) - 3), _MIN_OPENING_M]
            for arm in embodiment.arms
        ]
    )
    flat = samples.actions.reshape(-1, samples.actions.shape[-1])
    codec = ActionCodec.fit(flat, min_range=smallest, margin=_CODEC_MARGIN)
    middle = np.median(flat, axis=0)
    return ActionCodec(
        np.where(codec.varied, codec.low, middle), np.where(codec.varied, codec.high, middle), codec.varied
    )


def fit_proprio(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (P,) low and (P,) high of the samples' proprioception, with room on either side."""
    values = samples.proprio.numpy().astype(np.float64)
    low, high = values.min(axis=0), values.max(axis=0)
    room = _PROPRIO_MARGIN * (high - low) + 0.01
    return low - room, high + room


def split(samples: Samples | Pictures, held_out: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices for training and the last episodes' indices, ``held_out`` of all episodes."""
    first = round((1 - held_out) * (int(samples.episodes.max()) + 1))
    return np.flatnonzero(samples.episodes < first), np.flatnonzero(samples.episodes >= first)
