"""Answers that continue from committed actions: the network's part, the training's and the processor's."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simplevla.bundle import Manifest
from simplevla.embodiment import load_embodiment
from simplevla.errors import ConfigError, ObservationError
from simplevla.kinematics import from_joint_targets
from simplevla.observation import Observation
from simplevla.policy.config import NetworkConfig
from simplevla.policy.network import VLANetwork, make_network
from simplevla.policy.prefix import FREE, draw_prefix
from simplevla.policy.processor import PolicyProcessor, joined
from simplevla.policy.tokenizer import make_tokenizer

Observe = Callable[..., Observation]
LENGTH = 5


def with_prefix(config: NetworkConfig, **changes: object) -> NetworkConfig:
    head = msgspec.structs.replace(config.sizes.head, prefix=True)
    sizes = msgspec.structs.replace(config.sizes, head=head)
    return msgspec.structs.replace(config, sizes=sizes, **changes)


@pytest.fixture
def continuing(config: NetworkConfig) -> VLANetwork:
    torch.manual_seed(0)
    return make_network(with_prefix(config)).eval()


def make_inputs(network: VLANetwork) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 1, network.network.frame_height, network.network.frame_width, 3)
    return {
        "frames": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "input_ids": torch.randint(4, 100, (2, 32), generator=generator),
        "attention_mask": torch.ones(2, 32, dtype=torch.long),
        "proprio": torch.rand(2, 20, generator=generator) - 0.5,
    }


@torch.no_grad()
def test_a_prefix_reaches_every_free_slot_and_none_is_none(continuing: VLANetwork) -> None:
    inputs = make_inputs(continuing)
    slots = continuing.network.slots
    plain = continuing(**inputs)
    free = torch.full((2, slots), FREE)
    torch.testing.assert_close(continuing(**inputs, prefix=free), plain, atol=0, rtol=0)
    given_ = free.clone()
    given_[:, :14] = 100
    changed = continuing(**inputs, prefix=given_)
    assert ((changed - plain).abs().amax(dim=(0, 2)) > 1e-6).all()
    given_[:, 0] = 200
    assert not torch.allclose(continuing(**inputs, prefix=given_), changed)


@torch.no_grad()
def test_a_network_without_a_prefix_refuses_one(network: VLANetwork) -> None:
    prefix = torch.full((2, network.network.slots), FREE)
    with pytest.raises(ConfigError, match="takes no prefix"):
        network(**make_inputs(network), prefix=prefix)


def test_a_network_learns_to_continue(config: NetworkConfig) -> None:
    """One of two plans is right, and nothing but the prefix tells which."""
    torch.manual_seed(0)
    network = make_network(with_prefix(config))
    inputs = make_inputs(network)
    inputs = {name: value[:1].expand(2, *value.shape[1:]) for name, value in inputs.items()}
    labels = torch.tensor([40, 200])[:, None, None].expand(2, 2, 14)
    prefix = torch.where(torch.arange(28)[None] < 14, labels.flatten(1), FREE)
    optimiser = torch.optim.Adam(network.policy_parameters(), lr=3e-3)
    for _ in range(60):
        logits = network(**inputs, prefix=prefix)[:, 14:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(1)[:, 14:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        told = network(**inputs, prefix=prefix)[:, 14:].argmax(-1)
        untold = network(**inputs)[:, 14:].argmax(-1)
    assert (told - labels.flatten(1)[:, 14:]).abs().max() <= 4
    assert torch.equal(untold[0], untold[1])


@given(seed=st.integers(0, 1000), longest=st.integers(0, LENGTH - 1))
@settings(deadline=None, max_examples=30)
def test_a_prefix_is_the_first_actions_and_the_rest_is_free(seed: int, longest: int) -> None:
    labels = torch.randint(0, 256, (16, LENGTH, 3), generator=torch.Generator().manual_seed(seed))
    prefix, free = draw_prefix(labels, longest, torch.Generator().manual_seed(seed))
    assert torch.equal(prefix == FREE, free)
    assert torch.equal(prefix[~free], labels.flatten(1)[~free])
    given_ = (~free).reshape(16, LENGTH, 3)
    assert torch.equal(given_.all(-1), given_.any(-1)), "an action is given whole or not at all"
    counts = given_[..., 0].sum(1)
    assert torch.equal(given_[..., 0], torch.arange(LENGTH)[None] < counts[:, None])
    assert counts.max() <= longest


def test_every_length_of_a_prefix_is_drawn() -> None:
    labels = torch.zeros(400, LENGTH, 2, dtype=torch.long)
    _, free = draw_prefix(labels, 3, torch.Generator().manual_seed(0))
    counts = torch.bincount(LENGTH - free.reshape(400, LENGTH, 2)[..., 0].sum(1))
    assert len(counts) == 4
    assert counts.min() > 60
    with pytest.raises(ValueError, match="nothing to learn"):
        draw_prefix(labels, LENGTH, torch.Generator())


def processor_of(manifest: Manifest, config: NetworkConfig) -> PolicyProcessor:
    wired = msgspec.structs.replace(
        manifest, network=msgspec.to_builtins(config), chunk_length=config.chunk_length
    )
    return PolicyProcessor(wired, make_tokenizer())


@pytest.fixture(params=[False, True], ids=["joined afterwards", "prefix"])
def processor(request: pytest.FixtureRequest, manifest: Manifest, config: NetworkConfig) -> PolicyProcessor:
    longer = msgspec.structs.replace(config, chunk_length=LENGTH)
    return processor_of(manifest, with_prefix(longer) if request.param else longer)


def test_an_answer_begins_with_what_is_committed_and_goes_on_without_a_jump(
    processor: PolicyProcessor, observe: Observe
) -> None:
    rng = np.random.default_rng(0)
    bins = rng.integers(100, 130, (LENGTH, 14))
    plain = processor.chunk_of_bins(bins, observe(), "policy").actions
    step = np.abs(np.diff(plain, axis=0)).max()
    committed = (plain[:2] + 0.05 * np.where(np.arange(14) % 7 == 6, 0, 1)).astype(np.float32)
    answer = processor.chunk_of_bins(bins, observe(committed=committed), "policy").actions
    assert answer.dtype == np.float32
    np.testing.assert_array_equal(answer[:2], committed)
    seam = np.abs(answer[2] - answer[1]).max()
    assert seam < step + 0.05 / (LENGTH - 2) + 1e-6 < 0.05 + step
    if not processor.continues:
        np.testing.assert_allclose(answer[-1], plain[-1], atol=1e-6)


def test_what_the_plan_says_anyway_changes_nothing(processor: PolicyProcessor, observe: Observe) -> None:
    bins = np.random.default_rng(1).integers(100, 130, (LENGTH, 14))
    plain = processor.chunk_of_bins(bins, observe(), "policy").actions
    same = processor.chunk_of_bins(bins, observe(committed=plain[:3]), "policy").actions
    np.testing.assert_allclose(same, plain, atol=2e-4)


def test_committed_targets_become_the_bins_they_were_decoded_from(
    manifest: Manifest, config: NetworkConfig, observe: Observe
) -> None:
    processor = processor_of(manifest, with_prefix(config, chunk_length=LENGTH))
    bins = np.random.default_rng(2).integers(60, 100, (LENGTH, 14))
    targets = processor.chunk_of_bins(bins, observe(), "policy").actions
    prefix = processor.inputs(observe(committed=targets[:2]))["prefix"].reshape(LENGTH, 14)
    assert np.abs(prefix[:2] - bins[:2]).max() <= 1
    assert (prefix[2:] == -1).all()
    assert (processor.inputs(observe())["prefix"] == -1).all()


def test_a_chunk_with_nothing_left_to_say_is_refused(processor: PolicyProcessor, observe: Observe) -> None:
    whole = np.tile(observe().state, (LENGTH, 1))
    with pytest.raises(ObservationError, match="5 actions are committed, a chunk has 5"):
        processor.inputs(observe(committed=whole))


@given(seed=st.integers(0, 10_000), given_=st.integers(1, LENGTH - 1))
@settings(deadline=None, max_examples=30)
def test_joining_keeps_to_the_limits(seed: int, given_: int) -> None:
    embodiment = load_embodiment("piper_dual")
    lower, upper = embodiment.position_limits()
    rng = np.random.default_rng(seed)
    planned, committed = (
        rng.uniform(lower, upper, (count, 14)).astype(np.float32) for count in (LENGTH, given_)
    )
    answer = joined(planned, committed, embodiment)
    assert answer.shape == (LENGTH, 14)
    np.testing.assert_array_equal(answer[:given_], committed)
    assert (answer >= lower - 1e-6).all()
    assert (answer <= upper + 1e-6).all()
    np.testing.assert_allclose(answer[-1], planned[-1], atol=1e-6)


def test_the_prefix_is_in_the_policys_own_action_space(
    manifest: Manifest, config: NetworkConfig, observe: Observe
) -> None:
    processor = processor_of(manifest, with_prefix(config, chunk_length=LENGTH))
    observation = observe()
    committed = np.tile(observation.state, (2, 1))
    codec = manifest.action_codec()
    actions = from_joint_targets("ee_delta", committed, observation.state, manifest.embodiment)
    prefix = processor.inputs(observe(committed=committed))["prefix"].reshape(LENGTH, 14)
    np.testing.assert_array_equal(prefix[:2], codec.encode(actions))
