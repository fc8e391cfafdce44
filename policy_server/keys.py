"""CURVE keys: who a server is, and which clients it lets in.

A key is one line of text in a file. ``NAME.secret`` stays on its machine and is readable by its user
alone; ``NAME.public`` is what others need. In a server's folder ``clients/`` holds the public keys of those
who may connect; it is read at each connection, so that a key that is removed opens nothing any more.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy_server.address import is_on_this_machine
from simplevla.errors import ConfigError, MissingExtraError
from simplevla.files import write_atomic

SERVER = "server"
ENVIRONMENT = "SIMPLEVLA_KEYS"
_CLIENTS = "clients"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KEY = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_MAX_FILE_BYTES = 256


@dataclass(frozen=True, repr=False)
class ServerKeys:
    """A server's own pair, and where the keys of its clients are."""

    secret: bytes
    public: bytes
    clients: Path

    @classmethod
    def load(cls, folder: Path) -> ServerKeys:
        """Return the keys in ``folder``.

        Raises:
            ConfigError: there is none, it is damaged, or others can read the secret one.
        """
        secret = _read_secret(folder / f"{SERVER}.secret")
        return cls(secret, _zmq().curve_public(secret), folder / _CLIENTS)

    def callback(self, _domain: str, key: bytes) -> bool:
        """Return whether the holder of the public ``key`` may connect; what pyzmq's authenticator asks."""
        return key in {_read_key(file) for file in self.clients.glob("*.public")}


@dataclass(frozen=True, repr=False)
class ClientKeys:
    """A client's own pair, and the public key of the one server that it will speak to."""

    secret: bytes
    public: bytes
    server: bytes

    @classmethod
    def load(cls, folder: Path, name: str) -> ClientKeys:
        """Return the keys of the client ``name`` and of its server in ``folder``.

        Raises:
            ConfigError: there is none, it is damaged, or others can read the secret one.
        """
        secret = _read_secret(folder / f"{_checked(name)}.secret")
        return cls(secret, _zmq().curve_public(secret), _read_key(folder / f"{SERVER}.public"))

    @classmethod
    def find(cls, folder: Path) -> ClientKeys:
        """Return the keys of the only client in ``folder``.

        Raises:
            ConfigError: there is none, or more than one.
        """
        names = [file.stem for file in folder.glob("*.secret") if file.stem != SERVER]
        if len(names) != 1:
            raise ConfigError(
                f"{folder} holds the keys of {len(names)} clients, not of one",
                "make them with: simplevla keys new NAME",
            )
        return cls.load(folder, names[0])


def keys_for(address: str) -> ClientKeys | None:
    """Return the keys in the folder that SIMPLEVLA_KEYS names, for a server on another machine.

    None for one on this machine, or if no folder is named.

    Raises:
        ConfigError: the folder does not hold the keys of one client and of its server.
    """
    folder = os.environ.get(ENVIRONMENT, "")
    return ClientKeys.find(Path(folder)) if folder and not is_on_this_machine(address) else None


def default_folder() -> Path:
    """Return where keys are unless told otherwise."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "simplevla" / "keys"


def make_keys(folder: Path, name: str) -> Path:
    """Make a pair for ``name``, ``server`` being the server's; return the file of the public one.

    Raises:
        ConfigError: the name is none, or has keys already.
    """
    secret_path, public_path = (folder / f"{_checked(name)}.{kind}" for kind in ("secret", "public"))
    if secret_path.exists() or public_path.exists():
        raise ConfigError(f"{name} has keys in {folder} already", "choose another name, or remove them")
    public, secret = _zmq().curve_keypair()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(secret_path, secret + b"\n", private=True)
    write_atomic(public_path, public + b"\n")
    return public_path


def allow_client(folder: Path, public: Path) -> Path:
    """Let the holder of the key in the file ``public`` connect to the server of ``folder``.

    Raises:
        ConfigError: it is no public key, or another key has its name.
    """
    name = _checked(public.name.removesuffix(".public"))
    key = _read_key(public)
    target = folder / _CLIENTS / f"{name}.public"
    if target.exists() and _read_key(target) != key:
        raise ConfigError(f"another key is called {name}", f"remove {target}, or rename the new one")
    write_atomic(target, key + b"\n")
    return target


def forget_client(folder: Path, name: str) -> None:
    """Let the client ``name`` connect no more.

    Raises:
        ConfigError: it could not before.
    """
    path = folder / _CLIENTS / f"{_checked(name)}.public"
    if not path.exists():
        raise ConfigError(f"{name} is not one of the clients", "see: simplevla keys list")
    path.unlink()


def known_clients(folder: Path) -> list[str]:
    """Return who may connect to the server of ``folder``."""
    return sorted(file.stem for file in (folder / _CLIENTS).glob("*.public"))


def trust_server(folder: Path, public: Path) -> Path:
    """Let the clients of ``folder`` speak to the server whose key is in the file ``public``.

    Raises:
        ConfigError: it is no public key.
    """
    target = folder / f"{SERVER}.public"
    write_atomic(target, _read_key(public) + b"\n")
    return target


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a key", "use letters, digits, _ and -")
    return name


def _read_secret(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"there is no secret key {path}: {error.strerror}", f"make one: simplevla keys new {path.stem}"
        ) from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"others can read {path}", f"make new keys, or if you trust it: chmod 600 {path}")
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            key = stream.read(_MAX_FILE_BYTES).strip()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "copy the key there") from error
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{path} holds no key", "copy the file anew")
    return key


def _zmq() -> Any:
    try:
        import zmq
    except ImportError as error:
        raise MissingExtraError("pyzmq", "robot") from error
    return zmq
