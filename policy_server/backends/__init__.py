"""What can compute a policy's network, behind one interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from policy_server.backends.base import Session, SessionOptions
from simplevla.cli import require_choice

if TYPE_CHECKING:
    from policy_server.backends.base import Backend
    from simplevla.bundle import Bundle

COMPILED_BACKENDS = (
    "onnxruntime",
    "openvino",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "tensorrt",
    "tensorrt-rtx",
)
BACKENDS = (*COMPILED_BACKENDS, "torch")
CPU_BACKENDS = ("onnxruntime", "openvino")
AUTO = "auto"  # of CPU_BACKENDS: see policy_server.quickest
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def open_session(
    bundle: Bundle, backend: str, options: SessionOptions | None = None, *, precision: str = "fp32"
) -> Session:
    """Return the network of ``bundle``, loaded and ready to compute.

    Raises:
        ConfigError: there is no such back end, or it does not compute in that precision.
        EngineError: the bundle was not compiled for it on this machine, or the engine was altered.
        MissingExtraError: its library is not installed.
    """
    require_choice("back end", backend, BACKENDS)
    if backend == "torch":
        from policy_server.backends.torch_reference import TorchSession

        require_choice("precision of torch", precision, ("fp32",))
        return TorchSession(bundle, options)
    from policy_server.backends.compiled import CompiledSession
    from policy_server.engines import find_engine

    return CompiledSession(find_engine(bundle, backend, precision), backend_named(backend), options)


def backend_named(name: str) -> Backend:
    """Return a back end that compiles; ConfigError if there is none of that name."""
    require_choice("back end to compile for", name, COMPILED_BACKENDS)
    if name == "openvino":
        from policy_server.backends.openvino_cpu import OpenVino

        return OpenVino()
    if name in ("tensorrt", "tensorrt-rtx"):
        from policy_server.backends.tensorrt_build import TensorRt

        return TensorRt(name)
    from policy_server.backends.onnx_runtime import OnnxRuntime

    return OnnxRuntime(name)
