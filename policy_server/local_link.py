"""The way between two processes of one machine: a Unix socket for words, shared memory for pictures.

A message crosses as one datagram (:mod:`policy_server.datagram`) of a SOCK_SEQPACKET socket; long parts lie
in a slot of memory that both map. A datagram wakes the other
side directly, where ZMQ's ipc would wake two threads of its own on each side first. The kernel does the
bookkeeping: it says who is at the other end (SO_PEERCRED), closes the socket when a process dies, however
it dies, and frees the memory with the last of the two.

The memory is an anonymous file (memfd) that the server makes, of a size it knows beforehand, and hands
over with the socket: it has no name that could be guessed, listed or left behind. It is sealed against
shrinking, so that nobody can pull it from under the reader.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import logging
import mmap
import os
import secrets
import select
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from policy_server.datagram import INLINE_BYTES, MAGIC, MAX_DATAGRAM_BYTES, pack, split, unpack
from policy_server.protocol import MAX_TOTAL_BYTES, LocalOffer, MessageError, Part
from policy_server.waiting import SPIN_S, Patience
from simplevla.errors import UnavailableError

SLOTS = 4

_GREETING = struct.Struct("<4sHI")
_GREETING_S = 2.0
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0

_log = logging.getLogger(__name__)


class GoneError(UnavailableError):
    """The other side has closed the connection."""

    code = "gone"


def is_possible() -> bool:
    """Return whether this system has what a local link needs."""
    return hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED") and bool(_SEALS)


class LocalLink:
    """A client's end. Owns a socket and the mapped memory; not for several threads at once."""

    transport = "shared memory"

    def __init__(self, offer: LocalOffer, timeout_s: float, spin_s: float = SPIN_S) -> None:
        """Connect, and take over the memory.

        Args:
            offer: where, and what to show there.
            timeout_s: longest wait for the server, s.
            spin_s: see :class:`policy_server.waiting.Patience`.

        Raises:
            UnavailableError: there is no such server on this machine, it is another user's, or it is
                not the one that made the offer.
        """
        if not is_possible():
            raise UnavailableError("this system has no shared memory of that kind", "use the network")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(timeout_s)
            self._memory = _attach(self._socket, offer)
            self._socket.setblocking(False)
        except BaseException as error:
            self._socket.close()
            if isinstance(error, OSError | struct.error):
                raise UnavailableError(f"no server of this user at {offer.path}: {error}") from error
            raise
        self._patience = Patience(spin_s)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._free = list(range(len(self._memory)))
        self._buffer = bytearray(MAX_DATAGRAM_BYTES)  # to allocate it anew would cost more than to read

    def fileno(self) -> int:
        """The socket, to wait on."""
        return self._socket.fileno()

    def send(self, parts: Sequence[Part]) -> int:
        """Send a message; return the slot it lies in until its answer is there, or -1 if in none.

        Raises:
            MessageError: it does not fit, or every slot waits for an answer.
            GoneError: the server is gone.
        """
        slot = -1
        if any(len(part) >= INLINE_BYTES for part in parts[1:]):
            if not self._free:
                raise MessageError(
                    f"{len(self._memory)} requests wait for their answers", "wait for one", code="too_large"
                )
            slot = self._free.pop()
        try:
            pieces = split(parts, -1)[0] if slot < 0 else pack(parts, slot, self._memory[slot])
            self._socket.sendmsg(pieces)
        except OSError as error:
            raise GoneError("the policy server has ended the connection", "connect again") from error
        except MessageError:
            self.release(slot)
            raise
        return slot

    def release(self, slot: int) -> None:
        """Take back the slot of a message that was answered."""
        if slot >= 0:
            self._free.append(slot)

    def receive(self, timeout_s: float) -> list[Part] | None:
        """Return the next message; None if there was none within ``timeout_s``.

        Raises:
            GoneError: the server is gone.
            MessageError: what came is no message.
        """
        return self._patience.wait(self._look, timeout_s)

    def _look(self, timeout_s: float) -> list[Part] | None:
        if not self._poll.poll(max(1.0, 1e3 * timeout_s) if timeout_s > 0 else 0):
            return None
        try:
            size = self._socket.recv_into(self._buffer)
        except OSError as error:
            raise GoneError("the policy server has ended the connection", "connect again") from error
        if not size:
            raise GoneError("the policy server has ended the connection", "connect again")
        return unpack(bytes(memoryview(self._buffer)[:size]), [])

    def close(self) -> None:
        """Let go of socket and memory; safe to call twice."""
        self._socket.close()
        self._memory = []


class LocalPeer:
    """A server's end of one link: whom a message came from, and where its answer goes."""

    is_near = True
    may_seal = False

    def __init__(self, connection: socket.socket, token: str, slot_size: int, buffer: bytearray) -> None:
        """Take a connection, not yet greeted.

        Args:
            connection: the socket.
            token: what the client must know.
            slot_size: bytes of a slot.
            buffer: of MAX_DATAGRAM_BYTES, to read into; all peers may share it.
        """
        connection.setblocking(False)
        self.socket = connection
        self._token, self._slot_size, self._buffer = token, slot_size, buffer
        self.is_open = True
        self.greet_by_s: float | None = time.monotonic() + _GREETING_S
        self._memory: list[memoryview] = []
        # Answers are sent by one thread and the socket is closed by another.
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket, to wait on."""
        return self.socket.fileno()

    def greet(self) -> None:
        """Read the client's greeting and hand it memory of its own.

        Raises:
            PermissionError: it is another user, or does not know the token.
            OSError: the client is gone, or there is no memory.
        """
        told, _, _, _ = self.socket.recvmsg(256)
        _, uid, _ = _credentials(self.socket)
        if uid != os.geteuid() or not hmac.compare_digest(told, MAGIC + self._token.encode()):
            raise PermissionError(f"user {uid} does not know the token")
        handle = os.memfd_create("simplevla-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(handle, 0o600)
            os.ftruncate(handle, SLOTS * self._slot_size)
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(handle, SLOTS * self._slot_size, mmap.MAP_SHARED, mmap.PROT_READ)
            socket.send_fds(self.socket, [_GREETING.pack(MAGIC, SLOTS, self._slot_size)], [handle])
        finally:
            os.close(handle)
        self._memory = _slots(memory, SLOTS)
        self.greet_by_s = None

    def receive(self) -> list[Part] | None:
        """Return the message that is there; None if the client is gone.

        Raises:
            MessageError: it is none, or too large.
        """
        try:
            size = self.socket.recv_into(self._buffer, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not size:
            return None
        if size > len(self._buffer):
            raise MessageError("the datagram is too long", "send large arrays in a slot", code="too_large")
        return unpack(bytes(memoryview(self._buffer)[:size]), self._memory)

    def send(self, parts: Sequence[Part]) -> None:
        """Send an answer; a client that is gone or takes none is hung up on. Safe from any thread."""
        datagram = split(parts, -1)[0]
        with self._sending, contextlib.suppress(OSError):
            if not self.is_open:
                return
            try:
                self.socket.sendmsg(datagram)
            except BlockingIOError:
                _log.warning("a local client does not take its answers; it is hung up on")
                self.socket.shutdown(socket.SHUT_RDWR)  # its reader sees the end, and closes

    def close(self) -> None:
        """Let go of socket and memory; requests that are being answered keep the memory till then."""
        with self._sending:
            self.is_open = False
            self.socket.close()
        self._memory = []


class LocalListener:
    """Where local clients knock: a socket in a folder of its own that only this user can enter."""

    def __init__(self, slot_size: int) -> None:
        """Listen, for clients that get slots of ``slot_size`` bytes.

        Raises:
            OSError: the socket cannot be made.
        """
        self._slot_size = slot_size
        self._buffer = bytearray(MAX_DATAGRAM_BYTES)
        base = os.environ.get("XDG_RUNTIME_DIR", "")
        usable = os.path.isabs(base) and os.access(base, os.W_OK) and len(base) < 50
        self._folder = Path(tempfile.mkdtemp(prefix="simplevla-", dir=base if usable else None))
        path = self._folder / "policy"
        self.socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            self.socket.bind(str(path))
            path.chmod(0o600)
            self.socket.listen(64)
        except BaseException:
            self.close()
            raise
        self.offer = LocalOffer(str(path), secrets.token_hex(16))

    def fileno(self) -> int:
        """The socket, to wait on."""
        return self.socket.fileno()

    def accept(self) -> LocalPeer | None:
        """Return who knocked, not yet greeted; None if it went away again."""
        try:
            connection, _ = self.socket.accept()
        except OSError:
            return None
        return LocalPeer(connection, self.offer.token, self._slot_size, self._buffer)

    def close(self) -> None:
        """Close the socket and remove its folder."""
        self.socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _attach(connection: socket.socket, offer: LocalOffer) -> list[memoryview]:
    """Return the slots that the server hands over, after making sure that it is the right one."""
    status = os.lstat(offer.path)
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{offer.path} is no socket of this user")
    connection.connect(offer.path)
    if _credentials(connection)[1] != os.geteuid():
        raise PermissionError("it is another user's")
    connection.send(MAGIC + offer.token.encode())
    told, handles, _, _ = socket.recv_fds(connection, 256, 1)
    try:
        magic, slots, size = _GREETING.unpack(told)
        total = slots * size
        sealed = len(handles) == 1 and fcntl.fcntl(handles[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        if magic != MAGIC or not sealed or not 0 < total <= SLOTS * MAX_TOTAL_BYTES:
            raise PermissionError("it does not speak our language")
        if os.fstat(handles[0]).st_size != total:
            raise PermissionError("its memory has another size")
        memory = mmap.mmap(handles[0], total, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    finally:
        for handle in handles:
            os.close(handle)
    return _slots(memory, slots)


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Return process, user and group at the other end, as the kernel knows them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid


def _slots(memory: mmap.mmap, count: int) -> list[memoryview]:
    size = len(memory) // count
    whole = memoryview(memory)
    return [whole[index * size : (index + 1) * size] for index in range(count)]
