"""What can compute a policy's network, behind one interface."""

from __future__ import annotations

from policy_server.backends.base import Session, SessionOptions
from simplevla.bundle import Bundle
from simplevla.cli import require_choice

BACKENDS = ("onnxruntime", "torch")
DEFAULT_BACKEND = BACKENDS[0]


def open_session(bundle: Bundle, backend: str, options: SessionOptions | None = None) -> Session:
    """Return the network of ``bundle``, loaded and ready to compute.

    Raises:
        ConfigError: there is no such back end.
        EngineError: the bundle was not compiled for it on this machine, or the engine was altered.
        MissingExtraError: its library is not installed.
    """
    require_choice("back end", backend, BACKENDS)
    if backend == "torch":
        from policy_server.backends.torch_reference import TorchSession

        return TorchSession(bundle, options)
    from policy_server.backends.onnx_runtime import OnnxRuntimeSession
    from policy_server.engines import find_engine

    engine = find_engine(bundle, backend)
    return OnnxRuntimeSession(engine.model, options, engine=engine.record.key)
