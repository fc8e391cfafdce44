"""The network as it acts: a plain copy, brought up to date after each update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sim_training.grpo.experience import Answer, Looks
from simplevla.bundle import Bundle
from simplevla.policy.network import load_network
from simplevla.policy.processor import PromptEncoder

Key = tuple[int, ...]


class ActingNetwork:
    """Answers looks: samples bins at a temperature, or takes the likeliest.

    Attributes:
        input_ids, attention_mask: (prompts, L) of the run's prompts.
    """

    def __init__(
        self, bundle: Bundle, instructions: Sequence[str], *, keep_tokens: bool, device: str = "cpu"
    ) -> None:
        """Load the bundle's network.

        Args:
            instructions: the run's prompts, in the order of ``Looks.prompts``.
            keep_tokens: whether trajectories keep visual tokens in the place of images.
        """
        self.network = load_network(bundle).requires_grad_(False).to(device)
        self._device = device
        self._keep_tokens = keep_tokens
        self.input_ids, self.attention_mask = encode_prompts(bundle, instructions)

    @torch.inference_mode()
    def act(self, looks: Looks, *, key: Key, temperature: float) -> Answer:
        """Answer each look, from its own random numbers, whatever it is batched with.

        Args:
            key: with a look's episode and turn, what its random numbers are drawn from.
            temperature: 0 for the likeliest bins.
        """
        network = self.network
        tokens = network.visual_tokens(torch.from_numpy(looks.images).to(self._device).float() / 255)
        prompts = torch.from_numpy(looks.prompts)
        logits = network.decode(
            tokens,
            self.input_ids[prompts].to(self._device),
            self.attention_mask[prompts].to(self._device),
            torch.from_numpy(looks.proprio).to(self._device),
        )
        if temperature > 0:
            drawn = torch.from_numpy(uniform(looks, key, network.network.slots)).to(self._device)
            bins = sample(logits, temperature, drawn)
        else:
            bins = logits.argmax(dim=-1)
        shape = (len(looks), network.network.chunk_length, network.network.dimension)
        return Answer(
            bins.reshape(shape).to(torch.uint8).cpu().numpy(),
            tokens.float().cpu().numpy() if self._keep_tokens else None,
        )

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over weights, by their names in the network's state."""
        state = self.network.state_dict()
        for name, value in weights:
            state[name].copy_(value)


def sample(logits: Tensor, temperature: float, drawn: Tensor) -> Tensor:
    """Return (..., S) bins from logits (..., S, 256) and uniform numbers (..., S) in [0, 1)."""
    reached = (logits / temperature).softmax(dim=-1).double().cumsum(dim=-1)
    # The last sum is 1 but for rounding.
    return torch.searchsorted(reached, drawn.double().unsqueeze(-1), right=True).squeeze(-1).clamp(max=255)


def uniform(looks: Looks, key: Key, slots: int) -> NDArray[np.float64]:
    """Return (n, slots) uniform numbers, each row a function of the key, the episode and the turn."""
    rows = np.empty((len(looks), slots))
    for row, (seed, member), turn in zip(rows, looks.episodes, looks.turns, strict=True):
        entropy = np.random.SeedSequence([*key, int(seed), int(member), int(turn)])
        np.random.Generator(np.random.Philox(entropy)).random(out=row)
    return rows


def encode_prompts(bundle: Bundle, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return (prompts, L) int64 ids and mask, as the bundle's network takes them."""
    length = int(bundle.manifest.network["sizes"]["prompt_tokens"])
    encoder = PromptEncoder(bundle.tokenizer_path.read_bytes(), length)
    encoded: list[tuple[NDArray[Any], NDArray[Any]]] = [encoder(text) for text in instructions]
    return (
        torch.from_numpy(np.stack([ids for ids, _ in encoded])),
        torch.from_numpy(np.stack([mask for _, mask in encoded])),
    )
