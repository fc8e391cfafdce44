"""A policy ready to answer: bundle, processor and session, and nothing of the network protocol."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from policy_server.backends.base import Session
from simplevla.action_chunk import ActionChunk, check_chunk
from simplevla.bundle import Bundle, Manifest
from simplevla.embodiment import Embodiment
from simplevla.observation import Observation, check_observation


class Processor(Protocol):
    """Between an observation and the network; see :class:`simplevla.policy.processor.PolicyProcessor`."""

    def inputs(self, observation: Observation) -> dict[str, NDArray[Any]]:
        """Return the network's inputs, with a batch axis of 1."""

    def chunk(self, logits: NDArray[np.float32], observation: Observation, policy_id: str) -> ActionChunk:
        """Return the chunk that the logits (1, K * D, 256) mean."""


@dataclass(frozen=True)
class Split:
    """Where the time of one answer went, ms."""

    preprocess_ms: float
    inference_ms: float
    decode_ms: float


@dataclass(frozen=True)
class ServedPolicy:
    """Everything that answers an observation.

    Attributes:
        policy_id: identity of the bundle.
        manifest: the bundle's manifest.
    """

    policy_id: str
    manifest: Manifest
    processor: Processor
    session: Session

    @classmethod
    def of(cls, bundle: Bundle, session: Session) -> ServedPolicy:
        """Return the policy of ``bundle``, computed by ``session``."""
        from simplevla.policy.processor import PolicyProcessor

        return cls(bundle.id, bundle.manifest, PolicyProcessor.from_bundle(bundle), session)

    def answer(self, observation: Observation) -> tuple[ActionChunk, Split]:
        """Return the chunk for ``observation``, and what it cost.

        Raises:
            ObservationError: the observation does not fit the policy's embodiment and cameras.
            ChunkError: the network's answer is not a sound chunk.
        """
        start = time.perf_counter()
        check_observation(observation, self.manifest.embodiment, self.manifest.cameras)
        inputs = self.processor.inputs(observation)
        prepared = time.perf_counter()
        logits = self.session.run(inputs)
        inferred = time.perf_counter()
        chunk = self.processor.chunk(logits, observation, self.policy_id)
        check_chunk(chunk, self.manifest.embodiment)
        decoded = time.perf_counter()
        return chunk, Split(
            preprocess_ms=1e3 * (prepared - start),
            inference_ms=1e3 * (inferred - prepared),
            decode_ms=1e3 * (decoded - inferred),
        )

    def warm_up(self, rounds: int = 2) -> None:
        """Answer made-up observations, so that the first real one does not pay for first calls."""
        for _ in range(rounds):
            self.answer(example_observation(self.manifest))


def example_observation(manifest: Manifest) -> Observation:
    """Return an observation that fits the policy: home position, grey images, its first instruction."""
    embodiment: Embodiment = manifest.embodiment
    cameras = [embodiment.camera(name) for name in manifest.cameras]
    return Observation(
        images={c.name: np.full((c.height, c.width, 3), 127, np.uint8) for c in cameras},
        state=embodiment.home().astype(np.float32),
        instruction=next(iter(manifest.instructions.values()), ""),
        capture_ns=0,
        episode="example",
    )
