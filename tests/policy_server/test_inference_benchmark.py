"""The benchmark of back ends runs, and says what it compared."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from simplevla.bundle import Bundle

_BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks/inference.py"


def test_back_ends_are_compared_alone_and_on_the_whole_way(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which the benchmark sets for the whole process
    spec = importlib.util.spec_from_file_location("inference_benchmark", _BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    options = ["--only", "shipped", "--rounds", "10", "--threads", "1", "--without-torch-compile"]
    monkeypatch.setattr(sys, "argv", ["inference", str(bundle.path), *options])
    assert benchmark.main() == 0
    output = capsys.readouterr().out
    rows = [line.split(" | ") for line in output.splitlines() if line.startswith("| ")]
    names = [row[0].strip("| ") for row in rows]
    for name in ("torch eager", "ONNX Runtime"):
        assert names.count(name) == 2
    assert [row[-1].strip(" |") for row in rows if row[0] == "| torch eager"] == ["1.00", "1.00"]
    assert output.count("as fast as torch eager") == 2
