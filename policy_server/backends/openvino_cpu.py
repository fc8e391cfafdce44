"""OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy_server.backends.base import EngineError, NumberType, SessionOptions
from policy_server.machine import processor
from simplevla.errors import MissingExtraError

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


class OpenVino:
    """OpenVINO's CPU device."""

    name = "openvino"
    precisions: Mapping[str, NumberType] = {"fp32": "fp32", "bf16": "fp32", "int8": "fp32"}
    step_file = "step.onnx"

    def version(self) -> str:
        """Return the version of openvino; MissingExtraError if it is not installed."""
        return str(_openvino().__version__)

    def device(self) -> str:
        """Return ``cpu``."""
        return "cpu"

    def machine(self) -> str | None:
        """Return this processor's identity."""
        return processor()

    def build(self, step: Path, folder: Path) -> None:
        """Take the ONNX file as it is; the runtime compiles it when it loads it."""
        from policy_server.graphs import share

        for file in step.parent.glob(f"{step.name}*"):
            share(file, folder / file.name)

    def open(self, folder: Path, precision: str, options: SessionOptions, *, cache: Path) -> OpenVinoStep:  # noqa: ARG002 (it keeps nothing)
        """Load the graph; EngineError if openvino refuses it or would compute otherwise."""
        # Without a hint a processor that can computes in bf16, whatever the graph says.
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
        }
        if options.threads:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        try:
            core = _openvino().Core()
            model = core.compile_model(core.read_model(str(folder / self.step_file)), "CPU", settings)
            used = str(model.get_property("INFERENCE_PRECISION_HINT").to_string())
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise EngineError(f"openvino refuses the engine: {reason}", "compile it again") from error
        if used != _HINTS[precision]:
            raise EngineError(
                f"openvino would compute in {used} here, not in {precision}",
                "choose a precision that this processor has, such as fp32",
            )
        return OpenVinoStep(model)


class OpenVinoStep:
    """A step graph in OpenVINO."""

    def __init__(self, model: Any) -> None:
        self._request = model.create_infer_request()
        self._output = model.outputs[0]

    def set_constants(self, constants: Mapping[str, NDArray[np.float32]]) -> None:
        """Give the prompt's constants to the request, which keeps them."""
        for name, value in constants.items():
            self._request.set_tensor(name, _openvino().Tensor(value.copy()))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the logits."""
        answers = self._request.infer(dict(inputs), share_inputs=True)
        logits: NDArray[np.float32] = answers[self._output].copy()
        return logits


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    return openvino
