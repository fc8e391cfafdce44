"""Fine-tuning: labels, a loss that falls, and runs that can be cut off."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sim_training.pretraining import PretrainingSettings, pretrain
from sim_training.samples import Samples, fit_codec, fit_proprio, split
from sim_training.sft import (
    SftSettings,
    augment,
    bin_loss,
    fine_tune,
    freeze_statistics,
    schedule,
    soft_labels,
)
from simplevla.embodiment import Embodiment
from simplevla.errors import ConfigError
from simplevla.policy.config import NetworkConfig
from simplevla.policy.network import VLANetwork, make_network

N = 24


@pytest.fixture
def samples() -> Samples:
    """Return pictures with a bright square whose place decides the first action."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 40, (N, 1, 3, 24, 32), dtype=np.uint8)
    at = rng.integers(2, 26, N)
    for image, x in zip(images, at, strict=True):
        image[..., 8:14, x : x + 5] = 250
    actions = rng.normal(0, 1e-4, (N, 2, 14))
    actions[:, :, 0] = (at[:, None] - 14) / 400
    objects = np.zeros((N, 2, 3), np.float32)
    objects[:, 1, 0] = (at - 14) / 40
    return Samples(
        images=torch.from_numpy(images),
        proprio=torch.from_numpy(rng.normal(size=(N, 20)).astype(np.float32)),
        prompts=torch.zeros(N, dtype=torch.long),
        input_ids=torch.arange(32)[None],
        attention_mask=torch.cat([torch.ones(1, 1), torch.zeros(1, 20), torch.ones(1, 11)], 1).long(),
        actions=actions,
        objects=torch.from_numpy(objects),
        episodes=np.repeat(np.arange(6), 4),
    )


def fresh(config: NetworkConfig) -> VLANetwork:
    torch.manual_seed(0)
    return make_network(config)


def test_labels_are_narrow_bumps_around_their_bins() -> None:
    labels = soft_labels(3.0)
    np.testing.assert_allclose(labels.sum(dim=1), 1, rtol=1e-5)
    assert (labels[:255].argmax(dim=1) == torch.arange(255)).all()
    assert labels[:, 255].max() == 0
    spread = (labels[128] * (torch.arange(256) - 128) ** 2).sum().sqrt()
    assert float(spread) == pytest.approx(3.0, rel=0.01)


def test_the_loss_is_zero_only_for_a_perfect_fit() -> None:
    labels, bins = soft_labels(3.0), torch.tensor([[10, 200]])
    perfect = labels[bins].clamp_min(1e-30).log()
    assert float(bin_loss(perfect, bins, labels)) == pytest.approx(0, abs=1e-5)
    near, far = (bin_loss(labels[bins + by].clamp_min(1e-9).log(), bins, labels) for by in (1, 20))
    assert 0 < float(near) < float(far)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [schedule(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[100] == pytest.approx(0)
    assert (np.diff(rates[10:]) < 0).all()


def test_augmentation_is_a_function_of_its_generator() -> None:
    settings = SftSettings(steps=1, shift_px=2)
    images = torch.rand(3, 1, 3, 24, 32)
    first, second, other = (
        augment(images, settings, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert not torch.equal(first, other)
    assert first.shape == images.shape
    assert 0 <= float(first.min()) <= float(first.max()) <= 1


def test_statistics_find_what_varies(samples: Samples, embodiment: Embodiment) -> None:
    codec = fit_codec(samples, embodiment)
    assert codec.varied.tolist() == [True] + [False] * 13
    low, high = fit_proprio(samples)
    assert (low < samples.proprio.numpy().min(axis=0)).all()
    assert (high > samples.proprio.numpy().max(axis=0)).all()


def test_episodes_are_held_out_whole(samples: Samples) -> None:
    train, test = split(samples, 0.34)
    assert sorted([*train, *test]) == list(range(N))
    assert set(samples.episodes[train]).isdisjoint(samples.episodes[test])


@pytest.mark.parametrize("frozen_views", [0, 2])
def test_the_loss_falls(
    config: NetworkConfig, samples: Samples, embodiment: Embodiment, tmp_path: Path, frozen_views: int
) -> None:
    network = fresh(config)
    encoder = {k: v.clone() for k, v in network.encoders.state_dict().items()}
    settings = SftSettings(
        steps=160,
        batch=8,
        learning_rate=1e-2,
        warmup_steps=0,
        log_every=40,
        frozen_views=frozen_views,
        threads=1,
    )
    codec = fit_codec(samples, embodiment)
    history = fine_tune(network, samples, codec, settings, seed=0, folder=tmp_path)
    assert [entry["step"] for entry in history] == [40, 80, 120, 160]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    same = all(torch.equal(v, network.encoders.state_dict()[k]) for k, v in encoder.items())
    assert same == bool(frozen_views)


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    config: NetworkConfig, samples: Samples, embodiment: Embodiment, tmp_path: Path
) -> None:
    codec = fit_codec(samples, embodiment)
    settings = SftSettings(steps=12, batch=4, warmup_steps=2, checkpoint_every=5, threads=1)
    whole, cut = fresh(config), fresh(config)
    fine_tune(whole, samples, codec, settings, seed=3, folder=tmp_path / "whole")

    class Cut(Exception):  # noqa: N818 - stands for a power failure
        pass

    calls = 0
    decode = cut.decode

    def failing(*args: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise Cut
        return decode(*args)

    cut.decode = failing  # type: ignore[method-assign]
    with pytest.raises(Cut):
        fine_tune(cut, samples, codec, settings, seed=3, folder=tmp_path / "cut")
    assert json.loads((tmp_path / "cut/checkpoint/state.json").read_text()) == {"step": 5}
    again = make_network(config)
    fine_tune(again, samples, codec, settings, seed=3, folder=tmp_path / "cut")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=0, rtol=0)


def test_a_damaged_checkpoint_is_refused(
    config: NetworkConfig, samples: Samples, embodiment: Embodiment, tmp_path: Path
) -> None:
    settings = SftSettings(steps=1, batch=2, threads=1)
    codec = fit_codec(samples, embodiment)
    fine_tune(fresh(config), samples, codec, settings, seed=0, folder=tmp_path)
    (tmp_path / "checkpoint/state.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be continued"):
        fine_tune(fresh(config), samples, codec, settings, seed=0, folder=tmp_path)


def test_nothing_to_learn_is_refused(
    config: NetworkConfig, samples: Samples, embodiment: Embodiment, tmp_path: Path
) -> None:
    still = dataclasses.replace(samples, actions=np.zeros_like(samples.actions))
    with pytest.raises(ConfigError, match="nothing to learn"):
        fine_tune(
            fresh(config),
            still,
            fit_codec(still, embodiment),
            SftSettings(steps=1),
            seed=0,
            folder=tmp_path,
        )


def test_frozen_statistics_do_not_move(config: NetworkConfig) -> None:
    network = fresh(config).train()
    freeze_statistics(network)
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    network.visual_tokens(torch.rand(4, 1, 3, 24, 32))
    assert before
    assert all(torch.equal(network.state_dict()[k], v) for k, v in before.items())


def test_pretraining_finds_the_square(config: NetworkConfig, samples: Samples) -> None:
    everything = np.arange(N)
    settings = PretrainingSettings(steps=80, batch=16, learning_rate=5e-3, warmup_steps=5)
    plain = SftSettings(steps=1, brightness=0, contrast=0, noise=0, threads=1)
    errors = pretrain(fresh(config), samples, everything, everything, settings, plain, seed=0)
    assert errors.median_m[1] < 0.5 * float(samples.objects[:, 1, 0].abs().median())
