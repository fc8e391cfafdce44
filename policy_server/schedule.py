"""Whose turn it is: pure bookkeeping over requests that wait, with the time passed in.

- Latest wins: of one client only the newest request waits; the one before is refused as superseded.
- Deadlines: a request that cannot be answered in time, as far as recent answers tell, is refused at once.
- Fair: clients take turns in the order in which they began to wait, however often they ask.
- Together: where the engine computes several at once, the first waits a moment for the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from simplevla.errors import SimplevlaError
from simplevla.observation import Observation

_REMEMBERED = 31
_REMEMBERED_S = 5.0  # a slow spell must not have everything refused for ever
_ACTIVE_S = 1.0


class SupersededError(SimplevlaError):
    """A newer request of the same client came before this one had its turn."""

    code = "superseded"


class DeadlineError(SimplevlaError):
    """The answer would come after the request's deadline."""

    code = "too_late"


class DrainingError(SimplevlaError):
    """The server ends: what it has is answered, nothing new is taken on."""

    code = "draining"


@dataclass(eq=False)
class Job:
    """A request that waits for its turn.

    Attributes:
        client: whose it is.
        observation: checked.
        policy: what shall answer it.
        deadline_s: monotonic; None for never.
        arrived_s: when it was taken in, monotonic.
        refuse: says no to it.
        answer: hands out what the policy answered.
    """

    client: Hashable
    observation: Observation
    policy: Any
    deadline_s: float | None
    arrived_s: float
    refuse: Callable[[SimplevlaError], None]
    answer: Callable[..., None]
    turn_s: float = field(default=0.0)


Refusals = list[tuple[Job, SimplevlaError]]


class Schedule:
    """The requests that wait. Not thread-safe: its owner locks.

    Attributes:
        max_batch: how many the engine answers at once.
        usual_s: how long one answer (or one batch) takes: the median of the last ones, 0 without any.
    """

    def __init__(self, max_batch: int = 1, batch_wait_s: float = 0.002) -> None:
        """Start with nobody waiting.

        Args:
            max_batch: how many the engine answers at once.
            batch_wait_s: longest time that a request waits for others to be answered with it.
        """
        self.max_batch = max_batch
        self.usual_s = 0.0
        self._batch_wait_s = batch_wait_s
        self._waiting: dict[Hashable, Job] = {}  # in the order of turns
        self._asked_s: dict[Hashable, float] = {}
        self._took_s: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)  # ended, took
        self._busy_since_s: float | None = None

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def busy_since_s(self) -> float | None:
        """Since when an answer is being computed; None if none is."""
        return self._busy_since_s

    def admit(self, job: Job, now_s: float) -> Refusals:
        """Take ``job`` in, and return what has to be refused because of it, itself perhaps."""
        self._forget_old(now_s)
        self._asked_s[job.client] = now_s
        before = self._waiting.get(job.client)
        ahead = [other for client, other in self._waiting.items() if client != job.client]
        if self._ends_s(now_s, len(ahead) if before is None else self._place(job.client)) > _deadline(job):
            return [(job, self._too_late())]
        # A client keeps its place when it asks again: it waits as long as before, and no longer.
        job.turn_s = now_s if before is None else before.turn_s
        self._waiting[job.client] = job
        if before is None:
            return []
        return [
            (before, SupersededError("a newer request of yours came first", "wait for the newer answer"))
        ]

    def expired(self, now_s: float) -> Refusals:
        """Take out and return what can no longer be answered in time."""
        self._forget_old(now_s)
        late = [
            job
            for place, job in enumerate(self._waiting.values())
            if self._ends_s(now_s, place) > _deadline(job)
        ]
        for job in late:
            del self._waiting[job.client]
        return [(job, self._too_late()) for job in late]

    def take(self, now_s: float) -> list[Job]:
        """Return whose turn it is, at most ``max_batch`` of one policy.

        None while others are being answered, or if it is worth waiting for more. Call :meth:`ended` when
        they are answered.
        """
        if not self._waiting or self._busy_since_s is not None:
            return []
        if self.max_batch > 1 and self._worth_waiting(now_s):
            return []
        policy = next(iter(self._waiting.values())).policy
        jobs = [job for job in self._waiting.values() if job.policy is policy]
        del jobs[self.max_batch :]
        for job in jobs:
            del self._waiting[job.client]
        self._busy_since_s = now_s
        return jobs

    def ended(self, now_s: float) -> None:
        """Take note that what :meth:`take` returned is answered."""
        if self._busy_since_s is not None:
            self._took_s.append((now_s, now_s - self._busy_since_s))
            self._learn()
        self._busy_since_s = None

    def patience_s(self, now_s: float) -> float:
        """Return after how long to ask again for what is due or has expired; infinity if no time is set."""
        latest_s = min((_deadline(job) for job in self._waiting.values()), default=float("inf"))
        look_s = latest_s - self.usual_s
        if self._waiting and self._busy_since_s is None:
            look_s = min(look_s, next(iter(self._waiting.values())).turn_s + self._batch_wait_s)
        return max(0.0, look_s - now_s)

    def hand_over(self, before: Any, after: Any) -> None:
        """Let the policy ``after`` answer what waits for ``before``."""
        for job in self._waiting.values():
            if job.policy is before:
                job.policy = after

    def forget(self, client: Hashable) -> Job | None:
        """Drop a client that is gone; return its request, if one waited."""
        self._asked_s.pop(client, None)
        return self._waiting.pop(client, None)

    def _forget_old(self, now_s: float) -> None:
        while self._took_s and now_s - self._took_s[0][0] > _REMEMBERED_S:
            self._took_s.popleft()
            self._learn()
        for client in [c for c, s in self._asked_s.items() if now_s - s > _ACTIVE_S]:
            del self._asked_s[client]

    def _learn(self) -> None:
        self.usual_s = median(took for _, took in self._took_s) if self._took_s else 0.0

    def _worth_waiting(self, now_s: float) -> bool:
        first = next(iter(self._waiting.values()))
        self._forget_old(now_s)
        full = len(self._waiting) >= min(self.max_batch, len(self._asked_s))
        return not full and now_s < first.turn_s + self._batch_wait_s

    def _place(self, client: Hashable) -> int:
        return list(self._waiting).index(client)

    def _ends_s(self, now_s: float, place: int) -> float:
        """When the request at ``place`` would be answered, if each takes its turn and its usual time."""
        running = 0.0
        if self._busy_since_s is not None:
            running = max(0.0, self._busy_since_s + self.usual_s - now_s)
        return now_s + running + (place // self.max_batch + 1) * self.usual_s

    def _too_late(self) -> DeadlineError:
        return DeadlineError(
            f"it cannot be answered before its deadline: one answer takes {1e3 * self.usual_s:.0f} ms, "
            f"{len(self._waiting)} wait",
            "allow more time, or ask less often",
        )


def _deadline(job: Job) -> float:
    return float("inf") if job.deadline_s is None else job.deadline_s
