"""How smooth the arms move from chunk to chunk, by mode of execution: python -m benchmarks.seams.

Offline: the bridge's own player and limits at 200 Hz, the policy's way to join an answer to committed
actions, and a made-up policy that answers after a random latency. It follows minimum-jerk moves
between random poses, closes the error it sees, and no two of its answers agree: each drifts off by a
random amount of its own. All modes get the same moves, the same latencies and the same drifts.

===============  ================================================================================
synchronous      look, wait, play the whole chunk, look again; what the bridge does
receding         the same, but of each chunk only the first half
ensembling       ask while moving; each action is the mean of all answers for it, older ones count
                 more (Zhao et al. 2023, weight exp(-0.1 i)); played from when the answer comes
real-time        ask while moving; what will be played until the answer comes is committed and sent
                 along, the answer continues from it and is spliced in at that index
===============  ================================================================================

A seam is where a chunk begins or ends. Acceleration is the second difference of where the arms are
wanted, and of the setpoints that the limits let through, over one action's time; the step is how much
that changes within the next action's time. The table gives the largest step near a seam, rad/s2.
"""

from __future__ import annotations

import argparse
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from robot_bridge.chunk_execution import ChunkPlayer, Trajectory, smooth_move
from robot_bridge.limits import Limiter
from simplevla.cli import whole_number
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.errors import ChunkError
from simplevla.policy.processor import joined

Array = NDArray[np.float64]

_MODES = ("synchronous", "receding", "ensembling", "real-time")
_TICK_S = 0.005
_SPEED = 0.4  # of the limits, of the moves that the policy makes
_OLDER_COUNTS_MORE = 0.1
_KEPT_DELAYS = 20
_DELAY_QUANTILE = 0.95


@dataclass(frozen=True)
class Setting:
    """What is simulated; times in s, the drift in rad (a hundredth of it in m at the grippers)."""

    actions: int
    chunk: int
    dt_s: float
    latency_s: tuple[float, float]
    drift_rad: float
    seed: int


class DelayEstimate:
    """How long an answer takes: a high quantile of the last delays, so that a spike is soon forgotten."""

    def __init__(self, first_s: float) -> None:
        self._delays: deque[float] = deque([first_s], maxlen=_KEPT_DELAYS)

    def add(self, delay_s: float) -> None:
        """Take note of one delay."""
        self._delays.append(delay_s)

    def actions(self, dt_s: float) -> int:
        """Return how many actions will be played until the next answer, at least one."""
        return max(1, int(np.ceil(np.quantile(list(self._delays), _DELAY_QUANTILE) / dt_s)))


class Policy:
    """Answers with the next actions of the moves, from what it is shown."""

    def __init__(self, embodiment: Embodiment, setting: Setting) -> None:
        rng = np.random.default_rng(setting.seed)
        self._embodiment = embodiment
        self._setting = setting
        self._moves = _moves(embodiment, setting, rng)
        scale = np.full(embodiment.dimension, setting.drift_rad)
        scale[[part.stop - 1 for _, part in embodiment.slices()]] *= 0.01
        self._drifts = rng.normal(0, scale, (4 * setting.actions, embodiment.dimension))
        self._latencies = rng.uniform(*setting.latency_s, 4 * setting.actions)
        self._asked = 0

    def latency_s(self) -> float:
        """Return how long the next answer takes."""
        return float(self._latencies[self._asked])

    def act(self, state: Array, done: int, committed: Array | None = None) -> Array:
        """Return (K, D) targets for the actions ``done``, ``done`` + 1, ...

        Args:
            state: (D,) where the arms are wanted.
            done: actions played.
            committed: (m, D) the first of them, which are played whatever the answer says.
        """
        k = self._setting.chunk
        share = (np.arange(1, k + 1) / k)[:, None]
        ahead = self._moves[done + 1 : done + 1 + k]
        correction = share * (self._moves[done] - state) + share * self._drifts[self._asked]
        self._asked += 1
        plan = state + ahead - self._moves[done] + correction
        lower, upper = self._embodiment.position_limits()
        plan = np.clip(plan, lower, upper)
        if committed is None:
            return plan
        floats = (plan.astype(np.float32), committed.astype(np.float32))
        return joined(*floats, self._embodiment).astype(np.float64)


@dataclass
class Run:
    """The arms while one mode plays: time goes on by :meth:`until`."""

    embodiment: Embodiment
    dt_s: float
    wanted: list[Array] = field(default_factory=list)
    sent: list[Array] = field(default_factory=list)
    seams_s: list[float] = field(default_factory=list)
    late: int = 0  # chunks of which a part came too late
    refused: int = 0  # chunks that came too late as a whole

    def __post_init__(self) -> None:
        home = self.embodiment.home()
        self._player = ChunkPlayer(home)
        self._limiter = Limiter(self.embodiment)
        self._limiter.reset(home)
        self._offered = 0

    def until(self, t_s: float) -> Array:
        """Let the arms play until ``t_s`` and return (D,) where they are wanted then."""
        while (len(self.wanted) + 1) * _TICK_S <= t_s + 1e-9:
            wanted = self._player.wanted((len(self.wanted) + 1) * _TICK_S)
            assert self._limiter.position is not None
            self.wanted.append(wanted)
            self.sent.append(self._limiter.admit(wanted, self._limiter.position, _TICK_S).positions)
        return self._player.wanted(t_s)

    def play(self, start_s: float, targets: Array, now_s: float) -> bool:
        """Hand over a chunk that starts at ``start_s``; return whether any of it came in time."""
        self._offered += 1
        try:
            skipped = self._player.offer(Trajectory(start_s, self.dt_s, targets, self._offered), now_s)
        except ChunkError:
            self.refused += 1
            return False
        self.late += bool(skipped)
        self.seams_s.append(max(start_s, now_s))
        return True


def simulate(mode: str, embodiment: Embodiment, setting: Setting) -> Run:
    """Return the run of one mode."""
    policy, run = Policy(embodiment, setting), Run(embodiment, setting.dt_s)
    if mode in ("synchronous", "receding"):
        _hold_and_look(run, policy, setting, setting.chunk if mode == "synchronous" else setting.chunk // 2)
    else:
        _look_while_moving(run, policy, setting, commit=mode == "real-time")
    return run


def _hold_and_look(run: Run, policy: Policy, setting: Setting, played: int) -> None:
    now_s, done = 0.1, 0
    while done < setting.actions:
        state = run.until(now_s)
        now_s += policy.latency_s()
        run.until(now_s)
        run.play(now_s, policy.act(state, done)[:played], now_s)
        done += played
        now_s += played * setting.dt_s
        run.seams_s.append(now_s)
    run.until(now_s + 1)


def _look_while_moving(run: Run, policy: Policy, setting: Setting, *, commit: bool) -> None:
    dt_s, delays = setting.dt_s, DelayEstimate(setting.latency_s[1])
    begin_s = 0.1 + policy.latency_s()  # index i is to be reached at begin_s + (i + 1) dt_s
    run.until(begin_s)
    plan = policy.act(run.until(begin_s), 0)
    run.play(begin_s, plan, begin_s)
    planned = dict(enumerate(plan))  # what is to be played, by index
    answers = [(0, plan)]
    done = 1
    while done < setting.actions:
        asked_s = begin_s + done * dt_s
        state, latency_s = run.until(asked_s), policy.latency_s()
        free = done
        committed = None
        if commit:
            count = min(delays.actions(dt_s), setting.chunk - 1, max(planned) + 1 - done)
            free = done + max(count, 0)
            committed = np.array([planned[i] for i in range(done, free)]) if count > 0 else None
        answer = policy.act(state, done, committed)
        now_s = asked_s + latency_s
        run.until(now_s)
        delays.add(latency_s)
        answers = [*(kept for kept in answers if kept[0] + setting.chunk > done), (done, answer)]
        targets = answer[free - done :] if commit else _ensemble(answers, done, setting.chunk)
        if run.play(begin_s + free * dt_s, targets, now_s):
            planned.update(enumerate(targets, start=free))
        done = int(np.ceil((now_s - begin_s) / dt_s - 1e-9))
    run.until(begin_s + done * dt_s + 1)


def _ensemble(answers: list[tuple[int, Array]], first: int, count: int) -> Array:
    """Return (count, D) the mean of all answers for the actions from ``first`` on, oldest first."""
    rows = []
    for index in range(first, first + count):
        known = [answer[index - begun] for begun, answer in answers if 0 <= index - begun < len(answer)]
        weights = np.exp(-_OLDER_COUNTS_MORE * np.arange(len(known)))
        rows.append(np.average(known, axis=0, weights=weights))
    return np.array(rows)


def seam_steps(positions: list[Array], seams_s: list[float], dt_s: float, joints: Array) -> Array:
    """Return (S,) the largest step of any joint's acceleration within two actions of each seam, rad/s2."""
    stride = round(dt_s / _TICK_S)
    x = np.array(positions)[:, joints]
    acceleration = (x[2 * stride :] - 2 * x[stride:-stride] + x[: -2 * stride]) / dt_s**2
    steps = np.abs(acceleration[stride:] - acceleration[:-stride]).max(axis=1)
    middle = np.arange(len(steps)) + 1.5 * stride  # the tick that a step is about
    found = [steps[np.abs(middle - seam_s / _TICK_S) <= 2 * stride] for seam_s in seams_s]
    return np.array([near.max() for near in found if near.size])


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


def main() -> None:
    """Simulate every mode and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--actions", type=whole_number(10, 100_000), default=600, help="(default: 600)")
    parser.add_argument(
        "--chunk", type=whole_number(2, 100), default=10, help="actions a chunk (default: 10)"
    )
    parser.add_argument(
        "--dt-ms", type=whole_number(20, 1000), default=100, help="an action (default: 100)"
    )
    parser.add_argument(
        "--latency-ms", type=whole_number(0, 5000), nargs=2, default=(100, 300), metavar=("LOW", "HIGH"),
        help="uniform between the two (default: 100 300)",
    )  # fmt: skip
    parser.add_argument("--drift-mrad", type=whole_number(0, 1000), default=20, help="(default: 20)")
    parser.add_argument("--seed", type=whole_number(0, 2**31 - 1), default=0)
    parser.add_argument("--embodiment", default="piper_dual")
    args = parser.parse_args()
    low, high = sorted(args.latency_ms)
    setting = Setting(
        args.actions,
        args.chunk,
        args.dt_ms / 1000,
        (low / 1000, high / 1000),
        args.drift_mrad / 1000,
        args.seed,
    )
    embodiment = load_embodiment(args.embodiment)
    print(setting)
    print(format_table(embodiment, setting))


def format_table(embodiment: Embodiment, setting: Setting) -> str:
    """Return one line for each mode."""
    joints = np.ones(embodiment.dimension, dtype=bool)
    joints[[part.stop - 1 for _, part in embodiment.slices()]] = False
    header = f"{'mode':<12} {'largest':>8} {'ratio':>6} {'median':>7} {'after limits':>13} {'ratio':>6}"
    lines = [f"{header} {'seams':>6} {'late':>5} {'refused':>8} {'time, s':>8}"]
    first: tuple[float, float] | None = None
    for mode in _MODES:
        run = simulate(mode, embodiment, setting)
        wanted, sent = (
            seam_steps(each, run.seams_s, setting.dt_s, joints) for each in (run.wanted, run.sent)
        )
        largest = (float(wanted.max()), float(sent.max()))
        first = first or largest
        lines.append(
            f"{mode:<12} {largest[0]:8.2f} {largest[0] / first[0]:6.2f} {np.median(wanted):7.2f} "
            f"{largest[1]:13.2f} {largest[1] / first[1]:6.2f} {len(wanted):6d} {run.late:5d} "
            f"{run.refused:8d} {len(run.wanted) * _TICK_S:8.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
