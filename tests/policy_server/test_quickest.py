"""Of the engines that are certified here the quickest serves, and no other back end ever steps in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from policy_server import compiler, quickest
from policy_server.backends.base import EngineError, SessionInfo
from policy_server.compiler import CompileError, compile_for
from policy_server.quickest import open_quickest
from simplevla.bundle import Bundle
from simplevla.errors import MissingExtraError

pytestmark = pytest.mark.by_the_clock


class Timed:
    """A session that takes its time."""

    def __init__(self, backend: str, takes_s: float) -> None:
        self.info = SessionInfo(backend, "1", "cpu", "fp32")
        self._takes_s = takes_s

    def run(self, inputs: Mapping[str, Any]) -> np.ndarray:
        assert "frames" in inputs
        time.sleep(self._takes_s)
        return np.zeros((1, 1, 256), np.float32)


def openable(monkeypatch: pytest.MonkeyPatch, takes_s: Mapping[str, float]) -> None:
    def open_session(_bundle: Bundle, name: str, _options: object, *, precision: str) -> Timed:
        assert precision == "fp32"
        if name not in takes_s:
            raise EngineError(f"no engine for {name}", "compile it")
        return Timed(name, takes_s[name])

    monkeypatch.setattr(quickest, "open_session", open_session)


@pytest.mark.parametrize("slow", ["onnxruntime", "openvino"])
def test_the_quicker_one_serves(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    takes_s = {"onnxruntime": 0.001, "openvino": 0.001, slow: 0.02}
    openable(monkeypatch, takes_s)
    assert open_quickest(bundle).info.backend == min(takes_s, key=takes_s.__getitem__)


def test_what_is_not_compiled_is_left_out(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    openable(monkeypatch, {"openvino": 0.0})
    assert open_quickest(bundle).info.backend == "openvino"


def test_a_hot_swap_keeps_the_back_end_and_measures_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openable(monkeypatch, {"onnxruntime": 0.0, "openvino": 0.02})
    monkeypatch.setattr(quickest, "interleaved", None)
    assert open_quickest(bundle, like="openvino").info.backend == "openvino"
    openable(monkeypatch, {"onnxruntime": 0.0})
    assert open_quickest(bundle, like="openvino").info.backend == "onnxruntime"


def test_without_any_engine_the_first_says_why(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    openable(monkeypatch, {})
    with pytest.raises(EngineError, match="no engine for onnxruntime"):
        open_quickest(bundle)


def test_auto_compiles_for_what_is_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_bundle(_bundle: Bundle, name: str, precision: str, **settings: object) -> str:
        assert (precision, settings) == ("int8", {"force": True})
        if name == "openvino":
            raise MissingExtraError("openvino", "openvino")
        return f"engine of {name}"

    monkeypatch.setattr(compiler, "compile_bundle", compile_bundle)
    assert list(compile_for(bundle, "auto", "int8", force=True)) == ["engine of onnxruntime"]
    with pytest.raises(MissingExtraError):
        list(compile_for(bundle, "openvino", "int8", force=True))


def test_auto_fails_where_nothing_can_be_compiled(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_bundle: Bundle, name: str, _precision: str) -> None:
        raise CompileError(f"{name} disagrees with torch", "do not use it")

    monkeypatch.setattr(compiler, "compile_bundle", refuse)
    with pytest.raises(CompileError, match="onnxruntime disagrees"):
        list(compile_for(bundle, "auto"))
