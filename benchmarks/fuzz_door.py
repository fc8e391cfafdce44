"""Throws made-up messages at the server's door, guided by the code that they reach (atheris, libFuzzer).

Three kinds take turns: bytes as a datagram of the local socket, bytes cut into the parts of a network
message, and headers built field by field from odd values. Each must be answered once, with a typed refusal
or an answer, or wait for its turn; anything raised, a second of silence or memory that grows is a finding.
The same seed throws the same messages.

    python -m benchmarks.fuzz_door --inputs 1000000 --report results/fuzz_door.md
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simplevla.cli import whole_number
from simplevla.errors import MissingExtraError, SimplevlaError
from simplevla.files import write_atomic

_SLOT_BYTES = 4096
_SAY_EVERY = 50_000
_MAX_GROWTH_MIB = 64.0
_SECONDS_AN_INPUT = 5
_CHILD = "--child"


def main() -> int:
    """Run the fuzzer and report; returns 0 if nothing was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--inputs", type=whole_number(1000, 1_000_000_000), default=1_000_000, help="default: 1000000"
    )
    parser.add_argument("--seed", type=whole_number(1, 2**31 - 1), default=1, help="default: 1")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the report there too")
    args = parser.parse_args()
    try:
        passed, text = run(args.inputs, args.seed)
    except SimplevlaError as error:
        print(f"fuzz_door: {error}", file=sys.stderr)
        return 2
    print(text)
    if args.report:
        write_atomic(args.report, text.encode())
    return 0 if passed else 1


def run(inputs: int, seed: int) -> tuple[bool, str]:
    """Throw ``inputs`` messages; return whether nothing was found, and the report.

    Raises:
        MissingExtraError: atheris is not installed.
    """
    try:
        import atheris  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("atheris", "dev") from error
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        for index, message in enumerate(_examples()):
            (corpus / f"example-{index:02d}").write_bytes(message)
        command = [sys.executable, "-m", "benchmarks.fuzz_door", _CHILD, str(corpus)]
        flags = [
            f"-runs={inputs}",
            f"-seed={seed}",
            "-max_len=2048",
            f"-timeout={_SECONDS_AN_INPUT}",
            f"-artifact_prefix={scratch}/",
            "-print_final_stats=1",
        ]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
    thrown = _last(r"^stat::number_of_executed_units:\s*(\d+)", said)
    reached = _last(r"cov: (\d+)", said)
    memory = [float(found) for found in re.findall(r"^memory (\S+) MiB", said, re.M)]
    growth = memory[-1] - memory[0] if memory else 0.0
    counts = (re.findall(r"^counts (.*)$", said, re.M) or ["none"])[-1]
    passed = done.returncode == 0 and thrown >= inputs and growth <= _MAX_GROWTH_MIB
    finding = "" if passed else "\n\n```\n" + "\n".join(said.splitlines()[-40:]) + "\n```"
    return passed, (
        f"# Fuzzing the message door\n\n"
        f"`python -m benchmarks.fuzz_door --inputs {inputs} --seed {seed}`, Python "
        f"{platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}\n\n"
        f"| | |\n| --- | --- |\n"
        f"| messages thrown | {thrown} |\n"
        f"| of these | {counts} |\n"
        f"| branches reached | {reached} |\n"
        f"| crash, hang or unexpected error | {'none' if done.returncode == 0 else 'found, see below'} |\n"
        f"| memory grew by | {growth:.1f} MiB |\n"
        f"| seconds | {time.monotonic() - start_s:.0f} |\n"
        f"| verdict | {'passed' if passed else 'FAILED'} |{finding}\n"
    )


def _last(pattern: str, text: str) -> int:
    return int((re.findall(pattern, text, re.M) or ["0"])[-1])


def _examples() -> list[bytes]:
    """Return sound messages of every kind to begin with, as the three kinds of input."""
    import numpy as np

    from benchmarks.server_overhead import small_robot
    from policy_server import messages, protocol
    from policy_server.datagram import split  # the same bytes as on the socket
    from simplevla.observation import Observation

    embodiment = small_robot()
    observation = Observation(
        images={c.name: np.full((c.height, c.width, 3), 9, np.uint8) for c in embodiment.cameras},
        state=embodiment.home().astype(np.float32),
        instruction="go",
        capture_ns=1,
        committed=np.zeros((2, embodiment.dimension), np.float32),
    )
    cameras = list(observation.images)
    sound: list[Sequence[protocol.Part]] = [
        messages.encode(protocol.Hello(request=1, embodiment=embodiment)),
        messages.encode(protocol.Health(request=2)),
        messages.encode_observation(3, observation, cameras),
        messages.encode_observation(4, observation, cameras, deadline_ns=1),
        messages.encode_observation(5, observation, cameras, jpeg_quality=50),
    ]
    found = []
    for parts in sound:
        found.append(b"\x00" + b"".join(bytes(piece) for piece in split(parts, -1)[0]))
        cut = b"".join(len(part).to_bytes(2, "little") + bytes(part) for part in parts)
        found.append(b"\x01" + cut)
    found += [b"\x02" + bytes(range(60)), b"\x02" + bytes(200)]
    return found


def _fuzz(arguments: list[str]) -> None:
    """Throw messages until libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["policy_server", "simplevla"]):
        import policy_server.server  # noqa: F401
    from benchmarks.server_overhead import instant_policy, small_robot
    from policy_server.datagram import unpack
    from policy_server.door import Received
    from policy_server.protocol import MessageError
    from policy_server.server import PolicyServer

    peer = _Peer()
    counts = {"refused": 0, "answered": 0, "taken in": 0}

    def throw(data: bytes) -> None:
        before = len(peer.heard)
        kind, rest = data[:1], data[1:]
        error = None
        parts: list[Any] = []
        if kind == b"\x01":
            parts = _cut(rest)
        elif kind == b"\x02":
            parts = _made_up(atheris.FuzzedDataProvider(rest))
        else:
            try:
                parts = unpack(rest, slots)
            except MessageError as refused:
                error = refused
        server.take(Received(peer, parts, time.perf_counter(), error))
        jobs = server.due()
        for job in jobs:
            server.answer([job])
        said = len(peer.heard) - before
        if said != 1:
            raise AssertionError(f"{said} answers")
        counts["answered" if peer.heard[-1] else "refused"] += 1
        counts["taken in"] += len(jobs)
        del peer.heard[:]
        total = counts["answered"] + counts["refused"]
        if total % _SAY_EVERY == 0 or total == 2000:
            print(f"memory {_memory_mib():.1f} MiB\ncounts {counts}", flush=True)

    slots = [memoryview(bytearray(_SLOT_BYTES))]
    with PolicyServer(instant_policy(small_robot()), "tcp://127.0.0.1:*") as server:
        server.welcome(peer)
        atheris.Setup([sys.argv[0], *arguments], throw)
        atheris.Fuzz()


class _Peer:
    """Notes of each answer whether it was one, rather than a refusal."""

    is_near = True
    may_seal = False

    def __init__(self) -> None:
        self.heard: list[bool] = []

    def send(self, parts: Sequence[Any]) -> None:
        from policy_server import messages, protocol

        self.heard.append(not isinstance(messages.decode(parts).header, protocol.Error))


def _cut(data: bytes) -> list[bytes]:
    """Return the parts of a message, each with its length before it; the last may be shorter."""
    parts = []
    while len(data) >= 2:
        size = int.from_bytes(data[:2], "little")
        parts.append(data[2 : 2 + size])
        data = data[2 + size :]
    return parts


def _made_up(given: Any) -> list[bytes]:
    """Return a message whose header has the right keys, mostly, and odd values."""
    import msgspec

    plain: list[Callable[[], Any]] = [
        lambda: given.ConsumeInt(8),
        given.ConsumeFloat,
        lambda: given.ConsumeUnicodeNoSurrogates(12),
        lambda: given.ConsumeBytes(12),
        lambda: given.PickValueInList([None, True, False, 0, 1, -1, 2, 2**63, "act", "state"]),
        lambda: {"name": "state", "dtype": "float32", "shape": [given.ConsumeIntInRange(-1, 20)]},
        lambda: {"name": "image/head", "dtype": "uint8", "shape": [16, 16, 3]},
    ]

    def value(depth: int = 0) -> Any:
        kind = given.ConsumeIntInRange(0, len(plain) + (2 if depth < 3 else 0) - 1)
        if kind < len(plain):
            return plain[kind]()
        inner = [value(depth + 1) for _ in range(given.ConsumeIntInRange(0, 4))]
        return inner if kind == len(plain) else {str(index): each for index, each in enumerate(inner)}

    header = {"type": "act", "schema": 3, "request": 7, "instruction": "go", "capture_ns": 1}
    keys = [*header, "arrays", "episode", "last_action", "deadline_ns", "embodiment", "odd"]
    for _ in range(given.ConsumeIntInRange(0, 5)):
        header[given.PickValueInList(keys)] = value()
    parts = [bytes(given.ConsumeIntInRange(0, 800)) for _ in range(given.ConsumeIntInRange(0, 3))]
    try:
        return [msgspec.msgpack.encode(header), *parts]
    except OverflowError:
        return [b"", *parts]


def _memory_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        _fuzz(sys.argv[2:])
    sys.exit(main())
