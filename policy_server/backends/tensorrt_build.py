"""TensorRT and TensorRT-RTX: building an engine.

Both have one interface. TensorRT-RTX builds without a GPU, for any RTX GPU, and finishes the engine on
the machine that loads it; TensorRT builds on the very GPU that will serve. Networks are strongly typed:
an engine computes in the precision of its graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from policy_server.backends.base import EngineError, NumberType, SessionOptions, Step
from policy_server.backends.cuda import Cuda, graphics_processor
from simplevla.errors import MissingExtraError

_MODULES: Mapping[str, tuple[str, str]] = {
    "tensorrt": ("tensorrt", "gpu"),
    "tensorrt-rtx": ("tensorrt_rtx", "rtx"),
}


class TensorRt:
    """TensorRT or TensorRT-RTX."""

    precisions: Mapping[str, NumberType] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "fp32"}
    step_file = "step.plan"

    def __init__(self, name: str) -> None:
        """Take the name of the back end, which says which of the two."""
        self.name = name

    def version(self) -> str:
        """Return the library's version; MissingExtraError if it is not installed."""
        return str(self._library().__version__)

    def device(self) -> str:
        """Return which GPU with which driver, or that any will do."""
        if self.name == "tensorrt-rtx":
            return "any RTX GPU"
        return graphics_processor() or "no GPU"

    def machine(self) -> str | None:
        """Return this GPU's identity; None where there is none."""
        return graphics_processor()

    def build(self, step: Path, folder: Path) -> None:
        """Build :attr:`step_file` of the ONNX file ``step``.

        Raises:
            EngineError: the graph holds what TensorRT cannot do, or there is no GPU to build on.
            MissingExtraError: the library is not installed.
        """
        trt = self._library()
        if self.name == "tensorrt" and self.machine() is None:
            raise EngineError(
                "TensorRT builds on the GPU that serves, and there is none here",
                "run this on the GPU's machine, or build ahead of time with --backend tensorrt-rtx",
            )
        logger = trt.Logger(trt.Logger.INTERNAL_ERROR)  # errors are told below
        builder = trt.Builder(logger)
        network = builder.create_network(_strongly_typed(trt))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(step)):
            reason = str(parser.get_error(0).desc()).strip().splitlines()[0]
            raise EngineError(f"{self.name} cannot read the graph: {reason}", "report the bundle")
        plan = builder.build_serialized_network(network, builder.create_builder_config())
        if plan is None:
            raise EngineError(f"{self.name} cannot build the graph", "try another precision")
        (folder / self.step_file).write_bytes(bytes(plan))

    def open(self, folder: Path, precision: str, options: SessionOptions, *, cache: Path) -> Step:  # noqa: ARG002 (all is in the plan)
        """Load the engine on the first GPU.

        Raises:
            EngineError: there is no GPU, or the engine was built for another one.
        """
        from policy_server.backends.tensorrt_run import TensorRtStep

        if self.machine() is None:
            raise EngineError(
                f"{self.name} needs an NVIDIA GPU to run on", "serve with --backend onnxruntime"
            )
        return TensorRtStep(self._library(), (folder / self.step_file).read_bytes(), Cuda())

    def _library(self) -> Any:
        module, extra = _MODULES[self.name]
        try:
            return import_module(module)
        except ImportError as error:
            raise MissingExtraError(module, extra) from error


def _strongly_typed(trt: Any) -> int:
    """Return the flag for strong typing; from version 11 on networks have no other."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)
