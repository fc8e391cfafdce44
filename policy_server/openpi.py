"""openpi's websocket protocol, so that a robot with an unmodified openpi client can use our policies.

After connecting a client is sent the policy's metadata; each message after that is one observation, and
is answered by one message, a map with ``actions`` (K, D) float32. Messages are msgpack with arrays as maps
of ``__ndarray__``, ``data``, ``dtype`` and ``shape``. An observation is a map with

- ``state`` or ``observation/state``: (D,) numbers, rad and m;
- ``images``: {camera: picture}, or ``observation/<camera>``, or, where the policy has one camera,
  ``observation/image``; a picture is uint8, (H, W, 3) or (3, H, W), in the camera's own size;
- ``prompt``: the instruction; may be missing where the policy knows one alone.

What is refused is told as text, ``code: message -> remedy``, which openpi's client raises as an error; the
connection stays open. The protocol knows neither encryption nor authentication, so that it listens on
this machine alone, and not to web pages.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from policy_server.protocol import MessageError
from simplevla.bundle import Manifest
from simplevla.errors import ConfigError, MissingExtraError, SimplevlaError, UnavailableError
from simplevla.observation import Observation

if TYPE_CHECKING:
    from websockets.http11 import Request, Response
    from websockets.sync.server import ServerConnection

    from policy_server.server import PolicyServer

_REMEDY = 'send {"state": ..., "images": {camera: ...}, "prompt": ...} as the metadata says'
_DTYPES = {name: np.dtype(name) for name in ("|u1", "<f4", "<f8", "<i4", "<i8")}
_MAX_DIMENSIONS = 4
_MAX_CLIENTS = 32
_MAX_EXTRA_BYTES = 1 << 20
_ANSWER_S = 30.0

_log = logging.getLogger(__name__)


class OpenpiEndpoint:
    """Answers openpi's clients with what a policy server answers. A context manager."""

    def __init__(self, server: PolicyServer, port: int, host: str = "127.0.0.1") -> None:
        """Prepare to listen.

        Args:
            server: what answers; must be serving.
            port: 0 for a free one.
            host: a loopback address.

        Raises:
            ConfigError: other machines could reach the host.
            MissingExtraError: websockets is not installed.
        """
        try:
            import websockets.exceptions
            import websockets.sync.server
        except ImportError as error:
            raise MissingExtraError("websockets", "openpi") from error
        if not ipaddress.ip_address(host).is_loopback:
            raise ConfigError(
                f"{host} can be reached from other machines, and openpi's protocol has no keys",
                "listen on 127.0.0.1 and forward the port with ssh -L",
            )
        self._websockets = websockets
        self._server = server
        self._place = (host, port)
        self._free = threading.BoundedSemaphore(_MAX_CLIENTS)

    def __enter__(self) -> OpenpiEndpoint:
        """Listen.

        Raises:
            UnavailableError: the port is taken.
        """
        host, port = self._place
        try:
            self._listener = self._websockets.sync.server.serve(
                self._converse,
                host,
                port,
                origins=[None],  # a browser names an origin: no web page may drive a robot
                process_request=_healthy,
                compression=None,
                max_size=_message_bytes(self._server.manifest),
                logger=_log,
            )
        except OSError as error:
            raise UnavailableError(
                f"cannot listen on {host}:{port}: {error.strerror}", "choose another --openpi-port"
            ) from error
        self._thread = threading.Thread(target=self._listener.serve_forever, name="openpi", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown()
        self._thread.join()

    @property
    def port(self) -> int:
        """The port that was really taken."""
        return int(self._listener.socket.getsockname()[1])

    def _converse(self, connection: ServerConnection) -> None:
        if not self._free.acquire(blocking=False):
            connection.close(1013, "too many clients")
            return
        client = f"openpi-{connection.remote_address[1]}"
        try:
            connection.send(pack(_metadata(self._server)))
            for message in connection:
                connection.send(self._answer(client, message))
        except self._websockets.exceptions.ConnectionClosed:
            _log.info("%s has gone", client)
        finally:
            self._free.release()

    def _answer(self, client: str, message: str | bytes) -> str | bytes:
        """Return the actions, or in words why there are none."""
        start = time.perf_counter()
        try:
            observation = observation_of(message, self._server.manifest)
            chunk, timing = self._server.ask(client, observation, _ANSWER_S)
        except SimplevlaError as error:
            _log.info("refused (%s): %.200s", error.code, error)
            return f"{error.code}: {error}"
        return pack(
            {
                "actions": chunk.actions,
                "policy_id": chunk.policy_id,
                "server_timing": {
                    "infer_ms": timing.inference_ms,
                    "total_ms": 1e3 * (time.perf_counter() - start),
                },
            }
        )


def observation_of(message: str | bytes, manifest: Manifest) -> Observation:
    """Return the observation in a client's ``message``; its stamp is the time of its arrival.

    Raises:
        MessageError: it is none for this policy.
    """
    if isinstance(message, str):
        raise MessageError("an observation is binary, not text", _REMEDY)
    try:
        given = msgspec.msgpack.decode(message)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, TypeError) as error:
        raise MessageError(f"the observation is not msgpack: {error}", _REMEDY) from error
    if not isinstance(given, dict):
        raise MessageError("the observation is not a map", _REMEDY)
    known = list(manifest.instructions.values())
    prompt = given.get("prompt", known[0] if len(known) == 1 else None)
    if not isinstance(prompt, str):
        raise MessageError("prompt is missing, or no text", _REMEDY)
    state = _array(_first(given, "state", "observation/state"), "state")
    if state.dtype == np.uint8 or state.shape != (manifest.embodiment.dimension,):
        raise MessageError(
            f"state is {state.dtype} {state.shape}, not ({manifest.embodiment.dimension},) numbers", _REMEDY
        )
    with np.errstate(over="ignore"):
        narrow = state.astype(np.float32)
    return Observation(
        images={name: _picture(given, name, manifest) for name in manifest.cameras},
        state=narrow,
        instruction=prompt,
        capture_ns=time.time_ns(),
    )


def pack(value: Mapping[str, Any]) -> bytes:
    """Return ``value`` as msgpack, arrays as openpi's client reads them."""
    return msgspec.msgpack.encode(value, enc_hook=_described)


def _described(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} has no place in an answer")
    return {
        b"__ndarray__": True,
        b"data": np.ascontiguousarray(value).tobytes(),
        b"dtype": value.dtype.str,
        b"shape": value.shape,
    }


def _metadata(server: PolicyServer) -> dict[str, Any]:
    manifest = server.manifest
    cameras = [manifest.embodiment.camera(name) for name in manifest.cameras]
    return {
        "policy_id": server.policy_id,
        "name": manifest.name,
        "images": {camera.name: [camera.height, camera.width, 3] for camera in cameras},
        "state": list(manifest.embodiment.names()),
        "prompts": manifest.instructions,
        "action_horizon": manifest.chunk_length,
        "dt_s": manifest.dt_s,
    }


def _message_bytes(manifest: Manifest) -> int:
    """Return how long an observation may be: every picture of the robot, and some words."""
    pictures = sum(camera.height * camera.width * 3 for camera in manifest.embodiment.cameras)
    return pictures + _MAX_EXTRA_BYTES


def _picture(given: Mapping[Any, Any], name: str, manifest: Manifest) -> NDArray[np.uint8]:
    images = given.get("images")
    inner = images.get(name) if isinstance(images, dict) else None
    alone = ("observation/image",) if len(manifest.cameras) == 1 else ()
    picture = _array(inner if inner is not None else _first(given, f"observation/{name}", *alone), name)
    camera = manifest.embodiment.camera(name)
    want = (camera.height, camera.width, 3)
    if picture.shape == (3, camera.height, camera.width):
        picture = picture.transpose(1, 2, 0)
    if picture.dtype != np.uint8 or picture.shape != want:
        raise MessageError(f"image {name!r} is {picture.dtype} {picture.shape}, not uint8 {want}", _REMEDY)
    return np.ascontiguousarray(picture)


def _first(given: Mapping[Any, Any], *names: str) -> Any:
    for name in names:
        if name in given:
            return given[name]
    raise MessageError(f"the observation has no {names[0]!r}", _REMEDY)


def _array(value: Any, name: str) -> NDArray[Any]:
    """Return the array that openpi's client packed, or that a list of numbers is, checked beforehand."""
    if isinstance(value, list):
        if len(value) > 1024 or not all(type(x) in (int, float) for x in value):
            raise MessageError(f"{name!r} is a list of something else than numbers", _REMEDY)
        try:
            return np.array(value, dtype=np.float64)
        except OverflowError as error:
            raise MessageError(f"{name!r} holds too large a number", _REMEDY) from error
    if not isinstance(value, dict) or value.get(b"__ndarray__") is not True:
        raise MessageError(f"{name!r} is no array", _REMEDY)
    data, shape = value.get(b"data"), value.get(b"shape")
    kind = value.get(b"dtype")
    if isinstance(kind, bytes):
        kind = kind.decode("latin-1")
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise MessageError(f"{name!r} has no type of {', '.join(_DTYPES)}", _REMEDY)
    if (
        not isinstance(data, bytes)
        or not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(size) is int and 0 < size <= 1 << 20 for size in shape)
        or np.prod(shape, dtype=object) * dtype.itemsize != len(data)
    ):
        raise MessageError(f"{name!r} does not have as many bytes as its shape says", _REMEDY)
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _healthy(connection: ServerConnection, request: Request) -> Response | None:
    """Answer openpi's health check; let everything else become a websocket."""
    return connection.respond(HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None
