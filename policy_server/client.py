"""The thin client of a policy server: for the robot, needs neither torch nor an inference library.

:class:`PolicyClient` is for threads, :class:`~policy_server.async_client.AsyncPolicyClient` for asyncio.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType

from policy_server import messages, protocol
from policy_server.conversation import (
    Conversation,
    PolicyChangedError,
    RemoteError,
    Reply,
    ServerInfo,
    accepted,
    no_answer,
)
from policy_server.keys import ClientKeys, keys_for
from policy_server.links import Link, Way
from policy_server.local_link import GoneError
from policy_server.protocol import DEFAULT_ADDRESS, LocalOffer, MessageError, Part, Welcome
from policy_server.waiting import SPIN_S
from simplevla.embodiment import Embodiment
from simplevla.errors import UnavailableError
from simplevla.observation import Observation

__all__ = [
    "ClientKeys",
    "PolicyChangedError",
    "PolicyClient",
    "RemoteError",
    "Reply",
    "ServerInfo",
    "keys_for",
]

_log = logging.getLogger(__name__)


class PolicyClient:
    """Asks one policy server for chunks. A context manager; not for use by several threads at once.

    It says hello on entering, and again by itself after a silence or a restart of the server. With a
    server on the same machine it goes over to shared memory by itself.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        embodiment: Embodiment,
        timeout_s: float = 2.0,
        wait_s: float = 0.0,
        keys: ClientKeys | None = None,
        jpeg_quality: int | None = None,
        local: bool = True,
        sealed: bool = True,
        follow: bool = False,
        spin_s: float = SPIN_S,
    ) -> None:
        """Prepare to connect; nothing is opened yet.

        Args:
            address: where the server listens.
            embodiment: the robot that this client speaks for.
            timeout_s: longest time that any call takes, s.
            wait_s: how long entering waits for a server that is still starting, s.
            keys: encrypt, and speak to the one server that they name.
            jpeg_quality: send images as JPEG of this quality (1 to 100), for thin links; it loses a little.
            local: use shared memory if the server is on this machine.
            sealed: with keys, send images through a connection sealed with AES (see
                :mod:`policy_server.sealed_link`) rather than through CURVE, which is slower.
            follow: take the answer of another policy than before, instead of raising PolicyChangedError.
            spin_s: longest time that is spent looking for an answer before going to sleep, s; only where
                the last answer came that quickly. 0 for never.
        """
        self._address = address
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._way = Way(address, keys, local and jpeg_quality is None, sealed, spin_s)
        self._follow = follow
        self._talk = Conversation(embodiment, address, jpeg_quality)
        self._link: Link | None = None
        self._welcome: Welcome | None = None

    def __enter__(self) -> PolicyClient:
        try:
            self.connect(self._wait_s)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def info(self) -> ServerInfo:
        """The served policy, as of the last hello.

        Raises:
            UnavailableError: there was none yet.
        """
        return self._talk.info

    @property
    def offer(self) -> LocalOffer | None:
        """The way through shared memory that the server offered at the last hello."""
        return None if self._welcome is None else self._welcome.local

    @property
    def transport(self) -> str:
        """``shared memory``, ``network``, ``network, sealed`` or, before the first word, ``none``."""
        return "none" if self._link is None else self._link.transport

    def connect(self, wait_s: float = 0.0) -> ServerInfo:
        """Say hello, anew, and return what the server serves.

        Args:
            wait_s: how long to wait for a server that is still starting, s; at least the timeout.

        Raises:
            UnavailableError: nobody answered.
            EmbodimentError: the policy is for another robot.
            RemoteError: the server refused otherwise.
        """
        self.close()
        self._open(time.monotonic() + max(wait_s, self._timeout_s))
        return self.info

    def act(self, observation: Observation, deadline_s: float | None = None) -> Reply:
        """Return the server's chunk for ``observation``.

        Args:
            observation: what the robot sees, and perhaps the actions it is committed to.
            deadline_s: how long the answer is worth something, s; the server refuses at once what it
                cannot answer in time. The timeout by default.

        Raises:
            ObservationError: the observation does not fit the robot; nothing was sent.
            UnavailableError: no answer within the timeout; the next call connects anew.
            PolicyChangedError: another policy answers than before; the next call goes on with it.
            RemoteError: the server refused.
        """
        start_s = time.monotonic()
        give_up_s = start_s + self._timeout_s
        needed_s = give_up_s if deadline_s is None else min(give_up_s, start_s + deadline_s)
        try:
            reply = self._act(observation, start_s, needed_s, give_up_s)
        except GoneError:
            # The server was started anew, perhaps: the question can be asked again, it changes nothing.
            self.close()
            reply = self._act(observation, start_s, needed_s, give_up_s)
        except RemoteError as error:
            if error.code != "no_handshake":
                raise
            # It was started anew behind the same address and does not know this client.
            self._hello(give_up_s)
            reply = self._act(observation, start_s, needed_s, give_up_s)
        if reply.chunk.policy_id != self.info.policy_id:
            self._hello(give_up_s)
        return reply

    def health(self) -> protocol.Status:
        """Return how the server is.

        Raises:
            UnavailableError: no answer within the timeout.
        """
        give_up_s = time.monotonic() + self._timeout_s
        if self._link is None:
            self._link = self._way.begin()
        return self._talk.status(self._ask(self._link, self._talk.health(), give_up_s))

    def close(self) -> None:
        """Let go of the connection; safe to call twice."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _act(self, observation: Observation, start_s: float, needed_s: float, give_up_s: float) -> Reply:
        if self._link is None or not self._talk.is_acquainted:
            self._open(give_up_s)
        assert self._link is not None
        message = self._ask(self._link, self._talk.act(observation, needed_s), give_up_s)
        return self._talk.reply(message, observation, start_s)

    def _open(self, give_up_s: float) -> None:
        """Connect over the network, and go over to the quickest way that the server offers."""
        if self._link is None:
            self._link = self._way.begin()
        try:
            self._hello(give_up_s)
        except PolicyChangedError:
            self.close()  # the next call begins anew, and takes the quicker way
            raise
        assert self._welcome is not None
        link = self._way.quicker(self._welcome, max(0.01, give_up_s - time.monotonic()))
        if link is None:
            return
        self._link.close()
        self._link = link
        self._hello(give_up_s)
        _log.debug("messages go through: %s", link.transport)

    def _hello(self, give_up_s: float) -> None:
        assert self._link is not None
        asked_s = time.monotonic()
        message = self._ask(self._link, self._talk.hello(), give_up_s)
        try:
            self._talk.welcomed(message, asked_s)
        except PolicyChangedError:
            if not self._follow:
                raise
        self._welcome = self._talk.heard_welcome(message)

    def _ask(self, link: Link, said: tuple[int, list[Part]], give_up_s: float) -> messages.Message:
        """Send one request and return its answer; answers to older requests are thrown away."""
        request, parts = said
        start_s = time.monotonic()
        try:
            slot = link.send(parts)
            while (left_s := give_up_s - time.monotonic()) > 0:
                heard = link.receive(left_s)
                if heard is None:
                    break
                message = messages.decode(heard)
                if message.header.request == request:
                    link.release(slot)
                    return accepted(message)
                _log.debug("answer to request %d came too late", message.header.request)
        except (MessageError, UnavailableError):
            self.close()
            raise
        self.close()
        raise no_answer(self._address, time.monotonic() - start_s)
