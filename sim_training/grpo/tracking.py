"""The curves of a run, sent wherever verl's tracking can send them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sim_training.history import Iteration

Heard = Callable[[Iteration], None]


@contextmanager
def tracking(trackers: Sequence[str], folder: Path) -> Iterator[Heard]:
    """Yield what sends an iteration's figures to ``trackers``.

    Args:
        trackers: verl's names; none to send nothing.
        folder: of the run; tensorboard's files go below it.
    """
    if not trackers:
        yield lambda iteration: None  # noqa: ARG005
        return
    from verl.utils.tracking import Tracking

    os.environ["TENSORBOARD_DIR"] = str(folder / "tensorboard")
    os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / "tracking.jsonl")
    curves = Tracking("simplevla", folder.parent.name, list(trackers), config={})
    try:
        yield lambda iteration: curves.log(figures_of(iteration), step=iteration.iteration)
    finally:
        curves.finish()


def figures_of(iteration: Iteration) -> dict[str, float]:
    """Return an iteration as named numbers."""
    sampled = iteration.sampled
    figures: dict[str, float] = {
        "success/sampled": sampled.rate.rate,
        "groups/kept": iteration.kept_groups / max(iteration.groups, 1),
        "groups/updated": iteration.updated_groups,
        "update/loss": iteration.loss,
        "update/entropy": iteration.entropy,
        "update/ratio": iteration.ratio,
        "update/clip_fraction": iteration.clip_fraction,
        "update/gradient_norm": iteration.gradient_norm,
        "update/learning_rate": iteration.learning_rate,
        "update/temperature": iteration.temperature,
        "sampling/horizon": iteration.horizon,
        **{f"seconds/{name}": value for name, value in iteration.seconds.items()},
        **{f"region/{name}": part.rate.rate for name, part in iteration.regions.items()},
        **{f"strategy/{k}": v / max(sampled.successes, 1) for k, v in sampled.strategies.items()},
    }
    if iteration.greedy is not None:
        figures["success/greedy"] = iteration.greedy.rate.rate
    return figures
