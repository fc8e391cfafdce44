"""Compiled engines: where they lie, what each was made from, and whether it may still be used.

An engine is a folder named by its key, the SHA-256 of everything that decides what it computes: the
graph (hence the bundle's weights and the code that builds it), the back end with its version, the
precision, and for an accelerator its name and driver. Change one of them and the key changes, so a stale
engine is never found. The sidecar ``engine.json`` holds the hashes of its files, which are checked at each
load against damage, and the certificate: how the engine agreed with torch, and on which machine. Whoever
can write the folder can also write the sidecar, so protect it as you protect the program.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from policy_server.backends import backend_named
from policy_server.backends.base import EngineError, Session
from policy_server.graphs import OPSET, PROMPT, graph_key, require_files
from policy_server.observations import plausible_observations
from simplevla.bundle import Bundle, FileEntry
from simplevla.cli import require_choice

if TYPE_CHECKING:
    from policy_server.backends.base import Backend
    from simplevla.observation import Observation

SCHEMA = 2
SIDECAR = "engine.json"
GOLDEN = 4


class ParityLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far an engine may be from the torch reference.

    Attributes:
        min_agreement: least fraction of equal argmax bins, over the dimensions that vary.
        max_joint_error_rad: largest difference between two joint targets, rad.
        max_gripper_error_m: largest difference between two gripper targets, m.
    """

    min_agreement: float
    max_joint_error_rad: float
    max_gripper_error_m: float


# A likeliest bin that is nearly as likely as its neighbour may flip with the last digit: that moves a
# target by a bin, about a milliradian, and is harmless if it is rare. What counts is how far targets move.
LIMITS = {
    "fp32": ParityLimits(min_agreement=0.999, max_joint_error_rad=0.01, max_gripper_error_m=0.002),
    "fp16": ParityLimits(min_agreement=0.98, max_joint_error_rad=0.02, max_gripper_error_m=0.004),
    "bf16": ParityLimits(min_agreement=0.90, max_joint_error_rad=0.03, max_gripper_error_m=0.006),
    "int8": ParityLimits(min_agreement=0.80, max_joint_error_rad=0.05, max_gripper_error_m=0.01),
}


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Certificate: how an engine agreed with the torch reference.

    Attributes:
        source: ``synthetic`` or the name of the file of recorded observations.
        observations: how many were compared.
        agreement: fraction of equal argmax bins, over the dimensions that vary.
        worst_logit_error: largest difference between two logits.
        worst_joint_error_rad, worst_gripper_error_m: largest difference between two targets.
        limits: what it was held against.
        machine: what computed the engine.
        golden: bins that torch chose for made-up observations, one row each; see :func:`check_golden`.
    """

    source: str
    observations: int
    agreement: float
    worst_logit_error: float
    worst_joint_error_rad: float
    worst_gripper_error_m: float
    limits: ParityLimits
    machine: str
    golden: tuple[tuple[int, ...], ...]

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
        parity: its certificate; None where it was built ahead of time, where nothing could run it.
    """

    key: str
    backend: str
    precision: str
    opset: int
    bundle_id: str
    versions: dict[str, str]
    files: dict[str, FileEntry]
    parity: Parity | None
    created_ns: int
    schema: int = SCHEMA


@dataclass(frozen=True)
class Engine:
    """An engine whose files were checked: its folder and its record."""

    path: Path
    record: EngineRecord


def engine_key(bundle: Bundle, backend: str, precision: str = "fp32") -> str:
    """Return the key of the engine that ``backend`` needs for ``bundle`` on this machine.

    Raises:
        ConfigError: the back end does not compute in that precision.
        MissingExtraError: its library is not installed.
    """
    compiler = backend_named(backend)
    require_choice(f"precision of {backend}", precision, tuple(compiler.precisions))
    parts = {
        "schema": SCHEMA,
        "graph": graph_key(bundle, compiler.precisions[precision]),
        "backend": backend,
        "version": compiler.version(),
        "device": compiler.device(),
        "opset": OPSET,
        "precision": precision,
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def find_engine(bundle: Bundle, backend: str, precision: str = "fp32") -> Engine:
    """Return the engine of ``bundle`` for this machine, checked and certified.

    Raises:
        EngineError: there is none, it was altered, or its certificate is missing or another machine's.
    """
    engine = built_engine(bundle, backend, precision)
    remedy = f"check it here: {_compile_command(bundle, backend, precision)}"
    parity = engine.record.parity
    if parity is None:
        raise EngineError(f"engine {engine.path} was built ahead of time and never run", remedy)
    if not parity.passed:
        raise EngineError(f"engine {engine.path} has not passed its parity check", f"{remedy} --force")
    compiler = backend_named(backend)
    if not _travels(compiler, precision) and parity.machine != compiler.machine():
        raise EngineError(f"engine {engine.path} was checked on another machine: {parity.machine}", remedy)
    return engine


def built_engine(bundle: Bundle, backend: str, precision: str = "fp32") -> Engine:
    """Return the engine of ``bundle`` whether certified or not; EngineError if none is there and whole."""
    key = engine_key(bundle, backend, precision)
    for folder in engine_folders(bundle):
        if (folder / key).is_dir():
            return load_engine(folder / key, bundle)
    command = _compile_command(bundle, backend, precision)
    raise EngineError(
        f"{bundle.path} has no {backend} engine for this machine",
        f"run: {command}, or serve with --compile",
    )


def check_golden(bundle: Bundle, session: Session) -> None:
    """Check that ``session`` computes what its engine did when it was compiled.

    A session without an engine, which is torch itself, has nothing to be held against.

    Raises:
        EngineError: its engine is gone, or it chooses other bins than torch did for made-up observations.
    """
    info = session.info
    if not info.engine:
        return
    from simplevla.policy.processor import PolicyProcessor

    record = find_engine(bundle, info.backend, info.precision).record
    if record.key != info.engine or record.parity is None:
        raise EngineError("the session's engine is not the bundle's", "load it again")
    processor = PolicyProcessor.from_bundle(bundle)
    want = np.array(record.parity.golden)
    have = np.array(
        [
            session.run(processor.inputs(observation)).argmax(-1).reshape(-1)
            for observation in golden_observations(bundle)
        ]
    )
    if have.shape != want.shape or np.mean(have == want) < record.parity.limits.min_agreement:
        raise EngineError(
            f"engine {info.engine[:12]} does not answer as it did when it was compiled",
            f"build it again: {_compile_command(bundle, info.backend, info.precision)} --force",
        )


def golden_observations(bundle: Bundle) -> list[Observation]:
    """Return the made-up observations whose answers an engine's certificate holds."""
    return plausible_observations(bundle.manifest, count=GOLDEN, seed=0)


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


def load_engine(path: Path, bundle: Bundle) -> Engine:
    """Return the engine in ``path``; EngineError if it is incomplete, altered or of another bundle."""
    remedy = f"build it again: simplevla compile {bundle.path} --force"
    try:
        record = msgspec.json.decode((path / SIDECAR).read_bytes(), type=EngineRecord)
    except OSError as error:
        raise EngineError(f"engine {path} is incomplete: {error.strerror}", remedy) from error
    except msgspec.DecodeError as error:
        raise EngineError(f"{path / SIDECAR} is not valid: {error}", remedy) from error
    if (record.schema, record.key, record.bundle_id) != (SCHEMA, path.name, bundle.id):
        raise EngineError(f"engine {path} was made for something else", remedy)
    if not {PROMPT, backend_named(record.backend).step_file} <= record.files.keys():
        raise EngineError(f"{path / SIDECAR} does not name the engine's files", remedy)
    require_files(path, record.files, remedy)
    return Engine(path, record)


def _travels(compiler: Backend, precision: str) -> bool:
    """Return whether a certificate holds on other machines too: fp32 rounds nearly alike on every CPU."""
    return precision == "fp32" and compiler.device() == "cpu"


def _compile_command(bundle: Bundle, backend: str, precision: str) -> str:
    words = ["simplevla compile", str(bundle.path), "--backend", backend]
    return " ".join([*words, "--precision", precision] if precision != "fp32" else words)
