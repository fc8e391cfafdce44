"""The policy bundle: the one thing that passes from training to serving.

A folder with ``manifest.json``, ``weights.safetensors`` and ``tokenizer.json``. The manifest names
every file with its size and SHA-256; the bundle's identity is the SHA-256 of the manifest. Compiled
engines are caches beside those files (see ``policy_server``), no part of the identity, and carry
sidecars of their own. Nothing in a bundle is pickled.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from simplevla.action_codec import ActionCodec
from simplevla.embodiment import Embodiment, Positive
from simplevla.errors import BundleError
from simplevla.files import sha256_file, whole_directory

SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
_MAX_MANIFEST_BYTES = 4 << 20

ActionSpaceName = Literal["joint_absolute", "joint_delta", "ee_delta"]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and hex SHA-256 of one file."""

    size: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class CodecEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An :class:`~simplevla.action_codec.ActionCodec` as lists of length D."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    varied: tuple[bool, ...]


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a policy comes from.

    Attributes:
        commit: version of the code that trained it.
        config: the whole training configuration.
        seeds: {what: seed}.
        demonstrations: how many episodes it was fine-tuned on.
        evaluation: figures of its last evaluation, as the evaluation wrote them.
    """

    commit: str
    config: dict[str, Any]
    seeds: dict[str, int]
    demonstrations: int
    evaluation: dict[str, Any] = {}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything but the numbers: what the policy is, what it needs and what it answers.

    Attributes:
        network: the network's configuration, as ``simplevla.policy`` defines it.
        cameras: cameras the policy looks through, in the order the network takes them.
        instructions: the task's canonical instruction for each task the policy was trained on.
        chunk_length: K.
        dt_s: time between two actions, s.
        codec: statistics of the actions in ``action_space``.
        proprio_low, proprio_high: (P,) range that proprioception is normalised with.
        files: {file: entry} of every file of the bundle but the manifest.
    """

    name: str
    created_ns: int
    embodiment: Embodiment
    network: dict[str, Any]
    cameras: Annotated[tuple[str, ...], Meta(min_length=1)]
    instructions: dict[str, str]
    action_space: ActionSpaceName
    chunk_length: Annotated[int, Meta(ge=1, le=512)]
    dt_s: Positive
    codec: CodecEntry
    proprio_low: tuple[float, ...]
    proprio_high: tuple[float, ...]
    provenance: Provenance
    files: dict[str, FileEntry] = {}
    schema: int = SCHEMA

    def action_codec(self) -> ActionCodec:
        """Return the codec of the actions."""
        return ActionCodec.from_dict(msgspec.to_builtins(self.codec))


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file was checked against its manifest.

    Attributes:
        path: its folder.
        id: hex SHA-256 of the manifest; what a policy id is everywhere.
        manifest: its manifest.
    """

    path: Path
    id: str
    manifest: Manifest

    @property
    def weights_path(self) -> Path:
        """The safetensors file, already checked."""
        return self.path / WEIGHTS

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer (Hugging Face ``tokenizers`` JSON), already checked."""
        return self.path / TOKENIZER

    def weights(self) -> dict[str, NDArray[Any]]:
        """Return the tensors by name."""
        from safetensors.numpy import load_file

        return load_file(self.weights_path)


def write_bundle(
    path: Path, manifest: Manifest, weights: Mapping[str, NDArray[Any]], tokenizer: bytes
) -> Bundle:
    """Write a bundle, whole or not at all, and return it as loaded back.

    Args:
        manifest: its ``files`` are filled in here.
        weights: {name: array}.
        tokenizer: the tokenizer's JSON.

    Raises:
        BundleError: ``path`` exists already, or the manifest contradicts itself.
    """
    from safetensors.numpy import save_file

    _check_consistent(manifest)
    try:
        with whole_directory(path) as scratch:
            tensors = {k: np.ascontiguousarray(v) for k, v in sorted(weights.items())}
            save_file(tensors, scratch / WEIGHTS)
            _check_tensors(scratch / WEIGHTS)
            (scratch / WEIGHTS).chmod(0o644)  # safetensors writes 0600; a server may be another user
            (scratch / TOKENIZER).write_bytes(tokenizer)
            files = {
                name: FileEntry((scratch / name).stat().st_size, sha256_file(scratch / name))
                for name in (WEIGHTS, TOKENIZER)
            }
            full = msgspec.structs.replace(manifest, files=files)
            encoded = msgspec.json.format(msgspec.json.encode(full, order="sorted"), indent=1)
            (scratch / MANIFEST).write_bytes(encoded + b"\n")
    except FileExistsError as error:
        raise BundleError(f"{path} exists already", "choose another path or remove it") from error
    return load_bundle(path)


def load_bundle(path: Path) -> Bundle:
    """Return the bundle in ``path`` after checking every hash and every shape.

    Raises:
        BundleError: something is missing, altered, inconsistent or of another schema.
    """
    remedy = "fetch or train the bundle again"
    try:
        raw = _read_bounded(path / MANIFEST)
    except OSError as error:
        raise BundleError(f"{path} is not a policy bundle: {MANIFEST}: {error.strerror}", remedy) from error
    try:
        schema = json.loads(raw).get("schema")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path / MANIFEST} is not a manifest: {error}", remedy) from error
    if schema != SCHEMA:
        raise BundleError(
            f"{path} has schema {schema}, this version reads {SCHEMA}", "use the version that wrote it"
        )
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleError(f"{path / MANIFEST}: {error}", remedy) from error
    _check_consistent(manifest)
    for needed in (WEIGHTS, TOKENIZER):
        if needed not in manifest.files:
            raise BundleError(f"{path}: the manifest does not list {needed}", remedy)
    for name, entry in manifest.files.items():
        _check_file(path, name, entry)
    _check_tensors(path / WEIGHTS)
    return Bundle(path, hashlib.sha256(raw).hexdigest(), manifest)


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as stream:
        raw = stream.read(_MAX_MANIFEST_BYTES + 1)
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than {_MAX_MANIFEST_BYTES} bytes", "this is no bundle of ours")
    return raw


def _check_consistent(manifest: Manifest) -> None:
    dimension = manifest.embodiment.dimension
    try:
        codec = manifest.action_codec()
    except ValueError as error:
        raise BundleError(f"action statistics: {error}", "train the bundle again") from error
    if codec.low.shape != (dimension,):
        raise BundleError(
            f"action statistics have {codec.low.size} values, the embodiment "
            f"{manifest.embodiment.name} has {dimension}",
            "train the bundle again",
        )
    low, high = np.asarray(manifest.proprio_low), np.asarray(manifest.proprio_high)
    if low.shape != high.shape or not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
        raise BundleError("proprio_low and proprio_high do not describe a range", "train the bundle again")
    known = [camera.name for camera in manifest.embodiment.cameras]
    for name in manifest.cameras:
        if name not in known:
            raise BundleError(
                f"the policy needs camera {name!r}, its embodiment has {', '.join(known)}",
                "train the bundle again",
            )


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise BundleError(f"{folder}: the manifest lists {name!r}, outside the bundle", "do not use it")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path} is missing", "fetch or train the bundle again")
    try:
        same = path.stat().st_size == entry.size and sha256_file(path) == entry.sha256
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", "correct its permissions") from error
    if not same:
        raise BundleError(
            f"{path} is not the file the manifest names (size or SHA-256 differs)",
            "it was altered or cut short: fetch or train the bundle again",
        )


def _check_tensors(path: Path) -> None:
    """Check that the safetensors header is sound and that every value is finite."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                value = tensors.get_tensor(name)
                if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                    raise BundleError(f"{path}: tensor {name} is not finite", "train the bundle again")
    except (SafetensorError, struct.error, TypeError) as error:
        raise BundleError(f"{path} is not a safetensors file: {error}", "train the bundle again") from error
