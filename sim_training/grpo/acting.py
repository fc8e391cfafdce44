"""The network as it acts: a plain copy, brought up to date after each update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from sim_training.grpo.experience import Answer, Looks
from sim_training.grpo.settings import Exploration
from simplevla.bundle import Bundle
from simplevla.policy.network import load_network
from simplevla.policy.processor import PromptEncoder

Key = tuple[int, ...]

_MIDDLE = 127  # what a dimension that does not vary decodes to, whatever its bin
_WHOLE_ATTEMPT = 2**32 - 1  # in the place of a turn: what an attempt shares has a stream of its own
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


class ActingNetwork:
    """Answers looks: samples bins at a temperature, or takes the likeliest.

    Attributes:
        input_ids, attention_mask: (prompts, L) of the run's prompts.
    """

    def __init__(
        self,
        bundle: Bundle,
        instructions: Sequence[str],
        *,
        keep_tokens: bool,
        exploration: Exploration | None = None,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        """Load the bundle's network.

        Args:
            instructions: the run's prompts, in the order of ``Looks.prompts``.
            keep_tokens: whether trajectories keep visual tokens in the place of images.
            exploration: how the tokens of an attempt stray together; each for itself by default.
            precision: "fp32" or "bf16", of the weights and of what is computed with them.
        """
        self.network = load_network(bundle).requires_grad_(False).to(device)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for parameter in self.network.parameters():
            if parameter.ndim > 1:  # what normalises stays precise, and is small
                parameter.data = parameter.data.to(self._dtype)
        self._device = device
        self._slots = varied_slots(bundle).to(device)
        self._keep_tokens = keep_tokens
        self._exploration = exploration or Exploration()
        self.input_ids, self.attention_mask = encode_prompts(bundle, instructions)

    @torch.inference_mode()
    def act(self, looks: Looks, *, key: Key, temperature: float) -> Answer:
        """Answer each look, from its own random numbers, whatever it is batched with.

        Args:
            key: with a look's episode and turn, what its random numbers are drawn from.
            temperature: 0 for the likeliest bins.
        """
        network = self.network
        if not len(looks):
            shape = (0, network.network.chunk_length, network.network.dimension)
            return Answer(np.empty(shape, np.uint8))
        prompts = torch.tensor(looks.prompts)
        with lower_precision(self._device, self._dtype):
            tokens = network.visual_tokens(torch.tensor(looks.images, device=self._device).float() / 255)
            logits = network.decode(
                tokens,
                self.input_ids[prompts].to(self._device),
                self.attention_mask[prompts].to(self._device),
                torch.tensor(looks.proprio, device=self._device),
            )
        logits = logits[:, self._slots]
        if temperature > 0:
            actions = network.network.chunk_length
            tokens_of = (actions, len(self._slots) // actions)
            drawn = torch.from_numpy(uniform(looks, key, tokens_of, self._exploration)).to(self._device)
            chosen = sample(logits, temperature, drawn)
        else:
            chosen = logits.argmax(dim=-1)
        sizes = network.network
        bins = torch.full((len(looks), sizes.slots), _MIDDLE, dtype=torch.uint8, device=self._device)
        bins[:, self._slots] = chosen.to(torch.uint8)
        return Answer(
            bins.reshape(len(looks), sizes.chunk_length, sizes.dimension).cpu().numpy(),
            tokens.float().cpu().numpy() if self._keep_tokens else None,
        )

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over weights, by their names in the network's state."""
        state = self.network.state_dict()
        for name, value in weights:
            state[name].copy_(value)


def lower_precision(device: Any, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return the context in which matrix products are computed in ``dtype``; for float32, as ever."""
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32)


def sample(logits: Tensor, temperature: float, drawn: Tensor) -> Tensor:
    """Return (..., S) bins from logits (..., S, 256) and uniform numbers (..., S) in [0, 1)."""
    reached = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    # The last sum is 1 but for rounding.
    return torch.searchsorted(reached, drawn.unsqueeze(-1), right=True).squeeze(-1).clamp(max=255)


def uniform(
    looks: Looks, key: Key, shape: tuple[int, int], exploration: Exploration | None = None
) -> NDArray[np.float32]:
    """Return (n, K * V) numbers, each uniform in [0, 1); a row is a function of key, episode and turn.

    With coherent exploration they come from normal numbers ``z`` through their distribution function,
    ``z = sqrt(a) attempt + sqrt(c) chunk + sqrt(1 - a - c) own``, of which the first two are shared by the
    tokens of one dimension in the attempt and in the chunk.

    Args:
        shape: (K, V) actions of a chunk, dimensions of an action.
    """
    shares = exploration or Exploration()
    actions, dimensions = shape
    rows = np.empty((len(looks), actions * dimensions), np.float32)
    for row, episode, turn in zip(rows, looks.episodes.tolist(), looks.turns.tolist(), strict=True):
        own = _generator(*key, *episode, turn)
        if not shares.coherent:
            own.random(out=row, dtype=np.float32)
            continue
        mixed = np.sqrt(1 - shares.attempt - shares.chunk) * own.standard_normal(shape)
        mixed += np.sqrt(shares.chunk) * own.standard_normal(dimensions)
        mixed += np.sqrt(shares.attempt) * _generator(*key, *episode, _WHOLE_ATTEMPT).standard_normal(
            dimensions
        )
        row[:] = np.minimum(ndtr(mixed).ravel(), _BELOW_ONE)
    return rows


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def encode_prompts(bundle: Bundle, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return (prompts, L) int64 ids and mask, as the bundle's network takes them, without idle columns."""
    length = int(bundle.manifest.network["sizes"]["prompt_tokens"])
    encoder = PromptEncoder(bundle.tokenizer_path.read_bytes(), length)
    encoded: list[tuple[NDArray[Any], NDArray[Any]]] = [encoder(text) for text in instructions]
    ids, mask = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*encoded, strict=True))
    # Columns that are padding in every prompt change nothing and need not be computed.
    columns = mask.any(dim=0)
    return ids[:, columns], mask[:, columns]


def varied_slots(bundle: Bundle) -> Tensor:
    """Return (S,) int64: which of the K * D action slots are of dimensions that vary."""
    manifest = bundle.manifest
    return torch.from_numpy(np.flatnonzero(np.tile(manifest.action_codec().varied, manifest.chunk_length)))
