"""The benchmark compares, the soak passes in its short form, and the fuzzer finds nothing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=_ROOT, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.skipif(importlib.util.find_spec("openpi_client") is None, reason="openpi-client not installed")
def test_the_benchmark_compares_every_way_to_ask() -> None:
    done = run("benchmarks.server_overhead", "--rounds", "10", "--burst", "2")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * (2 + 7)
    for name in ("ours, shared memory", "ours, TCP with CURVE", "openpi websocket", "plain ZMQ"):
        assert sum(row.startswith(f"| {name}") for row in rows) == 2


def test_clients_that_misbehave_and_die_harm_nobody() -> None:
    done = run("benchmarks.soak", "--clients", "4", "--minutes", "0.1", "--kill-every", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Verdict: passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris not installed")
def test_the_fuzzer_finds_nothing_in_a_few_inputs(tmp_path: Path) -> None:
    done = run("benchmarks.fuzz_door", "--inputs", "3000", "--report", str(tmp_path / "report.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| messages thrown | 3000 |" in (tmp_path / "report.md").read_text()
