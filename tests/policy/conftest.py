"""A very small policy with everything a real one has."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from simplevla.action_codec import ActionCodec
from simplevla.bundle import Bundle, CodecEntry, Manifest, Provenance, write_bundle
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.observation import Observation
from simplevla.policy.config import Decoder, Head, NetworkConfig, NetworkSizes, ResidualEncoder
from simplevla.policy.network import VLANetwork, make_network, weights_of
from simplevla.policy.processor import proprio_size
from simplevla.policy.tokenizer import make_tokenizer

CHUNK = 2

SIZES = NetworkSizes(
    residual=(ResidualEncoder(stem=8, stages=(8,)),),
    image_height=24,
    image_width=32,
    visual_tokens=3,
    decoder=Decoder(hidden=32, layers=2, heads=4, mlp=64),
    head=Head(centres=12, slot_embeddings=True),
    vocabulary=512,
    prompt_tokens=32,
)


@pytest.fixture(scope="session")
def embodiment() -> Embodiment:
    return load_embodiment("piper_dual")


@pytest.fixture(scope="session")
def config(embodiment: Embodiment) -> NetworkConfig:
    camera = embodiment.camera("head")
    return NetworkConfig(
        sizes=SIZES,
        frame_height=camera.height,
        frame_width=camera.width,
        n_cameras=1,
        chunk_length=CHUNK,
        dimension=embodiment.dimension,
        proprio=proprio_size(embodiment),
    )


@pytest.fixture
def network(config: NetworkConfig) -> VLANetwork:
    torch.manual_seed(0)
    return make_network(config).eval()


@pytest.fixture(scope="session")
def manifest(embodiment: Embodiment, config: NetworkConfig) -> Manifest:
    codec = ActionCodec(np.full(14, -0.02), np.full(14, 0.07), np.ones(14, dtype=bool))
    return Manifest(
        name="test",
        created_ns=0,
        embodiment=embodiment,
        network=msgspec.to_builtins(config),
        cameras=("head",),
        instructions={"move_can_pot": "move the can next to the pot"},
        action_space="ee_delta",
        chunk_length=CHUNK,
        dt_s=0.1,
        codec=msgspec.convert(codec.to_dict(), CodecEntry),
        proprio_low=(-1.0,) * config.proprio,
        proprio_high=(1.0,) * config.proprio,
        provenance=Provenance(commit="unknown", config={}, seeds={}, demonstrations=0),
    )


@pytest.fixture
def bundle(tmp_path: Path, manifest: Manifest, network: VLANetwork) -> Bundle:
    return write_bundle(tmp_path / "bundle", manifest, weights_of(network), make_tokenizer())


@pytest.fixture
def observe(embodiment: Embodiment) -> Callable[..., Observation]:
    """Return a function that makes an observation at home; keyword arguments replace its fields."""

    def make(**changes: object) -> Observation:
        image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        fields: dict[str, object] = {
            "images": {"head": image},
            "state": embodiment.home().astype(np.float32),
            "instruction": "move the can next to the pot",
            "capture_ns": 5,
        }
        return Observation(**{**fields, **changes})  # type: ignore[arg-type]

    return make
