"""How steady the control loop is, and how long the way to the bus takes: python -m benchmarks.control_loop.

Runs the whole stack on the twin: emulated arms on their buses, the drivers and the vendors' SDKs, the
arms' node at 200 Hz, the policy's node with its cameras, a recorder that writes every topic to MCAP. The
policy server answers at once with a slow sway about the home pose, so that nothing but the bridge is
measured. Printed are

- the period of the control loop, as it counts it itself over two seconds at a time;
- how long a chunk takes from publication to the first setpoint on the bus, of which the lead that a
  trajectory is given on purpose is a part;
- what the executor adds: from the answer to the published trajectory, and the player's and plan's own
  computation, timed in this process beforehand;
- the way from exposure to bus, split; the twin draws its pictures on the CPU, which is most of the first
  leg and of the twin's share of the CPU, and which no robot does;
- the CPU that each process took.

    python -m benchmarks.control_loop --seconds 60 --cameras 3 --report results/control_loop.md
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml
from numpy.typing import NDArray

from policy_server.backends.base import SessionInfo
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer
from robot_bridge.bringup import Settings
from robot_bridge.chunk_execution import ChunkPlayer, Trajectory
from robot_bridge.execution_modes import ChunkPlan, DelayEstimate, Execution, ExecutionMode
from robot_bridge.latency import ChunkTrace, read_traces, summarise
from robot_bridge.nodes.trial import TrialNode
from robot_bridge.recording import Recording, read_recording
from robot_bridge.rig import load_rig, save_rig, with_free_ports
from robot_bridge.stack import Stack
from simplevla.action_chunk import ActionChunk
from simplevla.bundle import CodecEntry, Manifest, Provenance
from simplevla.cli import whole_number
from simplevla.embodiment import Camera, Embodiment
from simplevla.files import write_atomic
from simplevla.observation import Observation

Array = NDArray[np.float64]

_CHUNK = 10
_DT_S = 0.1
_SWAY_RAD = 0.15
_SWAY_ACTIONS = 40
_INSTRUCTION = "sway"
_WAIT_S = 30.0
_TARGET_P99_MS = 6.5
_TARGET_EXECUTOR_MS = 1.0
_BLOCKS = "arms: control loop"


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        executor_ms: (2,) medians of the plan's and player's computation: one chunk, one turn; ms.
        cpu: {process: share of one core}.
    """

    recording: Recording
    traces: tuple[ChunkTrace, ...]
    executor_ms: tuple[float, float]
    cpu: dict[str, float]


class _Sway:
    """A policy that looks at nothing and moves every joint to and fro; processor and session in one."""

    continues = False
    info = SessionInfo("sway", "1", "none", "none")

    def __init__(self, embodiment: Embodiment) -> None:
        self._home = embodiment.home()
        self._moves = np.full(embodiment.dimension, _SWAY_RAD)
        self._moves[[part.stop - 1 for _, part in embodiment.slices()]] = 0.0

    def inputs(self, observation: Observation) -> dict[str, NDArray[Any]]:
        return {"state": observation.state[None]}

    def run(self, inputs: Any) -> NDArray[np.float32]:
        state: NDArray[np.float32] = inputs["state"]
        return state

    def chunk(self, _: NDArray[np.float32], observation: Observation, policy_id: str) -> ActionChunk:
        index = observation.last_action + 1 + np.arange(1, _CHUNK + 1)
        phase = np.sin(2 * np.pi * index / _SWAY_ACTIONS)[:, None]
        targets = (self._home + self._moves * phase).astype(np.float32)
        return ActionChunk(targets, _DT_S, observation.capture_ns, policy_id)


def sway_policy(embodiment: Embodiment) -> ServedPolicy:
    """Return the policy, for all of the embodiment's cameras."""
    size = embodiment.dimension
    manifest = Manifest(
        name="sway",
        created_ns=0,
        embodiment=embodiment,
        network={},
        cameras=tuple(camera.name for camera in embodiment.cameras),
        instructions={"move_can_pot": _INSTRUCTION},
        action_space="joint_absolute",
        chunk_length=_CHUNK,
        dt_s=_DT_S,
        codec=CodecEntry((0.0,) * size, (1.0,) * size, (True,) * size),
        proprio_low=(),
        proprio_high=(),
        provenance=Provenance(commit="none", config={}, seeds={}, demonstrations=0),
    )
    policy = _Sway(embodiment)
    return ServedPolicy("0" * 64, manifest, policy, policy)


def write_rig(folder: Path, cameras: int) -> Path:
    """Write a twin's rig with so many cameras like the head's, on ports of its own; return its path."""
    rig = load_rig("twin")
    embodiment = rig.load_embodiment()
    head = embodiment.cameras[0]
    views = [head, *(_beside(head, number) for number in range(1, cameras))]
    robot = folder / "robot.yaml"
    several = msgspec.structs.replace(embodiment, cameras=tuple(views))
    robot.write_text(yaml.safe_dump(msgspec.to_builtins(several)))
    rig = msgspec.structs.replace(
        with_free_ports(rig),
        embodiment=str(robot),
        cameras={view.name: f"TWIN-{view.name.upper()}" for view in views},
    )
    path = folder / "rig.yaml"
    save_rig(rig, path)
    return path


def _beside(head: Camera, number: int) -> Camera:
    x, y, z = head.position_m
    return msgspec.structs.replace(
        head,
        name=f"side{number}",
        frame=f"side{number}_color_optical_frame",
        position_m=(x + 0.4 * (-1) ** number, y, z),
    )


@contextlib.contextmanager
def served(policy: ServedPolicy) -> Iterator[str]:
    """Yield the address of a server of ``policy`` in a thread."""
    with PolicyServer(policy, "tcp://127.0.0.1:*") as server:
        thread = threading.Thread(target=server.serve, name="server", daemon=True)
        thread.start()
        try:
            yield server.address
        finally:
            server.stop()
            thread.join()


def measure(folder: Path, *, cameras: int, seconds: int, execution: str) -> Result:
    """Run the stack for so long and return what was measured."""
    executor_ms = time_executor(load_rig("twin").load_embodiment())
    rig_path = write_rig(folder, cameras)
    embodiment = load_rig(str(rig_path)).load_embodiment()
    with served(sway_policy(embodiment)) as address:
        out = folder / "run"
        settings = Settings(rig=str(rig_path), server=address, record=True, out=out, execution=execution)
        blind = msgspec.structs.replace(embodiment, cameras=())  # this process hears no pictures
        with Stack(settings) as stack, TrialNode(blind) as node:
            node.wait_for_joints(_WAIT_S)
            node.call("arms/enable", _WAIT_S)
            node.call("arms/go_home", _WAIT_S)
            node.set_parameters(
                "policy", {"instruction": _INSTRUCTION, "episode": "sway", "step_limit": 100_000}, _WAIT_S
            )
            node.call("policy/start", _WAIT_S)
            time.sleep(2.0)
            before, began_s = cpu_times(stack.names), time.monotonic()
            time.sleep(seconds)
            wall_s = time.monotonic() - began_s
            after = cpu_times(stack.names)
            node.call("policy/stop", _WAIT_S)
            stack.check()
    recording = read_recording(out / "session", images=False)
    cpu = {name: (after[name] - before[name]) / wall_s for name in before if name in after}
    return Result(recording, read_traces(recording), executor_ms, cpu)


def cpu_times(names: list[str]) -> dict[str, float]:
    """Return {process: CPU time, s} of this process's children, and of this process with the server."""
    tick = os.sysconf("SC_CLK_TCK")
    found = {"server and this benchmark": time.process_time()}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) != os.getpid():
                continue
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            name = next((n for n in names if n in words or f"robot_bridge.nodes.{n}" in words), "")
            if name:
                found[name] = (int(fields[11]) + int(fields[12])) / tick
    return found


def time_executor(embodiment: Embodiment, rounds: int = 300) -> tuple[float, float]:
    """Return the medians of what one chunk and one turn cost the plan and the player, ms."""
    rng = np.random.default_rng(0)
    start = embodiment.home()
    player = ChunkPlayer(start, embodiment.position_limits())
    plan = ChunkPlan(Execution(ExecutionMode.REAL_TIME), DelayEstimate(), step_limit=10**6, begin_ns=0)
    now_ns, executed, per_chunk, per_turn = 0, 0, [], []
    for _ in range(rounds):
        actions = (start + 0.01 * rng.normal(size=(_CHUNK, len(start)))).astype(np.float32)
        began = time.perf_counter()
        plan.commit(executed)
        hand = plan.take(actions, _DT_S, capture_ns=now_ns, now_ns=now_ns)
        player.offer(
            Trajectory(hand.start_ns / 1e9, _DT_S, hand.targets.astype(np.float64), hand.start_ns),
            now_ns / 1e9,
        )
        per_chunk.append(time.perf_counter() - began)
        now_ns = max(plan.look_ns(), now_ns + 50_000_000)
        executed = hand.due(now_ns)
        for turn in range(5):
            began = time.perf_counter()
            player.wanted(now_ns / 1e9 + 0.005 * turn)
            player.played(now_ns / 1e9 + 0.005 * turn)
            per_turn.append(time.perf_counter() - began)
    return 1e3 * float(np.median(per_chunk)), 1e3 * float(np.median(per_turn))


def report(result: Result, *, cameras: int, execution: str) -> str:
    """Return the figures as Markdown."""
    statuses = [s.values for s in result.recording.statuses.get("diagnostics", ()) if s.name == _BLOCKS]
    on = [values for values in statuses if values.get("mode") == "on"][3:]  # without the start
    p50, p99 = (np.array([float(v[f"period_{q}_ms"]) for v in on]) for q in ("p50", "p99"))
    missed = int(on[-1]["missed_turns"]) - int(on[0]["missed_turns"])
    chunks = {s.stamp_ns: s.values for s in result.recording.statuses.get("policy/chunks", ())}
    first = {
        s.stamp_ns: int(s.values["first_setpoint_ns"])
        for s in result.recording.statuses.get("arms/executed", ())
    }
    known = [stamp for stamp in chunks if stamp in first]
    to_bus = np.array([(first[s] - int(chunks[s]["publish_ns"])) / 1e6 for s in known])
    to_publish = np.array([float(chunks[s]["reply_to_publish_ms"]) for s in known])
    per_chunk, per_turn = result.executor_ms
    rows = [
        ("control loop's period, median of p50", f"{np.median(p50):.2f} ms"),
        (
            "control loop's period, p99 of two seconds: median / worst",
            f"{np.median(p99):.2f} / {p99.max():.2f} ms (target {_TARGET_P99_MS} ms)",
        ),
        ("turns left out", f"{missed} of about {200 * len(on)}"),
        ("published chunk to first setpoint on the bus, p50 / p99", _two(to_bus)),
        ("answer to published chunk, p50 / p99", _two(to_publish)),
        (
            "the executor's own computation, p50: a chunk / a turn",
            f"{per_chunk:.2f} / {per_turn:.3f} ms (target {_TARGET_EXECUTOR_MS} ms)",
        ),
        *(
            (f"{leg.name}, p50 / p95", f"{leg.median_ms:.1f} / {leg.p95_ms:.1f} ms")
            for leg in summarise(result.traces)
        ),
        *((f"CPU of {name}", f"{100 * share:.0f} % of a core") for name, share in result.cpu.items()),
        ("messages dropped by the recorder", str(sum(result.recording.dropped.values()))),
    ]
    head = (
        f"{cameras} cameras, {execution}, {len(known)} chunks, {len(on)} s; "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    return "\n".join([head, "", "| what | seen |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])


def _two(values_ms: Array) -> str:
    return f"{np.median(values_ms):.2f} / {np.quantile(values_ms, 0.99):.2f} ms"


def main() -> None:
    """Measure and print, and perhaps keep, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=whole_number(5, 3600), default=60, help="(default: 60)")
    parser.add_argument("--cameras", type=whole_number(1, 4), default=3, help="(default: 3)")
    parser.add_argument("--execution", choices=[mode.value for mode in ExecutionMode], default="real-time")
    parser.add_argument("--report", type=Path, help="file that the table is written to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), cameras=args.cameras, seconds=args.seconds, execution=args.execution)
    text = report(result, cameras=args.cameras, execution=args.execution)
    print(text)
    if args.report is not None:
        write_atomic(args.report, text.encode() + b"\n")


if __name__ == "__main__":
    main()
