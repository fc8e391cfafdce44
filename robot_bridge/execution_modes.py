"""In which way a policy's chunks become motion: when to ask, what is committed, what the arms get next.

An action is named by its index in the episode. What was executed is told by the arms, by index; a hold
shifts time but no index. A :class:`ChunkPlan` keeps the targets that are handed over, by index, and
decides the rest; time is passed in, so the bridge's loop and the offline replay run the same rules.

===============  ================================================================================
synchronous      look, wait, play the whole chunk, look again: as the policy was evaluated
receding         the same, but of each chunk only the first ``horizon`` actions, by default half
ensembling       ask while moving; each action is the mean of all answers for it, older ones count
                 more (Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost
                 Hardware", weight exp(-0.1 i), i = 0 the oldest); new means replace what is planned
                 from the next action on
real-time        ask while moving, as late as recent delays allow; all that the arms have is committed
                 and sent along, the answer continues from it and is spliced in behind its last
                 action (real-time chunking: Black et al. 2025). ``horizon`` bounds what is taken
                 of one answer. The arms get each target as the mean of it, twice, and of those
                 before and after it: what is about to follow is known, so corners are rounded off,
                 those between chunks as those within, and nothing lags behind
===============  ================================================================================

An answer that comes late finds the arms holding at the end of what they had. It goes on from exactly
there by index, so it is still played, from now on; unless its observation is older than ``max_age_s``:
then it is refused, and the policy looks again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robot_bridge.chunk_execution import TOO_NEAR
from simplevla.errors import ChunkError, ConfigError

Array = NDArray[np.float32]

OLDER_COUNTS_MORE = 0.1
MAX_HORIZON = 512

_KEPT_DELAYS = 20
_DELAY_QUANTILE = 0.95
_KEPT_HANDED = 8
_SLOWEST = 2.0  # times as long as the policy's own time between two actions
_NS = 1_000_000_000


class ExecutionMode(str, Enum):
    """See the module."""

    SYNCHRONOUS = "synchronous"
    RECEDING = "receding"
    ENSEMBLING = "ensembling"
    REAL_TIME = "real-time"

    @property
    def moves_while_asking(self) -> bool:
        """Whether the arms go on while the policy thinks."""
        return self in (ExecutionMode.ENSEMBLING, ExecutionMode.REAL_TIME)


@dataclass(frozen=True)
class Execution:
    """How chunks are executed.

    Attributes:
        mode: see the module.
        horizon: how many new actions of an answer are played; 0 leaves it to the mode. Synchronous and
            ensembling play all that there are.
        max_age_s: an answer whose observation is older is refused, s.
        lead_s: how far ahead of now anything starts, so that it reaches the arms in time, s.
        settle_s: how much later than in simulation the arms are where the last action wants them; an
            observation of resting arms waits for that, s.

    Raises:
        ConfigError: a value is out of range, or the mode has no horizon.
    """

    mode: ExecutionMode = ExecutionMode.SYNCHRONOUS
    horizon: int = 0
    max_age_s: float = 2.0
    lead_s: float = 0.005
    settle_s: float = 0.0

    def __post_init__(self) -> None:
        has_horizon = self.mode in (ExecutionMode.RECEDING, ExecutionMode.REAL_TIME)
        if self.horizon and not has_horizon:
            raise ConfigError(f"{self.mode.value} execution has no horizon", "leave it at 0")
        if not 0 <= self.horizon <= MAX_HORIZON:
            raise ConfigError(f"a horizon of {self.horizon} actions", f"choose 0 to {MAX_HORIZON}")
        if not (self.max_age_s > 0 and self.lead_s >= 0 and self.settle_s >= 0):
            raise ConfigError("an age, a lead or a settling time is out of range", "choose positive values")


class DelayEstimate:
    """How long it takes from wanting to look until the answer is with the arms.

    A high quantile of the last delays, the lower neighbour where it lies between two: a single spike
    among twenty does not count, and every one is forgotten after twenty. Of n delays it is 1/n longer,
    since few say little.
    """

    def __init__(self) -> None:
        self._delays: deque[float] = deque(maxlen=_KEPT_DELAYS)

    def add(self, delay_s: float) -> None:
        """Take note of one delay, s."""
        self._delays.append(delay_s)

    def seconds(self) -> float:
        """Return the estimate, s; 0 before the first."""
        return self._quantile(_DELAY_QUANTILE)

    def typical_s(self) -> float:
        """Return the same for the median, s."""
        return self._quantile(0.5)

    def _quantile(self, share: float) -> float:
        if not self._delays:
            return 0.0
        few = 1 + 1 / len(self._delays)
        return few * float(np.quantile(list(self._delays), share, method="lower"))


@dataclass(frozen=True)
class HandOver:
    """Targets for the arms.

    Attributes:
        first: index in the episode of the first of them.
        splice: index of the first that follows from a new answer; those before it the arms had, and get
            anew, rounded off towards what follows.
        targets: (k, D) float32, rad and m.
        start_ns: when to set out for the first one, ns, maybe a moment ago; the next follow ``dt_s``
            apart.
        held: the arms came to hold before it; false for the first of an episode and where the mode has
            them hold anyway.
    """

    first: int
    splice: int
    targets: Array
    start_ns: int
    dt_s: float
    held: bool

    @property
    def ends_ns(self) -> int:
        """When the last target is to be reached, ns."""
        return self.reached_ns(self.first + len(self.targets))

    def reached_ns(self, executed: int) -> int:
        """Return when so many actions of the episode will have been executed, ns."""
        return self.start_ns + round((executed - self.first) * self.dt_s * _NS)

    def due(self, now_ns: int) -> int:
        """Return the index in the episode up to which its targets are due by ``now_ns``."""
        passed = int((now_ns - self.start_ns) / (self.dt_s * _NS))
        return self.first + min(max(passed, 0), len(self.targets))


@dataclass(frozen=True)
class _Answer:
    """(K, D) targets for the indices from ``first`` on."""

    first: int
    actions: Array

    def covers(self, index: int) -> bool:
        return 0 <= index - self.first < len(self.actions)

    def at(self, index: int) -> Array:
        action: Array = self.actions[index - self.first]
        return action


def _again(newest: HandOver, splice: int, dt_s: float, earliest_ns: int) -> tuple[int, int]:
    """Return the first index up to ``splice`` for which the arms can get another target, and its start, ns.

    It stays due when it was, and that is far enough ahead for the path to bend.
    """
    for first in range(newest.first + 1, splice):
        due_ns = newest.reached_ns(first + 1)
        start_ns = due_ns - round(dt_s * _NS)
        if start_ns > newest.start_ns and due_ns >= earliest_ns + round(TOO_NEAR * dt_s * _NS):
            return first, start_ns
    return splice, newest.reached_ns(splice)


class ChunkPlan:
    """What the arms have of one episode, by index, and what comes next.

    Use, again and again: look at :meth:`look_ns` or later; ask with :meth:`commit`; :meth:`take` the
    answer and hand over what it returns. :meth:`rest_at` whenever the arms have come to rest.

    Attributes:
        execution: how.
        planned: index of the first action that the arms do not have yet.
        newest: what was handed over last, None while the arms rest.
    """

    def __init__(
        self, execution: Execution, delays: DelayEstimate, *, step_limit: int, begin_ns: int
    ) -> None:
        """Begin an episode with resting arms.

        Args:
            execution: how.
            delays: from earlier episodes on.
            step_limit: actions at most.
            begin_ns: no observation may be older.
        """
        self.execution = execution
        self.planned = 0
        self.newest: HandOver | None = None
        self._delays = delays
        self._limit = step_limit
        self._look_ns = begin_ns  # since when a new observation could be had
        self._known: list[Array] = []  # targets by index
        self._answers: list[_Answer] = []
        self._asked = 0
        self._length = 1  # of an answer
        self._handed: list[HandOver] = []  # the last ones since the arms last rested

    @property
    def complete(self) -> bool:
        """Whether the arms have all that they may execute."""
        return self.planned >= self._limit

    @property
    def goes_on(self) -> bool:
        """Whether to look while the arms move; else they come to rest first."""
        return self.execution.mode.moves_while_asking and not self.complete

    def look_ns(self) -> int:
        """Return when to look next; an observation must not be older, ns."""
        newest = self.newest
        if newest is None:
            return self._look_ns
        if self.execution.mode is ExecutionMode.ENSEMBLING:
            return max(self._look_ns, newest.start_ns)  # once an action at most
        # One action more than the delay: the path then bends into the new chunk before it would begin
        # to brake for the end of the old one.
        dt_ns = round(newest.dt_s * _NS)
        needed_ns = round(self._delays.seconds() * _NS) + dt_ns
        longest_ns = (self._length - 1) * dt_ns  # or all of the answer would be committed
        return max(self._look_ns, newest.ends_ns - min(needed_ns, longest_ns))

    def commit(self, executed: int) -> Array | None:
        """Return (m, D) the targets from index ``executed`` on that an answer has to begin with, if any.

        Args:
            executed: actions executed when the observation was made, as the arms count.
        """
        self._asked = executed
        if self.execution.mode is not ExecutionMode.REAL_TIME or self.newest is None:
            return None
        # An action that is nearly done counts as done rather than filling the whole answer.
        self._asked = max(executed, self.planned - (self._length - 1))
        left = self._known[self._asked : self.planned]
        return np.array(left, dtype=np.float32) if left else None

    @property
    def asked(self) -> int:
        """Index of the first action of the answer to the last :meth:`commit`."""
        return self._asked

    def take(self, actions: ArrayLike, dt_s: float, *, capture_ns: int, now_ns: int) -> HandOver:
        """Return what of an answer the arms are to play, and from when on.

        Args:
            actions: (K, D) the answer to the last :meth:`commit`.
            dt_s: time between two of them.
            capture_ns: when its observation was made, ns.
            now_ns: ns of the same clock.

        Raises:
            ChunkError: it is stale: too old, or everything in it has been executed; the arms keep what
                they have.
        """
        answer = _Answer(self._asked, np.asarray(actions, dtype=np.float32))
        looked_ns, self._look_ns = self.look_ns(), now_ns
        self._delays.add((now_ns - looked_ns) / 1e9 + self.execution.lead_s)
        age_s = (now_ns - capture_ns) / 1e9
        if age_s > self.execution.max_age_s:
            raise ChunkError(
                f"stale: its observation is {age_s:.2f} s old, the bound is {self.execution.max_age_s:g} s",
                "look again; see why the policy's answers take so long",
            )
        self._length = len(answer.actions)
        splice = self._splice(now_ns)
        targets = self._targets(answer, splice)[: self._limit - splice]
        if not len(targets):
            raise ChunkError("stale: everything in it has been executed", "look again")
        self._known[splice:] = list(targets)
        self.planned = splice + len(targets)
        self.newest = self._hand_over(splice, self._pace_s(dt_s), now_ns)
        self._handed = [*self._handed, self.newest][-_KEPT_HANDED:]
        return self.newest

    def due(self, now_ns: int) -> int:
        """Return how many actions of the episode are due by ``now_ns`` if the arms do as told."""
        begun = [hand for hand in self._handed if hand.start_ns <= now_ns]
        if begun:
            return begun[-1].due(now_ns)
        return self._handed[0].first if self._handed else self.planned

    def rest_at(self, executed: int, now_ns: int) -> None:
        """Take note that the arms rest, having executed so many actions: what they did not do is off."""
        self.planned = executed
        del self._known[executed:]
        self.newest = None
        self._answers.clear()
        self._handed.clear()
        self._look_ns = max(self._look_ns, now_ns)

    def _hand_over(self, splice: int, dt_s: float, now_ns: int) -> HandOver:
        """Return what is known from index ``splice`` on, and before it what can still be rounded off."""
        newest, smooth = self.newest, self.execution.mode is ExecutionMode.REAL_TIME
        earliest_ns = now_ns + round(self.execution.lead_s * _NS)
        first, start_ns = splice, earliest_ns
        if newest is not None:
            start_ns = max(earliest_ns, newest.reached_ns(splice))
        held = newest is not None and self.execution.mode.moves_while_asking and start_ns == earliest_ns
        if smooth and newest is not None and not held:
            first, start_ns = _again(newest, splice, dt_s, earliest_ns)
        targets = self._rounded_off(first) if smooth else np.array(self._known[splice:])
        return HandOver(first, splice, targets, start_ns, dt_s, held)

    def _rounded_off(self, first: int) -> Array:
        """Return (k, D) the targets from ``first`` on; the last of those known stays what it is."""
        before = max(first - 1, 0)
        known = np.array(self._known[before:])
        rounded = known.copy()
        rounded[1:-1] = (known[:-2] + 2 * known[1:-1] + known[2:]) / 4
        return rounded[first - before :]

    def _pace_s(self, dt_s: float) -> float:
        """Return the time between two targets: ``dt_s``, or more where chunks are too short for the delay.

        While the arms move, a chunk of K actions has to last for its own delay and that of the next
        answer, for what was left of the action under way at its observation, half of one in the mean,
        and for one in which the path bends over; or the arms would run into its end. One of the two
        delays may be long, both seldom are. Slower in time beats stopping again and again.
        """
        if not self.execution.mode.moves_while_asking:
            return dt_s
        delays_s = self._delays.seconds() + self._delays.typical_s()
        return float(np.clip(delays_s / max(self._length - 1.5, 0.5), dt_s, _SLOWEST * dt_s))

    def _splice(self, now_ns: int) -> int:
        """Return the index from which on the arms' targets are replaced."""
        newest = self.newest
        if self.execution.mode is not ExecutionMode.ENSEMBLING or newest is None:
            return self.planned
        ahead_ns = now_ns + round(self.execution.lead_s * _NS) - newest.start_ns
        begun = newest.first + int(np.ceil(ahead_ns / (newest.dt_s * _NS)))
        return min(max(begun, newest.first + 1), self.planned)

    def _targets(self, answer: _Answer, splice: int) -> Array:
        """Return (k, D) the targets from index ``splice`` on."""
        if self.execution.mode is ExecutionMode.ENSEMBLING:
            self._answers = [*(old for old in self._answers if old.covers(splice)), answer]
            last = answer.first + len(answer.actions)
            means = [self._mean(index) for index in range(splice, last)]
            return np.array(means, dtype=np.float32)
        horizon = self.execution.horizon
        if self.execution.mode is ExecutionMode.RECEDING and not horizon:
            horizon = max(1, len(answer.actions) // 2)
        new = answer.actions[splice - answer.first :]
        return new[:horizon] if horizon else new

    def _mean(self, index: int) -> Array:
        known = [answer.at(index) for answer in self._answers if answer.covers(index)]
        weights = np.exp(-OLDER_COUNTS_MORE * np.arange(len(known)))
        mean: Array = np.average(known, axis=0, weights=weights).astype(np.float32)
        return mean
