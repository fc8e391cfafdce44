"""Addresses of servers, and who can reach them."""

from __future__ import annotations

import ipaddress
import logging

from policy_server.protocol import DEFAULT_ADDRESS
from simplevla.errors import ConfigError

_log = logging.getLogger(__name__)


def require_local(address: str, *, allow_remote: bool, encrypted: bool = False) -> None:
    """Check that only this machine or the holders of keys can reach ``address``, or warn if asked for.

    Raises:
        ConfigError: it is no address, or others could reach it.
    """
    scheme, separator, place = address.partition("://")
    if not separator or scheme not in ("tcp", "ipc") or not place:
        raise ConfigError(f"{address!r} is no address", f"use one like {DEFAULT_ADDRESS} or ipc:///path")
    if encrypted or is_on_this_machine(address):
        return
    if not allow_remote:
        raise ConfigError(
            f"{address} can be reached from other machines",
            "give --keys (make some with: simplevla keys new), or forward "
            f"{DEFAULT_ADDRESS} with ssh -L, or add --allow-remote if the network is yours alone",
        )
    _log.warning(
        "listening on %s: other machines can reach it, and traffic is neither encrypted nor authenticated",
        address,
    )


def host_of(address: str) -> str:
    """Return the host in ``tcp://host:port``."""
    return address.partition("://")[2].rpartition(":")[0].strip("[]")


def is_on_this_machine(address: str) -> bool:
    """Return whether the address is one that only this machine can reach."""
    scheme, _, place = address.partition("://")
    return scheme == "ipc" or is_loopback(place.rpartition(":")[0])


def is_loopback(host: str) -> bool:
    """Return whether ``host`` names this machine and nobody else can mean it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
