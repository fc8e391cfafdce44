"""Files that are whole or absent: atomic writes, hashes, and where the shipped data lies."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from simplevla.errors import ConfigError

_BLOCK = 1 << 20


def share_dir() -> Path:
    """Return the folder that holds ``config/``, ``urdf/`` and ``bundles/``.

    That is the checkout when the package is run from one, else ``share/simplevla`` of the
    environment (pip) or of the ament prefix (colcon).

    Raises:
        ConfigError: no such folder exists.
    """
    checkout = Path(__file__).resolve().parent.parent
    prefixes = [p for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    candidates = [checkout, *(Path(p) / "share/simplevla" for p in [*prefixes, sys.prefix])]
    for candidate in candidates:
        if (candidate / "config/embodiment").is_dir():
            return candidate
    raise ConfigError(
        "the configuration that ships with simplevla was not found in any of "
        + ", ".join(map(str, candidates)),
        "reinstall simplevla, or run from a checkout",
    )


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of the file at ``path``."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part.

    Args:
        path: its folder is made if need be.
        data: the whole content.
        private: only this user may read it, at any moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if not private:  # it was made for this user alone
            os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _fsync_dir(path.parent)


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` when the block ends, and vanishes if it raises.

    Raises:
        FileExistsError: ``path`` already exists (nothing is overwritten).
    """
    if path.exists():
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        os.chmod(scratch, 0o777 & ~_umask())
        os.rename(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    _fsync_dir(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
