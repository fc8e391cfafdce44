"""``simplevla inspect``: what is in a bundle, and which engines there are for it."""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simplevla.cli import Command

if TYPE_CHECKING:
    from simplevla.bundle import Bundle

_EPILOG = """\
Checks every hash, as whoever serves the bundle does, and says what the policy is, needs and answers,
where it comes from, and which compiled engines lie beside it or in the cache.

examples:
  simplevla inspect bundles/move_can_pot
  simplevla inspect bundles/move_can_pot --json | jq .engines
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the policy bundle")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _inspect(args: argparse.Namespace) -> int:
    from simplevla.bundle import load_bundle

    facts = describe(load_bundle(args.bundle))
    print(json.dumps(facts, indent=1) if args.json else _in_words(facts))
    return 0


def describe(bundle: Bundle) -> dict[str, Any]:
    """Return what is in ``bundle``, as JSON knows it."""
    import msgspec
    from safetensors import safe_open

    manifest = bundle.manifest
    with safe_open(bundle.weights_path, framework="numpy") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (no mapping)
    cameras = [manifest.embodiment.camera(name) for name in manifest.cameras]
    return {
        "path": str(bundle.path),
        "policy_id": bundle.id,
        "name": manifest.name,
        "created_ns": manifest.created_ns,
        "embodiment": manifest.embodiment.name,
        "arms": [arm.name for arm in manifest.embodiment.arms],
        "cameras": [{"name": c.name, "width": c.width, "height": c.height} for c in cameras],
        "instructions": manifest.instructions,
        "action_space": manifest.action_space,
        "chunk_length": manifest.chunk_length,
        "dt_s": manifest.dt_s,
        "continues": bool(manifest.network.get("sizes", {}).get("head", {}).get("prefix", False)),
        "parameters": sum(prod(shape) for shape in shapes),
        "files": {name: entry.size for name, entry in manifest.files.items()},
        "provenance": msgspec.to_builtins(manifest.provenance),
        "engines": _engines(bundle),
    }


def _engines(bundle: Bundle) -> list[dict[str, Any]]:
    """Return one entry for each engine that is there, whether it may be served here or not."""
    from policy_server.engines import SIDECAR, engine_folders, find_engine, load_engine
    from simplevla.errors import SimplevlaError

    found = []
    for folder in engine_folders(bundle):
        for sidecar in sorted(folder.glob(f"*/{SIDECAR}")):
            entry: dict[str, Any] = {"path": str(sidecar.parent), "usable": False}
            try:
                record = load_engine(sidecar.parent, bundle).record
                entry |= {
                    "backend": record.backend,
                    "precision": record.precision,
                    "versions": record.versions,
                }
                if record.parity is not None:
                    entry |= {"parity": str(record.parity), "machine": record.parity.machine}
                entry["usable"] = find_engine(bundle, record.backend, record.precision).record == record
                entry["why"] = "" if entry["usable"] else "made by another version or for another device"
            except SimplevlaError as error:
                entry["why"] = str(error)
            found.append(entry)
    return found


def _in_words(facts: dict[str, Any]) -> str:
    cameras = ", ".join(f"{c['name']} {c['width']}x{c['height']}" for c in facts["cameras"])
    made = facts["provenance"]
    lines = [
        f"{facts['name']}  {facts['policy_id']}",
        f"  robot         {facts['embodiment']} (arms: {', '.join(facts['arms'])})",
        f"  looks through {cameras}",
        f"  answers       {facts['chunk_length']} x {facts['dt_s']} s, {facts['action_space']}"
        + (", continues from committed actions" if facts["continues"] else ""),
        f"  network       {facts['parameters']:,} parameters",
        *(f"  files         {name}, {size:,} bytes" for name, size in facts["files"].items()),
        *(f"  instruction   {task}: {text}" for task, text in facts["instructions"].items()),
        f"  trained at    commit {made['commit']}, {made['demonstrations']} demonstrations",
        *(f"  evaluation    {key}: {value}" for key, value in made["evaluation"].items()),
    ]
    for engine in facts["engines"]:
        name = f"{engine.get('backend', '?')} {engine.get('precision', '')}".strip()
        state = engine.get("parity") if engine["usable"] else f"not usable here: {engine['why']}"
        lines.append(f"  engine        {name}: {state}")
    if not facts["engines"]:
        lines.append("  engine        none; simplevla compile makes one")
    return "\n".join(lines)


INSPECT = Command("say what is in a policy bundle", _configure, _inspect)
