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
from simplevla.kinematics.action_space import from_joint_targets, to_joint_targets, tool_poses
from simplevla.observation import Observation, check_observation
from simplevla.policy.config import network_config
from simplevla.policy.tokenizer import PADDING, START, prompt

INPUT_NAMES = ("frames", "input_ids", "attention_mask", "proprio")
_REMEDY = "train the bundle again"


class PolicyProcessor:
    """What stands between a robot's words and a network's arrays.

    Attributes:
        embodiment: the robot the policy is for.
        continues: whether the network itself continues from committed actions. For another network the
            answer is joined to them afterwards.
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
        self.continues = self._network.sizes.head.prefix
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
        ``proprio`` (1, P) float32; where the policy :attr:`continues` also ``prefix`` (1, K * D) int64,
        the bins of the committed actions and -1 elsewhere.

        Raises:
            ObservationError: the observation breaks its contract, its instruction is too long, or the
                committed actions fill the whole chunk.
        """
        check_observation(observation, self.embodiment, self._manifest.cameras)
        ids, mask = self._prompt(observation.instruction)
        frames = np.stack([observation.images[name] for name in self._manifest.cameras])
        committed = self._committed(observation)
        inputs: dict[str, NDArray[Any]] = {
            "frames": frames[None],
            "input_ids": ids[None].copy(),
            "attention_mask": mask[None].copy(),
            "proprio": proprioception(observation.state, self.embodiment)[None],
        }
        if self.continues:
            inputs["prefix"] = self._prefix(committed, observation)
        return inputs

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
        """Return the chunk of ``bins`` (K, D), however they were chosen.

        Where actions are committed, the chunk begins with them and moves on from the last without a
        jump: a network that :attr:`continues` has answered for that, and its further actions count from
        there; any other network's plan is joined to them.
        """
        space, actions = self._manifest.action_space, self._codec.decode(bins)
        committed = self._committed(observation)
        if committed is None:
            targets = to_joint_targets(space, actions, observation.state, self.embodiment)
        elif self.continues:
            rest = to_joint_targets(space, actions[len(committed) :], committed[-1], self.embodiment)
            targets = np.concatenate([committed, rest])
        else:
            planned = to_joint_targets(space, actions, observation.state, self.embodiment)
            targets = joined(planned, committed, self.embodiment)
        return ActionChunk(
            np.ascontiguousarray(targets, dtype=np.float32),
            self._manifest.dt_s,
            observation.capture_ns,
            policy_id,
        )

    def _committed(self, observation: Observation) -> NDArray[np.float32] | None:
        committed = observation.committed
        if committed is not None and len(committed) >= self._manifest.chunk_length:
            raise ObservationError(
                f"{len(committed)} actions are committed, a chunk has {self._manifest.chunk_length}",
                "commit only what is executed until the answer comes",
            )
        return committed

    def _prefix(self, committed: NDArray[np.float32] | None, observation: Observation) -> NDArray[np.int64]:
        prefix = np.full((self._manifest.chunk_length, self.embodiment.dimension), -1, dtype=np.int64)
        if committed is not None:
            actions = from_joint_targets(
                self._manifest.action_space, committed, observation.state, self.embodiment
            )
            prefix[: len(committed)] = self._codec.encode(actions)
        return prefix.reshape(1, -1)


def joined(
    planned: NDArray[np.float32], committed: NDArray[np.float32], embodiment: Embodiment
) -> NDArray[np.float32]:
    """Return (K, D) targets that begin with ``committed`` (m, D) and end as ``planned`` (K, D) does.

    Action i of the plan is meant for the same time as committed action i. Where the two part, the
    difference at the seam is taken back evenly over the rest of the chunk: no jump, and the plan's end,
    where a grasp may be, is kept.
    """
    length, given = len(planned), len(committed)
    seam = committed[-1] - planned[given - 1]
    left = np.linspace(1.0, 0.0, length - given + 1)[1:, None]
    lower, upper = embodiment.position_limits()
    rest = np.clip(planned[given:] + left * seam, lower, upper)
    return np.concatenate([committed, rest]).astype(np.float32)


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
