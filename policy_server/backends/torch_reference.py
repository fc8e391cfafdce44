"""The reference: the network as torch runs it, which every compiled engine is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy_server.backends.base import SessionInfo, SessionOptions
from simplevla.bundle import Bundle
from simplevla.errors import MissingExtraError

BACKEND = "torch"

_MAX_BATCH = 16


class TorchSession:
    """The bundle's network in torch, fp32 on the CPU."""

    def __init__(self, bundle: Bundle, options: SessionOptions | None = None) -> None:
        """Load the network of ``bundle``.

        Raises:
            MissingExtraError: torch or transformers is not installed.
            BundleError: the weights do not fit the network.
        """
        try:
            import torch

            from simplevla.policy.network import load_network
        except ImportError as error:
            raise MissingExtraError(error.name or "torch", "compile") from error
        self._torch = torch
        if options is not None and options.threads:
            torch.set_num_threads(options.threads)
        self._network = load_network(bundle)
        self.info = SessionInfo(BACKEND, str(torch.__version__), "cpu", "fp32", max_batch=_MAX_BATCH)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the logits; see :class:`~policy_server.backends.base.Session`."""
        tensors = {name: self._torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        with self._torch.inference_mode():
            logits: NDArray[np.float32] = self._network(**tensors).numpy()
        return logits
