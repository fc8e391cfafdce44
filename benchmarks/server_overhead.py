"""What asking costs: a request with three images there, a chunk of 25 actions back, and nothing computed.

Side by side, each in a process of its own, a few requests in a row in every round, in changing order: this
project's server through shared memory, TCP, and TCP with keys, sealed or through CURVE alone; openpi's
client (openpi-client from PyPI) with a server of its websocket protocol; plain ZMQ REQ/REP; and copying the
images once, which no transport can be quicker than. Compare the ratios: the milliseconds are those of this
machine, now. With --burst 1 every request finds the caches as the others left them, which hurts the
quickest most. Through shared memory and sealed, ours look for a moment before they sleep, while answers
come that quickly: --spin-us says for how long.

    python -m benchmarks.server_overhead
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from policy_server.backends.base import SessionInfo
from policy_server.client import ClientKeys, PolicyClient
from policy_server.keys import ServerKeys, allow_client, make_keys
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer, ServerOptions
from policy_server.waiting import SPIN_S
from simplevla.action_chunk import ActionChunk
from simplevla.bundle import CodecEntry, Manifest, Provenance
from simplevla.cli import whole_number
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.errors import MissingExtraError, SimplevlaError
from simplevla.observation import Observation

SIZES = ((224, 224), (480, 640))
_CHUNK = 25
_WARM_UP_ROUNDS = 5
_START_S = 60.0
_SHARED, _TCP = "ours, shared memory", "ours, TCP"
_KEYS, _CURVE = "ours, TCP with CURVE keys", "ours, the same with --curve-only"
_OPENPI, _PLAIN, _COPY = "openpi websocket", "plain ZMQ REQ/REP", "copying the images"


@dataclass(frozen=True)
class Ask:
    """One way to ask: what to call, and the process that answers (0 for none)."""

    call: Callable[[Observation], object]
    process: int


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=whole_number(10, 100_000), default=100, help="turns of each (default: 100)"
    )
    parser.add_argument(
        "--burst", type=whole_number(1, 1000), default=10, help="requests in a row of each (default: 10)"
    )
    parser.add_argument(
        "--spin-us", type=whole_number(0, 100_000), default=round(1e6 * SPIN_S),
        help="how long both our sides look before they sleep, microseconds (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole_number(0, 2**31 - 1), default=0, help="of images and order")
    args = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, "
        f"{args.rounds} rounds of {args.burst} requests, seed {args.seed}"
    )
    for height, width in SIZES:
        try:
            times_ms, cpu_ms = measure(
                height,
                width,
                rounds=args.rounds,
                burst=args.burst,
                seed=args.seed,
                spin_s=1e-6 * args.spin_us,
            )
        except SimplevlaError as error:
            print(f"server_overhead: {error}", file=sys.stderr)
            return 2
        print(f"\n3 x {height} x {width}\n\n{table(times_ms, cpu_ms)}", flush=True)
    return 0


def measure(
    height: int, width: int, *, rounds: int, burst: int, seed: int, spin_s: float = SPIN_S
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """Return {way: (requests,) ms for one answer} and {way: (rounds,) ms of CPU of one, both sides}."""
    rng = np.random.default_rng(seed)
    embodiment = three_cameras(height, width)
    observation = Observation(
        images={c.name: rng.integers(0, 256, (height, width, 3), np.uint8) for c in embodiment.cameras},
        state=embodiment.home().astype(np.float32),
        instruction="move the can next to the pot",
        capture_ns=1,
    )
    with ExitStack() as stack:
        asks = _asks(stack, embodiment, spin_s)
        names = list(asks)
        times: dict[str, list[float]] = {name: [] for name in names}
        spent: dict[str, list[float]] = {name: [] for name in names}
        for index in range(-_WARM_UP_ROUNDS, rounds):
            for name in rng.permutation(names):
                ask = asks[name]
                cpu_s = _cpu_s(ask.process)
                took_ms = [_ask_ms(ask, observation) for _ in range(burst)]
                if index >= 0:
                    times[name] += took_ms
                    spent[name].append(1e3 * (_cpu_s(ask.process) - cpu_s) / burst)
    return (
        {name: np.array(values) for name, values in times.items()},
        {name: np.array(values) for name, values in spent.items()},
    )


def _ask_ms(ask: Ask, observation: Observation) -> float:
    start_s = time.perf_counter()
    ask.call(observation)
    return 1e3 * (time.perf_counter() - start_s)


def table(times_ms: dict[str, NDArray[np.float64]], cpu_ms: dict[str, NDArray[np.float64]]) -> str:
    """Return medians, 99th percentiles, mean CPU and ratios as a Markdown table."""
    openpi, tcp = (float(np.median(times_ms[name])) for name in (_OPENPI, _TCP))
    lines = [
        "| one answer | p50 ms | p99 ms | CPU ms | openpi's p50 / this | this / TCP |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, values in times_ms.items():
        p50, p99 = np.percentile(values, [50, 99])
        lines.append(
            f"| {name} | {p50:.3f} | {p99:.3f} | {cpu_ms[name].mean():.3f} "
            f"| {openpi / p50:.2f} | {p50 / tcp:.2f} |"
        )
    return "\n".join(lines)


def three_cameras(height: int, width: int) -> Embodiment:
    """Return two Pipers with three cameras of one size."""
    dual = load_embodiment("piper_dual")
    camera = msgspec.structs.replace(dual.cameras[0], width=width, height=height)
    cameras = tuple(msgspec.structs.replace(camera, name=name) for name in ("head", "left", "right"))
    return msgspec.structs.replace(dual, cameras=cameras)


def small_robot() -> Embodiment:
    """Return one Piper with one very small camera."""
    single = load_embodiment("piper_single")
    return msgspec.structs.replace(
        single, cameras=(msgspec.structs.replace(single.cameras[0], name="head", width=16, height=16),)
    )


def instant_policy(embodiment: Embodiment) -> ServedPolicy:
    """Return a policy that looks at nothing and answers with where the robot is."""
    size = embodiment.dimension
    manifest = Manifest(
        name="instant",
        created_ns=0,
        embodiment=embodiment,
        network={},
        cameras=tuple(camera.name for camera in embodiment.cameras),
        instructions={},
        action_space="joint_absolute",
        chunk_length=_CHUNK,
        dt_s=0.1,
        codec=CodecEntry((0.0,) * size, (1.0,) * size, (True,) * size),
        proprio_low=(),
        proprio_high=(),
        provenance=Provenance(commit="none", config={}, seeds={}, demonstrations=0),
    )
    return ServedPolicy("0" * 64, manifest, _InstantProcessor(), _InstantSession())


class _InstantProcessor:
    continues = False

    def inputs(self, observation: Observation) -> dict[str, NDArray[Any]]:
        return {"state": observation.state[None]}

    def chunk(self, logits: NDArray[np.float32], observation: Observation, policy_id: str) -> ActionChunk:
        return ActionChunk(np.repeat(logits, _CHUNK, axis=0), 0.1, observation.capture_ns, policy_id)


class _InstantSession:
    info = SessionInfo("instant", "1", "none", "none")

    def run(self, inputs: Any) -> NDArray[np.float32]:
        state: NDArray[np.float32] = inputs["state"]
        return state


def _asks(stack: ExitStack, embodiment: Embodiment, spin_s: float) -> dict[str, Ask]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    make_keys(folder, "server")
    allow_client(folder, make_keys(folder, "robot"))
    keys = ClientKeys.load(folder, "robot")
    plain_address, plain_process = stack.enter_context(_process(_serve_ours, embodiment, None, spin_s))
    keyed_address, keyed_process = stack.enter_context(_process(_serve_ours, embodiment, folder, spin_s))

    def client(address: str, keys: ClientKeys | None, *, local: bool, sealed: bool = True) -> PolicyClient:
        return stack.enter_context(
            PolicyClient(
                address,
                embodiment=embodiment,
                timeout_s=30,
                keys=keys,
                local=local,
                sealed=sealed,
                spin_s=spin_s,
            )
        )

    shared = client(plain_address, None, local=True)
    if shared.transport != "shared memory":
        raise SimplevlaError("there is no shared memory on this system", "run it on Linux")
    tcp = client(plain_address, None, local=False)
    sealed = client(keyed_address, keys, local=False)
    if sealed.transport != "network, sealed":
        raise MissingExtraError("cryptography", "robot")
    curve = client(keyed_address, keys, local=False, sealed=False)
    openpi_port, openpi_process = stack.enter_context(_process(_serve_openpi))
    zmq_port, zmq_process = stack.enter_context(_process(_serve_plain_zmq))
    place = {c.name: np.empty((c.height, c.width, 3), np.uint8) for c in embodiment.cameras}

    def copy(observation: Observation) -> None:
        for name, image in observation.images.items():
            np.copyto(place[name], image)

    return {
        _SHARED: Ask(shared.act, plain_process),
        _TCP: Ask(tcp.act, plain_process),
        _KEYS: Ask(sealed.act, keyed_process),
        _CURVE: Ask(curve.act, keyed_process),
        _OPENPI: Ask(_openpi_ask(openpi_port), openpi_process),
        _PLAIN: Ask(_plain_zmq_ask(stack, zmq_port), zmq_process),
        _COPY: Ask(copy, 0),
    }


def _serve_ours(said: Connection, embodiment: Embodiment, keys: Path | None, spin_s: float) -> None:
    options = ServerOptions(keys=ServerKeys.load(keys) if keys else None, spin_s=spin_s)
    with PolicyServer(instant_policy(embodiment), "tcp://127.0.0.1:*", options) as server:
        said.send(server.address)
        server.serve()


def _serve_openpi(said: Connection) -> None:
    """Serve openpi's protocol: metadata first, then an answer in msgpack for each observation."""
    import asyncio

    from openpi_client import msgpack_numpy
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.exceptions import ConnectionClosed

    actions = np.zeros((_CHUNK, 14), np.float32)

    async def answer(connection: ServerConnection) -> None:
        packer = msgpack_numpy.Packer()
        await connection.send(packer.pack({"name": "instant"}))
        while True:
            try:
                start_s = time.monotonic()
                msgpack_numpy.unpackb(await connection.recv())
            except ConnectionClosed:
                return
            timing = {"infer_ms": 1e3 * (time.monotonic() - start_s)}
            await connection.send(packer.pack({"actions": actions, "server_timing": timing}))

    async def run() -> None:
        async with serve(answer, "127.0.0.1", 0, compression=None, max_size=None) as server:
            said.send(next(iter(server.sockets)).getsockname()[1])
            await server.serve_forever()

    asyncio.run(run())


def _openpi_ask(port: int) -> Callable[[Observation], object]:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    client = WebsocketClientPolicy("127.0.0.1", port)

    def ask(observation: Observation) -> object:
        said = {f"observation/{name}": image for name, image in observation.images.items()}
        return client.infer(
            {**said, "observation/state": observation.state, "prompt": observation.instruction}
        )

    return ask


def _serve_plain_zmq(said: Connection) -> None:
    """Serve REQ/REP as one writes it first: everything in one msgpack message, in both directions."""
    import zmq

    socket = zmq.Context().socket(zmq.REP)
    said.send(socket.bind_to_random_port("tcp://127.0.0.1"))
    actions = np.zeros((_CHUNK, 14), np.float32)
    while True:
        heard = msgspec.msgpack.decode(socket.recv())
        for value in heard["images"].values():
            np.frombuffer(value, np.uint8)
        socket.send(msgspec.msgpack.encode({"shape": actions.shape, "actions": actions.tobytes()}))


def _plain_zmq_ask(stack: ExitStack, port: int) -> Callable[[Observation], object]:
    import zmq

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stack.callback(context.destroy, linger=0)
    socket = context.socket(zmq.REQ)
    socket.connect(f"tcp://127.0.0.1:{port}")

    def ask(observation: Observation) -> object:
        images = {name: image.tobytes() for name, image in observation.images.items()}
        said = {"images": images, "state": observation.state.tobytes(), "prompt": observation.instruction}
        socket.send(msgspec.msgpack.encode(said))
        heard = msgspec.msgpack.decode(socket.recv())
        return np.frombuffer(heard["actions"], np.float32).reshape(heard["shape"])

    return ask


@contextmanager
def _process(serve: Callable[..., None], *arguments: object) -> Iterator[tuple[Any, int]]:
    """Run ``serve`` in a process of its own; yield where it says that it listens, and its number."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        if not ours.poll(_START_S):
            raise SimplevlaError(f"{serve.__name__} did not start", "read its message above")
        assert process.pid is not None
        yield ours.recv(), process.pid
    except EOFError:
        raise MissingExtraError("openpi-client, websockets or pyzmq", "dev") from None
    finally:
        process.terminate()
        process.join(5)


def _cpu_s(process: int) -> float:
    """Return the CPU time of this process and of ``process``, all their threads, s."""
    spent_s = time.process_time()
    if process:
        for task in Path(f"/proc/{process}/task").iterdir():
            spent_s += int((task / "schedstat").read_text().split()[0]) / 1e9
    return spent_s


if __name__ == "__main__":
    sys.exit(main())
