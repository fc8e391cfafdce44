"""The thin client for asyncio: many questions may be under way at once.

Of those the server answers the newest, and refuses the ones that waited before it as ``superseded``.
"""

from __future__ import annotations

import asyncio
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
from policy_server.keys import ClientKeys
from policy_server.links import Link, Way
from policy_server.local_link import SLOTS, GoneError
from policy_server.protocol import DEFAULT_ADDRESS, MessageError, Part
from simplevla.embodiment import Embodiment
from simplevla.errors import SimplevlaError, UnavailableError
from simplevla.observation import Observation


class AsyncPolicyClient:
    """Asks one policy server for chunks. An async context manager, for one event loop."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        embodiment: Embodiment,
        timeout_s: float = 2.0,
        keys: ClientKeys | None = None,
        jpeg_quality: int | None = None,
        local: bool = True,
        follow: bool = False,
    ) -> None:
        """Prepare to connect; see :class:`policy_server.client.PolicyClient` for the arguments."""
        self._address = address
        self._timeout_s = timeout_s
        # Who seals waits for the network, and a loop must not: ZMQ's thread encrypts and sends instead.
        self._way = Way(address, keys, local and jpeg_quality is None, sealed=False, spin_s=0.0)
        self._follow = follow
        self._talk = Conversation(embodiment, address, jpeg_quality)
        self._link: Link | None = None
        self._watched = -1
        self._open_requests: dict[int, tuple[asyncio.Future[messages.Message], int]] = {}
        self._opening = asyncio.Lock()
        self._places = asyncio.Semaphore(SLOTS)

    async def __aenter__(self) -> AsyncPolicyClient:
        try:
            await self._open()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
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

    async def act(self, observation: Observation, deadline_s: float | None = None) -> Reply:
        """Return the server's chunk for ``observation``; the same errors as the sync client's.

        A fifth call waits until one of four has its answer.

        Args:
            observation: what the robot sees; leave its arrays alone until the answer is there.
            deadline_s: how long the answer is worth something, s; the timeout by default.
        """
        start_s = time.monotonic()
        needed_s = start_s + min(self._timeout_s, self._timeout_s if deadline_s is None else deadline_s)
        async with self._places:
            try:
                reply = await self._act(observation, start_s, needed_s)
            except GoneError:
                reply = await self._act(observation, start_s, needed_s)
            except RemoteError as error:
                if error.code != "no_handshake":
                    raise
                await self._hello()
                reply = await self._act(observation, start_s, needed_s)
        if reply.chunk.policy_id != self.info.policy_id:
            await self._hello()
        return reply

    async def health(self) -> protocol.Status:
        """Return how the server is.

        Raises:
            UnavailableError: no answer within the timeout.
        """
        if self._link is None:
            self._watch(self._way.begin())
        return self._talk.status(await self._ask(self._talk.health()))

    def close(self) -> None:
        """Let go of the connection; who waits for an answer is told that none comes."""
        self._lose(UnavailableError("the client was closed", "open it again"))

    async def _act(self, observation: Observation, start_s: float, needed_s: float) -> Reply:
        if self._link is None or not self._talk.is_acquainted:
            await self._open()
        message = await self._ask(self._talk.act(observation, needed_s))
        return self._talk.reply(message, observation, start_s)

    async def _open(self) -> None:
        async with self._opening:
            if self._link is not None and self._talk.is_acquainted:
                return  # another task has done it meanwhile
            if self._link is None:
                self._watch(self._way.begin())
            asked_s = time.monotonic()
            message = await self._ask(self._talk.hello())
            welcome = self._talk.heard_welcome(message)
            link = await asyncio.to_thread(self._way.quicker, welcome, self._timeout_s)
            if link is not None:
                self._lose(UnavailableError("the connection changed", "ask again"))
                self._watch(link)
                asked_s = time.monotonic()
                message = await self._ask(self._talk.hello())
            self._take_welcome(message, asked_s)

    async def _hello(self) -> None:
        asked_s = time.monotonic()
        self._take_welcome(await self._ask(self._talk.hello()), asked_s)

    def _take_welcome(self, message: messages.Message, asked_s: float) -> None:
        try:
            self._talk.welcomed(message, asked_s)
        except PolicyChangedError:
            if not self._follow:
                raise

    async def _ask(self, said: tuple[int, list[Part]]) -> messages.Message:
        """Send one request and return its answer."""
        request, parts = said
        link = self._link
        if link is None:
            raise GoneError("the connection was closed", "ask again")
        start_s = time.monotonic()
        try:
            slot = link.send(parts)
        except GoneError as error:
            self._lose(error)
            raise
        future: asyncio.Future[messages.Message] = asyncio.get_running_loop().create_future()
        self._open_requests[request] = future, slot
        self._read()  # ZMQ tells of news only once, and sending may have swallowed it
        # If this is cancelled, the slot comes back with the answer that nobody awaits any more.
        try:
            return accepted(await asyncio.wait_for(future, self._timeout_s))
        except asyncio.TimeoutError:
            silence = no_answer(self._address, time.monotonic() - start_s)
            self._lose(silence)
            raise silence from None

    def _watch(self, link: Link) -> None:
        self._link = link
        self._watched = link.fileno()
        asyncio.get_running_loop().add_reader(self._watched, self._read)

    def _read(self) -> None:
        """Hand every message that is there to whoever awaits it."""
        while self._link is not None:
            try:
                heard = self._link.receive(0.0)
                if heard is None:
                    return
                message = messages.decode(heard)
            except (MessageError, UnavailableError) as error:
                self._lose(error)
                return
            future, slot = self._open_requests.pop(message.header.request, (None, -1))
            self._link.release(slot)
            if future is not None and not future.done():
                future.set_result(message)

    def _lose(self, error: SimplevlaError) -> None:
        """Close the connection, and tell everybody who waits."""
        link, self._link = self._link, None
        if link is None:
            return
        asyncio.get_running_loop().remove_reader(self._watched)
        link.close()
        waiting, self._open_requests = self._open_requests, {}
        for future, _ in waiting.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may await it any more: it must not be logged as forgotten
