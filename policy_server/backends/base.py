"""What every back end offers, whatever computes the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from simplevla.errors import SimplevlaError

NumberType: TypeAlias = Literal["fp32", "fp16", "bf16"]


class EngineError(SimplevlaError):
    """A compiled engine is missing, altered, or made for something else than this machine."""

    code = "bad_engine"


@dataclass(frozen=True)
class SessionInfo:
    """What computes the network.

    Attributes:
        backend: one of ``policy_server.backends.BACKENDS``.
        version: of the library that computes.
        device: what computes: ``cpu``, or the identity of this processor or GPU.
        precision: such as ``fp32``.
        engine: key of the compiled engine; empty where there is none.
        max_batch: how many observations one run may hold; 1 where shapes are static.
    """

    backend: str
    version: str
    device: str
    precision: str
    engine: str = ""
    max_batch: int = 1


@dataclass(frozen=True)
class SessionOptions:
    """How a session may use the machine.

    Attributes:
        threads: threads for one inference; 0 leaves it to the library (all cores).
        spin: threads stay awake between two inferences: lower latency, at the price of a busy core each.
    """

    threads: int = 0
    spin: bool = False


class Session(Protocol):
    """A loaded network, ready to compute, for up to ``info.max_batch`` observations at once."""

    @property
    def info(self) -> SessionInfo:
        """What computes the network."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the logits (B, K * D, 256) float32, B from 1 to ``info.max_batch``.

        Args:
            inputs: what the policy's processor makes of an observation: ``frames`` uint8
                (B, cameras, H, W, 3), ``input_ids`` and ``attention_mask`` int64 (B, L),
                ``proprio`` float32 (B, P).
        """


class Step(Protocol):
    """A compiled step graph, loaded; see ``simplevla.policy.folded``."""

    def set_constants(self, constants: Mapping[str, NDArray[np.float32]]) -> None:
        """Take what the prompt graph answered, for all runs until the next call."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the logits (1, K * D, 256) of ``frames``, ``proprio`` and ``prefix`` if there is one."""


class Backend(Protocol):
    """Something that compiles an exported step graph and computes it.

    Attributes:
        name: what it is called on the command line.
        precisions: {precision it computes in: number type of the graph that it is given}.
        step_file: name of the file that :meth:`build` leaves.
    """

    name: str
    precisions: Mapping[str, NumberType]
    step_file: str

    def version(self) -> str:
        """Return the library's version; MissingExtraError if it is not installed."""

    def device(self) -> str:
        """Return what an engine is made for: ``cpu``, or the accelerator, its driver included."""

    def machine(self) -> str | None:
        """Return the identity of what computes here; None where nothing here can run its engines."""

    def build(self, step: Path, folder: Path) -> None:
        """Make :attr:`step_file` in ``folder`` of the ONNX file ``step``, already of the right precision.

        Raises:
            EngineError: it cannot be built.
        """

    def open(self, folder: Path, precision: str, options: SessionOptions, *, cache: Path) -> Step:
        """Load :attr:`step_file` from ``folder``.

        Args:
            cache: folder for what the library itself wants to keep.

        Raises:
            EngineError: the library does not take it, or would compute it elsewhere than asked for.
        """
