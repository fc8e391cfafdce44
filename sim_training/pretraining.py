"""Teach the image encoder where things are, before it has to act on that.

The network's visual tokens are asked, through one linear layer that is thrown away afterwards, for
the places of the task's things and of the tools. Only here do batch statistics of the encoder move;
fine-tuning keeps them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor, nn

from sim_training.pictures import Pictures
from sim_training.samples import Samples
from sim_training.sft import SftSettings, augment, schedule
from simplevla.config import Config
from simplevla.embodiment import Positive
from simplevla.policy.network import VLANetwork

log = logging.getLogger(__name__)

_DECIMETRES = 10.0


class PretrainingSettings(Config, frozen=True, kw_only=True):
    """How to pretrain the encoder. ``held_out`` is the fraction of episodes that it is tested on."""

    steps: Annotated[int, Meta(ge=1)]
    batch: Annotated[int, Meta(ge=2)] = 64
    learning_rate: Positive = 2e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 0.01
    warmup_steps: Annotated[int, Meta(ge=0)] = 100
    held_out: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    log_every: Annotated[int, Meta(ge=1)] = 100


@dataclass(frozen=True)
class PlaceErrors:
    """Median and 90th percentile of the horizontal error on held-out episodes, m, thing by thing."""

    median_m: tuple[float, ...]
    p90_m: tuple[float, ...]


def pretrain(
    network: VLANetwork,
    samples: Samples | Pictures,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    settings: PretrainingSettings,
    augmentation: SftSettings,
    *,
    seed: int,
) -> PlaceErrors:
    """Train the encoders and token mixer of ``network`` in place, and return how well they see.

    Args:
        train, test: indices of the samples to learn from and to be tested on.
        augmentation: whose image changes to use.
    """
    torch.set_num_threads(augmentation.threads)
    torch.manual_seed(seed)
    wanted = (samples.objects * _DECIMETRES).flatten(1)
    centre = wanted[train].mean(dim=0)
    with torch.no_grad():
        width = network.visual_tokens(samples.images[:1].float() / 255).flatten(1).shape[1]
    head = nn.Linear(width, wanted.shape[1])
    parts = [network.encoders, *([network.mixer] if network.mixer is not None else [])]
    parameters = [p for part in parts for p in part.parameters()] + list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    network.train()
    since, losses = time.perf_counter(), []
    for step in range(settings.steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = train[torch.randint(len(train), (settings.batch,), generator=generator).numpy()]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, settings.steps, settings.warmup_steps)
        images = augment(samples.images[index].float() / 255, augmentation, generator)
        places = head(network.visual_tokens(images).flatten(1)) + centre
        loss = nn.functional.smooth_l1_loss(places, wanted[index], beta=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % settings.log_every == 0:
            now = time.perf_counter()
            pace = len(losses) * settings.batch / max(now - since, 1e-9)
            log.info(
                "pretraining %d/%d: loss %.4f, %.0f images/s",
                step + 1,
                settings.steps,
                np.mean(losses),
                pace,
            )
            since, losses = now, []
    network.eval()
    return place_errors(network, head, samples, test, centre)


@torch.no_grad()
def place_errors(
    network: VLANetwork,
    head: nn.Linear,
    samples: Samples | Pictures,
    test: NDArray[np.int64],
    centre: Tensor,
) -> PlaceErrors:
    """Return the horizontal errors of the ``test`` samples."""
    found = torch.cat(
        [
            head(network.visual_tokens(samples.images[part].float() / 255).flatten(1)) + centre
            for part in np.array_split(test, max(1, len(test) // 256))
        ]
    )
    offset = found.reshape(len(test), -1, 3) / _DECIMETRES - samples.objects[test]
    error = offset[..., :2].norm(dim=-1).numpy()
    return PlaceErrors(
        tuple(np.median(error, axis=0).tolist()), tuple(np.quantile(error, 0.9, axis=0).tolist())
    )
