"""From an observation to a network's inputs, and from its logits to an action chunk. No torch.

Used as it is by training, evaluation and every serving back end.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from simplevla.action_chunk import ActionChunk
from simplevla.action_codec import BINS
from simplevla.bundle import Bundle, Manifest
from simplevla.embodiment import Embodiment
from simplevla.errors import BundleError, ChunkError, ConfigError, ObservationError
from simplevla.kinematics.action_space import to_joint_targets, tool_poses
from simplevla.observation import Observation, check_observation
from simplevla.policy.config import network_config
from simplevla.policy.tokenizer import PADDING, START, prompt

INPUT_NAMES = ("frames", "input_ids", "attention_mask", "proprio")
_REMEDY = "train the bundle again"


class PolicyProcessor:
    """What stands between a robot's words and a network's arrays.

    Attributes:
        embodiment: the robot the policy is for.
    """

    def __init__(self, manifest: Manifest, tokenizer_json: bytes) -> None:
        """Check that the manifest's parts fit each other.

        Raises:
            BundleError: they do not, or the tokenizer is unusable.
        """
        self.embodiment = manifest.embodiment
        self._manifest = manifest
        self._codec = manifest.action_codec()
        try:
            self._network = network_config(manifest.network, source="network")
        except ConfigError as error:
            raise BundleError(f"the manifest's {error.message}", _REMEDY) from error
        _check_fit(manifest)
        self._prompt = PromptEncoder(tokenizer_json, self._network.sizes.prompt_tokens)
        if self._prompt.size > self._network.sizes.vocabulary:
            raise BundleError("the tokenizer has more tokens than the network knows", _REMEDY)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> PolicyProcessor:
        """Return the processor of a loaded bundle."""
        return cls(bundle.manifest, bundle.tokenizer_path.read_bytes())

    def inputs(self, observation: Observation) -> dict[str, NDArray[Any]]:
        """Return the network's inputs with a batch axis of one.

        ``frames`` (1, n_cameras, H, W, 3) uint8, ``input_ids`` and ``attention_mask`` (1, L) int64,
        ``proprio`` (1, P) float32.

        Raises:
            ObservationError: the observation breaks its contract, or its instruction is too long.
        """
        check_observation(observation, self.embodiment, self._manifest.cameras)
        ids, mask = self._prompt(observation.instruction)
        frames = np.stack([observation.images[name] for name in self._manifest.cameras])
        return {
            "frames": frames[None],
            "input_ids": ids[None].copy(),
            "attention_mask": mask[None].copy(),
            "proprio": proprioception(observation.state, self.embodiment)[None],
        }

    def chunk(self, logits: NDArray[Any], observation: Observation, policy_id: str) -> ActionChunk:
        """Return the greedy chunk of ``logits`` (K * D, 256) or (1, K * D, 256).

        Args:
            observation: the one that the logits answer; its state anchors relative actions.

        Raises:
            ChunkError: the logits have another shape or are not finite.
        """
        length, dimension = self._manifest.chunk_length, self.embodiment.dimension
        values = logits[0] if logits.ndim == 3 and len(logits) == 1 else logits
        if values.shape != (length * dimension, BINS) or not np.isfinite(values).all():
            raise ChunkError(
                f"the network answered {logits.shape}, not finite ({length * dimension}, {BINS})",
                "compile the engine again, or serve another bundle",
            )
        return self.chunk_of_bins(values.argmax(axis=-1).reshape(length, dimension), observation, policy_id)

    def chunk_of_bins(
        self, bins: NDArray[np.int64], observation: Observation, policy_id: str
    ) -> ActionChunk:
        """Return the chunk of ``bins`` (K, D), however they were chosen."""
        targets = to_joint_targets(
            self._manifest.action_space, self._codec.decode(bins), observation.state, self.embodiment
        )
        return ActionChunk(
            np.ascontiguousarray(targets, dtype=np.float32),
            self._manifest.dt_s,
            observation.capture_ns,
            policy_id,
        )


class PromptEncoder:
    """Instructions as token ids of one fixed length.

    The start token comes first, then padding, then the prompt up to the last place, so that the
    prompt's end is always next to the action slots.

    Attributes:
        size: tokens the tokenizer knows.
    """

    def __init__(self, tokenizer_json: bytes, length: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise BundleError(f"the tokenizer cannot be read: {error}", _REMEDY) from error
        start, padding = self._tokenizer.token_to_id(START), self._tokenizer.token_to_id(PADDING)
        if start is None or padding is None:
            raise BundleError(f"the tokenizer has no {START} or {PADDING}", _REMEDY)
        self._start, self._padding, self._length = int(start), int(padding), length
        self.size = int(self._tokenizer.get_vocab_size())
        self._cached = lru_cache(maxsize=256)(self._encode)

    def __call__(self, instruction: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (L,) ids and (L,) mask; ObservationError if the instruction is too long."""
        return self._cached(instruction)

    def _encode(self, instruction: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        words = self._tokenizer.encode(prompt(instruction), add_special_tokens=False).ids
        if len(words) > self._length - 1:
            raise ObservationError(
                f"the instruction makes {len(words)} tokens, the policy takes {self._length - 1}",
                "say it in fewer words",
            )
        ids = np.full(self._length, self._padding, dtype=np.int64)
        mask = np.zeros(self._length, dtype=np.int64)
        ids[0], mask[0] = self._start, 1
        ids[self._length - len(words) :], mask[self._length - len(words) :] = words, 1
        return ids, mask


def proprioception(state: NDArray[Any], embodiment: Embodiment) -> NDArray[np.float32]:
    """Return (P,) float32: the state (D,), then each arm's tool position in its base frame (m)."""
    tools = [pose[:3, 3] for pose in tool_poses(state, embodiment).values()]
    return np.concatenate([state, *tools]).astype(np.float32)


def proprio_size(embodiment: Embodiment) -> int:
    """Return P, the length of :func:`proprioception`."""
    return embodiment.dimension + 3 * len(embodiment.arms)


def _check_fit(manifest: Manifest) -> None:
    network = network_config(manifest.network, source="network")
    embodiment = manifest.embodiment
    for what, have, want in (
        ("chunk length", network.chunk_length, manifest.chunk_length),
        ("action dimension", network.dimension, embodiment.dimension),
        ("number of cameras", network.n_cameras, len(manifest.cameras)),
        ("proprioception", network.proprio, proprio_size(embodiment)),
        ("proprioception range", network.proprio, len(manifest.proprio_low)),
    ):
        if have != want:
            raise BundleError(f"the network's {what} is {have}, the manifest needs {want}", _REMEDY)
    for name in manifest.cameras:
        camera = embodiment.camera(name)
        if (camera.height, camera.width) != (network.frame_height, network.frame_width):
            raise BundleError(
                f"camera {name!r} is {camera.width}x{camera.height}, the network takes "
                f"{network.frame_width}x{network.frame_height}",
                _REMEDY,
            )
