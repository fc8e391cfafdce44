"""What a policy answers: the next K joint setpoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simplevla.embodiment import Embodiment
from simplevla.errors import ChunkError


@dataclass(frozen=True)
class ActionChunk:
    """K absolute joint targets, one every ``dt_s``.

    Action i is meant for ``capture_ns + (i + 1) * dt_s``; an executor that starts late counts what
    it has consumed by index.

    Attributes:
        actions: (K, D) float32 absolute targets in the embodiment's order; rad and m.
        dt_s: time between two actions, s.
        capture_ns: capture time of the observation that this chunk answers.
        policy_id: identity of the bundle that made it.
    """

    actions: NDArray[np.float32]
    dt_s: float
    capture_ns: int
    policy_id: str

    @property
    def length(self) -> int:
        """K, the number of actions."""
        return int(self.actions.shape[0])


def check_chunk(chunk: ActionChunk, embodiment: Embodiment) -> None:
    """Check a chunk's form. Whether it is safe is for the limits to say, at the bus.

    Raises:
        ChunkError: the shape, type or spacing is wrong, or a value is not finite.
    """
    actions = chunk.actions
    if actions.ndim != 2 or not len(actions) or actions.shape[1] != embodiment.dimension:
        raise ChunkError(
            f"actions have shape {actions.shape}, not (K, {embodiment.dimension})",
            f"serve a bundle made for {embodiment.name}",
        )
    if actions.dtype != np.float32 or not np.isfinite(actions).all():
        raise ChunkError("actions are not finite float32 values", "check the policy bundle")
    if not 1e-3 <= chunk.dt_s <= 10:
        raise ChunkError(f"dt is {chunk.dt_s} s", "expected 0.001 to 10 s")
