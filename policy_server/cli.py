"""``simplevla serve``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from policy_server.backends import AUTO, BACKENDS, PRECISIONS
from policy_server.waiting import SPIN_S
from simplevla.cli import Command, whole_number

if TYPE_CHECKING:
    from policy_server.served_policy import ServedPolicy
    from simplevla.bundle import Bundle

_DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"
_BUNDLE_HELP = "folder of the policy bundle, such as bundles/move_can_pot"
_SERVE_EPILOG = """\
The server loads the bundle, checks every hash, warms up, and prints one line when it can answer:

  ready: NAME POLICY_ID on ADDRESS (BACKEND)

It stops on Ctrl-C or SIGTERM, after answering what has arrived. On SIGHUP it looks at BUNDLE again, which
may be a link to another folder by now: what lies there answers from then on, without a pause, if it
proves sound; else the old policy goes on.

It listens on this machine only, where clients send images through shared memory. For other machines
make keys (simplevla keys --help), or forward the port: ssh -L 5555:127.0.0.1:5555 gpu-server

examples:
  simplevla serve bundles/move_can_pot --compile
  simplevla serve bundles/move_can_pot --backend torch --address tcp://127.0.0.1:6000
  simplevla serve bundles/move_can_pot --address tcp://0.0.0.0:5555 --keys ~/.config/simplevla/keys
  simplevla serve bundles/move_can_pot --metrics-port 9555     then: curl 127.0.0.1:9555/health
"""

_log = logging.getLogger(__name__)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _SERVE_EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help=_BUNDLE_HELP)
    parser.add_argument(
        "--backend",
        default=AUTO,
        choices=(AUTO, *BACKENDS),
        help="what computes the network; all but torch need a compiled engine (default: auto, the quicker "
        "of onnxruntime and openvino for this network on this machine, as far as they are compiled)",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=PRECISIONS,
        help="precision of the compiled engine (default: fp32)",
    )
    parser.add_argument(
        "--address",
        default=_DEFAULT_ADDRESS,
        help="where to listen: tcp://host:port, port * for a free one, or ipc://path "
        f"(default: {_DEFAULT_ADDRESS})",
    )
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="DIR",
        help="encrypt, and let in only clients whose keys are in DIR/clients; see simplevla keys",
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="accept an address that other machines can reach without keys; traffic is then neither "
        "encrypted nor authenticated",
    )
    parser.add_argument(
        "--no-shared-memory",
        action="store_true",
        help="let clients of this machine send images through the socket too",
    )
    parser.add_argument(
        "--curve-only",
        action="store_true",
        help="let clients with keys send images through CURVE too, which is slower, instead of sealed with "
        "AES through a port 1000 above that of the address",
    )
    parser.add_argument(
        "--wait-spin-us",
        type=whole_number(0, 100_000),
        default=round(1e6 * SPIN_S),
        metavar="US",
        help="longest time to look for the next message of shared memory or of a sealed connection before "
        "going to sleep, only while messages come that quickly; 0 for never (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-wait-ms",
        type=whole_number(0, 1000),
        default=2,
        help="longest wait for other robots, where the back end answers several at once (default: 2)",
    )
    parser.add_argument(
        "--metrics-port",
        type=whole_number(0, 65535),
        metavar="PORT",
        help="show /metrics (Prometheus) and /health on 127.0.0.1:PORT, 0 for a free one",
    )
    parser.add_argument(
        "--openpi-port",
        type=whole_number(0, 65535),
        metavar="PORT",
        help="also answer openpi's unmodified websocket client on 127.0.0.1:PORT, 0 for a free one",
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
        help="keep threads awake between two inferences: lower latency, and a busy core for each",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="build the engine first if this machine has none yet; with auto, one for each back end",
    )


def _serve(args: argparse.Namespace) -> int:
    from policy_server.hot_swap import HotSwap
    from policy_server.keys import ServerKeys
    from policy_server.metrics import Metrics, MetricsPage
    from policy_server.server import PolicyServer, ServerOptions
    from simplevla.bundle import load_bundle

    metrics = Metrics() if args.metrics_port is not None else None
    options = ServerOptions(
        allow_remote=args.allow_remote,
        keys=None if args.keys is None else ServerKeys.load(args.keys),
        local=not args.no_shared_memory,
        sealed=not args.curve_only,
        spin_s=1e-6 * args.wait_spin_us,
        batch_wait_s=1e-3 * args.batch_wait_ms,
        metrics=metrics,
    )
    bundle = load_bundle(args.bundle.resolve())  # a link may move on while it is read
    with contextlib.ExitStack() as resources:
        policy = _open_policy(bundle, args)
        server = resources.enter_context(PolicyServer(policy, args.address, options))
        swap = HotSwap(
            server,
            args.bundle,
            lambda found: _open_policy(found, args, server.backend),
            _log.debug if metrics is None else metrics.swap,
        )
        resources.enter_context(swap)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.stop())
        signal.signal(signal.SIGHUP, lambda *_: swap.ask())
        if metrics is not None:
            page = resources.enter_context(MetricsPage(metrics, args.metrics_port, server.health))
            _log.info("metrics on http://127.0.0.1:%d/metrics, process %d", page.port, os.getpid())
        if args.openpi_port is not None:
            from policy_server.openpi import OpenpiEndpoint

            endpoint = resources.enter_context(OpenpiEndpoint(server, args.openpi_port))
            _log.info("openpi's clients are answered at ws://127.0.0.1:%d", endpoint.port)
        who = f"{bundle.manifest.name} {bundle.id[:12]}"
        # What is loaded by now stays: to look through it for garbage again and again would hold up answers.
        gc.collect()
        gc.freeze()
        print(f"ready: {who} on {server.address} ({policy.session.info.backend})", flush=True)
        server.serve()
    return 0


def _open_policy(bundle: Bundle, args: argparse.Namespace, like: str = "") -> ServedPolicy:
    """Load what answers; with ``auto`` in the back end ``like`` if it can, since measuring disturbs."""
    from policy_server.backends import open_session
    from policy_server.backends.base import SessionOptions
    from policy_server.served_policy import ServedPolicy

    if args.compile and args.backend != "torch":
        from policy_server.compiler import compile_for

        for engine in compile_for(bundle, args.backend, args.precision):
            _log.info("%s: %s", engine.record.backend, engine.record.parity)
    options = SessionOptions(threads=args.threads, spin=args.spin)
    if args.backend == AUTO:
        from policy_server.quickest import open_quickest

        return ServedPolicy.of(bundle, open_quickest(bundle, options, precision=args.precision, like=like))
    session = open_session(bundle, args.backend, options, precision=args.precision)
    return ServedPolicy.of(bundle, session)


SERVE = Command("serve a policy bundle to robots", _configure, _serve)
