"""What every back end offers, whatever computes the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simplevla.errors import SimplevlaError


class EngineError(SimplevlaError):
    """A compiled engine is missing, altered, or made for something else than this machine."""

    code = "bad_engine"


@dataclass(frozen=True)
class SessionInfo:
    """What computes the network.

    Attributes:
        backend: ``onnxruntime`` or ``torch``.
        version: of the library that computes.
        device: such as ``cpu``.
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
        spin: waiting threads stay awake: lower latency, at the price of a busy core each.
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
