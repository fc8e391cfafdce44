"""How fast the network answers: torch eager, torch.compile, ONNX Runtime and OpenVINO, side by side.

For the shipped bundle and for a network of 50 million parameters in OpenVLA-OFT's shape with fresh weights,
one observation at a time on the CPU. Every round asks each of them the same question once, one after the
other, so that whatever else the machine does falls on all alike: compare the ratios. Two tables a bundle:
the network alone, and the whole way from observation to joint targets. With --ablate a third one tells
what each part of the compilation brings, by leaving it out.

    python -m benchmarks.inference
    python -m benchmarks.inference --ablate --rounds 500 --only shipped
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Threads that wait for work must not spin on the cores of whoever is asked next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from numpy.typing import NDArray

from policy_server.backends import AUTO, open_session
from policy_server.backends.base import Session, SessionOptions
from policy_server.backends.compiled import PromptConstants
from policy_server.backends.onnx_runtime import OnnxStep, cpu_session
from policy_server.backends.torch_reference import TorchSession
from policy_server.compiler import compile_bundle, compile_for
from policy_server.examples import write_example_bundle
from policy_server.graphs import PROMPT, STEP
from policy_server.observations import plausible_observations
from policy_server.quickest import open_quickest
from policy_server.served_policy import ServedPolicy
from policy_server.timing import Times, interleaved, table, where
from simplevla.bundle import Bundle, load_bundle
from simplevla.cli import whole_number
from simplevla.errors import SimplevlaError
from simplevla.files import share_dir
from simplevla.policy.config import load_sizes
from simplevla.policy.processor import PolicyProcessor

Inputs = Mapping[str, NDArray[Any]]

EAGER = "torch eager"
NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
SPEED_UP, SPREAD = 1.8, 2.0  # what the served back end must reach against torch eager, and p99 over p50


def main() -> int:
    """Measure and print; returns 1 where --check finds the served back end too slow."""
    args = _arguments()
    options = SessionOptions(threads=args.threads)
    sound = True
    print(where())
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for name in ("shipped", "medium"):
                if args.only not in (None, name):
                    continue
                bundle = (
                    load_bundle(args.bundle)
                    if name == "shipped"
                    else write_example_bundle(Path(scratch) / name, load_sizes(name))
                )
                sound &= _measured(bundle, options, args, Path(scratch))
    except SimplevlaError as error:
        print(f"inference: {error}", file=sys.stderr)
        return 2
    return 0 if sound or not args.check else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "bundle", type=Path, nargs="?", default=share_dir() / "bundles/move_can_pot",
        help="the shipped bundle's place (default: bundles/move_can_pot)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=whole_number(10, 100_000), default=200, help="answers of each (default: 200)"
    )
    parser.add_argument(
        "--threads", type=whole_number(0, 1024), default=0, help="threads of each (default: 0, all cores)"
    )
    parser.add_argument("--only", choices=["shipped", "medium"], help="measure one of the two alone")
    parser.add_argument(
        "--without-torch-compile", action="store_true", help="spare its minutes of building"
    )
    parser.add_argument("--ablate", action="store_true", help="also leave out one part at a time")
    parser.add_argument(
        "--check", action="store_true",
        help=f"fail unless the served back end is {SPEED_UP}x as fast as torch eager and its p99 at most "
        f"{SPREAD}x its p50",
    )  # fmt: skip
    return parser.parse_args()


def _measured(bundle: Bundle, options: SessionOptions, args: argparse.Namespace, scratch: Path) -> bool:
    """Print the tables of one bundle; return whether the served back end is as fast as it must be."""
    size = sum(value.size for value in bundle.weights().values()) / 1e6
    threads = options.threads or "all"
    print(
        f"\n## {bundle.manifest.name}: {size:.1f} M parameters, {args.rounds} rounds, threads {threads}\n"
    )
    sessions = _sessions(bundle, options, with_compile=not args.without_torch_compile)
    served = NAMES[open_quickest(bundle, options).info.backend]
    processor = PolicyProcessor.from_bundle(bundle)
    observations = plausible_observations(bundle.manifest, count=8, seed=0)
    inputs = [processor.inputs(observation) for observation in observations]
    alone = interleaved({name: session.run for name, session in sessions.items()}, inputs, args.rounds)
    print(table(alone, "the network alone") + "\n")
    policies = {name: ServedPolicy.of(bundle, session) for name, session in sessions.items()}
    whole = interleaved({name: p.answer for name, p in policies.items()}, observations, args.rounds)
    print(table(whole, "observation to joint targets") + "\n")
    sound = all(
        [
            _judged(alone, served, "the network alone"),
            _judged(whole, served, "observation to joint targets"),
        ]
    )
    if args.ablate:
        print(
            "\n" + table(interleaved(_ablated(bundle, options, scratch), inputs, args.rounds), "ablation")
        )
    return sound


def _judged(times: Times, served: str, what: str) -> bool:
    p50, p99 = np.percentile(times[served], [50, 99])
    ratio = float(np.median(times[EAGER]) / p50)
    print(
        f"{what}: {served}, which simplevla serve chooses here, is {ratio:.2f}x as fast as torch eager "
        f"(at least {SPEED_UP}), p99 {p99 / p50:.2f}x p50 (at most {SPREAD})"
    )
    return ratio >= SPEED_UP and p99 / p50 <= SPREAD


def _sessions(bundle: Bundle, options: SessionOptions, *, with_compile: bool) -> dict[str, Session]:
    sessions: dict[str, Session] = {EAGER: TorchSession(bundle, options)}
    if with_compile:
        try:
            sessions["torch.compile"] = CompiledTorch(bundle, options)
        except Exception as error:  # inductor raises whatever its compilers raise
            print(f"without torch.compile: {str(error).splitlines()[0]}\n")
    for engine in compile_for(bundle, AUTO):
        backend = engine.record.backend
        sessions[NAMES[backend]] = open_session(bundle, backend, options)
    return sessions


class CompiledTorch(TorchSession):
    """The network as ``torch.compile`` makes it, with static shapes."""

    def __init__(self, bundle: Bundle, options: SessionOptions) -> None:
        """Compile it by answering once."""
        super().__init__(bundle, options)
        self._network = self._torch.compile(self._network, dynamic=False)
        observation = plausible_observations(bundle.manifest, count=1, seed=0)[0]
        self.run(PolicyProcessor.from_bundle(bundle).inputs(observation))


def _ablated(
    bundle: Bundle, options: SessionOptions, scratch: Path
) -> dict[str, Callable[[Inputs], object]]:
    """Return ONNX Runtime with the network as it was trained, with each folding left out, and with all."""
    import torch

    from policy_server.graphs import export_module
    from simplevla.policy.folded import CONSTANT_NAMES, Folding, PromptGraph, StepGraph
    from simplevla.policy.network import load_network

    processor = PolicyProcessor.from_bundle(bundle)
    observation = plausible_observations(bundle.manifest, count=1, seed=0)[0]
    inputs = {k: torch.from_numpy(np.array(v)) for k, v in processor.inputs(observation).items()}
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    rest = {name: value for name, value in inputs.items() if name not in words}
    trained = scratch / "trained.onnx"
    export_module(load_network(bundle), inputs, ["logits"], trained)
    network = cpu_session(trained, options)
    asks: dict[str, Callable[[Inputs], object]] = {
        "as trained, one graph": lambda given: network.run(None, dict(given))
    }
    engine = compile_bundle(bundle)
    prompt = PromptConstants(engine.path / PROMPT)
    with torch.no_grad():
        constants = dict(zip(CONSTANT_NAMES, PromptGraph(load_network(bundle))(**words), strict=True))
    for name, folding in (
        ("without blocks of pixel rows", Folding(blocks=False)),
        ("without slots alone in the last layer", Folding(slots_only=False)),
    ):
        path = scratch / f"{folding}.onnx"
        export_module(StepGraph(load_network(bundle), folding=folding).eval(), {**rest, **constants},
                      ["logits"], path)  # fmt: skip
        asks[name] = _asking(prompt, OnnxStep(cpu_session(path, options)))
    always = cpu_session(engine.path / PROMPT, SessionOptions(threads=1))
    step = cpu_session(engine.path / STEP, options)

    def prompt_again(given: Inputs) -> object:
        answers = always.run(list(CONSTANT_NAMES), {name: given[name] for name in words})
        fresh = dict(zip(CONSTANT_NAMES, answers, strict=True))
        return step.run(None, {**{name: given[name] for name in rest}, **fresh})

    asks["without the prompt's cache"] = prompt_again
    asks["all"] = _asking(prompt, OnnxStep(step))
    return asks


def _asking(prompt: PromptConstants, step: OnnxStep) -> Callable[[Inputs], object]:
    def ask(given: Inputs) -> object:
        step.set_constants(prompt(given)[1])
        return step.run(
            {name: v for name, v in given.items() if name not in ("input_ids", "attention_mask")}
        )

    return ask


if __name__ == "__main__":
    sys.exit(main())
