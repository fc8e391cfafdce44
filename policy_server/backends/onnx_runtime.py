"""ONNX Runtime: on the CPU the default back end, on NVIDIA GPUs by its CUDA and TensorRT providers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy_server.backends.base import EngineError, NumberType, SessionOptions
from policy_server.machine import processor
from simplevla.errors import MissingExtraError

_PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
_ERRORS_ONLY = 3


class OnnxRuntime:
    """One of ONNX Runtime's providers."""

    step_file = "step.onnx"

    def __init__(self, name: str = "onnxruntime") -> None:
        """Take the name of the back end, which says which provider."""
        self.name = name
        self._provider = _PROVIDERS[name]
        self._on_cpu = name == "onnxruntime"
        on_gpu: dict[str, NumberType] = {} if self._on_cpu else {"fp16": "fp16"}
        self.precisions: Mapping[str, NumberType] = {"fp32": "fp32", **on_gpu, "int8": "fp32"}

    def version(self) -> str:
        """Return the version of onnxruntime; MissingExtraError if it is not installed."""
        return str(_onnxruntime("serve" if self._on_cpu else "gpu").__version__)

    def device(self) -> str:
        """Return ``cpu``, or which GPU with which driver."""
        if self._on_cpu:
            return "cpu"
        from policy_server.backends.cuda import graphics_processor

        return graphics_processor() or "no GPU"

    def machine(self) -> str | None:
        """Return this processor's identity, or this GPU's; None where there is no GPU to run on."""
        if self._on_cpu:
            return processor()
        from policy_server.backends.cuda import graphics_processor

        return graphics_processor()

    def build(self, step: Path, folder: Path) -> None:
        """Take the ONNX file as it is; the runtime compiles it when it loads it."""
        from policy_server.graphs import share

        for file in step.parent.glob(f"{step.name}*"):
            share(file, folder / file.name)

    def open(self, folder: Path, precision: str, options: SessionOptions, *, cache: Path) -> OnnxStep:  # noqa: ARG002 (it is in the graph)
        """Load the graph; EngineError if onnxruntime refuses it or would run it elsewhere."""
        settings: dict[str, Any] = {}
        if self.name == "onnxruntime-cuda":
            settings = {"use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"}
        elif self.name == "onnxruntime-tensorrt":
            cache.mkdir(parents=True, exist_ok=True)
            settings = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
        session = _session(folder / self.step_file, options, self._provider, settings)
        return OnnxStep(session)


class OnnxStep:
    """A step graph in ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._constants: dict[str, NDArray[np.float32]] = {}

    def set_constants(self, constants: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep the prompt's constants."""
        self._constants = dict(constants)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the logits."""
        logits: NDArray[np.float32] = self._session.run(None, {**inputs, **self._constants})[0]
        return logits


def cpu_session(model: Path, options: SessionOptions) -> Any:
    """Return onnxruntime's session of ``model`` on the CPU.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: it does not take the model.
    """
    return _session(model, options, _PROVIDERS["onnxruntime"], {})


def _session(model: Path, options: SessionOptions, provider: str, settings: dict[str, Any]) -> Any:
    ort = _onnxruntime("serve")
    wanted = ort.SessionOptions()
    wanted.log_severity_level = _ERRORS_ONLY
    wanted.intra_op_num_threads = options.threads
    wanted.inter_op_num_threads = 1
    wanted.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Between two operations threads stay awake: to wake them a hundred times costs a small network a fifth
    # of its time. Between two observations they sleep, unless told otherwise.
    wanted.add_session_config_entry("session.intra_op.allow_spinning", "1")
    wanted.add_session_config_entry("session.force_spinning_stop", str(int(not options.spin)))
    if provider not in ort.get_available_providers():
        raise EngineError(
            f"this onnxruntime has no {provider}", 'install it with: pip install "simplevla[gpu]"'
        )
    try:
        session = ort.InferenceSession(str(model), wanted, providers=[(provider, settings)])
    except Exception as error:  # onnxruntime's errors share no base but Exception
        raise EngineError(f"onnxruntime refuses the engine: {error}", "compile it again") from error
    # Onnxruntime falls back to the CPU without an error where a GPU's libraries are missing.
    used = session.get_providers()
    if used[0] != provider:
        raise EngineError(
            f"onnxruntime would run on {used[0]}, not {provider}", "install the GPU's driver and libraries"
        )
    return session


def _onnxruntime(extra: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", extra) from error
    return onnxruntime
