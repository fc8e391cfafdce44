"""Answers that continue from actions which are already committed.

While a policy thinks, the robot goes on executing the chunk before. The next chunk must begin with
what will have been executed until then, and continue from it. A network with a prefix takes those
actions' bins as the inputs of the slots that they fill, and learns to continue from them because a
random part of each training example is given to it in the same way (Black et al. 2025, "Training-time
action conditioning for efficient real-time chunking").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simplevla.action_codec import BINS

FREE = -1  # marks a slot that the network is to fill


def draw_prefix(labels: Tensor, longest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give away the first actions of each example, a random number of them.

    Feed ``prefix`` to the network and count the loss of the free slots alone.

    Args:
        labels: (B, K, D) int64 bins of the right actions.
        longest: the most actions that are given away, fewer than K; 0 to ``longest`` are equally likely.
        generator: decides how many, on the CPU.

    Returns:
        ``prefix`` (B, K * D) int64, the labels that are given away and ``FREE`` elsewhere, and ``free``
        (B, K * D) bool, where the network has to answer.

    Raises:
        ValueError: ``longest`` would leave nothing to learn.
    """
    count, length, _ = labels.shape
    if not 0 <= longest < length:
        raise ValueError(f"a prefix of up to {longest} of {length} actions leaves nothing to learn")
    given = torch.randint(longest + 1, (count, 1, 1), generator=generator).to(labels.device)
    free = torch.arange(length, device=labels.device)[None, :, None] >= given
    free = free.expand_as(labels).flatten(1)
    return torch.where(free, FREE, labels.flatten(1)), free


class PrefixEmbedding(nn.Module):
    """From the bins of committed actions to what is added to their slots.

    A bin is read through bumps over all bins, so that neighbours mean nearly the same from the start.
    """

    basis: Tensor

    def __init__(self, hidden: int, centres: int) -> None:
        super().__init__()
        self.register_buffer("basis", bumps(centres), persistent=False)
        self.linear = nn.Linear(centres, hidden)

    def forward(self, bins: Tensor) -> Tensor:
        """Return (B, N, hidden) of ``bins`` (B, N) int64; zero where a slot is free."""
        added: Tensor = self.linear(self.basis[bins.clamp(min=0)])
        return added * (bins >= 0)[..., None]

    def table(self) -> Tensor:
        """Return (1 + 256, hidden): what a free slot gets, then every bin."""
        rows = self.linear(self.basis)
        return torch.cat([torch.zeros_like(rows[:1]), rows]).detach()


def bumps(centres: int) -> Tensor:
    """Return (256, centres) Gaussian bumps over the bins, one width apart."""
    at = torch.linspace(0, BINS - 1, centres)
    width = (BINS - 1) / max(centres - 1, 1)
    return torch.exp(-0.5 * ((torch.arange(BINS)[:, None] - at) / width) ** 2)
