"""Makes the policy server of this machine go away, or run slowly: what the twin cannot do for itself."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

from robot_bridge.twin.faults import Fault, FaultKind
from simplevla.errors import ConfigError, UnavailableError

_ADDRESS = re.compile(r"tcp://127\.0\.0\.1:(\d{1,5})")
_LISTENING = "0A"  # state of a socket in /proc/net/tcp
_TURN_S = 0.1
_SERVES = ("simplevla", "policy_server")


def harm_server(fault: Fault, address: str) -> None:
    """Do to the policy server at ``address`` what ``fault`` says, and return when it is over.

    Args:
        fault: a server's; one that slows it down needs its seconds.
        address: ``tcp://127.0.0.1:<port>``, where a process of this user listens.

    Raises:
        ConfigError: the address is not on this machine, or the seconds are missing.
        UnavailableError: nobody listens there, or what does is no policy server.
    """
    pid = listener(address)
    if fault.kind is FaultKind.SERVER_KILL:
        os.kill(pid, signal.SIGKILL)
        return
    if fault.seconds is None or fault.amount is None:
        raise ConfigError(f"{fault.kind.value} without an end", "say for how long: --seconds")
    deadline = time.monotonic() + fault.seconds
    try:
        while time.monotonic() < deadline:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(_TURN_S * (1 - fault.amount))
            os.kill(pid, signal.SIGCONT)
            time.sleep(_TURN_S * fault.amount)
    except ProcessLookupError as error:
        raise UnavailableError(f"the policy server at {address} has ended", "start it anew") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def listener(address: str) -> int:
    """Return the process that listens at ``address``; see :func:`harm_server`."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ConfigError(f"{address!r} is not on this machine", "give tcp://127.0.0.1:<port>")
    port = f":{int(found[1]):04X}"
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[1].endswith(port) and words[3] == _LISTENING:
            inodes.add(f"socket:[{words[9]}]")
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if any(os.readlink(handle) in inodes for handle in folder.iterdir()):
                command = (
                    (folder.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                if not any(word in command for word in _SERVES):
                    raise UnavailableError(
                        f"what listens at {address} is no policy server", "name its address"
                    )
                return int(folder.parent.name)
    raise UnavailableError(f"nobody listens at {address}", "start the server: simplevla serve")
