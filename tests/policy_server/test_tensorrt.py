"""TensorRT: engines built ahead of time where there is no GPU, and what a GPU is asked for, in order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from policy_server.backends import open_session
from policy_server.backends.base import EngineError
from policy_server.backends.cuda import Cuda, graphics_processor
from policy_server.backends.tensorrt_run import TensorRtStep
from policy_server.compiler import compile_bundle
from policy_server.engines import find_engine
from policy_server.examples import write_example_bundle
from simplevla.bundle import Bundle, load_bundle
from simplevla.files import share_dir
from simplevla.policy.config import load_sizes

HAS_GPU = graphics_processor() is not None
SHAPES = {
    "frames": ((1, 1, 4, 6, 3), np.uint8),
    "proprio": ((1, 5), np.float32),
    "constants": ((1, 3, 2), np.float32),
    "logits": ((1, 7, 256), np.float32),
}


class Recorded:
    """What TensorRT and CUDA were asked for, in order; it computes the sum of what it was given.

    It stands in for the vendor's libraries alone, where no GPU is: nothing of ours is replaced.
    """

    stream = 77

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.names: dict[int, str] = {}
        self.captured: list[str] | None = None
        self.freed: tuple[int, int, int] | None = None

    # CUDA
    def allocate(self, size: int) -> int:
        self.calls.append(f"allocate {size}")
        return len(self.calls)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def upload(self, device: int, host: np.ndarray) -> None:
        self._do(f"upload {self.names[device]}")
        if self.captured is None:
            self.arrays[self.names[device]] = host.copy()
        self.hosts = {**getattr(self, "hosts", {}), self.names[device]: host}

    def download(self, host: np.ndarray, device: int) -> None:
        self._do(f"download {self.names[device]}")
        self.answer = host

    def begin_capture(self) -> None:
        self.calls.append("begin capture")
        self.captured = []

    def end_capture(self) -> list[str]:
        self.calls.append("end capture")
        assert self.captured is not None
        recorded, self.captured = self.captured, None
        return recorded

    def launch(self, graph: list[str]) -> None:
        self.calls.append("launch")
        for step in graph:
            what, _, name = step.partition(" ")
            if what == "upload":
                self.arrays[name] = self.hosts[name].copy()
        self.answer[:] = sum(float(value.sum()) for value in self.arrays.values())

    def synchronise(self) -> None:
        self.calls.append("synchronise")

    def release(self, device: list[int], host: list[np.ndarray], graphs: list[Any]) -> None:
        self.freed = (len(device), len(host), len(graphs))

    # TensorRT
    def library(self, shapes: dict[str, Any] = SHAPES, *, accepts: bool = True) -> SimpleNamespace:
        names = list(shapes)

        def set_address(name: str, address: int) -> None:
            self.names[address] = name

        context = SimpleNamespace(set_tensor_address=set_address, execute_async_v3=self._execute)
        engine = SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=names.__getitem__,
            get_tensor_shape=lambda name: shapes[name][0],
            get_tensor_dtype=lambda name: shapes[name][1],
            create_execution_context=lambda: context,
        )
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: engine if accepts else None)
        logger = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)
        make_logger = type("Logger", (), {**vars(logger), "__init__": lambda *_: None})
        return SimpleNamespace(Runtime=lambda _: runtime, Logger=make_logger, nptype=lambda dtype: dtype)

    def _execute(self, stream: int) -> bool:
        assert stream == self.stream
        self._do("execute")
        return True

    def _do(self, what: str) -> None:
        (self.calls if self.captured is None else self.captured).append(what)


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def test_memory_is_allocated_once_and_the_run_is_captured_after_a_first_one(recorded: Recorded) -> None:
    TensorRtStep(recorded.library(), b"plan", recorded)
    assert [call for call in recorded.calls if "allocate" in call] == recorded.calls[:4]
    assert recorded.calls[4:] == [
        "upload frames", "upload proprio", "execute", "download logits", "synchronise",
        "begin capture", "end capture",
    ]  # fmt: skip


def test_an_answer_is_one_launch_and_constants_go_up_only_when_they_change(recorded: Recorded) -> None:
    step = TensorRtStep(recorded.library(), b"plan", recorded)
    recorded.calls.clear()
    step.set_constants({"constants": np.ones((1, 3, 2), np.float32)})
    assert recorded.calls == ["upload constants", "synchronise"]
    for value in (1, 2):
        recorded.calls.clear()
        frames = np.full((1, 1, 4, 6, 3), value, np.uint8)
        logits = step.run({"frames": frames, "proprio": np.zeros((1, 5), np.float32)})
        assert recorded.calls == ["launch", "synchronise"]
        assert logits.shape == (1, 7, 256)
        assert (logits == 72 * value + 6).all()
    assert logits is not recorded.answer, "the next run would overwrite the answer"


def test_what_would_be_converted_silently_is_refused(recorded: Recorded) -> None:
    step = TensorRtStep(recorded.library(), b"plan", recorded)
    with pytest.raises(TypeError):
        step.run({"frames": np.zeros((1, 1, 4, 6, 3)), "proprio": np.zeros((1, 5), np.float32)})


def test_everything_is_given_back(recorded: Recorded) -> None:
    step = TensorRtStep(recorded.library(), b"plan", recorded)
    assert recorded.freed is None
    del step
    assert recorded.freed == (4, 4, 1)


def test_an_engine_for_another_gpu_is_refused(recorded: Recorded) -> None:
    with pytest.raises(EngineError, match="refuses the engine on this GPU"):
        TensorRtStep(recorded.library(accepts=False), b"plan", recorded)
    moving = {**SHAPES, "frames": ((-1, 1, 4, 6, 3), np.uint8)}
    with pytest.raises(EngineError, match="frames has the shape"):
        TensorRtStep(recorded.library(moving), b"plan", recorded)
    assert recorded.freed is not None


def test_the_tiny_network_builds_ahead_of_time() -> None:
    pytest.importorskip("tensorrt_rtx")
    builds_ahead_of_time(load_bundle(share_dir() / "bundles/move_can_pot"), "fp32")


def test_fifty_million_parameters_of_openvlas_shape_build_ahead_of_time(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = write_example_bundle(tmp_path / "medium", load_sizes("medium"))
    parameters = sum(value.size for value in bundle.weights().values())
    assert 45e6 < parameters < 55e6
    builds_ahead_of_time(bundle, "fp16")


def builds_ahead_of_time(bundle: Bundle, precision: str) -> None:
    engine = compile_bundle(bundle, "tensorrt-rtx", precision)
    assert (engine.record.backend, engine.record.precision) == ("tensorrt-rtx", precision)
    assert engine.record.files["step.plan"].size > 1_000_000
    if HAS_GPU:
        return
    assert engine.record.parity is None
    with pytest.raises(EngineError, match="never run"):
        find_engine(bundle, "tensorrt-rtx", precision)
    with pytest.raises(EngineError, match="never run"):
        open_session(bundle, "tensorrt-rtx", precision=precision)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_tensorrt_says_that_it_needs_the_gpu(bundle: Bundle) -> None:
    pytest.importorskip("tensorrt")
    with pytest.raises(EngineError, match="none here"):
        compile_bundle(bundle, "tensorrt")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU")
@pytest.mark.parametrize(
    "backend", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt"]
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_answers_as_torch_does(bundle: Bundle, backend: str, precision: str) -> None:
    engine = compile_bundle(bundle, backend, precision)
    assert engine.record.parity is not None
    assert engine.record.parity.passed
    assert open_session(bundle, backend, precision=precision).info.device == graphics_processor()


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_cuda_is_an_error_that_says_so() -> None:
    pytest.importorskip("cuda.bindings")
    with pytest.raises(EngineError, match="nvidia-smi"):
        Cuda()
