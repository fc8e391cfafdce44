"""A bundle's network as ONNX, exported once and shared by every back end.

A graph is a folder of two models with static shapes and batch 1, the prompt's and the step's (see
``simplevla.policy.folded``), and a sidecar with their hashes. It lies beside the engines, named by the
hash of all that decides what it computes: the bundle's identity (hence its weights), the code that
builds it, opset and number type.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from policy_server.backends.base import EngineError, NumberType
from policy_server.served_policy import example_observation
from simplevla import __version__
from simplevla.bundle import Bundle, FileEntry
from simplevla.errors import MissingExtraError, SimplevlaError
from simplevla.files import sha256_file, whole_directory

OPSET = 18
PROMPT, STEP, SIDECAR = "prompt.onnx", "step.onnx", "graph.json"
_SCHEMA = 1
_CODE = (
    "simplevla.policy.network",
    "simplevla.policy.config",
    "simplevla.policy.prefix",
    "simplevla.policy.folded",
    "policy_server.graphs",
)
_ONE_FILE_BYTES = 1_500_000_000  # a model of one file must stay under protobuf's 2 GiB

_log = logging.getLogger(__name__)


class CompileError(SimplevlaError):
    """A bundle cannot be compiled, or its engine disagrees with the torch reference."""

    code = "compile_failed"


class _Sidecar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    versions: dict[str, str]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Graph:
    """An exported network: its folder, its files' hashes, and the libraries that made it."""

    path: Path
    files: dict[str, FileEntry]
    versions: dict[str, str]


def graph_key(bundle: Bundle, numbers: NumberType) -> str:
    """Return the hash of all that decides what the graph of ``bundle`` computes."""
    parts = {
        "schema": _SCHEMA,
        "bundle": bundle.id,
        "code": {name: _code_digest(name) for name in _CODE},
        "opset": OPSET,
        "numbers": numbers,
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def exported_graph(bundle: Bundle, numbers: NumberType, folder: Path, *, force: bool = False) -> Graph:
    """Return the graph of ``bundle`` in ``folder``, exported now unless a sound one is there.

    Raises:
        CompileError: the export failed; nothing was written.
        MissingExtraError: torch, onnx or onnxscript is not installed.
    """
    path = folder / f"graph-{graph_key(bundle, numbers)}"
    if not force:
        try:
            return _load(path)
        except EngineError as error:
            _log.info("exporting the network, a quarter of a minute or more: %s", error.message)
    shutil.rmtree(path, ignore_errors=True)
    with whole_directory(path) as scratch:
        versions = export_onnx(bundle, scratch, numbers)
        sidecar = _Sidecar(versions=versions, files=entries(scratch))
        (scratch / SIDECAR).write_bytes(msgspec.json.format(msgspec.json.encode(sidecar), indent=1))
    return _load(path)


def export_onnx(bundle: Bundle, folder: Path, numbers: NumberType) -> dict[str, str]:
    """Write the two models of the bundle's network into ``folder``.

    Returns:
        {library: version} of what made them.

    Raises:
        CompileError: the export failed.
        MissingExtraError: torch, onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript
        import torch

        from simplevla.policy.folded import CONSTANT_NAMES, PromptGraph, StepGraph
        from simplevla.policy.network import load_network
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "compile") from error
    from simplevla.policy.processor import PolicyProcessor

    arrays = PolicyProcessor.from_bundle(bundle).inputs(example_observation(bundle.manifest))
    inputs = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    words = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[numbers]
    network = load_network(bundle)
    prompt = PromptGraph(network).eval()
    step = StepGraph(network, dtype).eval()
    with torch.no_grad():
        constants = dict(zip(CONSTANT_NAMES, prompt(**words), strict=True))
    large = sum(p.numel() * p.element_size() for p in step.parameters()) > _ONE_FILE_BYTES
    try:
        export_module(prompt, words, list(CONSTANT_NAMES), folder / PROMPT)
        export_module(step, {**inputs, **constants}, ["logits"], folder / STEP, external=large)
    except Exception as error:  # the exporter raises whatever its many passes raise
        _log.debug("export failed", exc_info=True)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "run again with: simplevla --log-level debug compile ..."
        raise CompileError(f"the ONNX export failed: {first}", remedy) from error
    return {
        "simplevla": __version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
    }


def entries(folder: Path) -> dict[str, FileEntry]:
    """Return {file: size and hash} of every file in ``folder``."""
    return {
        path.name: FileEntry(path.stat().st_size, sha256_file(path)) for path in sorted(folder.iterdir())
    }


def share(source: Path, target: Path) -> None:
    """Let ``target`` be the same file as ``source``, or a copy where the file system knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def require_files(folder: Path, files: dict[str, FileEntry], remedy: str) -> None:
    """Check that ``folder`` holds ``files``.

    Raises:
        EngineError: one is missing or is not what its hash says.
    """
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise EngineError(f"{path} is missing", remedy)
        if path.stat().st_size != entry.size or sha256_file(path) != entry.sha256:
            raise EngineError(f"{path} is not the file that its sidecar names", remedy)


def _load(path: Path) -> Graph:
    remedy = "export it again with --force"
    try:
        sidecar = msgspec.json.decode((path / SIDECAR).read_bytes(), type=_Sidecar)
    except OSError as error:
        raise EngineError("there is no exported network", remedy) from error
    except msgspec.DecodeError as error:
        raise EngineError(f"{path / SIDECAR} is not valid: {error}", remedy) from error
    if not {PROMPT, STEP} <= sidecar.files.keys():
        raise EngineError(f"{path / SIDECAR} names no graph", remedy)
    require_files(path, sidecar.files, remedy)
    return Graph(path, sidecar.files, sidecar.versions)


def export_module(
    module: Any, inputs: Mapping[str, Any], outputs: Sequence[str], path: Path, *, external: bool = False
) -> None:
    """Write a torch module as ONNX, its shapes those of ``inputs``, without a trace of this machine.

    Args:
        module: in eval mode.
        inputs: {argument: tensor}.
        outputs: what the answers are to be called.
        path: the file.
        external: keep the weights in a file beside it.
    """
    import torch

    with _quiet(), torch.no_grad():
        torch.onnx.export(
            module,
            (),
            path,
            kwargs=dict(inputs),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=True,
            external_data=external,
            verbose=False,
        )
    _strip_provenance(path)


def _strip_provenance(path: Path) -> None:
    """Remove what the exporter notes of each node: stack traces, with the paths of this machine."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString(deterministic=True))


def _code_digest(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise EngineError(f"{module} is not installed", "reinstall simplevla")
    return sha256_file(Path(spec.origin))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and warnings off the terminal; debug logging shows them."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    printed = io.StringIO()
    try:
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
        if printed.getvalue():
            _log.debug("exporter: %s", printed.getvalue())
