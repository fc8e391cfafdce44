"""``simplevla bench``: how fast a bundle answers on this machine, by back end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy_server.backends import BACKENDS
from simplevla.cli import Command, whole_number

if TYPE_CHECKING:
    from policy_server.served_policy import ServedPolicy
    from simplevla.bundle import Bundle

_EPILOG = """\
Asks every back end the same questions in turn, from observation to checked joint targets, and prints
median, 99th percentile, and where the time went. Compare the ratios: the milliseconds are those of this
machine, now. What is not named is measured as far as it is installed and compiled here.

examples:
  simplevla bench bundles/move_can_pot
  simplevla bench bundles/move_can_pot --backend torch --backend openvino:bf16 --compile --threads 1
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the policy bundle")
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME[:PRECISION]",
        help=f"what to measure, as often as you like: {', '.join(BACKENDS)}",
    )
    parser.add_argument("--compile", action="store_true", help="build engines that are missing first")
    parser.add_argument(
        "--rounds", type=whole_number(10, 1_000_000), default=200, help="answers of each (default: 200)"
    )
    parser.add_argument(
        "--threads",
        type=whole_number(0, 1024),
        default=0,
        help="threads for one inference (default: 0, all cores)",
    )


def _bench(args: argparse.Namespace) -> int:
    import numpy as np

    from policy_server.observations import plausible_observations
    from policy_server.timing import interleaved, table, where
    from simplevla.bundle import load_bundle

    bundle = load_bundle(args.bundle)
    policies = _policies(bundle, args)
    splits: dict[str, list[Any]] = {name: [] for name in policies}

    def asking(name: str) -> Any:
        return lambda observation: splits[name].append(policies[name].answer(observation)[1])

    questions = plausible_observations(bundle.manifest, count=16, seed=0)
    times = interleaved({name: asking(name) for name in policies}, questions, args.rounds)
    print(f"{bundle.manifest.name} {bundle.id[:12]}, {args.rounds} rounds, threads {args.threads or 'all'}")
    print(where())
    print(table(times, "one chunk"))
    print("\n| median ms | preprocess | inference | decode |\n| --- | --- | --- | --- |")
    for name, parts in splits.items():
        values = [[p.preprocess_ms, p.inference_ms, p.decode_ms] for p in parts[-args.rounds :]]
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in np.median(values, axis=0)) + " |")
    return 0


def _policies(bundle: Bundle, args: argparse.Namespace) -> dict[str, ServedPolicy]:
    """Return {name: policy} of what was asked for, or of all that can be had, torch first."""
    from policy_server.backends import open_session
    from policy_server.backends.base import SessionOptions
    from policy_server.compiler import compile_bundle
    from policy_server.served_policy import ServedPolicy
    from simplevla.errors import SimplevlaError, UnavailableError

    policies = {}
    for name in args.backend or [BACKENDS[-1], *BACKENDS[:-1]]:
        backend, _, precision = name.partition(":")
        try:
            if args.compile and backend != "torch":
                compile_bundle(bundle, backend, precision or "fp32")
            session = open_session(
                bundle, backend, SessionOptions(threads=args.threads), precision=precision or "fp32"
            )
        except SimplevlaError as error:
            if args.backend:
                raise
            print(f"without {name}: {error}")
            continue
        policies[name] = ServedPolicy.of(bundle, session)
    if not policies:
        raise UnavailableError("nothing can answer here", 'install it with: pip install "simplevla[serve]"')
    return policies


BENCH = Command("measure how fast a policy bundle answers here", _configure, _bench)
