"""Supervised fine-tuning: a network learns the bins of demonstrated action chunks.

Labels are spread over neighbouring bins (a Gaussian of a few bins), dimensions that never vary carry
no loss, and every random draw is a function of (seed, step), so that a run that was cut off and went
on is the run that was never cut off.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sim_training.samples import Samples
from simplevla.action_codec import BINS, ActionCodec
from simplevla.config import Config
from simplevla.embodiment import Positive
from simplevla.errors import ConfigError
from simplevla.files import whole_directory
from simplevla.policy.network import VLANetwork

log = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint"


class SftSettings(Config, frozen=True, kw_only=True):
    """How to fine-tune.

    Attributes:
        batch: samples of one step.
        warmup_steps: steps of linear rise of the learning rate before its cosine fall to zero.
        label_bins: standard deviation of the labels, in bins.
        brightness, contrast: largest relative change of an image's brightness and contrast.
        noise: standard deviation of pixel noise, of 1.
        shift_px: largest shift of the resampled image in either direction, pixels.
        frozen_views: 0 to train the whole network; else the encoder stays as it is and each picture is
            encoded this many times beforehand, each time with other changes of light and noise. That
            leaves only the decoder to compute in each step.
        threads: torch's threads; 1 or 2 on a machine that does other work too.
    """

    steps: Annotated[int, Meta(ge=1)]
    batch: Annotated[int, Meta(ge=1)] = 64
    learning_rate: Positive = 1e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 0.01
    warmup_steps: Annotated[int, Meta(ge=0)] = 100
    gradient_clip: Positive = 1.0
    label_bins: Positive = 3.0
    brightness: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    contrast: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    noise: Annotated[float, Meta(ge=0, lt=1)] = 0.02
    shift_px: Annotated[int, Meta(ge=0, le=16)] = 0
    frozen_views: Annotated[int, Meta(ge=0, le=64)] = 0
    checkpoint_every: Annotated[int, Meta(ge=1)] = 500
    log_every: Annotated[int, Meta(ge=1)] = 50
    threads: Annotated[int, Meta(ge=1, le=256)] = 2


def fine_tune(
    network: VLANetwork,
    samples: Samples,
    codec: ActionCodec,
    settings: SftSettings,
    *,
    seed: int,
    folder: Path,
) -> list[dict[str, float]]:
    """Train ``network`` in place, from the last checkpoint in ``folder`` if there is one.

    Args:
        codec: makes bins of the samples' actions; dimensions it calls not varied carry no loss.
        folder: holds the checkpoint; made if it is missing.

    Returns:
        The log: one {"step", "loss", "learning_rate", "samples_per_s"} every ``log_every`` steps
        that this call made.

    Raises:
        ConfigError: there is nothing to learn from, or the checkpoint is of another network.
    """
    if not len(samples) or not codec.varied.any():
        raise ConfigError("the demonstrations hold nothing to learn", "collect demonstrations first")
    torch.set_num_threads(settings.threads)
    labels = soft_labels(settings.label_bins)
    slots = torch.from_numpy(np.tile(codec.varied, network.network.chunk_length))
    bins = torch.from_numpy(codec.encode(samples.actions)).flatten(1)
    # Columns that are padding in every prompt change nothing and need not be computed.
    columns = samples.attention_mask.any(dim=0)
    input_ids, attention_mask = samples.input_ids[:, columns], samples.attention_mask[:, columns]
    trained = network.policy_parameters() if settings.frozen_views else list(network.parameters())
    decay = [p for p in trained if p.ndim >= 2]
    plain = [p for p in trained if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )
    step = load_checkpoint(folder / _CHECKPOINT, network, optimizer)
    network.train()
    freeze_statistics(network)
    views = encode_views(network, samples, settings, seed) if settings.frozen_views else None
    history: list[dict[str, float]] = []
    since, losses = time.perf_counter(), []
    while step < settings.steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(samples), (settings.batch,), generator=generator)
        prompts = samples.prompts[index]
        rate = settings.learning_rate * schedule(step, settings.steps, settings.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if views is None:
            images = augment(samples.images[index].float() / 255, settings, generator)
            tokens = network.visual_tokens(images)
        else:
            tokens = views[torch.randint(len(views), (settings.batch,), generator=generator), index]
        logits = network.decode(tokens, input_ids[prompts], attention_mask[prompts], samples.proprio[index])
        loss = bin_loss(logits[:, slots], bins[index][:, slots], labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, settings.gradient_clip)
        optimizer.step()
        step += 1
        losses.append(float(loss.detach()))
        if step % settings.log_every == 0 or step == settings.steps:
            now = time.perf_counter()
            pace = len(losses) * settings.batch / max(now - since, 1e-9)
            history.append(
                {"step": step, "loss": float(np.mean(losses)), "learning_rate": rate, "samples_per_s": pace}
            )
            log.info(
                "fine-tuning %d/%d: loss %.4f, %.0f samples/s",
                step,
                settings.steps,
                history[-1]["loss"],
                pace,
            )
            since, losses = now, []
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            save_checkpoint(folder / _CHECKPOINT, network, optimizer, step)
    network.eval()
    return history


@torch.no_grad()
def encode_views(network: VLANetwork, samples: Samples, settings: SftSettings, seed: int) -> Tensor:
    """Return (views, N, tokens, features) visual tokens; the first view is of the unchanged pictures."""
    views = []
    for view in range(settings.frozen_views):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + 500_000_000 + view)
        parts = []
        for images in samples.images.split(256):
            pixels = images.float() / 255
            parts.append(network.visual_tokens(augment(pixels, settings, generator) if view else pixels))
        views.append(torch.cat(parts))
    return torch.stack(views)


def soft_labels(width_bins: float) -> Tensor:
    """Return (256, 256): row b is the label of bin b, a Gaussian; the unused last bin gets nothing."""
    bins = torch.arange(BINS)
    weights = torch.exp(-0.5 * ((bins[None] - bins[:, None]) / width_bins) ** 2)
    weights[:, -1] = 0
    return weights / weights.sum(dim=1, keepdim=True)


def bin_loss(logits: Tensor, bins: Tensor, labels: Tensor) -> Tensor:
    """Return the mean divergence of (B, S, 256) ``logits`` from the soft labels of (B, S) ``bins``.

    The labels' own entropy is subtracted, so that zero is a perfect fit.
    """
    wanted = labels[bins]
    entropy = -(wanted * wanted.clamp_min(1e-12).log()).sum(-1)
    return (-(wanted * logits.log_softmax(-1)).sum(-1) - entropy).mean()


def augment(images: Tensor, settings: SftSettings, generator: torch.Generator) -> Tensor:
    """Return (B, cameras, 3, h, w) images in 0..1 with changed light, noise and small shifts."""
    shape = (images.shape[0], images.shape[1], 1, 1, 1)

    def around(scale: float) -> Tensor:
        return 1 + scale * (2 * torch.rand(shape, generator=generator) - 1)

    mean = images.mean(dim=(-3, -2, -1), keepdim=True)
    images = (images - mean) * around(settings.contrast) + mean * around(settings.brightness)
    if settings.noise:
        images = images + settings.noise * torch.randn(images.shape, generator=generator)
    if settings.shift_px:
        by = torch.randint(-settings.shift_px, settings.shift_px + 1, (len(images), 2), generator=generator)
        images = torch.stack(
            [_shift(image, int(y), int(x)) for image, (y, x) in zip(images, by, strict=True)]
        )
    return images.clamp(0, 1)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the learning rate's factor: a linear rise over ``warmup`` steps, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def freeze_statistics(network: nn.Module) -> None:
    """Make batch normalisation use its stored statistics: training then sees what serving will see."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def save_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write weights, optimizer and step, whole or not at all, in the place of the last checkpoint."""
    fresh = path.with_name(path.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    with whole_directory(fresh) as scratch:
        save_file(
            {k: v.contiguous() for k, v in network.state_dict().items()}, scratch / "weights.safetensors"
        )
        state = {
            f"{index}.{name}": torch.as_tensor(value).contiguous()
            for index, entry in optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        save_file(state, scratch / "optimizer.safetensors")
        (scratch / "state.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)


def load_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the step of the checkpoint at ``path`` after loading it, 0 if there is none.

    Raises:
        ConfigError: it is of another network, or damaged.
    """
    fresh = path.with_name(path.name + ".new")
    if not path.is_dir() and fresh.is_dir():  # cut off between removing the old one and renaming
        fresh.rename(path)
    if not path.is_dir():
        return 0
    try:
        step = int(json.loads((path / "state.json").read_text())["step"])
        network.load_state_dict(load_file(path / "weights.safetensors"))
        whole = optimizer.state_dict()
        whole["state"] = {}
        for key, value in load_file(path / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            whole["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(whole)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"the checkpoint {path} cannot be continued: {str(error).splitlines()[0]}",
            "remove it, or train into another folder",
        ) from error
    log.info("continuing from step %d of %s", step, path)
    return step


def _shift(image: Tensor, y: int, x: int) -> Tensor:
    """Return ``image`` (..., h, w) moved by (y, x) pixels, its edge repeated."""
    height, width = image.shape[-2:]
    rows = (torch.arange(height) - y).clamp(0, height - 1)
    columns = (torch.arange(width) - x).clamp(0, width - 1)
    return image[..., rows, :][..., columns]
