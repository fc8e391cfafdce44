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
