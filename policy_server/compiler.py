"""From a bundle to an engine: export once, hold it against torch, keep it only if they agree."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from policy_server.backends.base import EngineError, Session
from policy_server.backends.onnx_runtime import MODEL, OnnxRuntimeSession
from policy_server.engines import (
    OPSET,
    PRECISION,
    SIDECAR,
    Engine,
    EngineRecord,
    Parity,
    ParityLimits,
    engine_folders,
    engine_key,
    find_engine,
    writable_engine_folder,
)
from policy_server.served_policy import ServedPolicy, example_observation
from simplevla import __version__
from simplevla.bundle import Bundle, FileEntry, Manifest
from simplevla.cli import require_choice
from simplevla.errors import MissingExtraError, ObservationError, SimplevlaError
from simplevla.files import sha256_file, whole_directory
from simplevla.observation import Observation, check_observation

COMPILED_BACKENDS = ("onnxruntime",)

_log = logging.getLogger(__name__)


class CompileError(SimplevlaError):
    """A bundle cannot be compiled, or its engine disagrees with the torch reference."""

    code = "compile_failed"


def compile_bundle(
    bundle: Bundle,
    backend: str = COMPILED_BACKENDS[0],
    *,
    observations: Sequence[Observation] | None = None,
    source: str = "synthetic",
    limits: ParityLimits | None = None,
    force: bool = False,
) -> Engine:
    """Return the engine of ``bundle``, built and checked now unless a sound one is there already.

    Args:
        bundle: the policy.
        backend: what the engine is for.
        observations: what torch and the engine are compared on; made-up ones by default.
        source: where they come from, for the certificate.
        limits: how far the engine may be from torch.
        force: build it even if there is one.

    Raises:
        CompileError: the export failed, or the engine disagrees with torch; nothing was written.
        MissingExtraError: torch, onnx or onnxscript is not installed.
        EngineError: there is no place for the engine.
    """
    require_choice("back end to compile for", backend, COMPILED_BACKENDS)
    if not force:
        try:
            return find_engine(bundle, backend)
        except EngineError as error:
            _log.info("building an engine, half a minute or so: %s", error.message)
    if observations is None:
        observations = plausible_observations(bundle.manifest, count=32, seed=0)
    key = engine_key(bundle, backend)
    _remove_engine(bundle, key)
    folder = writable_engine_folder(bundle)
    try:
        with whole_directory(folder / key) as scratch:
            versions = export_onnx(bundle, scratch / MODEL)
            parity = measure_parity(
                bundle,
                OnnxRuntimeSession((scratch / MODEL).read_bytes()),
                observations,
                source=source,
                limits=limits or ParityLimits(),
            )
            if not parity.passed:
                raise CompileError(
                    f"the engine disagrees with torch ({parity})", "do not use it; report the bundle"
                )
            record = EngineRecord(
                key=key,
                backend=backend,
                precision=PRECISION,
                opset=OPSET,
                bundle_id=bundle.id,
                versions=versions,
                parity=parity,
                created_ns=time.time_ns(),
                files={MODEL: FileEntry((scratch / MODEL).stat().st_size, sha256_file(scratch / MODEL))},
            )
            encoded = msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1)
            (scratch / SIDECAR).write_bytes(encoded + b"\n")
    finally:
        with contextlib.suppress(OSError):  # an empty folder is not left behind
            folder.rmdir()
    return find_engine(bundle, backend)


def export_onnx(bundle: Bundle, path: Path) -> dict[str, str]:
    """Write the bundle's network as one ONNX file with static shapes and batch 1.

    Returns:
        {library: version} of what made it.

    Raises:
        CompileError: the export failed.
        MissingExtraError: torch, onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript
        import torch

        from simplevla.policy.network import load_network
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "compile") from error
    from simplevla.policy.processor import PolicyProcessor

    inputs = PolicyProcessor.from_bundle(bundle).inputs(example_observation(bundle.manifest))
    network = load_network(bundle).fold()
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                network,
                (),
                path,
                kwargs={name: torch.from_numpy(np.array(value)) for name, value in inputs.items()},
                input_names=list(inputs),
                output_names=["logits"],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        _strip_provenance(path)
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
        "onnxruntime": onnxruntime.__version__,
    }


def _strip_provenance(path: Path) -> None:
    """Remove what the exporter notes of each node: stack traces, with the paths of this machine."""
    import onnx

    model = onnx.load(path)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    onnx.save(model, path)


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
    processor = reference.processor
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
    return Parity(
        source=source,
        observations=len(observations),
        agreement=float(np.mean(equal)) if varied.any() else 1.0,
        worst_logit_error=logit_error,
        worst_joint_error_rad=float(target_error[~gripper].max()),
        worst_gripper_error_m=float(target_error[gripper].max()),
        limits=limits,
    )


def plausible_observations(manifest: Manifest, *, count: int, seed: int) -> list[Observation]:
    """Return made-up observations: states around home, noisy and smooth images, known instructions."""
    rng = np.random.default_rng(seed)
    embodiment = manifest.embodiment
    lower, upper = embodiment.position_limits()
    instructions = list(manifest.instructions.values()) or [""]
    observations = []
    for index in range(count):
        spread = 0.2 * (upper - lower) * rng.uniform(-1, 1, embodiment.dimension)
        make = _noise_image if index % 2 else _smooth_image
        cameras = [embodiment.camera(name) for name in manifest.cameras]
        observations.append(
            Observation(
                images={c.name: make(rng, c.height, c.width) for c in cameras},
                state=np.clip(embodiment.home() + spread, lower, upper).astype(np.float32),
                instruction=instructions[index % len(instructions)],
                capture_ns=index,
            )
        )
    return observations


def load_observations(path: Path, manifest: Manifest) -> list[Observation]:
    """Return the recorded observations in an ``.npz`` file.

    It holds ``state`` (N, D) float32, ``image/<camera>`` (N, H, W, 3) uint8 for each camera of the
    policy, and optionally ``instruction`` (N,) text.

    Raises:
        ObservationError: the file is missing, or does not hold these.
    """
    remedy = "record state, image/<camera> and instruction with numpy.savez"
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays: Mapping[str, NDArray[Any]] = {name: data[name] for name in data.files}
        states = arrays["state"]
        images = {name: arrays[f"image/{name}"] for name in manifest.cameras}
    except OSError as error:
        raise ObservationError(f"{path} cannot be read: {error.strerror or error}", remedy) from error
    except (KeyError, ValueError) as error:
        raise ObservationError(f"{path} holds no observations: {error}", remedy) from error
    default = next(iter(manifest.instructions.values()), "")
    instructions = [str(x) for x in arrays.get("instruction", np.array([default] * len(states)))]
    if {len(instructions), *map(len, images.values())} != {len(states)}:
        raise ObservationError(f"the arrays of {path} have different lengths", remedy)
    observations = [
        Observation(
            images={name: stack[i] for name, stack in images.items()},
            state=states[i],
            instruction=instructions[i],
            capture_ns=i,
        )
        for i in range(len(states))
    ]
    for observation in observations:
        check_observation(observation, manifest.embodiment, manifest.cameras)
    return observations


def _remove_engine(bundle: Bundle, key: str) -> None:
    for folder in engine_folders(bundle):
        if (folder / key).is_dir():
            shutil.rmtree(folder / key)


def _noise_image(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _smooth_image(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Return a few broad colour blobs on a plain ground, so that edges and flat parts occur."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.broadcast_to(rng.uniform(40, 215, 3), (height, width, 3)).copy()
    for _ in range(4):
        centre = rng.uniform((0, 0), (height, width))
        radius = rng.uniform(0.05, 0.25) * height
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        image[inside] = rng.uniform(0, 255, 3)
    return image.astype(np.uint8)


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
