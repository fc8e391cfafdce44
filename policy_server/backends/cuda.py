"""The few calls of CUDA's runtime that a compiled network needs, with its errors as ours.

Nothing here can be seen working without an NVIDIA GPU (docs/verified.md), so there is no more of it than
must be: what decides anything lies in ``tensorrt_run``, which is tested against a recording in place of
this class.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from policy_server.backends.base import EngineError
from simplevla.errors import MissingExtraError


def graphics_processor() -> str | None:
    """Return name, compute capability and driver of the first NVIDIA GPU; None if there is none."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess or not count:
        return None
    properties = _checked(runtime.cudaGetDeviceProperties(0))
    driver = _checked(runtime.cudaDriverGetVersion())
    name = properties.name.decode(errors="replace")
    return f"{name}, capability {properties.major}.{properties.minor}, driver {driver // 1000}"


class Cuda:
    """Memory, one stream and captured graphs of the first GPU."""

    def __init__(self) -> None:
        """Make the stream.

        Raises:
            MissingExtraError: CUDA's Python bindings are not installed.
            EngineError: there is no usable GPU.
        """
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise MissingExtraError("cuda-bindings", "gpu") from error
        self._runtime = runtime
        _checked(runtime.cudaSetDevice(0))
        self._stream = _checked(runtime.cudaStreamCreate())

    @property
    def stream(self) -> int:
        """The stream's handle, for other libraries."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """Return ``size`` bytes on the device."""
        return int(_checked(self._runtime.cudaMalloc(size)))

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array in host memory that the device can reach by itself."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(_checked(self._runtime.cudaMallocHost(size)))
        memory = memoryview((ctypes.c_uint8 * size).from_address(address))
        return np.frombuffer(memory, dtype=np.dtype(dtype)).reshape(shape)

    def upload(self, device: int, host: NDArray[Any]) -> None:
        """Copy ``host``, pinned, to the device, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        _checked(self._runtime.cudaMemcpyAsync(device, host.ctypes.data, host.nbytes, kind, self._stream))

    def download(self, host: NDArray[Any], device: int) -> None:
        """Copy from the device to ``host``, pinned, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _checked(self._runtime.cudaMemcpyAsync(host.ctypes.data, device, host.nbytes, kind, self._stream))

    def begin_capture(self) -> None:
        """Record what the stream is given, instead of doing it."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked(self._runtime.cudaStreamBeginCapture(self._stream, mode))

    def end_capture(self) -> Any:
        """Return what was recorded, ready to launch."""
        graph = _checked(self._runtime.cudaStreamEndCapture(self._stream))
        launchable = _checked(self._runtime.cudaGraphInstantiate(graph, 0))
        _checked(self._runtime.cudaGraphDestroy(graph))
        return launchable

    def launch(self, graph: Any) -> None:
        """Do what was recorded."""
        _checked(self._runtime.cudaGraphLaunch(graph, self._stream))

    def synchronise(self) -> None:
        """Wait until the stream is done."""
        _checked(self._runtime.cudaStreamSynchronize(self._stream))

    def release(self, device: list[int], host: list[NDArray[Any]], graphs: list[Any]) -> None:
        """Give back what was allocated and recorded, and the stream."""
        runtime = self._runtime
        runtime.cudaStreamSynchronize(self._stream)
        for graph in graphs:
            runtime.cudaGraphExecDestroy(graph)
        for pointer in device:
            runtime.cudaFree(pointer)
        for array in host:
            runtime.cudaFreeHost(array.ctypes.data)
        runtime.cudaStreamDestroy(self._stream)


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return what a call answered beside its status.

    Raises:
        EngineError: the status is not success.
    """
    status, *values = answer
    if int(status) != 0:
        raise EngineError(f"CUDA answers {status!r}", "check the GPU and its driver with nvidia-smi")
    return values[0] if values else None
