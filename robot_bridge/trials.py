"""Makes trials: reset, run, watch, judge, record, count; and a report at the end.

Input is checked before anything starts. Each trial is recorded to a file of its own and entered in
the index as soon as it is judged, so that whatever ends a run, what was done before is whole. A
trial that a part of the system spoils (server, camera or arm lost) is an error, no failure of the
policy; two such in a row end the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from robot_bridge import bringup
from robot_bridge.latency import ChunkTrace, count_limit_events, one_line, read_traces, split
from robot_bridge.nodes.trial import PolicyState, TrialNode
from robot_bridge.progress import Progress
from robot_bridge.recording import TrialRecorder, read_recording
from robot_bridge.report import is_slow, make_report, simulated_rate
from robot_bridge.rig import Rig
from robot_bridge.scene import Judgement, OperatorScene, Scene, TwinScene, operator_terminal
from robot_bridge.stack import ProcessEndedError, Stack, interruptible, private
from robot_bridge.trial_plan import Plan, TrialSettings, prepare
from robot_bridge.twin.control import TwinControl
from simplevla.errors import RecordError, SimplevlaError, UnavailableError
from simplevla.trial import FailureCode, Outcome, Strategy, Trial, TrialIndex, save_index

_WATCH_PERIOD_S = 0.1
_HOME_TIMEOUT_S = 30.0
_HOME_ATTEMPTS = 3
_ENABLE_TIMEOUT_S = 20.0
_START_TIMEOUT_S = 10.0
_STILL_TIMEOUT_S = 5.0
_SETTLE_TIMEOUT_S = 2.0
_RESPAWN_TIMEOUT_S = 120.0
_PAUSE_S = 1.0
_ERRORS_IN_A_ROW = 2
_FIRST_DOMAIN, _DOMAINS = 1, 70  # clear of ROS's default, of the twin's own and of the ephemeral ports
_LOST_WITH = {"server": FailureCode.SERVER_LOST, "arms": FailureCode.ARM_LOST}
_logger = logging.getLogger(__name__)


def run_trials(settings: TrialSettings) -> int:
    """Make the trials and the report; return 0 when every trial was judged, 1 if one ended in an error.

    Raises:
        SimplevlaError: the input is bad, the stack does not start, or errors in a row end the run.
        KeyboardInterrupt: after the arms hold and what was done is saved.
    """
    plan = prepare(settings)
    with contextlib.ExitStack() as resources:
        resources.enter_context(interruptible())
        stack = resources.enter_context(open_stack(plan))
        node = resources.enter_context(TrialNode(plan.embodiment, settings.namespace))
        scene = resources.enter_context(open_scene(stack.rig, plan))
        run = Run(plan, node, scene, stack.check)
        with _report_of(run):
            run.make()
    return 1 if run.errors else 0


@contextlib.contextmanager
def open_stack(plan: Plan) -> Iterator[Stack | AttachedStack]:
    """Yield everything that has to run, started on ports and in a ROS domain of its own, or attached to."""
    wanted = plan.bringup_settings()
    if plan.settings.attach:
        os.environ.update(bringup.environment(wanted, plan.rig))
        yield AttachedStack(plan.rig)
        return
    if plan.rig.is_twin and not os.environ.get("ROS_DOMAIN_ID"):
        os.environ["ROS_DOMAIN_ID"] = str(_FIRST_DOMAIN + os.getpid() % _DOMAINS)
    _logger.info("starting the stack in ROS domain %s", os.environ.get("ROS_DOMAIN_ID", "0"))
    with Stack(private(wanted)) as stack:
        yield stack


@dataclass(frozen=True)
class AttachedStack:
    """A stack that somebody else started, and watches."""

    rig: Rig

    def check(self) -> None:
        """Nothing: its processes are not ours; what is lost shows on its topics."""


@contextlib.contextmanager
def open_scene(rig: Rig, plan: Plan) -> Iterator[Scene]:
    """Yield the scene of ``rig``."""
    if rig.twin is not None:
        with TwinScene(TwinControl(rig.twin.control), plan.settings.task) as scene:
            yield scene
        return
    with (
        operator_terminal() as (answers, questions),
        OperatorScene(plan.settings.task, plan.instruction, answers=answers, questions=questions) as asked,
    ):
        yield asked


class Run:
    """The trials of one run, made one after another."""

    def __init__(self, plan: Plan, node: TrialNode, scene: Scene, check_stack: Callable[[], None]) -> None:
        """Prepare a run; nothing moves and nothing is written yet.

        Args:
            plan: what to do.
            node: hears and asks the stack.
            scene: sets up and judges.
            check_stack: raises UnavailableError if a part of the stack has ended.
        """
        self.plan = plan
        self.index = TrialIndex(run=plan.run_info())
        self.traces: list[ChunkTrace] = []
        self._node = node
        self._scene = scene
        self._check_stack = check_stack

    @property
    def errors(self) -> int:
        """How many trials ended in an error of the system."""
        return sum(trial.outcome is Outcome.ERROR for trial in self.index.trials)

    def make(self) -> None:
        """Make every trial.

        Raises:
            UnavailableError: the arms cannot be had, or errors in a row end the run.
        """
        settings = self.plan.settings
        self._node.wait_for_joints(_START_TIMEOUT_S)
        self._enable()
        in_a_row = 0
        with Progress(settings.trials, settings.step_limit) as progress:
            for number in range(settings.trials):
                self._wait_for_stack()
                if in_a_row:
                    self._enable()
                trial = self._trial(number, settings.seed + number, progress)
                self.index = msgspec.structs.replace(self.index, trials=(*self.index.trials, trial))
                save_index(self.index, self.plan.out)
                progress.ended(trial)
                in_a_row = in_a_row + 1 if trial.outcome is Outcome.ERROR else 0
                if in_a_row == _ERRORS_IN_A_ROW:
                    raise UnavailableError(
                        f"{in_a_row} trials in a row ended in an error, the last one: {trial.note}",
                        f"see the report in {self.plan.out}",
                    )

    def _wait_for_stack(self) -> None:
        """Return when all runs that has to; what has ended may be on its way back."""
        deadline = time.monotonic() + _RESPAWN_TIMEOUT_S
        while True:
            try:
                self._check_stack()
            except ProcessEndedError as error:
                if error.for_good or time.monotonic() > deadline:
                    raise
                time.sleep(_WATCH_PERIOD_S)
            else:
                return

    def _enable(self) -> None:
        """Give the arms power, at the start and after an error; nothing happens to arms that have it."""
        self._scene.clear_to_move()
        self._node.call("arms/enable", _ENABLE_TIMEOUT_S)

    def _go_home(self) -> None:
        """Send the arms home; what the limits interrupt, such as a gap in the feedback, is tried again."""
        for attempts_left in reversed(range(_HOME_ATTEMPTS)):
            try:
                self._node.call("arms/go_home", _HOME_TIMEOUT_S)
            except UnavailableError as error:
                if not attempts_left:
                    raise
                _logger.warning("%s; trying again", error)
                time.sleep(_PAUSE_S)
            else:
                return

    def _trial(self, number: int, seed: int, progress: Progress) -> Trial:
        name = f"trial_{number:03d}"
        attempt = _Attempt(started_ns=time.time_ns())
        recorder: TrialRecorder | None = None
        try:
            self._go_home()
            self._scene.reset(seed)
            self._node.wait_still(_STILL_TIMEOUT_S)
            recorder = self._record(name, seed)
            attempt.started_ns = time.time_ns()
            progress.started(number, seed)
            self._attempt(attempt, progress)
        except SimplevlaError as error:
            attempt.failure, attempt.note = _failure_of(error), str(error)
            attempt.outcome = Outcome.ERROR
            attempt.duration_s = (time.time_ns() - attempt.started_ns) / 1e9
            self._stop_policy()
        except BaseException:
            self._stop_policy()
            if recorder is not None:
                self._node.tap.recorder = None
                recorder.abandon()
            raise
        return self._entered(name, seed, attempt, recorder)

    def _record(self, name: str, seed: int) -> TrialRecorder:
        recorder = TrialRecorder(
            self.plan.out,
            name,
            self._node.tap.topics,
            namespace=self._node.namespace,
            metadata={
                "trial": name,
                "task": self.plan.settings.task,
                "seed": str(seed),
                "execution": self.plan.settings.execution,
                "embodiment": self.plan.embodiment.name,
            },
        )
        self._node.tap.recorder = recorder
        return recorder

    def _attempt(self, attempt: _Attempt, progress: Progress) -> None:
        """Let the policy try once, and fill in how it went."""
        plan, node = self.plan, self._node
        episode = f"{plan.settings.task}-{attempt.started_ns}"  # unlike any that this stack has seen
        wanted: dict[str, str | int] = {
            "instruction": plan.instruction,
            "episode": episode,
            "step_limit": plan.settings.step_limit,
        }
        node.set_parameters("policy", wanted, _START_TIMEOUT_S)
        before = self._scene.watch()
        began_s = time.monotonic()
        node.call("policy/start", _START_TIMEOUT_S)
        seen = before
        while not seen.ended and not attempt.over:
            time.sleep(_WATCH_PERIOD_S)
            self._check_stack()
            seen = self._scene.watch()
            attempt.hear(node.policy, episode)
            progress.moved(attempt.actions)
            if node.silent_joints():
                raise _LostError(FailureCode.ARM_LOST, "the arms say nothing any more")
            if time.monotonic() - began_s > plan.patience_s:
                attempt.over, attempt.note = True, f"ended after {plan.patience_s:.0f} s"
        attempt.duration_s = time.monotonic() - began_s
        if attempt.lost is not FailureCode.NONE and seen.success is not True:
            raise _LostError(attempt.lost, attempt.note)
        node.call("policy/stop", _START_TIMEOUT_S)
        node.wait_still(_SETTLE_TIMEOUT_S)
        after = self._scene.watch()
        if before.simulated_s is not None and after.simulated_s is not None:
            wall_s = time.monotonic() - began_s
            attempt.real_time_factor = (after.simulated_s - before.simulated_s) / wall_s
        attempt.hear(node.policy, episode)
        attempt.judged(seen if seen.success else self._scene.judge())

    def _stop_policy(self) -> None:
        """Stop the policy, so that the arms hold; they hold by themselves if it cannot be reached."""
        try:
            self._node.call("policy/stop", 2.0)
        except SimplevlaError as error:
            _logger.warning("%s", error)

    def _entered(self, name: str, seed: int, attempt: _Attempt, recorder: TrialRecorder | None) -> Trial:
        """Return the trial as the index keeps it, with the figures that its recording holds."""
        plan = self.plan
        recording, limits = "", dict[str, int]()
        traces: tuple[ChunkTrace, ...] = ()
        self._node.tap.recorder = None
        if recorder is not None:
            try:
                found = read_recording(recorder.finish().path, images=False)
                recording, traces, limits = name, read_traces(found), count_limit_events(found)
            except RecordError as error:
                attempt.note = f"{attempt.note}; {error}".lstrip("; ")
                _logger.error("%s: %s", name, error)
        self.traces += traces
        return Trial(
            id=name,
            task=plan.settings.task,
            rig=plan.rig.name,
            embodiment=plan.embodiment.name,
            policy_id=plan.bundle.id,
            instruction=plan.instruction,
            seed=seed,
            operator=plan.operator,
            started_ns=attempt.started_ns,
            duration_s=attempt.duration_s,
            actions=attempt.actions,
            outcome=attempt.outcome,
            failure=attempt.failure,
            strategy=attempt.strategy,
            note=attempt.note,
            latency=split(traces),
            limits=limits,
            real_time_factor=attempt.real_time_factor,
            recording=recording,
        )


@dataclass
class _Attempt:
    """What becomes known of a trial while it runs."""

    started_ns: int
    duration_s: float = 0.0
    actions: int = 0
    over: bool = False
    lost: FailureCode = FailureCode.NONE
    outcome: Outcome = Outcome.ERROR
    failure: FailureCode = FailureCode.NONE
    strategy: Strategy = Strategy.UNKNOWN
    note: str = ""
    real_time_factor: float | None = None

    def hear(self, state: PolicyState, episode: str) -> None:
        """Take note of what the policy says of ``episode``."""
        if state.episode != episode:
            return
        self.actions = state.actions
        self.over = self.over or state.phase in ("finished", "failed")
        if state.phase == "failed":
            self.lost, self.note = state.failure, state.reason

    def judged(self, verdict: Judgement) -> None:
        """Take over the final judgement."""
        self.strategy = verdict.strategy
        if verdict.success:
            self.note = ""  # whatever was lost after success has spoilt nothing
        self.note = "; ".join(part for part in (self.note, verdict.note) if part)
        if verdict.success is None:
            self.outcome, self.failure = Outcome.ABSTAINED, FailureCode.NONE
        elif verdict.success:
            self.outcome, self.failure = Outcome.SUCCESS, FailureCode.NONE
        else:
            self.outcome = Outcome.FAILURE
            known = verdict.failure is not FailureCode.NONE
            self.failure = verdict.failure if known else FailureCode.TIME_LIMIT


class _LostError(SimplevlaError):
    """A part of the system was lost in the middle of a trial."""

    def __init__(self, failure: FailureCode, message: str) -> None:
        super().__init__(message)
        self.failure = failure


def _failure_of(error: SimplevlaError) -> FailureCode:
    if isinstance(error, _LostError):
        return error.failure
    if isinstance(error, ProcessEndedError):
        return _LOST_WITH.get(error.process, FailureCode.OTHER)
    return FailureCode.OTHER


@contextlib.contextmanager
def _report_of(run: Run) -> Iterator[None]:
    """Write and announce the report when the block ends, however it ends, if any trial was made."""
    try:
        yield
    finally:
        if run.index.trials:
            print("\n".join(summary(run.index, run.traces)), flush=True)
            print(f"report            {make_report(run.plan.out)}", flush=True)


def summary(index: TrialIndex, traces: list[ChunkTrace]) -> list[str]:
    """Return the lines that a run ends with."""
    factors = [t.real_time_factor for t in index.trials if t.real_time_factor is not None]
    simulated = simulated_rate(index.run.evaluation if index.run else {})
    errors = sum(trial.outcome is Outcome.ERROR for trial in index.trials)
    lines = [f"success           {index.success()}"]
    if simulated is not None:
        lines.append(f"in simulation     {simulated}")
    if errors:
        lines.append(f"errors            {errors} of {len(index.trials)} trials, counted in no rate")
    lines.append(f"latency           {one_line(traces)}")
    if factors:
        slow = "; below real time, which can cost success" if is_slow(min(factors)) else ""
        lines.append(f"real-time factor  {statistics.median(factors):.2f}, lowest {min(factors):.2f}{slow}")
    return lines
