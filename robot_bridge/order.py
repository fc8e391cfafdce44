"""Who ends when, whoever sends the signals.

A terminal's Ctrl-C, ``ros2 launch`` and systemd signal every process of a run at once. That must not make
the order: the arms stop moving at once, but stay until nothing asks them for motion any more; the
recorder stays for what they say meanwhile; the twin stays until nobody stands on its bus.

So every process of a run takes a place, a Unix datagram socket in Linux's abstract name space, which the
kernel removes with the process however it ends; and before it leaves it waits, for a bounded time, for the
places of those it must outlive. :mod:`robot_bridge.bringup` says who that is, in the environment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence

logger = logging.getLogger(__name__)

RUN = "SIMPLEVLA_RUN"  # tells runs apart
PLACE = "SIMPLEVLA_PLACE"  # the process's own name in its run
OUTLIVES = "SIMPLEVLA_OUTLIVES"  # names, by commas, of those that must have ended before it does
_POLL_S = 0.02
_PATIENCE_S = 6.0


def place_in_order(run: str, name: str, outlives: Sequence[str]) -> dict[str, str]:
    """Return the environment of the process ``name`` of ``run`` that ends after ``outlives``."""
    return {RUN: run, PLACE: name, OUTLIVES: ",".join(outlives)}


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Take this process's place while the block runs; nothing happens outside a run."""
    run, name = os.environ.get(RUN, ""), os.environ.get(PLACE, "")
    if not run or not name:
        yield
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as place:
        try:
            place.bind(_address(run, name))
        except OSError as error:  # one that is being started again, before the old one is quite gone
            logger.debug("the place of %s is taken: %s", name, error)
        yield


def wait_for_others(
    meanwhile: Callable[[float], object] = time.sleep, patience_s: float = _PATIENCE_S
) -> list[str]:
    """Wait until everyone this process must outlive has ended; return who has not in time.

    Args:
        meanwhile: called again and again with how long to take, s.
        patience_s: longest wait, s.
    """
    run = os.environ.get(RUN, "")
    others = [name for name in os.environ.get(OUTLIVES, "").split(",") if name and run]
    deadline = time.monotonic() + patience_s
    while others := [name for name in others if _is_taken(_address(run, name))]:
        if time.monotonic() > deadline:
            logger.warning("ending before %s", ", ".join(others))
            break
        meanwhile(_POLL_S)
    return others


def _address(run: str, name: str) -> str:
    return f"\0simplevla/{run}/{name}"


def _is_taken(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            return False
    return True
