"""Priority for the processes that have a clock to keep: the arms' loop and the twin."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)


def ask_for_priority(steps: int = 10) -> bool:
    """Ask the system to run this process before others; return whether it was granted.

    On a machine that trains or infers beside it, a process that sleeps 200 times a second otherwise
    waits for its turn, tens of milliseconds at times. Call it before threads are started: on Linux
    only the calling thread and those that it starts later are concerned. Without the right to do it
    (root, or ``nice`` in ``/etc/security/limits.conf``) nothing changes.

    Args:
        steps: how many nice levels up from the present one.
    """
    try:
        os.nice(-steps)
    except PermissionError:
        logger.debug("no right to raise the priority; timing will be as good as the machine is idle")
        return False
    return True


def ask_for_real_time(level: int = 10) -> bool:
    """Ask the system to run this process as soon as it has work, whatever else runs; return whether.

    That is Linux's SCHED_RR: a nice level only weighs against others, and beside a process that draws
    or infers on every core the loop then still waits for some of its turns. Call it before threads are
    started, as above; other processes keep the part of the time that the kernel reserves for them (5 %
    as a rule). Without the right to do it (root, or ``rtprio`` in ``/etc/security/limits.conf``) nothing
    changes.

    Args:
        level: of 1 to 99; the kernel's own threads for interrupts stand at 50.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(level))
    except PermissionError:
        logger.debug("no right to run in real time")
        return False
    return True


def in_real_time() -> bool:
    """Return whether this thread runs as :func:`ask_for_real_time` asks."""
    return os.sched_getscheduler(0) == os.SCHED_RR
