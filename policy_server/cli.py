"""``simplevla serve`` and ``simplevla compile``."""

from __future__ import annotations

import argparse
import logging
import signal
from pathlib import Path

from simplevla.cli import Command, whole_number

_DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"
_BUNDLE_HELP = "folder of the policy bundle, such as bundles/move_can_pot"
_SERVE_EPILOG = """\
The server loads the bundle, checks every hash, warms up, and prints one line when it can answer:

  ready: NAME POLICY_ID on ADDRESS (BACKEND)

It stops on Ctrl-C or SIGTERM, after answering what has arrived. It listens on this machine only. To
reach it from another, forward the port: ssh -L 5555:127.0.0.1:5555 gpu-server

examples:
  simplevla serve bundles/move_can_pot --compile
  simplevla serve bundles/move_can_pot --backend torch --address tcp://127.0.0.1:6000
"""
_COMPILE_EPILOG = """\
Exports the network to ONNX, compares it with torch, and keeps the engine only if both answer alike: in
the bundle's folder engines/, or in ~/.cache/simplevla if that cannot be written to. An engine fits one
version of the bundle, of the back end and of simplevla; "simplevla serve" says when a new one is needed.

examples:
  simplevla compile bundles/move_can_pot
  simplevla compile bundles/move_can_pot --observations recorded.npz --force
"""

_log = logging.getLogger(__name__)


def _configure_serve(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _SERVE_EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help=_BUNDLE_HELP)
    parser.add_argument(
        "--backend",
        default="onnxruntime",
        choices=["onnxruntime", "torch"],
        help="what computes the network (default: onnxruntime, which needs a compiled engine)",
    )
    parser.add_argument(
        "--address",
        default=_DEFAULT_ADDRESS,
        help="where to listen: tcp://host:port, port * for a free one, or ipc://path "
        f"(default: {_DEFAULT_ADDRESS})",
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="accept an address that other machines can reach; traffic is neither encrypted nor "
        "authenticated",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(0, 1024),
        default=0,
        help="threads for one inference (default: 0, all cores)",
    )
    parser.add_argument(
        "--spin",
        action="store_true",
        help="keep waiting threads awake: lower latency, and a busy core for each",
    )
    parser.add_argument(
        "--compile", action="store_true", help="build the engine first if this machine has none yet"
    )


def _configure_compile(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _COMPILE_EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help=_BUNDLE_HELP)
    parser.add_argument(
        "--backend",
        default="onnxruntime",
        choices=["onnxruntime"],
        help="what the engine is for (default: onnxruntime)",
    )
    parser.add_argument(
        "--observations",
        type=Path,
        metavar="FILE.npz",
        help="recorded observations to compare on: state (N, D) float32, image/<camera> (N, H, W, 3) "
        "uint8, instruction (N,); default: made-up ones",
    )
    parser.add_argument(
        "--count",
        type=whole_number(1, 100_000),
        default=32,
        help="how many observations to make up (default: 32)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**31 - 1),
        default=0,
        help="decides the made-up observations (default: 0)",
    )
    parser.add_argument("--force", action="store_true", help="build again even if there is an engine")


def _serve(args: argparse.Namespace) -> int:
    from policy_server.backends import open_session
    from policy_server.backends.base import SessionOptions
    from policy_server.served_policy import ServedPolicy
    from policy_server.server import PolicyServer
    from simplevla.bundle import load_bundle

    bundle = load_bundle(args.bundle)
    if args.compile and args.backend != "torch":
        from policy_server.compiler import compile_bundle

        _log.info("%s", compile_bundle(bundle, args.backend).record.parity)
    session = open_session(bundle, args.backend, SessionOptions(threads=args.threads, spin=args.spin))
    policy = ServedPolicy.of(bundle, session)
    with PolicyServer(policy, args.address, allow_remote=args.allow_remote) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.stop())
        who = f"{bundle.manifest.name} {bundle.id[:12]}"
        print(f"ready: {who} on {server.address} ({args.backend})", flush=True)
        server.serve()
    return 0


def _compile(args: argparse.Namespace) -> int:
    from policy_server.compiler import compile_bundle, load_observations, plausible_observations
    from simplevla.bundle import load_bundle

    bundle = load_bundle(args.bundle)
    if args.observations is not None:
        observations, source = load_observations(args.observations, bundle.manifest), args.observations.name
    else:
        observations = plausible_observations(bundle.manifest, count=args.count, seed=args.seed)
        source = "synthetic"
    engine = compile_bundle(
        bundle, args.backend, observations=observations, source=source, force=args.force
    )
    print(f"engine: {engine.path}")
    print(f"parity with torch: {engine.record.parity}")
    return 0


SERVE = Command("serve a policy bundle to robots", _configure_serve, _serve)
COMPILE = Command("compile a policy bundle for the machine that serves it", _configure_compile, _compile)
