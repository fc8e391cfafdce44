"""Which initial states are sampled: all alike, or more of those regions where success is in between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from sim_training.grpo.experience import Trajectory
from sim_training.seeds import FIRST_VALIDATION_SEED

# A region that always or never succeeds is looked at now and then, to see whether that is still so.
_LEAST = 0.05
_UNKNOWN = 0.5
_CANDIDATES = 4


def draw_seeds(
    count: int,
    key: tuple[int, ...],
    *,
    avoid: Collection[int] = (),
    region_of: Callable[[int], str] | None = None,
    success: dict[str, float] | None = None,
) -> list[int]:
    """Return ``count`` different seeds for training, a function of ``key``.

    Args:
        avoid: seeds that are not drawn.
        region_of: where the object of a seed starts; None to draw all alike.
        success: {region: recent success p}; a seed is drawn in proportion to its region's p (1 - p).
    """
    rng = np.random.default_rng(key)
    candidates = [int(seed) for seed in rng.permutation(FIRST_VALIDATION_SEED) if int(seed) not in avoid]
    if region_of is None:
        return candidates[:count]
    candidates = candidates[: _CANDIDATES * count]
    known = success or {}
    rates = np.array([known.get(region_of(seed), _UNKNOWN) for seed in candidates])
    weights = np.maximum(rates * (1 - rates), _LEAST)
    chosen = rng.choice(len(candidates), size=count, replace=False, p=weights / weights.sum())
    return [candidates[i] for i in chosen]


def remember(success: dict[str, float], played: Sequence[Trajectory], memory: float) -> None:
    """Mix what was played into each region's recent success.

    Args:
        memory: share of the past that stays.
    """
    for region, part in by_region(played).items():
        now = sum(trajectory.success for trajectory in part) / len(part)
        success[region] = memory * success[region] + (1 - memory) * now if region in success else now


def by_region(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """Return the trajectories of each region; those that know none are left out."""
    found: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        if trajectory.region:
            found.setdefault(trajectory.region, []).append(trajectory)
    return found
