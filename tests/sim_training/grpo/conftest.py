"""A very small policy, and a task without physics that it can learn in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sim_training.grpo.experience import Act, Episode, Looks, Trajectory
from simplevla.action_codec import ActionCodec
from simplevla.bundle import Bundle, CodecEntry, Manifest, Provenance, write_bundle
from simplevla.embodiment import load_embodiment
from simplevla.policy.config import (
    Decoder,
    Head,
    NetworkConfig,
    NetworkSizes,
    ResidualEncoder,
    VisionTransformer,
)
from simplevla.policy.network import make_network, weights_of
from simplevla.policy.processor import proprio_size
from simplevla.policy.tokenizer import make_tokenizer

CHUNK = 2
INSTRUCTION = "move the can next to the pot"
VARIED = np.array([True, True, False, False, False, False, False])


class Lamps:
    """Fulfilled by high actions where the picture is bright, by low ones where it is dark.

    An episode has two looks. It succeeds as soon as both varied dimensions of one action lie in the
    right third of the range, so that a policy that draws every bin alike succeeds about once in three.
    """

    instructions = (INSTRUCTION,)

    def __init__(self, dies_in: int = 0, width: int = 32) -> None:
        """Make lamps whose process ends in the middle of call ``dies_in``, counted from 1."""
        self.width = width
        self.seconds = {"simulation": 0.0}
        self.collected: list[Episode] = []
        self.horizons: list[int] = []
        self.calls = 0
        self.dies_in = dies_in

    def collect(self, episodes: Sequence[Episode], act: Act, *, horizon: int = 0) -> list[Trajectory]:
        self.calls += 1
        self.horizons.append(horizon)
        for number, episode in enumerate(episodes):
            if self.calls == self.dies_in and number == len(episodes) // 2:
                raise KeyboardInterrupt
            self.collected.append(episode)
        return [self._play(episode, act) for episode in episodes]

    def _play(self, episode: Episode, act: Act) -> Trajectory:
        bright = self.bright(episode.seed)
        noise = np.random.default_rng(episode.seed).integers(0, 40, (1, 1, 3, 24, self.width))
        image = (noise + (180 if bright else 20)).astype(np.uint8)
        proprio = np.zeros((1, 10), np.float32)
        seen: list[NDArray[np.generic]] = []
        bins: list[NDArray[np.uint8]] = []
        for turn in range(2):
            looks = Looks(
                np.array([episode], np.int64), np.array([turn]), image, proprio, np.zeros(1, np.int64)
            )
            answer = act(looks)
            seen.append(image[0] if answer.kept is None else answer.kept[0])
            bins.append(answer.bins[0])
            right = bins[-1][:, VARIED] > 170 if bright else bins[-1][:, VARIED] < 85
            done = right.all(axis=1)
            if done.any():
                break
        actions = turn * CHUNK + (int(done.argmax()) + 1 if done.any() else CHUNK)
        return Trajectory(
            episode=episode,
            seen=np.stack(seen),
            proprio=np.repeat(proprio, turn + 1, axis=0),
            prompt=0,
            bins=np.stack(bins),
            actions=actions,
            success=bool(done.any()),
            strategy="push" if done.any() else "",
            region="bright" if bright else "dark",
            failure="" if done.any() else "timeout",
        )

    @staticmethod
    def bright(seed: int) -> bool:
        return seed % 2 == 0


@pytest.fixture
def lamps() -> type[Lamps]:
    return Lamps


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("policy") / "bundle")


@pytest.fixture(scope="session")
def transformer_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A policy with the parts of the large ones: SigLIP, DINOv2, every patch, a plain head."""
    sizes = NetworkSizes(
        transformers=(
            VisionTransformer(kind="siglip", hidden=16, layers=2, heads=2, mlp=32, patch=8),
            VisionTransformer(kind="dinov2", hidden=16, layers=2, heads=2, mlp=32, patch=8),
        ),
        image_height=24,
        image_width=24,
        decoder=Decoder(hidden=32, layers=2, heads=2, mlp=64),
        vocabulary=512,
        prompt_tokens=24,
    )
    return make_bundle(tmp_path_factory.mktemp("policy") / "bundle", sizes)


SMALL = NetworkSizes(
    residual=(ResidualEncoder(stem=4, stages=(8,)),),
    image_height=24,
    image_width=32,
    visual_tokens=2,
    visual_features=8,
    decoder=Decoder(hidden=32, layers=2, heads=2, mlp=64),
    head=Head(centres=12, slot_embeddings=True),
    vocabulary=512,
    prompt_tokens=24,
)


def make_bundle(path: Path, sizes: NetworkSizes = SMALL) -> Bundle:
    """Write a small policy with random weights."""
    single = load_embodiment("piper_single")
    embodiment = msgspec.structs.replace(
        single, cameras=(msgspec.structs.replace(single.cameras[0], width=32, height=24),)
    )
    proprio = proprio_size(embodiment)
    config = NetworkConfig(
        sizes=sizes,
        frame_height=24,
        frame_width=32,
        n_cameras=1,
        chunk_length=CHUNK,
        dimension=embodiment.dimension,
        proprio=proprio,
    )
    torch.manual_seed(0)
    codec = ActionCodec(np.full(7, -0.02), np.full(7, 0.02), VARIED)
    manifest = Manifest(
        name="lamps",
        created_ns=0,
        embodiment=embodiment,
        network=msgspec.to_builtins(config),
        cameras=(embodiment.cameras[0].name,),
        instructions={"move_can_pot": INSTRUCTION},
        action_space="ee_delta",
        chunk_length=CHUNK,
        dt_s=0.1,
        codec=msgspec.convert(codec.to_dict(), CodecEntry),
        proprio_low=(-1.0,) * proprio,
        proprio_high=(1.0,) * proprio,
        provenance=Provenance(commit="unknown", config={}, seeds={}, demonstrations=0),
    )
    return write_bundle(path, manifest, weights_of(make_network(config)), make_tokenizer())
