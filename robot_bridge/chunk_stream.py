"""A recorded trial as a stream of answers that can be played again, in another mode or with other delays.

What a policy answered at each index of the episode is known from ``policy/answers`` and
``policy/chunks``. Where the replay asks between two recorded answers, or beyond the end of one, it gets
what the next ones said. The densest stream is that of ``receding`` execution with a horizon of 1: an
answer for each index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robot_bridge.recording import Recording
from simplevla.embodiment import Embodiment
from simplevla.errors import RecordError
from simplevla.policy.processor import joined

ANSWERS = "policy/answers"
CHUNKS = "policy/chunks"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RecordedAnswer:
    """One answer: (K, D) targets for the actions ``first``, ``first`` + 1, ...; rad and m."""

    first: int
    actions: Array


@dataclass(frozen=True)
class ChunkStream:
    """The answers of one episode, in order.

    Attributes:
        answers: at least one.
        dt_s: time between two actions.
        start: (D,) the setpoint at the first answer.
        delays_s: (N,) from each answer's observation to its hand-over, as recorded.
    """

    answers: tuple[RecordedAnswer, ...]
    dt_s: float
    start: Array
    delays_s: Array

    @property
    def length(self) -> int:
        """How many actions of the episode are known."""
        return max(answer.first + len(answer.actions) for answer in self.answers)


def read_stream(recording: Recording) -> ChunkStream:
    """Return the stream of a recorded trial.

    Raises:
        RecordError: the recording has no answers, or they do not fit each other.
    """
    whole = {each.stamp_ns: each for each in recording.trajectories.get(ANSWERS, ())}
    answers, delays_s = [], []
    for status in recording.statuses.get(CHUNKS, ()):
        answer = whole.get(status.stamp_ns)
        if answer is None:
            continue
        try:
            asked = int(status.values["asked"])
            delays_s.append((int(status.values["publish_ns"]) - int(status.values["capture_ns"])) / 1e9)
        except (KeyError, ValueError) as error:
            raise RecordError(
                f"{recording.path}: the chunk at {status.stamp_ns} lacks {error}", "record a new trial"
            ) from error
        answers.append(RecordedAnswer(asked, answer.targets))
    if not answers or not len(recording.commanded.position):
        raise RecordError(
            f"the recording {recording.path} has no answers of a policy", "give one of a trial, made by now"
        )
    shapes = {answer.actions.shape for answer in answers}
    spacings = {each.dt_s for each in whole.values()}
    if len(shapes) > 1 or max(spacings) - min(spacings) > 1e-6:
        raise RecordError(
            f"the answers in {recording.path} differ in shape or spacing",
            "give the recording of one policy",
        )
    return ChunkStream(
        tuple(answers),
        spacings.pop(),
        recording.commanded.position[0],
        np.array(delays_s, dtype=np.float64),
    )


class RecordedPolicy:
    """Answers as the stream has it; see :class:`robot_bridge.replay.Answers`."""

    def __init__(self, stream: ChunkStream, embodiment: Embodiment) -> None:
        """Prepare to answer for ``embodiment``.

        Raises:
            RecordError: the stream is of another robot.
        """
        self.dt_s = stream.dt_s
        self._answers = stream.answers
        self._embodiment = embodiment
        self._length, dimension = stream.answers[0].actions.shape
        if dimension != embodiment.dimension:
            raise RecordError(
                f"the stream has {dimension} values, {embodiment.name} has {embodiment.dimension}",
                "name the embodiment of the recorded robot",
            )

    def act(self, _: Array, first: int, committed: NDArray[np.float32] | None) -> Array:
        """Return (K, D) targets; joined to what is committed as the policy server does it.

        Where the arms are does not matter: the recorded targets are absolute.

        Args:
            first: index of the first of them.
            committed: (m, D) what is played whatever the answer says.
        """
        planned = np.array([self._at(index, first) for index in range(first, first + self._length)])
        if committed is None:
            return planned
        return joined(planned.astype(np.float32), committed, self._embodiment).astype(np.float64)

    def _at(self, index: int, asked: int) -> Array:
        """Return the target for ``index`` of the newest answer up to ``asked``, else of the next one."""
        covering = [a for a in self._answers if 0 <= index - a.first < len(a.actions)]
        known = [a for a in covering if a.first <= asked]
        if known or covering:
            answer = known[-1] if known else covering[0]
            target: Array = answer.actions[index - answer.first]
            return target
        last = max(self._answers, key=lambda a: a.first)
        end: Array = last.actions[-1]
        return end
