"""From a bundle to an engine: build, hold against torch, keep only if they agree."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from policy_server.backends import AUTO, CPU_BACKENDS, backend_named
from policy_server.backends.base import Backend, EngineError, Session
from policy_server.backends.compiled import CompiledSession, PromptConstants
from policy_server.engines import (
    LIMITS,
    SIDECAR,
    Engine,
    EngineRecord,
    Parity,
    ParityLimits,
    built_engine,
    engine_folders,
    engine_key,
    find_engine,
    golden_observations,
    load_engine,
    writable_engine_folder,
)
from policy_server.graphs import OPSET, PROMPT, STEP, CompileError, Graph, entries, exported_graph, share
from policy_server.observations import plausible_observations
from policy_server.served_policy import ServedPolicy
from simplevla.bundle import Bundle
from simplevla.cli import require_choice
from simplevla.errors import ObservationError, SimplevlaError
from simplevla.files import whole_directory, write_atomic
from simplevla.observation import Observation, check_observation
from simplevla.policy.processor import PolicyProcessor

_CALIBRATED = 64  # observations that decide the ranges of int8; the gate looks at others

_log = logging.getLogger(__name__)


def compile_bundle(
    bundle: Bundle,
    backend: str = "onnxruntime",
    precision: str = "fp32",
    *,
    observations: Sequence[Observation] | None = None,
    source: str = "synthetic",
    limits: ParityLimits | None = None,
    force: bool = False,
) -> Engine:
    """Return the engine of ``bundle``, built and checked now unless a certified one is there already.

    One that is there is checked again where observations or limits are given, and removed if it fails.
    Where nothing can run the engine (no GPU), it is built ahead of time and left without a certificate:
    nothing serves it before this was called again where it can run.

    Args:
        bundle: the policy.
        backend: what the engine is for.
        precision: what it computes in; int8 takes its ranges from part of the observations.
        observations: what torch and the engine are compared on; made-up ones by default.
        source: where they come from, for the certificate.
        limits: how far the engine may be from torch; those of the precision by default.
        force: build it even if there is one.

    Raises:
        CompileError: the export failed, or the engine disagrees with torch; no engine is left.
        EngineError: the back end cannot build it, or there is no place for it.
        MissingExtraError: a library is not installed.
    """
    compiler = backend_named(backend)
    require_choice(f"precision of {backend}", precision, tuple(compiler.precisions))
    to_check = force or observations is not None or limits is not None
    if observations is None:
        observations = plausible_observations(bundle.manifest, count=32, seed=0)
    ranges: Sequence[Observation] = ()
    if precision == "int8":
        observations, ranges = _parted(observations)
    with _alone(bundle) as folder:
        if not to_check:
            with contextlib.suppress(EngineError):
                return find_engine(bundle, backend, precision)
        if not force:
            with contextlib.suppress(EngineError):
                engine = built_engine(bundle, backend, precision)
                return _certify(bundle, compiler, engine, observations, source, limits)
        _remove_engine(bundle, engine_key(bundle, backend, precision))
        return _build(
            bundle, compiler, precision, folder, observations, ranges, source, limits, force=force
        )


def compile_for(bundle: Bundle, backend: str, precision: str = "fp32", **settings: Any) -> Iterator[Engine]:
    """Yield the engine of ``bundle`` for ``backend``; with ``auto`` one for each of CPU_BACKENDS.

    Of those, what is not installed, does not compute in ``precision`` or disagrees with torch is left out
    with a warning, unless none is left.

    Args:
        bundle, backend, precision: as for :func:`compile_bundle`.
        settings: the rest of them.

    Raises:
        SimplevlaError: as :func:`compile_bundle`.
    """
    if backend != AUTO:
        yield compile_bundle(bundle, backend, precision, **settings)
        return
    failed: list[SimplevlaError] = []
    for name in CPU_BACKENDS:
        try:
            engine = compile_bundle(bundle, name, precision, **settings)
        except SimplevlaError as error:
            _log.warning("without %s: %s", name, error.message)
            failed.append(error)
        else:
            yield engine
    if len(failed) == len(CPU_BACKENDS):
        raise failed[0]


def measure_parity(
    bundle: Bundle,
    session: Session,
    observations: Sequence[Observation],
    *,
    source: str,
    limits: ParityLimits,
) -> Parity:
    """Return how ``session`` agrees with the torch reference on ``observations``.

    Raises:
        ObservationError: there is no observation, or one does not fit the bundle.
        CompileError: the session answers another shape than torch.
    """
    from policy_server.backends.torch_reference import TorchSession

    if not observations:
        raise ObservationError("there is no observation to compare on", "give at least one")
    reference = ServedPolicy.of(bundle, TorchSession(bundle))
    processor = PolicyProcessor.from_bundle(bundle)
    manifest = bundle.manifest
    varied = np.tile(np.asarray(manifest.codec.varied), manifest.chunk_length)
    gripper = np.zeros(manifest.embodiment.dimension, dtype=bool)
    gripper[[part.stop - 1 for _, part in manifest.embodiment.slices()]] = True
    equal, logit_error = [], 0.0
    target_error = np.zeros(manifest.embodiment.dimension)
    for observation in observations:
        check_observation(observation, manifest.embodiment, manifest.cameras)
        inputs = processor.inputs(observation)
        want, have = reference.session.run(inputs), session.run(inputs)
        if have.shape != want.shape or not np.isfinite(have).all():
            raise CompileError(f"the engine answers {have.shape}, torch {want.shape}", "report the bundle")
        equal.append((want.argmax(-1) == have.argmax(-1)).reshape(-1)[varied])
        logit_error = max(logit_error, float(np.abs(want - have).max()))
        chunks = [processor.chunk(logits, observation, bundle.id).actions for logits in (want, have)]
        target_error = np.maximum(target_error, np.abs(chunks[0] - chunks[1]).max(axis=0))
    golden = [
        reference.session.run(processor.inputs(observation)).argmax(-1).reshape(-1).tolist()
        for observation in golden_observations(bundle)
    ]
    return Parity(
        source=source,
        observations=len(observations),
        agreement=float(np.mean(equal)) if varied.any() else 1.0,
        worst_logit_error=logit_error,
        worst_joint_error_rad=float(target_error[~gripper].max()),
        worst_gripper_error_m=float(target_error[gripper].max()),
        limits=limits,
        machine=session.info.device,
        golden=tuple(map(tuple, golden)),
    )


def _build(
    bundle: Bundle,
    compiler: Backend,
    precision: str,
    folder: Path,
    observations: Sequence[Observation],
    ranges: Sequence[Observation],
    source: str,
    limits: ParityLimits | None,
    *,
    force: bool,
) -> Engine:
    key = engine_key(bundle, compiler.name, precision)
    graph = exported_graph(bundle, compiler.precisions[precision], folder, force=force)
    with whole_directory(folder / key) as scratch:
        share(graph.path / PROMPT, scratch / PROMPT)
        if precision == "int8":
            with _quantised(bundle, graph, ranges, folder) as step:
                compiler.build(step, scratch)
        else:
            compiler.build(graph.path / STEP, scratch)
        record = EngineRecord(
            key=key,
            backend=compiler.name,
            precision=precision,
            opset=OPSET,
            bundle_id=bundle.id,
            versions={**graph.versions, compiler.name: compiler.version()},
            parity=None,
            created_ns=time.time_ns(),
            files=entries(scratch),
        )
        if compiler.machine() is not None:
            session = CompiledSession(Engine(scratch, record), compiler)
            record = _certified(bundle, session, record, observations, source, limits)
        (scratch / SIDECAR).write_bytes(_encoded(record))
    return load_engine(folder / key, bundle)


def _certify(
    bundle: Bundle,
    compiler: Backend,
    engine: Engine,
    observations: Sequence[Observation],
    source: str,
    limits: ParityLimits | None,
) -> Engine:
    """Give an engine that is there a certificate of this machine, or remove it."""
    if compiler.machine() is None:
        return engine
    session = CompiledSession(engine, compiler)
    try:
        record = _certified(bundle, session, engine.record, observations, source, limits)
    except CompileError:
        shutil.rmtree(engine.path)
        raise
    write_atomic(engine.path / SIDECAR, _encoded(record))
    return load_engine(engine.path, bundle)


def _certified(
    bundle: Bundle,
    session: Session,
    record: EngineRecord,
    observations: Sequence[Observation],
    source: str,
    limits: ParityLimits | None,
) -> EngineRecord:
    parity = measure_parity(
        bundle, session, observations, source=source, limits=limits or LIMITS[record.precision]
    )
    if not parity.passed:
        raise CompileError(
            f"the engine disagrees with torch ({parity})",
            "do not use it: choose another precision or back end, or report the bundle",
        )
    return msgspec.structs.replace(record, parity=parity)


@contextlib.contextmanager
def _quantised(bundle: Bundle, graph: Graph, ranges: Sequence[Observation], folder: Path) -> Iterator[Path]:
    """Yield the graph in int8, which is gone afterwards."""
    from policy_server.quantise import quantise

    processor = PolicyProcessor.from_bundle(bundle)
    prompt = PromptConstants(graph.path / PROMPT)
    given = []
    for observation in ranges:
        inputs = processor.inputs(observation)
        _, constants = prompt(inputs)
        words = ("input_ids", "attention_mask")
        given.append({**{k: v for k, v in inputs.items() if k not in words}, **constants})
    scratch = folder / f".int8-{graph.path.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        quantise(graph.path / STEP, scratch / STEP, given)
        yield scratch / STEP
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _alone(bundle: Bundle) -> Iterator[Path]:
    """Yield the folder for the bundle's engines, to one process at a time."""
    folder = writable_engine_folder(bundle)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # an empty folder is not left behind
            folder.rmdir()


def _parted(
    observations: Sequence[Observation],
) -> tuple[Sequence[Observation], Sequence[Observation]]:
    """Return observations to compare on, and others to take int8's ranges from."""
    if len(observations) < 4:
        raise ObservationError(
            f"{len(observations)} observations are too few to quantise with", "give at least 4"
        )
    every = max(2, len(observations) // _CALIBRATED)
    ranges = list(observations[::every])
    return [o for i, o in enumerate(observations) if i % every], ranges


def _remove_engine(bundle: Bundle, key: str) -> None:
    for folder in engine_folders(bundle):
        if (folder / key).is_dir():
            shutil.rmtree(folder / key)


def _encoded(record: EngineRecord) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n"
