"""The benchmark runs, and says what it compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from simplevla.bundle import Bundle

_ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_compares_every_back_end_with_and_without_the_server(bundle: Bundle) -> None:
    command = [sys.executable, "-m", "benchmarks.server_latency", str(bundle.path)]
    done = subprocess.run(
        [*command, "--rounds", "10", "--threads", "1"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert bundle.id[:12] in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith(("torch", "onnxruntime"))]
    assert len(rows) == 4
    assert rows[0].endswith("1.00x")


def test_the_benchmark_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.server_latency", str(tmp_path)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
