"""Progress of a run of trials: a bar on a terminal, a line a trial in a log."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import Any

from simplevla.trial import FailureCode, Trial


class Progress:
    """Tells how far the trials are; a context manager."""

    def __init__(self, trials: int, step_limit: int) -> None:
        """Prepare for ``trials`` trials of at most ``step_limit`` actions."""
        self._trials = trials
        self._step_limit = step_limit
        self._bar: Any = None
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("actions"),
                TimeElapsedColumn(),
            )
            self._bar = self._resources.enter_context(Bar(*columns, transient=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()
        self._bar = None

    def started(self, number: int, seed: int) -> None:
        """Say that trial ``number``, counted from 0, runs from the start that ``seed`` names."""
        text = f"trial {number + 1} of {self._trials}, seed {seed}"
        if self._bar is None:
            print(f"{text}: running", flush=True)
            return
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(text, total=self._step_limit)

    def moved(self, actions: int) -> None:
        """Say how many actions the present trial has executed."""
        if self._bar is not None:
            for task in self._bar.task_ids:
                self._bar.update(task, completed=actions)

    def ended(self, trial: Trial) -> None:
        """Say how ``trial`` ended."""
        why = f" ({trial.failure.value})" if trial.failure is not FailureCode.NONE else ""
        note = f": {trial.note}" if trial.note else ""
        line = (
            f"{trial.id}  seed {trial.seed}  {trial.outcome.value}{why}  {trial.strategy.value}  "
            f"{trial.actions} actions in {trial.duration_s:.1f} s{note}"
        )
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False)
