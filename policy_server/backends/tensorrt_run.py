"""A TensorRT engine on the GPU: one stream, memory allocated once, one captured graph for each answer.

Frames go up as the bytes they are. What a run does (upload, compute, download) is recorded once and then
launched as a whole, so that the CPU speaks to the driver once for each answer.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from policy_server.backends.base import EngineError

_CONSTANTS = ("constants", "mask", "cosine", "sine")
_OUTPUT = "logits"


class Device(Protocol):
    """What of CUDA is needed; see :class:`~policy_server.backends.cuda.Cuda`."""

    @property
    def stream(self) -> int:
        """The stream's handle."""

    def allocate(self, size: int) -> int:
        """Return device memory."""

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return a pinned array."""

    def upload(self, device: int, host: NDArray[Any]) -> None:
        """Copy to the device."""

    def download(self, host: NDArray[Any], device: int) -> None:
        """Copy from the device."""

    def begin_capture(self) -> None:
        """Begin to record."""

    def end_capture(self) -> Any:
        """Return what was recorded."""

    def launch(self, graph: Any) -> None:
        """Do what was recorded."""

    def synchronise(self) -> None:
        """Wait for the stream."""

    def release(self, device: list[int], host: list[NDArray[Any]], graphs: list[Any]) -> None:
        """Give everything back."""


class TensorRtStep:
    """A step graph as a TensorRT engine."""

    def __init__(self, trt: Any, plan: bytes, device: Device) -> None:
        """Load the engine, warm it up and capture what a run does.

        Args:
            trt: the library, ``tensorrt`` or ``tensorrt_rtx``.
            plan: the serialised engine.
            device: the GPU.

        Raises:
            EngineError: the engine does not fit this GPU or this version, or its shapes are not static.
        """
        self._device = device
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                "TensorRT refuses the engine on this GPU", "compile it again on the machine that serves"
            )
        self._context = self._engine.create_execution_context()
        self._host: dict[str, NDArray[Any]] = {}
        self._memory: dict[str, int] = {}
        graphs: list[Any] = []
        # Freed when the session is no longer used, also where its engine turns out to be unusable.
        weakref.finalize(self, _release, device, self._memory, self._host, graphs)
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            shape = tuple(self._engine.get_tensor_shape(name))
            if any(size < 1 for size in shape):
                raise EngineError(f"the engine's {name} has the shape {shape}", "compile it again")
            self._host[name] = device.pinned(shape, trt.nptype(self._engine.get_tensor_dtype(name)))
            self._memory[name] = device.allocate(self._host[name].nbytes)
            self._context.set_tensor_address(name, self._memory[name])
        self._moving = [name for name in self._host if name not in _CONSTANTS and name != _OUTPUT]
        self._run_once()  # TensorRT does its last work in the first run, which no graph may hold
        device.synchronise()
        device.begin_capture()
        self._run_once()
        graphs.append(device.end_capture())
        self._graph = graphs[0]

    def set_constants(self, constants: Mapping[str, NDArray[np.float32]]) -> None:
        """Upload the prompt's constants, which stay on the GPU."""
        for name, value in constants.items():
            np.copyto(self._host[name], value)
            self._device.upload(self._memory[name], self._host[name])
        self._device.synchronise()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the logits."""
        for name in self._moving:
            np.copyto(self._host[name], inputs[name], casting="no")
        self._device.launch(self._graph)
        self._device.synchronise()
        return self._host[_OUTPUT].astype(np.float32)

    def _run_once(self) -> None:
        for name in self._moving:
            self._device.upload(self._memory[name], self._host[name])
        if not self._context.execute_async_v3(self._device.stream):
            raise EngineError("TensorRT cannot run the engine", "compile it again")
        self._device.download(self._host[_OUTPUT], self._memory[_OUTPUT])


def _release(
    device: Device, memory: dict[str, int], host: dict[str, NDArray[Any]], graphs: list[Any]
) -> None:
    device.release(list(memory.values()), list(host.values()), graphs)
