"""An engine, loaded: the prompt's graph once an instruction, the step's graph each time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from policy_server.backends.base import Backend, SessionInfo, SessionOptions

if TYPE_CHECKING:
    from policy_server.engines import Engine

Constants: TypeAlias = dict[str, NDArray[np.float32]]
_WORDS = ("input_ids", "attention_mask")
_KEPT_INSTRUCTIONS = 64


class CompiledSession:
    """A compiled network; batch 1, static shapes."""

    def __init__(self, engine: Engine, backend: Backend, options: SessionOptions | None = None) -> None:
        """Load an engine that was checked.

        Raises:
            EngineError: the back end does not take it.
            MissingExtraError: a library is not installed.
        """
        from policy_server.graphs import PROMPT

        record = engine.record
        options = options or SessionOptions()
        self._prompt = PromptConstants(engine.path / PROMPT)
        cache = engine.path.parent / "libraries" / record.key
        self._step = backend.open(engine.path, record.precision, options, cache=cache)
        self._loaded: bytes | None = None
        device = backend.machine() or backend.device()
        self.info = SessionInfo(backend.name, backend.version(), device, record.precision, record.key)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the logits; see :class:`~policy_server.backends.base.Session`."""
        key, constants = self._prompt(inputs)
        if key != self._loaded:
            self._loaded = None
            self._step.set_constants(constants)
            self._loaded = key
        return self._step.run({name: value for name, value in inputs.items() if name not in _WORDS})


class PromptConstants:
    """What the prompt's graph answers, kept for the instructions that were given last."""

    def __init__(self, model: Path) -> None:
        from policy_server.backends.onnx_runtime import cpu_session

        self._session = cpu_session(model, SessionOptions(threads=1))
        self._names = [output.name for output in self._session.get_outputs()]
        self._kept: OrderedDict[bytes, Constants] = OrderedDict()

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[bytes, Constants]:
        """Return a name for the instruction in ``inputs``, and its constants."""
        key = b"".join(inputs[name].tobytes() for name in _WORDS)
        constants = self._kept.get(key)
        if constants is None:
            answers = self._session.run(self._names, {name: inputs[name] for name in _WORDS})
            constants = self._kept[key] = dict(zip(self._names, answers, strict=True))
            if len(self._kept) > _KEPT_INSTRUCTIONS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return key, constants
