"""The folded graphs answer as the network does, in whatever parts they are folded."""

from __future__ import annotations

import msgspec
import pytest
import torch

from simplevla.policy.config import Decoder, Head, NetworkConfig, NetworkSizes, VisionTransformer
from simplevla.policy.folded import BlockResample, Folding, PromptGraph, StepGraph
from simplevla.policy.network import make_network
from simplevla.policy.resample import Resample

TRANSFORMERS = NetworkSizes(
    transformers=(
        VisionTransformer(kind="dinov2", hidden=24, layers=1, heads=2, mlp=48, patch=14),
        VisionTransformer(kind="siglip", hidden=16, layers=1, heads=2, mlp=32, patch=14),
    ),
    image_height=28,
    image_width=28,
    crop_area=0.9,
    decoder=Decoder(hidden=32, layers=3, heads=4, mlp=48),
    head=Head(prefix=True),
    vocabulary=512,
    prompt_tokens=32,
)


def inputs_of(config: NetworkConfig, padding: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(padding)
    mask = torch.ones(1, 32, dtype=torch.long)
    mask[:, 1 : 1 + padding] = 0
    shape = (1, config.n_cameras, config.frame_height, config.frame_width, 3)
    return {
        "frames": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "input_ids": torch.randint(4, 100, (1, 32), generator=generator),
        "attention_mask": mask,
        "proprio": torch.rand(1, config.proprio, generator=generator) - 0.5,
    }


@pytest.fixture(params=["mixed tokens", "transformers and a prefix"])
def wired(request: pytest.FixtureRequest, config: NetworkConfig) -> NetworkConfig:
    if request.param == "mixed tokens":
        return config
    return msgspec.structs.replace(config, sizes=TRANSFORMERS, n_cameras=2)


@pytest.mark.parametrize("folding", [None, Folding(blocks=False), Folding(slots_only=False)])
@torch.no_grad()
def test_folding_changes_no_output(wired: NetworkConfig, folding: Folding | None) -> None:
    torch.manual_seed(0)
    network = make_network(wired).eval()
    network.proprio_low.fill_(-0.3)
    prompt, step = PromptGraph(network).eval(), StepGraph(network, folding=folding).eval()
    for padding in (0, 7):
        inputs = inputs_of(wired, padding)
        constants = prompt(inputs["input_ids"], inputs["attention_mask"])
        last = []
        if network.prefix is not None:
            prefix = torch.full((1, wired.slots), -1)
            prefix[:, :14] = torch.arange(14) * 18
            last = [prefix]
            inputs["prefix"] = prefix
        want = network(**inputs)
        have = step(inputs["frames"], inputs["proprio"], *constants, *last)
        torch.testing.assert_close(have, want, atol=2e-4, rtol=1e-4)
        assert want.std() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_near(config: NetworkConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = make_network(config).eval()
    inputs = inputs_of(config, 3)
    want = network(**inputs)
    prompt, step = PromptGraph(network), StepGraph(network, dtype)
    have = step(inputs["frames"], inputs["proprio"], *prompt(inputs["input_ids"], inputs["attention_mask"]))
    assert have.dtype == torch.float32
    assert (have - want).abs().max() < 0.1 * want.abs().max()
    assert step.proprio_low.dtype == torch.float32


@pytest.mark.parametrize("crop_area", [1.0, 0.9])
@pytest.mark.parametrize("target", [(96, 128), (224, 224), (7, 5), (300, 400)])
def test_resampling_in_blocks_is_resampling(target: tuple[int, int], crop_area: float) -> None:
    frames = torch.randint(0, 256, (1, 2, 240, 320, 3), dtype=torch.uint8)
    dense = Resample((240, 320), target, crop_area)
    torch.testing.assert_close(BlockResample(dense)(frames), dense(frames), atol=2e-6, rtol=1e-5)
