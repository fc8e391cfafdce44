"""``simplevla compile``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from policy_server.backends import AUTO, COMPILED_BACKENDS, PRECISIONS
from simplevla.cli import Command, whole_number

if TYPE_CHECKING:
    from policy_server.engines import ParityLimits

_EPILOG = """\
Exports the network to ONNX once, builds the engine, compares it with torch, and keeps it only if both
answer alike: in the bundle's folder engines/, or in ~/.cache/simplevla if that cannot be written to. The
certificate lies beside the engine. An engine fits one version of the bundle, of the back end and of
simplevla; "simplevla serve" says when a new one is needed. In a lower precision, or on a GPU, the
certificate holds on the machine that gave it: run this again on the one that serves.

Where there is a certified engine already, nothing is done unless observations or limits are given: then
it is checked again, and removed if it fails. tensorrt-rtx and onnxruntime's GPU providers can be compiled
ahead of time where there is no GPU; nothing serves such an engine before this was run again where it can
be checked.

examples:
  simplevla compile bundles/move_can_pot
  simplevla compile bundles/move_can_pot --backend openvino
  simplevla observe bundles/move_can_pot --count 500 --out recorded.npz
  simplevla compile bundles/move_can_pot --observations recorded.npz \\
      --min-agreement 1 --max-joint-error 1e-4
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        help="folder of the policy bundle, such as bundles/move_can_pot",
    )
    parser.add_argument(
        "--backend",
        default=AUTO,
        choices=(AUTO, *COMPILED_BACKENDS),
        help="what the engine is for (default: auto, an engine for onnxruntime and one for openvino, as "
        "far as they are installed; simplevla serve takes the quicker one)",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=PRECISIONS,
        help="what it computes in; int8 takes its ranges from part of the observations (default: fp32)",
    )
    parser.add_argument(
        "--observations",
        type=Path,
        metavar="FILE.npz",
        help="recorded observations to compare on, from simplevla observe; default: made-up ones",
    )
    parser.add_argument(
        "--count",
        type=whole_number(1, 100_000),
        help="how many observations to make up (default: 32)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**31 - 1),
        help="decides the made-up observations (default: 0)",
    )
    parser.add_argument(
        "--min-agreement",
        type=_share,
        metavar="SHARE",
        help="least share of equal likeliest bins (default: by precision)",
    )
    parser.add_argument(
        "--max-joint-error",
        type=_share,
        metavar="RAD",
        help="largest difference between two joint targets, rad (default: by precision)",
    )
    parser.add_argument("--force", action="store_true", help="build again even if there is an engine")


def _compile(args: argparse.Namespace) -> int:
    from policy_server.compiler import compile_for
    from policy_server.observations import load_observations, plausible_observations
    from simplevla.bundle import load_bundle

    bundle = load_bundle(args.bundle)
    observations, source = None, "synthetic"
    if args.observations is not None:
        observations, source = load_observations(args.observations, bundle.manifest), args.observations.name
    elif args.count is not None or args.seed is not None:
        observations = plausible_observations(bundle.manifest, count=args.count or 32, seed=args.seed or 0)
    for engine in compile_for(
        bundle,
        args.backend,
        args.precision,
        observations=observations,
        source=source,
        limits=_limits(args),
        force=args.force,
    ):
        print(f"engine: {engine.path}")
        if engine.record.parity is None:
            print("built ahead of time; nothing here can run it: run this on the machine that serves")
        else:
            print(f"{engine.record.backend}, parity with torch: {engine.record.parity}")
    return 0


def _limits(args: argparse.Namespace) -> ParityLimits | None:
    """Return the limits that were asked for; None leaves them to the precision."""
    if args.min_agreement is None and args.max_joint_error is None:
        return None
    import msgspec

    from policy_server.engines import LIMITS

    limits = LIMITS[args.precision]
    if args.min_agreement is not None:
        limits = msgspec.structs.replace(limits, min_agreement=args.min_agreement)
    if args.max_joint_error is not None:
        limits = msgspec.structs.replace(limits, max_joint_error_rad=args.max_joint_error)
    return limits


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


COMPILE = Command("compile a policy bundle for the machine that serves it", _configure, _compile)
