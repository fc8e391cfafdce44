"""The policy that answers, and the one before it until the new one has proved itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from policy_server.served_policy import ServedPolicy, Split
from simplevla.action_chunk import ActionChunk
from simplevla.errors import ChunkError, SimplevlaError
from simplevla.observation import Observation

Answer = tuple[ActionChunk, Split] | SimplevlaError

_PROBATION_ANSWERS = 20

_log = logging.getLogger(__name__)


class InternalError(SimplevlaError):
    """Something failed in the server that is not the client's doing."""

    code = "internal"

    def __init__(self) -> None:
        super().__init__("the policy server failed to answer", "read the server's log")


class Incumbent:
    """Who answers now. Not thread-safe: its owner locks.

    Attributes:
        policy: the one that answers.
    """

    def __init__(self, policy: ServedPolicy) -> None:
        self.policy = policy
        self._before: ServedPolicy | None = None
        self._left = 0

    def promote(self, policy: ServedPolicy) -> ServedPolicy:
        """Let ``policy`` answer from now on, on probation; return the one before."""
        self._before, self.policy, self._left = self.policy, policy, _PROBATION_ANSWERS
        return self._before

    def falls(self, policy: ServedPolicy, answers: Sequence[Answer]) -> bool:
        """Look at what ``policy`` answered; return whether the one before has taken over again."""
        if self._before is None or policy is not self.policy:
            return False
        if any(isinstance(answer, ChunkError | InternalError) for answer in answers):
            _log.error("policy %s fails; the one before answers again", policy.policy_id[:12])
            self.policy, self._before = self._before, None
            return True
        self._left -= len(answers)
        if self._left <= 0:
            self._before = None  # let go of it
        return False


def compute(policy: ServedPolicy, observations: Sequence[Observation]) -> list[Answer]:
    """Return the policy's answers; if the batch fails, each alone, so that none spoils another's."""
    if len(observations) <= policy.max_batch:
        try:
            return policy.answer_many(observations)
        except Exception:
            _log.exception("inference failed")
        if len(observations) == 1:
            return [InternalError()]
    return [answer for observation in observations for answer in compute(policy, [observation])]
