"""Chunks played offline: the bridge's rules, player and limits at their rate, in simulated time.

Where the answers come from is left open: a recorded trial (:mod:`robot_bridge.chunk_stream`), a made-up
policy, or a policy in a simulated world. What comes out is every setpoint, and how the arms moved where
chunks meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from robot_bridge.chunk_execution import ChunkPlayer, Trajectory
from robot_bridge.execution_modes import ChunkPlan, DelayEstimate, Execution, HandOver
from robot_bridge.limits import Limiter
from simplevla.embodiment import Embodiment
from simplevla.errors import ChunkError

Array = NDArray[np.float64]

_NS = 1_000_000_000


class Answers(Protocol):
    """A policy, for the replay: sees where the arms are, and says what comes next.

    Attributes:
        dt_s: time between two actions.
    """

    dt_s: float

    def act(self, state: Array, first: int, committed: NDArray[np.float32] | None) -> Array:
        """Return (K, D) targets for the actions ``first``, ``first`` + 1, ...

        Args:
            state: (D,) where the arms are wanted; rad and m.
            first: index in the episode.
            committed: (m, D) the first of them, which are played whatever the answer says.
        """
        ...


@dataclass
class SimulatedArms:
    """Player and limits at the control rate, in simulated time; the arms follow their setpoints at once.

    Attributes:
        wanted, sent: (D,) every tick: what the player wanted, and what the limits let through.
        seams_s: when a chunk followed another, and when the one before had ended in a hold.
        held: chunks that found the arms holding where the mode would have them move.
    """

    embodiment: Embodiment
    start: Array
    tick_s: float
    wanted: list[Array] = field(default_factory=list)
    sent: list[Array] = field(default_factory=list)
    seams_s: list[float] = field(default_factory=list)
    held: int = 0

    def __post_init__(self) -> None:
        self._player = ChunkPlayer(self.start, self.embodiment.position_limits())
        self._limiter = Limiter(self.embodiment)
        self._limiter.reset(self.start)
        self._handed: dict[int, HandOver] = {}
        self._last: HandOver | None = None

    @property
    def now_s(self) -> float:
        """The simulated time, s."""
        return len(self.wanted) * self.tick_s

    @property
    def now_ns(self) -> int:
        """The simulated time, ns."""
        return round(self.now_s * _NS)

    @property
    def executed(self) -> int:
        """Actions of the episode that were executed so far, as the arms count."""
        played = self._player.played(self.now_s)
        return self._handed[played[-1].stamp_ns].first + played[-1].reached if played else 0

    def until(self, t_ns: int) -> None:
        """Let the arms play until the first tick at ``t_ns`` or after it."""
        while self.now_s < t_ns / _NS - 1e-9:
            wanted = self._player.wanted((len(self.wanted) + 1) * self.tick_s)
            sent = self._limiter.admit(wanted, self.measured(), self.tick_s).positions
            self.wanted.append(wanted)
            self.sent.append(sent)
            self.drive(sent)

    def play(self, chunk: HandOver) -> None:
        """Take over a chunk."""
        start_s = chunk.start_ns / _NS
        self._player.offer(
            Trajectory(start_s, chunk.dt_s, chunk.targets.astype(np.float64), chunk.start_ns), self.now_s
        )
        if self._last is not None:
            seam_ns = chunk.reached_ns(chunk.splice)
            if self._last.ends_ns < seam_ns:
                self.seams_s.append(self._last.ends_ns / _NS)
            self.seams_s.append(seam_ns / _NS)
        self.held += chunk.held
        self._handed[chunk.start_ns] = self._last = chunk

    def finish(self, rest_s: float) -> None:
        """Play to the end of what there is, and rest."""
        if self._last is not None:
            self.until(self._last.ends_ns + round(rest_s * _NS))

    def measured(self) -> Array:
        """Return (D,) where the arms are."""
        return self.sent[-1] if self.sent else self.start

    def drive(self, setpoint: Array) -> None:
        """Move the arms for one tick; here they are where they are wanted."""


@dataclass(frozen=True)
class Outcome:
    """What became of the answers.

    Attributes:
        refused: answers that were stale.
    """

    asked: int
    refused: int


def execute(
    plan: ChunkPlan,
    arms: SimulatedArms,
    answers: Answers,
    latency_s: Callable[[], float],
    over: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Execute an episode until its step limit, or until it is ``over``."""
    asked = refused = 0
    while not over():
        if plan.newest is not None and not plan.goes_on:
            arms.until(plan.newest.ends_ns)
            plan.rest_at(arms.executed, arms.now_ns)
        if plan.complete:
            break
        arms.until(plan.look_ns())
        committed = plan.commit(arms.executed)
        capture_ns = arms.now_ns
        actions = answers.act(arms.measured(), plan.asked, committed)
        asked += 1
        arms.until(capture_ns + round(latency_s() * _NS))
        try:
            arms.play(plan.take(actions, answers.dt_s, capture_ns=capture_ns, now_ns=arms.now_ns))
        except ChunkError:
            refused += 1
    return Outcome(asked, refused)


@dataclass(frozen=True)
class Seams:
    """How smooth the arms moved where chunks met.

    Attributes:
        wanted, sent: (S,) largest step of any joint's acceleration near each seam, rad/s2, of what the
            player wanted and of what the limits let through.
        held, refused: chunks that found the arms holding though the mode moves on; that were stale.
        duration_s: of the whole.
    """

    wanted: Array
    sent: Array
    held: int
    refused: int
    duration_s: float


def replay(
    answers: Answers,
    embodiment: Embodiment,
    execution: Execution,
    *,
    start: Array,
    actions: int,
    latencies_s: Iterable[float],
    window_s: float | None = None,
) -> Seams:
    """Play ``actions`` actions of ``answers`` in one mode and return how smooth the seams are.

    Args:
        answers: the policy.
        embodiment: the robot, with its limits.
        execution: the mode.
        start: (D,) where the arms rest at first; rad and m.
        actions: how many.
        latencies_s: from each observation to its answer, s, one after another.
        window_s: over which acceleration is taken; one action's time by default.
    """
    arms = SimulatedArms(embodiment, start, 1 / embodiment.control_rate_hz)
    plan = ChunkPlan(execution, DelayEstimate(), step_limit=actions, begin_ns=0)
    delays = iter(latencies_s)
    outcome = execute(plan, arms, answers, lambda: next(delays))
    arms.finish(1.0)
    joints = np.ones(embodiment.dimension, dtype=bool)
    joints[[part.stop - 1 for _, part in embodiment.slices()]] = False
    window_s = window_s or answers.dt_s
    wanted, sent = (
        seam_steps(
            positions, arms.seams_s, joints, tick_s=arms.tick_s, window_s=window_s, near_s=2 * answers.dt_s
        )
        for positions in (arms.wanted, arms.sent)
    )
    return Seams(wanted, sent, arms.held, outcome.refused, arms.now_s)


def seam_steps(
    positions: list[Array],
    seams_s: list[float],
    joints: NDArray[np.bool_],
    *,
    tick_s: float,
    window_s: float,
    near_s: float,
) -> Array:
    """Return (S,) the largest step of any joint's acceleration near each seam, rad/s2.

    Acceleration is the second difference of positions over ``window_s``; the step is how much that
    changes within the next ``window_s``.

    Args:
        positions: (D,) at every tick, the first one tick after the time 0.
        seams_s: when the seams are.
        joints: (D,) which values count.
        tick_s: between two positions.
        window_s: a multiple of it.
        near_s: how far from a seam a step may be.
    """
    stride = max(1, round(window_s / tick_s))
    x = np.array(positions)[:, joints]
    acceleration = (x[2 * stride :] - 2 * x[stride:-stride] + x[: -2 * stride]) / (stride * tick_s) ** 2
    steps = np.abs(acceleration[stride:] - acceleration[:-stride]).max(axis=1)
    middle_s = (np.arange(len(steps)) + 1 + 1.5 * stride) * tick_s  # the moment that a step is about
    found = [steps[np.abs(middle_s - seam_s) <= near_s] for seam_s in seams_s]
    return np.array([near.max() for near in found if near.size])
