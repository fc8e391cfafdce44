"""How smooth the arms move from chunk to chunk, by mode of execution: python -m benchmarks.seams.

Offline: the bridge's own modes, player and limits at their rate (:mod:`robot_bridge.replay`), with the
policy's way to join an answer to committed actions. The answers are those of a recorded trial, or come
from a made-up policy: it follows minimum-jerk moves between random poses, closes the error it sees, and
no two of its answers agree: each drifts off by a random amount of its own. All modes get the same
answers and the same random latencies.

    python -m benchmarks.seams
    python -m benchmarks.seams --recording runs/dense/trial_000 --latency-ms 100 300

A seam is where a chunk follows another. Acceleration is the second difference of where the arms are
wanted, and of the setpoints that the limits let through, over one action's time (or --window-ms); the
step is how much that changes within the same time. The table gives the largest step near a seam, rad/s2.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robot_bridge.chunk_execution import smooth_move
from robot_bridge.chunk_stream import RecordedPolicy, read_stream
from robot_bridge.execution_modes import Execution, ExecutionMode
from robot_bridge.recording import read_recording
from robot_bridge.replay import Answers, Seams, replay
from simplevla.cli import whole_number
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.policy.processor import joined

Array = NDArray[np.float64]

_SPEED = 0.4  # of the limits, of the moves that the policy makes


@dataclass(frozen=True)
class Setting:
    """The made-up policy; times in s, the drift in rad (a hundredth of it in m at the grippers)."""

    actions: int = 600
    chunk: int = 10
    dt_s: float = 0.1
    drift_rad: float = 0.02
    seed: int = 0


class MadeUpPolicy:
    """Answers with the next actions of the moves, from what it is shown."""

    def __init__(self, embodiment: Embodiment, setting: Setting) -> None:
        rng = np.random.default_rng(setting.seed)
        self.dt_s = setting.dt_s
        self._embodiment = embodiment
        self._setting = setting
        self._moves = _moves(embodiment, setting, rng)
        scale = np.full(embodiment.dimension, setting.drift_rad)
        scale[[part.stop - 1 for _, part in embodiment.slices()]] *= 0.01
        self._drifts = rng.normal(0, scale, (8 * setting.actions, embodiment.dimension))
        self._asked = 0

    def act(self, state: Array, first: int, committed: NDArray[np.float32] | None = None) -> Array:
        """Return (K, D) targets for the actions ``first``, ``first`` + 1, ...

        Args:
            state: (D,) where the arms are wanted.
            first: index of the first of them.
            committed: (m, D) the first of them, which are played whatever the answer says.
        """
        k = self._setting.chunk
        share = (np.arange(1, k + 1) / k)[:, None]
        ahead = self._moves[first + 1 : first + 1 + k]
        correction = share * (self._moves[first] - state) + share * self._drifts[self._asked]
        self._asked += 1
        plan = state + ahead - self._moves[first] + correction
        lower, upper = self._embodiment.position_limits()
        plan = np.clip(plan, lower, upper)
        if committed is None:
            return plan
        return joined(plan.astype(np.float32), committed, self._embodiment).astype(np.float64)


def _moves(embodiment: Embodiment, setting: Setting, rng: np.random.Generator) -> Array:
    """Return minimum-jerk moves between poses near home, one row for each action and some more."""
    home = embodiment.home()
    lower, upper = embodiment.position_limits()
    rows, here = [home], home
    while len(rows) < 2 * setting.actions + 2 * setting.chunk:
        goal = np.clip(home + 0.25 * rng.uniform(-0.5, 0.5, len(home)) * (upper - lower), lower, upper)
        move = smooth_move(
            here,
            goal,
            speed=_SPEED * embodiment.velocity_limits(),
            acceleration=_SPEED * embodiment.acceleration_limits(),
            dt_s=setting.dt_s,
            start_s=0.0,
            stamp_ns=1,
        )
        rows += list(move.targets)
        here = goal
    return np.array(rows)


def compare(
    policy: Callable[[], Answers],
    embodiment: Embodiment,
    *,
    start: Array,
    actions: int,
    latency_s: tuple[float, float],
    seed: int = 0,
    window_s: float | None = None,
) -> dict[ExecutionMode, Seams]:
    """Return the seams of every mode under the same uniformly random latencies.

    Args:
        policy: makes the same policy anew for each mode.
        embodiment: the robot.
        start: (D,) where the arms rest at first.
        actions: how many are executed.
        latency_s: the shortest and the longest.
        seed: of the latencies.
        window_s: see :func:`robot_bridge.replay.replay`.
    """
    latencies = np.random.default_rng(seed).uniform(*latency_s, 8 * actions)
    return {
        mode: replay(
            policy(),
            embodiment,
            Execution(mode),
            start=start,
            actions=actions,
            latencies_s=latencies,
            window_s=window_s,
        )
        for mode in ExecutionMode
    }


def format_table(found: dict[ExecutionMode, Seams]) -> str:
    """Return one line for each mode; ratios are to the first."""
    header = f"{'mode':<12} {'largest':>8} {'ratio':>6} {'median':>7} {'after limits':>13} {'ratio':>6}"
    lines = [f"{header} {'95 %':>6} {'median':>7} {'seams':>6} {'held':>5} {'refused':>8} {'time, s':>8}"]
    first = next(iter(found.values()))
    for mode, seams in found.items():
        wanted, sent = float(seams.wanted.max()), float(seams.sent.max())
        lines.append(
            f"{mode.value:<12} {wanted:8.2f} {wanted / first.wanted.max():6.2f} "
            f"{np.median(seams.wanted):7.2f} {sent:13.2f} {sent / first.sent.max():6.2f} "
            f"{np.quantile(seams.sent, 0.95):6.2f} {np.median(seams.sent):7.2f} {len(seams.sent):6d} "
            f"{seams.held:5d} {seams.refused:8d} {seams.duration_s:8.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Replay every mode and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recording", type=Path, help="folder of a recorded trial, best one of receding with horizon 1"
    )
    parser.add_argument("--actions", type=whole_number(10, 100_000), default=600, help="(default: 600)")
    parser.add_argument(
        "--chunk", type=whole_number(2, 100), default=10, help="actions a chunk, made up (default: 10)"
    )
    parser.add_argument(
        "--dt-ms", type=whole_number(20, 1000), default=100, help="an action, made up (default: 100)"
    )
    parser.add_argument(
        "--latency-ms", type=whole_number(0, 5000), nargs=2, default=(100, 300), metavar=("LOW", "HIGH"),
        help="uniform between the two (default: 100 300)",
    )  # fmt: skip
    parser.add_argument(
        "--drift-mrad", type=whole_number(0, 1000), default=20, help="made up (default: 20)"
    )
    parser.add_argument("--window-ms", type=whole_number(0, 1000), default=0, help="(default: an action)")
    parser.add_argument("--seed", type=whole_number(0, 2**31 - 1), default=0)
    parser.add_argument("--embodiment", default="piper_dual")
    args = parser.parse_args()
    embodiment = load_embodiment(args.embodiment)
    low, high = sorted(args.latency_ms)
    start, actions = embodiment.home(), args.actions
    policy: Callable[[], Answers]
    if args.recording is not None:
        stream = read_stream(read_recording(args.recording, images=False))
        start, actions = stream.start, min(actions, stream.length)
        policy = lambda: RecordedPolicy(stream, embodiment)  # noqa: E731
        source = f"{args.recording.name}: {len(stream.answers)} recorded answers"
    else:
        setting = Setting(actions, args.chunk, args.dt_ms / 1000, args.drift_mrad / 1000, args.seed)
        policy = lambda: MadeUpPolicy(embodiment, setting)  # noqa: E731
        source = str(setting)
    print(f"{source}; {actions} actions; latency {low} to {high} ms, seed {args.seed}")
    found = compare(
        policy,
        embodiment,
        start=start,
        actions=actions,
        latency_s=(low / 1000, high / 1000),
        seed=args.seed,
        window_s=args.window_ms / 1000 or None,
    )
    print(format_table(found))


if __name__ == "__main__":
    main()
