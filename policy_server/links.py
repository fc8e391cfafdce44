"""How a client gets to its server, and over to the quickest way that the server offers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from policy_server.address import host_of
from policy_server.keys import ClientKeys
from policy_server.local_link import LocalLink
from policy_server.protocol import Part, Welcome
from policy_server.remote_link import RemoteLink
from policy_server.sealed_link import SealedLink
from policy_server.waiting import SPIN_S
from simplevla.errors import UnavailableError

_log = logging.getLogger(__name__)


class Link(Protocol):
    """What carries a client's messages: a RemoteLink, a LocalLink or a SealedLink."""

    @property
    def transport(self) -> str:
        """What it goes through, in words."""

    def fileno(self) -> int:
        """What to wait on for the next message."""

    def send(self, parts: Sequence[Part]) -> int:
        """Send a message; return what to release when its answer is there."""

    def release(self, slot: int) -> None:
        """Take back what :meth:`send` returned."""

    def receive(self, timeout_s: float) -> list[Part] | None:
        """Return the next message, or None if there is none in time."""

    def close(self) -> None:
        """Let go of everything; safe to call twice."""


@dataclass(frozen=True)
class Way:
    """Where a server is, and how its client may go there.

    Attributes:
        address: the server's.
        keys: encrypt, and speak to the one server that they name.
        local: go through shared memory if the server is on this machine.
        sealed: with keys, go through a sealed connection; else through CURVE throughout.
        spin_s: see :class:`policy_server.waiting.Patience`.
    """

    address: str
    keys: ClientKeys | None = None
    local: bool = True
    sealed: bool = True
    spin_s: float = SPIN_S

    def begin(self) -> Link:
        """Return the way over the network, where a client says hello first; ConfigError if it is none."""
        return RemoteLink(self.address, self.keys)

    def quicker(self, welcome: Welcome, timeout_s: float) -> Link | None:
        """Return the quickest way that a server offers and that is open; None if that is the first one."""
        try:
            if self.local and welcome.local is not None:
                return LocalLink(welcome.local, timeout_s, self.spin_s)
        except UnavailableError as error:
            _log.info("images go over the network: %s", error.message)
        try:
            if self.sealed and self.keys is not None and welcome.sealed is not None:
                return SealedLink(host_of(self.address), welcome.sealed, timeout_s, self.spin_s)
        except UnavailableError as error:
            _log.warning("images go through CURVE, which is slow: %s", error)
        return None
