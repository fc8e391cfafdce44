"""Eight-bit integers in a graph: quantise and dequantise around every product, ranges from observations."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from simplevla.errors import MissingExtraError

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_PIXELS = "resample."  # a frame keeps its digits until it is a picture


def quantise(step: Path, target: Path, inputs: Sequence[Mapping[str, NDArray[Any]]]) -> None:
    """Write the graph ``step`` to ``target`` with its products in int8.

    Symmetric, weights by channel, in the form (Q/DQ) that ONNX Runtime, OpenVINO and TensorRT all take.
    Whether it still answers as torch does is for the parity gate to say.

    Args:
        inputs: what the step graph is given for each of a few observations; ranges come from these.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "compile") from error

    class Given(CalibrationDataReader):  # type: ignore[misc]
        """The inputs, one after the other."""

        def __init__(self) -> None:
            self._left: Iterator[Mapping[str, NDArray[Any]]] = iter(inputs)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            """Return the next one."""
            found = next(self._left, None)
            return None if found is None else dict(found)

    graph = onnx.load(step, load_external_data=False).graph
    pixels = [node.name for node in graph.node if any(name.startswith(_PIXELS) for name in node.input)]
    level = logging.getLogger().level
    try:
        logging.getLogger().setLevel(max(level, logging.ERROR))  # it advises through the root logger
        quantize_static(
            step,
            target,
            Given(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_PRODUCTS),
            nodes_to_exclude=pixels,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,  # attention's own products lose too much
                "QuantizeBias": False,  # TensorRT takes no int32
            },
        )
    finally:
        logging.getLogger().setLevel(level)
