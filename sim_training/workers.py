"""One function over many seeds in several processes, each of which sets itself up once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

T = TypeVar("T")

Setup = Callable[[], AbstractContextManager[Callable[[int], T]]]
"""Makes what is needed once in a process; what it enters is called with each seed. Must be picklable."""


def map_seeds(setup: Setup[T], seeds: Sequence[int], workers: int) -> Iterator[T]:
    """Yield what the function that ``setup`` enters returns for each seed, in their order.

    Args:
        workers: processes; with 1 everything happens in this one.
    """
    if workers <= 1:
        with setup() as function:
            yield from map(function, seeds)
        return
    # Spawned, since a forked process would share a graphics driver and torch's threads.
    with multiprocessing.get_context("spawn").Pool(workers, _start, (setup,)) as pool:
        yield from pool.imap(_call, seeds)


_function: Callable[[int], Any] | None = None


def _start(setup: Setup[Any]) -> None:
    global _function  # noqa: PLW0603 (one world for each process of the pool)
    _function = setup().__enter__()


def _call(seed: int) -> Any:
    if _function is None:
        raise RuntimeError("the worker was not started")
    return _function(seed)
