"""Bundles with fresh weights: for measuring and for building engines where no trained policy is needed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from simplevla.bundle import Bundle, CodecEntry, Manifest, Provenance, write_bundle
from simplevla.embodiment import load_embodiment
from simplevla.errors import MissingExtraError
from simplevla.policy.config import NetworkConfig, NetworkSizes
from simplevla.policy.processor import proprio_size
from simplevla.policy.tokenizer import INSTRUCTIONS, make_tokenizer


def write_example_bundle(
    path: Path, sizes: NetworkSizes, *, embodiment: str = "piper_dual", chunk_length: int = 5
) -> Bundle:
    """Write a bundle whose network has ``sizes``, such as ``load_sizes("medium")``, and fresh weights.

    Raises:
        ConfigError: there is no such embodiment.
        BundleError: ``path`` exists already.
        MissingExtraError: torch or transformers is not installed.
    """
    try:
        import torch

        from simplevla.policy.network import make_network, weights_of
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "compile") from error

    robot = load_embodiment(embodiment)
    camera, proprio = robot.cameras[0], proprio_size(robot)
    config = NetworkConfig(
        sizes=sizes,
        frame_height=camera.height,
        frame_width=camera.width,
        n_cameras=1,
        chunk_length=chunk_length,
        dimension=robot.dimension,
        proprio=proprio,
    )
    torch.manual_seed(0)
    made = make_network(config)
    made.set_proprio_range(np.full(proprio, -np.pi), np.full(proprio, np.pi))
    change = [*(-0.02 for _ in range(6)), 0.0]
    manifest = Manifest(
        name="untrained",
        created_ns=0,
        embodiment=robot,
        network=msgspec.to_builtins(config),
        cameras=(camera.name,),
        instructions={"move_can_pot": INSTRUCTIONS[0]},
        action_space="ee_delta",
        chunk_length=chunk_length,
        dt_s=0.1,
        codec=CodecEntry(
            low=tuple(change * len(robot.arms)),
            high=tuple([*(0.02 for _ in range(6)), 0.07] * len(robot.arms)),
            varied=(True,) * robot.dimension,
        ),
        proprio_low=(-np.pi,) * proprio,
        proprio_high=(np.pi,) * proprio,
        provenance=Provenance(commit="untrained", config={}, seeds={"weights": 0}, demonstrations=0),
    )
    return write_bundle(path, manifest, weights_of(made), make_tokenizer())
