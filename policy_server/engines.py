"""Compiled engines: where they lie, what each was made from, and whether it may still be used.

An engine is a folder named by its key, the SHA-256 of everything that decides what it computes: the
bundle's identity (hence its weights), the code that builds the graph, the runtime's version, opset and
precision. Change one of them and the key changes, so a stale engine is never found. The sidecar
``engine.json`` holds the hash of the model, which is checked at each load against damage; whoever can
write the folder can also write the sidecar, so protect it as you protect the program.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import msgspec

from policy_server.backends.base import EngineError
from policy_server.backends.onnx_runtime import MODEL, runtime_version
from simplevla.bundle import Bundle, FileEntry
from simplevla.files import sha256_file

SCHEMA = 1
SIDECAR = "engine.json"
OPSET = 18
PRECISION = "fp32"
_GRAPH_CODE = ("simplevla.policy.network", "simplevla.policy.config", "policy_server.compiler")


class ParityLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far an engine may be from the torch reference.

    Attributes:
        min_agreement: least fraction of equal argmax bins, over the dimensions that vary.
        max_joint_error_rad: largest difference between two joint targets, rad.
        max_gripper_error_m: largest difference between two gripper targets, m.
    """

    min_agreement: float = 0.999
    max_joint_error_rad: float = 0.01
    max_gripper_error_m: float = 0.002


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Certificate: how an engine agreed with the torch reference.

    Attributes:
        source: ``synthetic`` or the name of the file of recorded observations.
        observations: how many were compared.
        agreement: fraction of equal argmax bins, over the dimensions that vary.
        worst_logit_error: largest difference between two logits.
        worst_joint_error_rad, worst_gripper_error_m: largest difference between two targets.
        limits: what it was held against.
    """

    source: str
    observations: int
    agreement: float
    worst_logit_error: float
    worst_joint_error_rad: float
    worst_gripper_error_m: float
    limits: ParityLimits

    @property
    def passed(self) -> bool:
        """Whether every figure is within its limit; a figure that is not a number is not."""
        return (
            self.observations > 0
            and self.agreement >= self.limits.min_agreement
            and self.worst_joint_error_rad <= self.limits.max_joint_error_rad
            and self.worst_gripper_error_m <= self.limits.max_gripper_error_m
        )

    def __str__(self) -> str:
        return (
            f"argmax agreement {self.agreement:.4f}, "
            f"worst joint error {self.worst_joint_error_rad:.2g} rad, "
            f"worst gripper error {self.worst_gripper_error_m:.2g} m, "
            f"{self.observations} {self.source} observations"
        )


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sidecar of an engine.

    Attributes:
        key: the engine's key; also the folder's name.
        bundle_id: the bundle that it computes.
        versions: {library: version} that made it.
        files: {file: size and hash}.
        parity: its certificate.
    """

    key: str
    backend: str
    precision: str
    opset: int
    bundle_id: str
    versions: dict[str, str]
    files: dict[str, FileEntry]
    parity: Parity
    created_ns: int
    schema: int = SCHEMA


@dataclass(frozen=True)
class Engine:
    """An engine that was checked: its folder, its record and the bytes of its model."""

    path: Path
    record: EngineRecord
    model: bytes


def engine_key(bundle: Bundle, backend: str) -> str:
    """Return the key of the engine that ``backend`` needs for ``bundle`` on this machine."""
    parts = {
        "schema": SCHEMA,
        "bundle": bundle.id,
        "graph_code": {name: _code_digest(name) for name in _GRAPH_CODE},
        "backend": backend,
        "runtime": runtime_version(),
        "opset": OPSET,
        "precision": PRECISION,
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def find_engine(bundle: Bundle, backend: str) -> Engine:
    """Return the engine of ``bundle`` for this machine, checked.

    Raises:
        EngineError: there is none, or it was altered.
    """
    key = engine_key(bundle, backend)
    for folder in engine_folders(bundle):
        if (folder / key).is_dir():
            return _load(folder / key, bundle)
    raise EngineError(
        f"{bundle.path} has no {backend} engine for this machine",
        f"run: simplevla compile {bundle.path} --backend {backend}, or serve with --compile",
    )


def engine_folders(bundle: Bundle) -> tuple[Path, Path]:
    """Return where engines of ``bundle`` may lie: beside its files, or in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return bundle.path / "engines", cache / "simplevla/engines" / bundle.id


def writable_engine_folder(bundle: Bundle) -> Path:
    """Return the first of :func:`engine_folders` that can be written to, made if need be.

    Raises:
        EngineError: none can.
    """
    folders = engine_folders(bundle)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise EngineError(
        f"no engine can be written to {folders[0]} or {folders[1]}",
        "set XDG_CACHE_HOME to a folder that can be written to",
    )


def _load(path: Path, bundle: Bundle) -> Engine:
    remedy = f"build it again: simplevla compile {bundle.path} --force"
    try:
        record = msgspec.json.decode((path / SIDECAR).read_bytes(), type=EngineRecord)
        model = (path / MODEL).read_bytes()
    except OSError as error:
        raise EngineError(f"engine {path} is incomplete: {error.strerror}", remedy) from error
    except msgspec.DecodeError as error:
        raise EngineError(f"{path / SIDECAR} is not valid: {error}", remedy) from error
    if (record.schema, record.key, record.bundle_id) != (SCHEMA, path.name, bundle.id):
        raise EngineError(f"engine {path} was made for something else", remedy)
    if record.files.get(MODEL) != FileEntry(len(model), hashlib.sha256(model).hexdigest()):
        raise EngineError(f"{path / MODEL} is not the file that its sidecar names", remedy)
    if not record.parity.passed:
        raise EngineError(f"engine {path} has not passed its parity check", remedy)
    return Engine(path, record, model)


def _code_digest(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise EngineError(f"{module} is not installed", "reinstall simplevla")
    return sha256_file(Path(spec.origin))
