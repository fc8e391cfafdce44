"""ONNX Runtime on the CPU: the default back end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy_server.backends.base import EngineError, SessionInfo, SessionOptions
from simplevla.errors import MissingExtraError

BACKEND = "onnxruntime"
MODEL = "model.onnx"
_PROVIDER = "CPUExecutionProvider"
_ERRORS_ONLY = 3


class OnnxRuntimeSession:
    """An exported network, fp32, static shapes, batch 1."""

    def __init__(self, model: bytes, options: SessionOptions | None = None, *, engine: str = "") -> None:
        """Load an ONNX model that was already checked.

        Args:
            model: the file's bytes.
            options: threads and spinning; the library's choice by default.
            engine: key of the compiled engine it comes from.

        Raises:
            MissingExtraError: onnxruntime is not installed.
            EngineError: onnxruntime does not take the model, or would run it elsewhere than asked for.
        """
        ort = _onnxruntime()
        options = options or SessionOptions()
        settings = ort.SessionOptions()
        settings.log_severity_level = _ERRORS_ONLY
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spin)))
        try:
            self._session = ort.InferenceSession(model, settings, providers=[_PROVIDER])
        except Exception as error:  # onnxruntime's errors share no base but Exception
            raise EngineError(f"onnxruntime refuses the engine: {error}", "compile it again") from error
        # Onnxruntime falls back to another provider without an error.
        used = self._session.get_providers()
        if used[0] != _PROVIDER:
            raise EngineError(f"onnxruntime runs on {used[0]}, not {_PROVIDER}", "reinstall onnxruntime")
        self.info = SessionInfo(BACKEND, ort.__version__, "cpu", "fp32", engine)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the logits; see :class:`~policy_server.backends.base.Session`."""
        logits: NDArray[np.float32] = self._session.run(None, dict(inputs))[0]
        return logits


def runtime_version() -> str:
    """Return the version of onnxruntime.

    Raises:
        MissingExtraError: it is not installed.
    """
    return str(_onnxruntime().__version__)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "serve") from error
    return onnxruntime
