"""One driver for each bus on a machine, so that no arm ever hears two programs at once."""

from __future__ import annotations

import errno
import socket

from robot_bridge.rig import CanPort
from simplevla.errors import UnavailableError


def claim(port: CanPort) -> socket.socket:
    """Return what holds the bus of ``port`` for this driver until it is closed, or the process ends.

    The claim is a name of Linux's abstract sockets: the kernel lets one process have it, forgets it with
    the process however that ends, and keeps it in the same namespace as network interfaces, CAN's among
    them. It binds those who ask for it: ``candump`` and an emergency stop need no claim.

    Raises:
        UnavailableError: another driver has the bus.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0simplevla/{port.interface}/{port.channel}")
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise UnavailableError(
            f"bus {port.interface}:{port.channel} is driven by another program or driver",
            "end what runs (simplevla up, a trial, a calibration, the service); each arm needs its own bus",
        ) from error
    return held
