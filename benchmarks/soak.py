"""Many clients at one server for minutes, as badly behaved as they come, and what became of it.

Each client is a process: it asks well, through shared memory or TCP, checks that the answer is the one to
its own question, and in between sends what is malformed, oversized, stale or more than it may, drops its
connection, or is killed and comes back. Every valid request must be answered once, with a chunk or with a
refusal that says why; memory, files and threads of the server must not grow; and when all clients are
gone nothing of theirs may be left.

    python -m benchmarks.soak --clients 16 --minutes 10 --report results/soak.md
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from benchmarks.server_overhead import instant_policy, small_robot
from policy_server import messages, protocol
from policy_server.client import PolicyClient, RemoteError
from policy_server.datagram import MAGIC
from policy_server.local_link import GoneError, LocalLink
from policy_server.server import PolicyServer
from simplevla.cli import whole_number
from simplevla.embodiment import Embodiment
from simplevla.errors import SimplevlaError, UnavailableError
from simplevla.files import write_atomic
from simplevla.observation import Observation

COUNTS = ("asked", "answered", "refused", "unanswered", "twice", "wrong", "nonsense")
_TIMEOUT_S = 20.0
_MAX_GROWTH_MIB = 16.0
_MAX_MORE_FILES = 64
_GONE_S = 10.0
_SETTLED = 0.3  # of the time: until then caches and pools may fill


@dataclass(frozen=True)
class Sample:
    """What the server's process held at one moment."""

    memory_mib: float
    files: int
    threads: int
    rings: int


@dataclass(frozen=True)
class Result:
    """How it went.

    Attributes:
        counts: by the names in :data:`COUNTS`, of all clients.
        kills: clients that were killed.
        settled, last, left: the server's process after a while, at the end, and with all clients gone.
        status: what the server itself counted.
    """

    counts: dict[str, int]
    kills: int
    settled: Sample
    last: Sample
    left: Sample
    status: protocol.Status

    @property
    def problems(self) -> list[str]:
        """What must not be."""
        counts = self.counts
        grown = self.last.memory_mib - self.settled.memory_mib
        found = {
            "nothing was asked": counts["asked"] == 0,
            "requests without an answer": counts["unanswered"] > 0,
            "requests with two answers": counts["twice"] > 0,
            "answers to another question": counts["wrong"] > 0,
            f"memory grew by {grown:.1f} MiB": grown > _MAX_GROWTH_MIB,
            f"{self.left.rings} shared memories are left": self.left.rings > 0,
            "threads are left": self.left.threads > self.settled.threads,
            f"{self.left.files} files are left open": self.left.files > self.settled.files,
            "ever more files are open": self.last.files > self.settled.files + _MAX_MORE_FILES,
        }
        return [what for what, is_so in found.items() if is_so]


def main() -> int:
    """Run and report; returns 0 if all is well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=whole_number(1, 64), default=16, help="default: 16")
    parser.add_argument("--minutes", type=float, default=10.0, help="default: 10")
    parser.add_argument("--kill-every", type=float, default=3.0, metavar="S", help="default: 3")
    parser.add_argument("--seed", type=whole_number(0, 2**31 - 1), default=0, help="default: 0")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the report there too")
    args = parser.parse_args()
    result = soak(args.clients, 60 * args.minutes, kill_every_s=args.kill_every, seed=args.seed)
    command = (
        f"python -m benchmarks.soak --clients {args.clients} --minutes {args.minutes:g} --seed {args.seed}"
    )
    text = report(result, command)
    print(text)
    if args.report:
        write_atomic(args.report, text.encode())
    return 1 if result.problems else 0


def soak(clients: int, seconds: float, *, kill_every_s: float, seed: int) -> Result:
    """Let ``clients`` loose on a server for ``seconds``, killing one every ``kill_every_s``."""
    rng = random.Random(seed)  # noqa: S311 - which mischief is next, no secret
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.server_overhead"])
    embodiment = small_robot()
    counts = context.RawArray("q", clients * len(COUNTS))
    with _served(context, embodiment) as (address, process):

        def start(place: int) -> Any:
            child = context.Process(
                target=_misbehave,
                args=(address, embodiment, counts, place, rng.getrandbits(32)),
                daemon=True,
            )
            child.start()
            return child

        running = [start(place) for place in range(clients)]
        kills = 0
        began_s = time.monotonic()
        settled = _sample(process)
        try:
            while (passed_s := time.monotonic() - began_s) < seconds:
                time.sleep(min(kill_every_s, seconds - passed_s))
                if passed_s < _SETTLED * seconds:
                    settled = _sample(process)
                place = rng.randrange(clients)
                running[place].kill()
                running[place].join()
                kills += 1
                running[place] = start(place)
            last = _sample(process)
        finally:
            for child in running:
                child.kill()
                child.join()
        give_up_s = time.monotonic() + _GONE_S
        while (left := _sample(process)).rings and time.monotonic() < give_up_s:
            time.sleep(0.1)
        with PolicyClient(address, embodiment=embodiment, timeout_s=_TIMEOUT_S, local=False) as client:
            status = client.health()
    total = {
        name: sum(counts[place * len(COUNTS) + index] for place in range(clients))
        for index, name in enumerate(COUNTS)
    }
    return Result(total, kills, settled, last, left, status)


def report(result: Result, command: str) -> str:
    """Return the result as Markdown."""
    lines = [
        "# Soak of the policy server",
        "",
        f"`{command}`, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}",
        "",
        "| valid requests | |",
        "| --- | --- |",
        *(f"| {name} | {result.counts[name]} |" for name in COUNTS[:-1]),
        "",
        f"Beside them {result.counts['nonsense']} messages of nonsense; {result.kills} clients killed. "
        f"The server counted {result.status.answered} answers and {result.status.refused} refusals.",
        "",
        "| server's process | memory MiB | open files | threads | shared memories |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, sample in (("settled", result.settled), ("end", result.last), ("clients gone", result.left)):
        lines.append(
            f"| {name} | {sample.memory_mib:.1f} | {sample.files} | {sample.threads} | {sample.rings} |"
        )
    verdict = "passed" if not result.problems else "FAILED: " + "; ".join(result.problems)
    return "\n".join([*lines, "", f"Verdict: {verdict}", ""])


class _Client:
    """One client process: behaves well and badly by turns, and keeps count."""

    def __init__(
        self, address: str, embodiment: Embodiment, count: Callable[[str], None], seed: int
    ) -> None:
        self.address = address
        self.embodiment = embodiment
        self.count = count
        self.rng = random.Random(seed)  # noqa: S311 - which mischief is next, no secret
        self.home = embodiment.home().astype(np.float32)
        self.number = 0

    def observation(self) -> Observation:
        """Return a question that no other client asks, so that its answer can be told from theirs."""
        self.number += 1
        state = self.home.copy()
        state[0] += np.float32(self.rng.uniform(-0.1, 0.1))
        camera = self.embodiment.cameras[0]
        image = np.full((camera.height, camera.width, 3), self.number % 256, np.uint8)
        return Observation({camera.name: image}, state, "go", capture_ns=self.number)

    def run(self) -> None:
        """Go on until killed."""
        ways = (
            self.ask_well,
            self.ask_well,
            self.ask_much,
            self.ask_too_late,
            self.talk_nonsense,
            self.knock,
        )
        while True:
            with contextlib.suppress(UnavailableError):
                self.rng.choice(ways)()

    def ask_well(self) -> None:
        """Ask one thing after another, by either way."""
        local = self.rng.random() < 0.6
        with PolicyClient(
            self.address, embodiment=self.embodiment, timeout_s=_TIMEOUT_S, local=local
        ) as client:
            for _ in range(self.rng.randint(1, 60)):
                observation = self.observation()
                self.count("asked")
                try:
                    reply = client.act(observation)
                except RemoteError:
                    self.count("refused")
                except UnavailableError:
                    self.count("unanswered")
                    raise
                else:
                    right = (reply.chunk.actions == observation.state).all()
                    self.count("answered" if right else "wrong")

    def ask_much(self) -> None:
        """Send several requests before the first answer: of each there must be exactly one."""
        with _socket(self.address) as raw:
            raw.send_multipart(messages.encode(protocol.Hello(request=1, embodiment=self.embodiment)))
            waiting = {1: None}
            for request in range(2, self.rng.randint(3, 12)):
                observation = waiting[request] = self.observation()
                raw.send_multipart(
                    messages.encode_observation(request, observation, list(observation.images))
                )
                self.count("asked")
            give_up_s = time.monotonic() + _TIMEOUT_S
            heard: set[int] = set()
            while (set(waiting) - heard and time.monotonic() < give_up_s) or raw.poll(20):
                if not raw.poll(1000):
                    continue
                message = messages.decode(raw.recv_multipart())
                request = message.header.request
                if request in heard:
                    self.count("twice")
                heard.add(request)
                self._judge(message, waiting.get(request))
            for _ in set(waiting) - heard:
                self.count("unanswered")

    def ask_too_late(self) -> None:
        """Ask for an answer by a time that has passed: it must be refused."""
        with _socket(self.address) as raw:
            raw.send_multipart(messages.encode(protocol.Hello(request=1, embodiment=self.embodiment)))
            observation = self.observation()
            raw.send_multipart(
                messages.encode_observation(2, observation, list(observation.images), deadline_ns=1)
            )
            self.count("asked")
            heard = [messages.decode(raw.recv_multipart()) for _ in range(2) if raw.poll(1000 * _TIMEOUT_S)]
            if len(heard) < 2:
                self.count("unanswered")
            else:
                refused = isinstance(heard[1].header, protocol.Error)
                self.count("refused" if refused else "wrong")

    def talk_nonsense(self) -> None:
        """Send what is no message, too much of one, or one that lies about itself."""
        observation = self.observation()
        good = [bytes(p) for p in messages.encode_observation(3, observation, list(observation.images))]
        noise = self.rng.randbytes(self.rng.randint(0, 4000))
        flipped = bytearray(good[0])
        flipped[self.rng.randrange(len(flipped))] ^= 1 << self.rng.randrange(8)
        with _socket(self.address) as raw:
            for parts in (
                [noise],
                [bytes(flipped), *good[1:]],
                good[:-1],
                [*good, b"more"],
                [good[0], *[b"x"] * 100],
                [good[0], bytes(self.rng.choice([100, 70_000, 900_000])), *good[2:]],
                [bytes(2 << 20)],  # larger than the socket takes: it hangs up
                [msgspec.msgpack.encode({"type": "act", "schema": 3, "request": 1, "arrays": [[[]]] * 9})],
            ):
                raw.send_multipart(parts)
                self.count("nonsense")
            raw.poll(50)

    def knock(self) -> None:
        """Come to the local socket with a wrong word, leave in the middle, or lie about a slot."""
        with PolicyClient(
            self.address, embodiment=self.embodiment, timeout_s=_TIMEOUT_S, local=False
        ) as client:
            offer = client.offer
        if offer is None:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(offer.path)
            if self.rng.random() < 0.5:
                stranger.send(self.rng.randbytes(40))
            self.count("nonsense")
        with contextlib.suppress(SimplevlaError, GoneError):
            link = LocalLink(offer, _TIMEOUT_S)
            try:
                for _ in range(self.rng.randint(1, 20)):
                    datagram = MAGIC + self.rng.randbytes(self.rng.randint(0, 60))
                    socket.socket(fileno=os.dup(link.fileno())).send(datagram)
                    self.count("nonsense")
                    link.receive(0.001)
            finally:
                link.close()

    def _judge(self, message: messages.Message, asked: Observation | None) -> None:
        if asked is None:
            return
        if isinstance(message.header, protocol.Error):
            known = message.header.code in ("superseded", "too_late")
            self.count("refused" if known else "wrong")
        else:
            chunk = messages.decode_chunk(message)
            right = chunk.capture_ns == asked.capture_ns and (chunk.actions == asked.state).all()
            self.count("answered" if right else "wrong")


def _misbehave(address: str, embodiment: Embodiment, counts: Any, place: int, seed: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def count(name: str) -> None:
        counts[place * len(COUNTS) + COUNTS.index(name)] += 1

    _Client(address, embodiment, count, seed).run()


@contextlib.contextmanager
def _socket(address: str) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        raw = context.socket(zmq.DEALER)
        raw.connect(address)
        yield raw
    finally:
        context.destroy(linger=0)


@contextlib.contextmanager
def _served(context: Any, embodiment: Embodiment) -> Iterator[tuple[str, int]]:
    """Run a server in a process of its own; yield its address and its process."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, embodiment), daemon=True)
    process.start()
    try:
        yield ours.recv(), process.pid
        if process.exitcode is not None:
            raise UnavailableError(f"the server ended with {process.exitcode}", "read its message above")
    finally:
        process.terminate()
        process.join(10)


def _serve(said: Connection, embodiment: Embodiment) -> None:
    policy = instant_policy(embodiment)
    batching = dataclasses.replace(policy, session=_SlowSession(policy.session))
    with PolicyServer(batching, "tcp://127.0.0.1:*") as server:
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        said.send(server.address)
        server.serve()


class _SlowSession:
    """Takes its time, so that requests meet, and answers up to four at once."""

    def __init__(self, instant: Any) -> None:
        self.info = dataclasses.replace(instant.info, max_batch=4)
        self._instant = instant

    def run(self, inputs: Any) -> Any:
        time.sleep(0.002)
        return self._instant.run(inputs)


def _sample(process: int) -> Sample:
    folder = Path(f"/proc/{process}")
    fields = dict(
        line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line
    )
    rings = sum("memfd:simplevla-frames" in line for line in (folder / "maps").read_text().splitlines())
    return Sample(
        memory_mib=int(fields["VmRSS"].split()[0]) / 1024,
        files=len(list((folder / "fd").iterdir())),
        threads=int(fields["Threads"]),
        rings=rings,
    )


if __name__ == "__main__":
    sys.exit(main())
