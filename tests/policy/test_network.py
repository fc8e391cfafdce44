"""The network: its contract, its attention, its preprocessing, and what export relies on."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional

from simplevla.bundle import Bundle, Manifest, write_bundle
from simplevla.config import build
from simplevla.errors import BundleError, ConfigError
from simplevla.policy.config import NetworkConfig, NetworkSizes, VisionTransformer, load_sizes
from simplevla.policy.network import (
    SmoothHead,
    VLANetwork,
    load_network,
    make_network,
    weights_of,
)
from simplevla.policy.resample import Resample
from simplevla.policy.tokenizer import make_tokenizer

Inputs = dict[str, torch.Tensor]


def make_inputs(batch: int = 2, padding: int = 5) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, 32, dtype=torch.long)
    mask[:, 1 : 1 + padding] = 0
    return {
        "frames": torch.randint(0, 256, (batch, 1, 240, 320, 3), dtype=torch.uint8, generator=generator),
        "input_ids": torch.randint(4, 100, (batch, 32), generator=generator),
        "attention_mask": mask,
        "proprio": torch.rand(batch, 20, generator=generator) - 0.5,
    }


@torch.no_grad()
def test_logits_have_the_contracts_shape(network: VLANetwork) -> None:
    logits = network(**make_inputs())
    assert logits.shape == (2, 28, 256)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix(network: VLANetwork) -> None:
    inputs = make_inputs()
    alone = network(**{name: value[:1] for name, value in inputs.items()})
    torch.testing.assert_close(network(**inputs)[:1], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_is_bidirectional(network: VLANetwork) -> None:
    """Changing the last slot's embedding reaches the first slot, which causal attention forbids."""
    inputs = make_inputs()
    before = network(**inputs)
    assert network.slots is not None
    network.slots[-1] += 1.0
    change = (network(**inputs) - before).abs().amax(dim=(0, 2))
    assert (change > 1e-6).all()


@pytest.mark.parametrize("name", ["frames", "input_ids", "proprio"])
@torch.no_grad()
def test_every_input_reaches_every_slot(network: VLANetwork, name: str) -> None:
    inputs = make_inputs()
    before = network(**inputs)
    value = inputs[name]
    changed = 255 - value if name == "frames" else value + 0.3 if name == "proprio" else value + 1
    change = (network(**{**inputs, name: changed}) - before).abs().amax(dim=(0, 2))
    assert (change > 1e-6).all()


@torch.no_grad()
def test_padding_changes_nothing(network: VLANetwork) -> None:
    inputs = make_inputs(padding=5)
    before = network(**inputs)
    other = inputs["input_ids"].clone()
    other[:, 1:6] = 99
    torch.testing.assert_close(network(**{**inputs, "input_ids": other}), before, atol=0, rtol=0)
    keep = torch.tensor([0, *range(6, 32)])
    shorter = {name: inputs[name][:, keep] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(network(**{**inputs, **shorter}), before, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_proprioception_is_normalised_and_clipped_in_the_graph(network: VLANetwork) -> None:
    inputs = make_inputs()
    network.set_proprio_range(np.full(20, 10.0), np.full(20, 30.0))
    middle = {**inputs, "proprio": torch.full((2, 20), 20.0)}
    above, far_above = ({**inputs, "proprio": torch.full((2, 20), value)} for value in (30.0, 99.0))
    torch.testing.assert_close(network(**above), network(**far_above), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(network(**above), network(**middle))


@pytest.mark.parametrize("crop_area", [1.0, 0.9])
@pytest.mark.parametrize("target", [(96, 128), (224, 224), (300, 400)])
def test_resampling_is_crop_and_antialiased_resize(target: tuple[int, int], crop_area: float) -> None:
    frames = torch.randint(0, 256, (2, 1, 240, 320, 3), dtype=torch.uint8)
    ours = Resample((240, 320), target, crop_area)(frames)
    assert ours.shape == (2, 1, 3, *target)
    image = frames[:, 0].permute(0, 3, 1, 2).double() / 255
    if crop_area == 1.0:
        theirs = functional.interpolate(image, target, mode="bilinear", antialias=True)
        torch.testing.assert_close(ours[:, 0].double(), theirs, atol=1e-5, rtol=0)
        return
    # A linear ramp survives a linear resize, so the crop can be read off it.
    ramp = (torch.arange(320) // 2).to(torch.uint8)[None, None, None, :, None].expand(1, 1, 240, 320, 3)
    row = Resample((240, 320), target, crop_area)(ramp)[0, 0, 0, target[0] // 2] * 255
    side = np.sqrt(crop_area)
    expected = (320 * (1 - side) / 2 + (np.arange(target[1]) + 0.5) * 320 * side / target[1] - 0.5) / 2
    np.testing.assert_allclose(row.numpy()[2:-2], expected[2:-2] - 0.25, atol=0.6)


@torch.no_grad()
def test_folding_the_head_changes_no_output(network: VLANetwork) -> None:
    assert isinstance(network.head, SmoothHead)
    hidden = torch.randn(2, 5, network.head.linear.in_features)
    torch.testing.assert_close(network.head.fold()(hidden), network.head(hidden), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_head_is_smooth_over_the_bins(network: VLANetwork) -> None:
    logits = network(**make_inputs())
    steps = logits.diff(dim=-1).abs().max()
    assert steps < 0.2 * (logits.amax() - logits.amin())


def test_an_encoder_of_transformers_and_plain_patches_work(config: NetworkConfig) -> None:
    small = {"hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "patch": 8}
    sizes = msgspec.structs.replace(
        config.sizes,
        residual=(),
        transformers=(VisionTransformer(kind="dinov2", **small), VisionTransformer(kind="siglip", **small)),
        visual_tokens=0,
        image_height=32,
    )
    network = make_network(msgspec.structs.replace(config, sizes=sizes)).eval()
    images = torch.rand(1, 1, 3, 32, 32)
    assert network.visual_tokens(images).shape == (1, 4 * 4, 32)
    with torch.no_grad():
        assert network(**make_inputs(1)).shape == (1, 28, 256)


def test_a_few_steps_on_one_batch_reduce_the_loss(network: VLANetwork) -> None:
    inputs, wanted = (
        make_inputs(4),
        torch.randint(0, 255, (4, 28), generator=torch.Generator().manual_seed(2)),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = functional.cross_entropy(network(**inputs).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.15


def test_the_7b_configuration_has_openvlas_size() -> None:
    with torch.device("meta"):
        network = make_network(
            NetworkConfig(
                sizes=load_sizes("openvla_oft_7b"),
                frame_height=240,
                frame_width=320,
                n_cameras=1,
                chunk_length=25,
                dimension=14,
                proprio=14,
            )
        )
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    # Llama-2 7B without its language head, with 64 more rows of embeddings.
    assert count["decoder"] == 6_738_415_616 - 2 * 32000 * 4096 + 32064 * 4096
    assert count["projector"] == 2176 * 8704 + 8704 + 8704 * 4096 + 4096 + 4096 * 4096 + 4096
    assert count["head"] == 256 * 4096
    assert 0.65e9 < count["encoders"] < 0.75e9
    assert all(p.is_meta for p in network.parameters())


def test_the_tiny_configuration_is_tiny(config: NetworkConfig) -> None:
    network = make_network(msgspec.structs.replace(config, sizes=load_sizes("tiny")))
    assert sum(p.numel() for p in network.parameters()) < 2e6


@torch.no_grad()
def test_a_bundle_holds_the_network_that_wrote_it(network: VLANetwork, bundle: Bundle) -> None:
    inputs = make_inputs()
    again = load_network(bundle)
    assert not again.training
    torch.testing.assert_close(again(**inputs), network(**inputs), atol=0, rtol=0)


def test_weights_of_another_network_are_refused(
    tmp_path: Path, manifest: Manifest, network: VLANetwork
) -> None:
    weights = weights_of(network)
    for name, broken in {
        "missing": {k: v for k, v in weights.items() if k != "slots"},
        "reshaped": {**weights, "slots": weights["slots"][:-1]},
        "contradicting": {**weights, "proprio_low": weights["proprio_low"] - 1},
    }.items():
        bundle = write_bundle(tmp_path / name, manifest, broken, make_tokenizer())
        with pytest.raises(BundleError):
            load_network(bundle)


@pytest.mark.parametrize(
    "change",
    [
        {"residual": ()},
        {"decoder": {"hidden": 30, "layers": 1, "heads": 4, "mlp": 8}},
        {"crop_area": 1.5},
        {"prompt_tokens": 3},
        {"unheard": 1},
        {"transformers": ({"kind": "siglip", "hidden": 8, "layers": 1, "heads": 2, "mlp": 8, "patch": 8},)},
        {"transformers": ({"kind": "siglip", "hidden": 8, "layers": 1, "heads": 2, "mlp": 8, "patch": 7},)},
        {"transformers": ({"kind": "siglip", "hidden": 8, "layers": 1, "heads": 2, "mlp": 8, "patch": 2},)},
    ],
)
def test_sizes_that_cannot_be_are_refused(config: NetworkConfig, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        build({**msgspec.to_builtins(config.sizes), **change}, NetworkSizes, source="test")


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="tiny"):
        load_sizes("huge")
