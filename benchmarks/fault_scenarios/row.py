"""A row of the table, and what every fault does alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.fault_scenarios.cell import PATIENCE_S, Cell, FaultError
from robot_bridge.chunk_execution import Trajectory
from robot_bridge.control_loop import Mode
from simplevla.errors import UnavailableError

AGAIN = "enable"
RESET = "reset with the arm supported, then enable"
BY_ITSELF = "by itself"
_DT_S = 0.05


@dataclass(frozen=True)
class Row:
    """One fault, as it went.

    Attributes:
        fault: what went wrong.
        within: how soon the bridge noticed, in words.
        did: what the arms did.
        recovery: what ends it.
        recorded: what a recording tells of it.
    """

    fault: str
    within: str
    did: str
    recovery: str
    recorded: str


Scenario = Callable[[], Row]


def wait_for(done: Callable[[], bool], otherwise: str) -> None:
    """Wait until ``done``; raise :class:`FaultError` with ``otherwise`` if that takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        require(time.monotonic() < deadline, otherwise)
        time.sleep(0.002)


def require(holds: bool, otherwise: str) -> None:
    """Raise :class:`FaultError` with ``otherwise`` unless it holds."""
    if not holds:
        raise FaultError(otherwise)


def ms(seconds: float) -> str:
    """Return a time in words."""
    return f"{seconds * 1e3:.0f} ms"


def drive(cell: Cell, rad: float) -> None:
    """Play a move of the first joint by ``rad`` that no limit is in the way of."""
    path = np.tile(cell.position(), (30, 1))
    path[:, 0] += rad * np.linspace(1 / 30, 1, 30)
    cell.loop.play(Trajectory(time.monotonic(), _DT_S, path, time.time_ns()))


def refuses(cell: Cell, words: str) -> None:
    """See that the loop takes no trajectory, and says why in ``words``."""
    try:
        cell.loop.play(Trajectory(time.monotonic(), 0.05, cell.position()[None], time.time_ns()))
    except UnavailableError as error:
        require(words in error.message, error.message)
        return
    raise FaultError("a trajectory was taken")


def go_on(cell: Cell, look: Callable[[], None] = lambda: None) -> None:
    """Enable again if need be, look, and see that the arms move and follow."""
    if cell.loop.health().mode is not Mode.ON:
        cell.loop.enable()
        look()
    cell.swing()
    cell.loop.hold()
    cell.rest(time.monotonic())
    wait_for(lambda: np.abs(cell.position() - _poses(cell)).max() < 0.01, "the arms did not follow")


def reset_and_go_on(cell: Cell) -> None:
    """Reset as a person would, who supports the arm; then as :func:`go_on`."""
    cell.loop.reset()
    go_on(cell)


def _poses(cell: Cell) -> np.ndarray:
    return np.concatenate([bench.position for bench in cell.benches])
