"""How long a chunk takes: each back end, called directly and through the server.

Every round asks each of them once, one after the other, so that whatever else the machine does falls on
all alike. Compare the ratios; the milliseconds are those of this machine, now.

    python -m benchmarks.server_latency BUNDLE --rounds 200
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from policy_server.backends import BACKENDS, open_session
from policy_server.backends.base import SessionOptions
from policy_server.client import PolicyClient
from policy_server.compiler import compile_bundle, plausible_observations
from policy_server.served_policy import ServedPolicy
from simplevla.bundle import Bundle, load_bundle
from simplevla.cli import whole_number
from simplevla.errors import SimplevlaError, UnavailableError
from simplevla.observation import Observation

_WARM_UP_ROUNDS = 5
_SERVE = [sys.executable, "-c", "import sys; from simplevla.cli import main; sys.exit(main())", "serve"]


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the policy bundle")
    parser.add_argument(
        "--rounds", type=whole_number(10, 100_000), default=100, help="answers of each (default: 100)"
    )
    parser.add_argument(
        "--threads", type=whole_number(0, 1024), default=0, help="threads of each (default: 0, all cores)"
    )
    args = parser.parse_args()
    try:
        bundle = load_bundle(args.bundle)
        times_ms = measure(bundle, rounds=args.rounds, threads=args.threads)
    except SimplevlaError as error:
        print(f"server_latency: {error}", file=sys.stderr)
        return 2
    print(f"{bundle.manifest.name} {bundle.id[:12]}, threads {args.threads or 'all'}, {args.rounds} rounds")
    print(f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    print(table(times_ms))
    return 0


def measure(bundle: Bundle, *, rounds: int, threads: int) -> dict[str, NDArray[np.float64]]:
    """Return {what was asked: (rounds,) ms for one chunk}."""
    compile_bundle(bundle)
    observations = plausible_observations(bundle.manifest, count=8, seed=0)
    with ExitStack() as stack:
        asks: dict[str, Callable[[Observation], object]] = {}
        for backend in reversed(BACKENDS):
            session = open_session(bundle, backend, SessionOptions(threads=threads))
            asks[backend] = ServedPolicy.of(bundle, session).answer
            client = stack.enter_context(_served(bundle, backend, threads))
            asks[f"{backend}, through the server"] = client.act
        times: dict[str, list[float]] = {name: [] for name in asks}
        for index in range(-_WARM_UP_ROUNDS, rounds):
            for name, ask in asks.items():
                start = time.perf_counter()
                ask(observations[index % len(observations)])
                if index >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.array(values) for name, values in times.items()}


def table(times_ms: dict[str, NDArray[np.float64]]) -> str:
    """Return the medians, the 99th percentiles and the ratios to the first row."""
    first = float(np.median(next(iter(times_ms.values()))))
    lines = [f"{'one chunk, ms':32}{'p50':>9}{'p99':>9}{'ratio':>8}"]
    for name, values in times_ms.items():
        p50, p99 = np.percentile(values, [50, 99])
        lines.append(f"{name:32}{p50:9.2f}{p99:9.2f}{first / p50:7.2f}x")
    return "\n".join([*lines, "ratio: how many times as fast as the first row, at the median"])


@contextmanager
def _served(bundle: Bundle, backend: str, threads: int) -> Iterator[PolicyClient]:
    """Run ``simplevla serve`` and yield a client of it."""
    command = [*_SERVE, str(bundle.path), "--backend", backend, "--threads", str(threads)]
    process = subprocess.Popen(
        [*command, "--address", "tcp://127.0.0.1:*"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        if not ready.startswith("ready:"):
            raise UnavailableError("simplevla serve did not start", "read its message above")
        address = ready.split(" on ")[1].split()[0]
        with PolicyClient(address, embodiment=bundle.manifest.embodiment, timeout_s=30) as client:
            yield client
    finally:
        process.terminate()
        process.wait(10)


if __name__ == "__main__":
    sys.exit(main())
