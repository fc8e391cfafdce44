"""A policy ready to answer: bundle, processor and session, and nothing of the network protocol."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from policy_server.backends.base import Session
from simplevla.action_chunk import ActionChunk, check_chunk
from simplevla.bundle import Bundle, Manifest
from simplevla.embodiment import Embodiment
from simplevla.errors import SimplevlaError
from simplevla.observation import Observation


class Processor(Protocol):
    """Between an observation and the network; see :class:`simplevla.policy.processor.PolicyProcessor`."""

    @property
    def continues(self) -> bool:
        """Whether the network was trained to go on from committed actions."""

    def inputs(self, observation: Observation) -> dict[str, NDArray[Any]]:
        """Return the network's inputs, with a batch axis of 1, after checking the observation."""

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

    @property
    def continues(self) -> bool:
        """Whether the network was trained to go on from committed actions."""
        return self.processor.continues

    @property
    def max_batch(self) -> int:
        """How many observations can be answered at once."""
        return self.session.info.max_batch

    def answer(self, observation: Observation) -> tuple[ActionChunk, Split]:
        """Return the chunk for ``observation``, and what it cost.

        Raises:
            ObservationError: the observation does not fit the policy's embodiment and cameras.
            ChunkError: the network's answer is not a sound chunk.
        """
        start = time.perf_counter()
        inputs = self.processor.inputs(observation)
        prepared = time.perf_counter()
        logits = self.session.run(inputs)
        inferred = time.perf_counter()
        chunk = self._chunk(logits, observation)
        return chunk, _split(start, prepared, inferred, time.perf_counter())

    def answer_many(
        self, observations: Sequence[Observation]
    ) -> list[tuple[ActionChunk, Split] | SimplevlaError]:
        """Return the answer for each of several robots, computed in one run, or why there is none.

        The inference of the batch is in each one's split. One robot's observation can spoil no other's
        answer.

        Args:
            observations: at most ``max_batch``.
        """
        if len(observations) == 1:
            try:
                return [self.answer(observations[0])]
            except SimplevlaError as error:
                return [error.with_traceback(None)]
        start = time.perf_counter()
        inputs: list[dict[str, NDArray[Any]] | SimplevlaError] = []
        for observation in observations:
            try:
                inputs.append(self.processor.inputs(observation))
            except SimplevlaError as error:
                inputs.append(error.with_traceback(None))
        good = [each for each in inputs if not isinstance(each, SimplevlaError)]
        if not good:
            return [each for each in inputs if isinstance(each, SimplevlaError)]
        stacked = good[0]
        if len(good) > 1:
            stacked = {name: np.concatenate([each[name] for each in good]) for name in good[0]}
        prepared = time.perf_counter()
        logits = self.session.run(stacked)
        inferred = time.perf_counter()
        answers: list[tuple[ActionChunk, Split] | SimplevlaError] = []
        rows = iter(range(len(good)))
        for observation, each in zip(observations, inputs, strict=True):
            begun = time.perf_counter()
            try:
                if isinstance(each, SimplevlaError):
                    raise each
                row = next(rows)
                chunk = self._chunk(logits[row : row + 1], observation)
            except SimplevlaError as error:
                answers.append(error.with_traceback(None))
            else:
                decode_s = time.perf_counter() - begun
                answers.append((chunk, _split(start, prepared, inferred, inferred + decode_s)))
        return answers

    def warm_up(self, rounds: int = 2) -> None:
        """Answer made-up observations, so that the first real one does not pay for first calls.

        Raises:
            SimplevlaError: the policy cannot answer.
        """
        for _ in range(rounds):
            self.answer(example_observation(self.manifest))

    def _chunk(self, logits: NDArray[np.float32], observation: Observation) -> ActionChunk:
        chunk = self.processor.chunk(logits, observation, self.policy_id)
        check_chunk(chunk, self.manifest.embodiment)
        return chunk


def _split(start_s: float, prepared_s: float, inferred_s: float, decoded_s: float) -> Split:
    return Split(
        preprocess_ms=1e3 * (prepared_s - start_s),
        inference_ms=1e3 * (inferred_s - prepared_s),
        decode_ms=1e3 * (decoded_s - inferred_s),
    )


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
