"""The scene of a trial: who sets it up, and who judges how it ended.

On the twin both are the simulation's, from its own state and contacts. On a robot both are the
operator's, asked on the terminal.
"""

from __future__ import annotations

import contextlib
import io
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from simplevla.errors import UnavailableError
from simplevla.trial import FailureCode, Strategy

if TYPE_CHECKING:
    from robot_bridge.twin.control import TwinControl


TERMINAL = "/dev/tty"  # of whoever started us, whatever our own input is


def has_operator() -> bool:
    """Return whether somebody sits at a terminal: ours, or that of the launch we are part of."""
    try:
        with operator_terminal():
            return True
    except UnavailableError:
        return False


@contextlib.contextmanager
def operator_terminal() -> Iterator[tuple[TextIO, TextIO]]:
    """Yield where the operator answers, and where questions go.

    Under ``ros2 launch`` input and output are pipes; the terminal it was started from is ours as well.

    Raises:
        UnavailableError: there is no terminal.
    """
    if sys.stdin.isatty():
        yield sys.stdin, sys.stdout
        return
    try:
        answers = open(TERMINAL, encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UnavailableError("there is no operator's terminal", "run this from a terminal") from error
    with answers, open(TERMINAL, "w", encoding="utf-8") as questions:
        yield answers, questions


@dataclass(frozen=True)
class Judgement:
    """What is known of a trial at one moment.

    Attributes:
        success: None while nobody has decided; still None at the end, the judge abstained.
        ended: there is nothing more to wait for.
        simulated_s: the twin's own time, s; None on a robot.
    """

    success: bool | None = None
    ended: bool = False
    strategy: Strategy = Strategy.UNKNOWN
    failure: FailureCode = FailureCode.NONE
    simulated_s: float | None = None
    note: str = ""


class Scene(Protocol):
    """Lets the arms move, sets the scene up before a trial, watches it, and judges it at the end."""

    def clear_to_move(self) -> None:
        """Return when nobody stands in the way: the arms get power and go home next.

        Raises:
            UnavailableError: nobody can say.
        """

    def reset(self, seed: int) -> None:
        """Bring the scene to the initial state that ``seed`` names.

        Raises:
            UnavailableError: nobody can.
        """

    def watch(self) -> Judgement:
        """Return what is known now; called many times a second, never waits."""

    def judge(self) -> Judgement:
        """Return the final judgement; may ask somebody.

        Raises:
            UnavailableError: nobody answers.
        """


class TwinScene:
    """The twin's own scene; a context manager that owns the connection to it."""

    def __init__(self, control: TwinControl, task: str) -> None:
        """Reset scenes of ``task`` through ``control``."""
        self._control = control
        self._task = task

    def __enter__(self) -> TwinScene:
        self._control.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.__exit__(kind, error, trace)

    def clear_to_move(self) -> None:
        """Return at once: nobody can stand in a simulation."""

    def reset(self, seed: int) -> None:
        """Place the objects as ``seed`` says; the arms stay where they are."""
        self._control.reset(seed, task=self._task)

    def watch(self) -> Judgement:
        """Return the simulation's state of the task."""
        status = self._control.status()
        return Judgement(
            success=status.success,
            ended=status.success,
            strategy=status.strategy,
            failure=status.failure,
            simulated_s=status.time_s,
        )

    def judge(self) -> Judgement:
        """Return the same as :meth:`watch`: the simulation always knows."""
        return self.watch()


class OperatorScene:
    """A person at a terminal sets the scene up and says how the trial ended."""

    def __init__(self, task: str, instruction: str, *, answers: TextIO, questions: TextIO) -> None:
        """Ask on ``questions``, hear on ``answers``."""
        self._task = task
        self._instruction = instruction
        self._answers = answers
        self._questions = questions

    def __enter__(self) -> OperatorScene:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def clear_to_move(self) -> None:
        """Ask to step back, and wait until that is confirmed."""
        self._ask("The arms get power and go home next. Stand clear, then press Enter: ")

    def reset(self, seed: int) -> None:
        """Ask to set the scene up, and wait until it is."""
        self._say(f"The arms hold. Set up {self._task}, start {seed}, and stand clear.")
        self._ask("Press Enter when the scene is ready: ")
        self._say(f'The policy is told: "{self._instruction}". Press Enter when the trial has ended.')

    def watch(self) -> Judgement:
        """Return whether the operator has pressed Enter."""
        try:
            pressed = bool(select.select([self._answers], [], [], 0)[0])
        except (io.UnsupportedOperation, ValueError):
            return Judgement()
        if pressed:
            self._answers.readline()
        return Judgement(ended=pressed)

    def judge(self) -> Judgement:
        """Ask whether the trial succeeded, how, and for a note."""
        verdict = self._choose("Did it succeed?", {"y": "yes", "n": "no", "a": "abstain"})
        strategy, failure = Strategy.UNKNOWN, FailureCode.NONE
        if verdict == "yes":
            choices = {
                "g": Strategy.GRASP.value,
                "p": Strategy.PUSH.value,
                "t": Strategy.TOUCH.value,
                "u": Strategy.UNKNOWN.value,
            }
            strategy = Strategy(self._choose("How was the object moved?", choices))
        elif verdict == "no":
            codes = {
                "t": FailureCode.TIME_LIMIT.value,
                "u": FailureCode.NOT_UPRIGHT.value,
                "d": FailureCode.DROPPED.value,
                "o": FailureCode.OPERATOR.value,
                "x": FailureCode.OTHER.value,
            }
            failure = FailureCode(self._choose("Why not?", codes))
        note = self._ask("Note (Enter for none): ")
        success = {"yes": True, "no": False}.get(verdict)
        return Judgement(success, ended=True, strategy=strategy, failure=failure, note=note)

    def _choose(self, question: str, choices: dict[str, str]) -> str:
        """Ask until one of ``choices``, {letter: word}, is named by its letter or its word."""
        offer = ", ".join(f"{letter} = {word}" for letter, word in choices.items())
        while True:
            answer = self._ask(f"{question} [{offer}] ").lower()
            if answer in choices:
                return choices[answer]
            if answer in choices.values():
                return answer
            self._say(f"Please answer with one of: {', '.join(choices)}")

    def _ask(self, question: str) -> str:
        self._questions.write(question)
        self._questions.flush()
        answer = self._answers.readline()
        if not answer:
            raise UnavailableError(
                "nobody answers the trial's questions: standard input is closed",
                "run trials on a robot from a terminal, or use the twin",
            )
        return answer.strip()

    def _say(self, text: str) -> None:
        self._questions.write(f"{text}\n")
        self._questions.flush()
