"""How far a run is: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from sim_training.history import Iteration

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Within this, log lines go above a bar instead of through it; in a log nothing changes."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.logging import RichHandler

    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers = [RichHandler(console=_console(), show_path=False, log_time_format="%H:%M:%S")]
    try:
        yield
    finally:
        root.handlers = before


@contextlib.contextmanager
def episodes(total: int, what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (episodes done, successes among them).

    Args:
        what: what happens to the episodes, as "evaluating".
    """
    if not sys.stderr.isatty():
        every = max(1, total // 10)

        def line(done: int, successes: int) -> None:
            if done % every == 0 or done == total:
                print(f"{done} of {total} episodes, {successes} successes", file=sys.stderr, flush=True)

        yield line
        return
    from rich.progress import Progress

    with Progress(console=_console()) as bar:
        task = bar.add_task(what, total=total)

        def update(done: int, successes: int) -> None:
            bar.update(task, completed=done, description=f"{what}: {successes} of {done} succeeded")

        yield update


@contextlib.contextmanager
def iterations(total: int) -> Iterator[Callable[[Iteration], None]]:
    """Yield a function that is told of each of ``total`` iterations of reinforcement learning."""
    if not sys.stderr.isatty():
        yield lambda done: print(describe(done, total), file=sys.stderr, flush=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console()) as bar:
        task = bar.add_task("reinforcement learning", total=total)

        def update(done: Iteration) -> None:
            bar.console.print(describe(done, total), markup=False, highlight=False)
            bar.update(task, completed=done.iteration + 1)

        yield update


def describe(done: Iteration, total: int) -> str:
    """Return one iteration as one line."""
    sampled = done.sampled
    parts = [
        f"iteration {done.iteration + 1} of {total}: "
        f"sampled {sampled.successes}/{sampled.episodes} = {100 * sampled.rate.rate:.0f} %",
        f"kept {done.kept_groups}/{done.groups} groups",
        f"entropy {done.entropy:.2f}",
        f"|ratio - 1| {done.ratio:.4f}",
        f"{done.elapsed_s:.0f} s so far",
    ]
    if done.greedy is not None:
        parts.insert(1, f"greedy {done.greedy.rate}")
    return ", ".join(parts)


@cache
def _console() -> Console:
    """Return the one console of this process: what is printed through it goes above its bars."""
    from rich.console import Console

    return Console(stderr=True)
