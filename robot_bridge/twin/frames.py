"""Newest-picture slots in shared memory: one writer, any number of readers, no lock, no queue.

A slot is a file in memory (``/dev/shm``) that both sides map. Python's own ``shared_memory`` is not
used: up to 3.12 a process that merely attaches removes the memory when it ends. The writer fills the
two halves in turn; each half carries its picture's number in front and behind, and a reader takes a
copy only if both numbers are still the expected one after copying.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from simplevla.errors import UnavailableError

_MAGIC = b"SVLAFRM2"
_HEADER = struct.Struct("=8sII")  # magic, height, width
_COUNT = struct.Struct("=Q")  # number of the newest picture, from 1; at _COUNT_AT
_HALF = struct.Struct("=QqqQ")  # number before, capture time, due time, number after
_COUNT_AT = 16
_HALVES_AT = 64
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_MAX_PIXELS = 4096 * 4096


@dataclass(frozen=True)
class Picture:
    """One picture from a slot.

    Attributes:
        image: (H, W, 3) uint8 RGB, a copy.
        capture_ns: when it was taken, ns of the system clock.
        number: counts from 1 without gaps.
        due_ns: when it may be handed on, ns of the system clock; 0 for at once.
    """

    image: NDArray[np.uint8]
    capture_ns: int
    number: int
    due_ns: int = 0


def slot_name(prefix: str, camera: str) -> str:
    """Return the name of a camera's slot."""
    return f"{prefix}_{camera}"


class _Slot:
    """A mapped slot."""

    def __init__(self, memory: mmap.mmap, height: int, width: int) -> None:
        self._memory = memory
        self.shape = (height, width, 3)
        self._bytes = height * width * 3
        self._half_bytes = _HALF.size + self._bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the slot."""
        self._memory.close()

    def _half_at(self, number: int) -> int:
        return _HALVES_AT + (number % 2) * self._half_bytes


class FrameWriter(_Slot):
    """The writing end of a new slot; what stood under its name is replaced. A context manager.

    Args:
        name: the slot's name.
        height, width: of its pictures.
    """

    def __init__(self, name: str, height: int, width: int) -> None:
        self._path = _path(name)
        size = _HALVES_AT + 2 * (_HALF.size + height * width * 3)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.ftruncate(handle, size)
            super().__init__(mmap.mmap(handle, size), height, width)
        finally:
            os.close(handle)
        self._number = 0
        self._memory[: _HEADER.size] = _HEADER.pack(_MAGIC, height, width)

    def __enter__(self) -> FrameWriter:
        return self

    def write(self, image: NDArray[np.uint8], capture_ns: int, due_ns: int = 0) -> None:
        """Publish a (H, W, 3) uint8 RGB picture; see :class:`Picture` for its times."""
        if image.shape != self.shape or image.dtype != np.uint8:
            raise ValueError(f"picture is {image.dtype} {image.shape}, the slot holds uint8 {self.shape}")
        number = self._number + 1
        at = self._half_at(number)
        _HALF.pack_into(self._memory, at, number, capture_ns, due_ns, 0)
        self._memory[at + _HALF.size : at + self._half_bytes] = image.tobytes()
        _HALF.pack_into(self._memory, at, number, capture_ns, due_ns, number)
        _COUNT.pack_into(self._memory, _COUNT_AT, number)
        self._number = number

    def close(self) -> None:
        """Unmap the slot and remove its name; readers keep what they have mapped."""
        super().close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


class FrameReader(_Slot):
    """The reading end of a slot. A context manager.

    Args:
        name: the slot's name.

    Raises:
        UnavailableError: there is no such slot, or it is none of ours.
    """

    def __init__(self, name: str) -> None:
        self._path = _path(name)
        remedy = "start the twin: simplevla twin"
        try:
            handle = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise UnavailableError(f"there are no pictures under the name {name}", remedy) from error
        try:
            status = os.fstat(handle)
            if status.st_size < _HALVES_AT:
                raise UnavailableError(f"the pictures under the name {name} are cut short", remedy)
            memory = mmap.mmap(handle, status.st_size, prot=mmap.PROT_READ)
        finally:
            os.close(handle)
        self._inode = status.st_ino
        magic, height, width = _HEADER.unpack_from(memory, 0)
        super().__init__(memory, height, width)
        whole = _HALVES_AT + 2 * self._half_bytes
        if magic != _MAGIC or height * width > _MAX_PIXELS or status.st_size != whole:
            self.close()
            raise UnavailableError(f"{self._path} does not hold pictures", remedy)

    def __enter__(self) -> FrameReader:
        return self

    def read_newer(self, number: int) -> Picture | None:
        """Return the newest picture if its number is above ``number``, else None."""
        for _ in range(3):
            (newest,) = _COUNT.unpack_from(self._memory, _COUNT_AT)
            if newest <= number:
                return None
            at = self._half_at(newest)
            pixels = np.frombuffer(self._memory[at + _HALF.size : at + self._half_bytes], np.uint8)
            before, capture_ns, due_ns, after = _HALF.unpack_from(self._memory, at)
            if before == after == newest:
                return Picture(pixels.reshape(self.shape), capture_ns, newest, due_ns)
        return None

    def is_replaced(self) -> bool:
        """Return whether the slot's name is gone or stands for another slot by now."""
        try:
            return os.stat(self._path).st_ino != self._inode
        except FileNotFoundError:
            return True


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a slot")
    folder = Path("/dev/shm")  # noqa: S108 - memory, not a temporary file; opened exclusively, mode 0600
    return (folder if folder.is_dir() else Path(tempfile.gettempdir())) / name
