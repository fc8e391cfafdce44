"""What reinforcement learning wrote down: one line of JSON an iteration.

The trainer appends to ``history.jsonl``; the report, the comparison of runs and the tests read it. A
run that was killed and went on may have begun an iteration twice: the last line of an iteration is
the one that counts, and a line that was cut off counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from simplevla.errors import RecordError
from simplevla.intervals import Rate, wilson

HISTORY = "history.jsonl"
DRIVER_STEPS = frozenset({"rollouts", "log_probs", "update", "evaluation"})


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """Successes among episodes, and how the successful ones were done: {strategy: successes}."""

    episodes: int
    successes: int
    strategies: dict[str, int] = {}

    @property
    def rate(self) -> Rate:
        """The success rate with its 95 % Wilson interval."""
        return wilson(self.successes, self.episodes)


class Iteration(msgspec.Struct, frozen=True, kw_only=True):
    """One iteration: groups were sampled, some were kept, the policy was updated.

    Attributes:
        iteration: counted from 0.
        sampled: the episodes that were sampled, with the policy before the update.
        regions: the same, by the region that the object started in.
        greedy: the greedy policy after the update, where it was evaluated in this iteration, on
            seeds that the final evaluation does not use.
        groups: groups that were sampled, of which ``kept_groups`` had an accuracy worth learning from.
        updated_groups: groups that the update used, among them surplus of earlier iterations.
        entropy: of the action distributions at the sampling temperature, nats a token.
        ratio: mean distance of the ratio of probabilities from 1, over the valid tokens.
        clip_fraction: of the valid tokens.
        horizon: actions that a sampled episode might take; 0 for the task's own limit.
        seconds: where the time of the iteration went: by the clock in ``DRIVER_STEPS``, the others within
            rollouts and summed over processes.
        elapsed_s: time spent in all iterations so far, over restarts.
    """

    iteration: int
    sampled: Counted
    groups: int
    kept_groups: int
    updated_groups: int
    loss: float
    entropy: float
    ratio: float
    clip_fraction: float
    gradient_norm: float
    learning_rate: float
    temperature: float
    seconds: dict[str, float]
    elapsed_s: float
    horizon: int = 0
    regions: dict[str, Counted] = {}
    greedy: Counted | None = None


def sampled_rates(history: Sequence[Iteration]) -> list[float]:
    """Return the rate of success of each iteration's episodes.

    An iteration whose groups had all waited since an earlier one sampled nothing and says nothing new:
    it repeats the one before.
    """
    rates: list[float] = []
    for iteration in history:
        known = rates[-1] if rates else 0.0
        rates.append(iteration.sampled.rate.rate if iteration.sampled.episodes else known)
    return rates


def append_iteration(folder: Path, iteration: Iteration) -> None:
    """Append one line to the history in ``folder``, after ending a line that was cut off."""
    path = folder / HISTORY
    folder.mkdir(parents=True, exist_ok=True)
    broken = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("ab") as stream:
        stream.write((b"\n" if broken else b"") + msgspec.json.encode(iteration) + b"\n")
        stream.flush()


def read_history(folder: Path) -> list[Iteration]:
    """Return the iterations in the history of ``folder`` in order, none if there is no history.

    Raises:
        RecordError: a line that was written whole is no iteration.
    """
    path = folder / HISTORY
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    found: dict[int, Iteration] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=Iteration)
        except msgspec.ValidationError as error:
            raise RecordError(
                f"{path}, line {number}: {error}", "was it written by another version?"
            ) from error
        except msgspec.DecodeError:
            continue  # a process was killed while it wrote this line
        found = {i: entry_i for i, entry_i in found.items() if i < entry.iteration}
        found[entry.iteration] = entry
    return [found[i] for i in sorted(found)]
