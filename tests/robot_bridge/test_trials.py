"""Trials: what is refused before anything starts, how a run counts, and what ends it."""

import contextlib
import os
import pty
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from robot_bridge.recording import INTERRUPTED, read_recording
from robot_bridge.report import make_report
from robot_bridge.rig import load_rig
from robot_bridge.scene import Judgement, OperatorScene, has_operator, operator_terminal
from robot_bridge.stack import ProcessEndedError
from robot_bridge.trial_plan import Plan, TrialSettings, prepare
from robot_bridge.trials import Run, summary
from simplevla.bundle import CodecEntry, Manifest, Provenance, load_bundle, write_bundle
from simplevla.embodiment import load_embodiment
from simplevla.errors import BundleError, ConfigError, EmbodimentError, SimplevlaError, UnavailableError
from simplevla.trial import FailureCode, Outcome, Strategy, load_index

pytest.importorskip("rclpy")

pytestmark = pytest.mark.realtime

INSTRUCTION = "move the can next to the pot"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A bundle whose policy was never trained."""
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b", "piper_dual")


def make_bundle(path: Path, embodiment_name: str) -> Path:
    embodiment = load_embodiment(embodiment_name)
    size = embodiment.dimension
    manifest = Manifest(
        name="untrained",
        created_ns=0,
        embodiment=embodiment,
        network={},
        cameras=("head",),
        instructions={"move_can_pot": INSTRUCTION},
        action_space="joint_absolute",
        chunk_length=5,
        dt_s=0.1,
        codec=CodecEntry((-1.0,) * size, (1.0,) * size, (True,) * size),
        proprio_low=(-1.0,) * size,
        proprio_high=(1.0,) * size,
        provenance=Provenance(commit="0123abc", config={}, seeds={}, demonstrations=7),
    )
    return write_bundle(path, manifest, {"w": np.zeros(1, np.float32)}, b"{}").path


@pytest.fixture
def plan(bundle, tmp_path) -> Plan:
    return make_plan(bundle, tmp_path / "run")


def make_plan(bundle: Path, out: Path, **changes) -> Plan:
    return prepare(TrialSettings(bundle=bundle, out=out, **changes))


class ScriptedScene:
    """Succeeds after some looks, or never."""

    def __init__(self, looks_to_success: int | None = None) -> None:
        self.looks_to_success = looks_to_success
        self.seeds: list[int] = []
        self.looks = 0

    def clear_to_move(self) -> None:
        pass

    def reset(self, seed: int) -> None:
        self.seeds.append(seed)
        self.looks = 0

    def watch(self) -> Judgement:
        self.looks += 1
        done = self.looks_to_success is not None and self.looks > self.looks_to_success
        strategy = Strategy.PUSH if done else Strategy.NONE
        return Judgement(done, done, strategy, FailureCode.NONE, simulated_s=0.5 * time.monotonic())

    def judge(self) -> Judgement:
        return self.watch()


class SmallStack:
    """The arms' and the policy's side of ROS in one process, playing actions that go nowhere."""

    def __init__(self, fails_with: FailureCode | None = None) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.executors import SingleThreadedExecutor
        from sensor_msgs.msg import JointState
        from std_srvs.srv import Trigger

        from robot_bridge.nodes.process import declare

        self.fails_with = fails_with
        self.refuses: list[str] = []
        self.calls: list[str] = []
        self.silent = self.dead = False
        self._context = rclpy.Context()
        rclpy.init(context=self._context)
        arms = rclpy.create_node("arms", context=self._context)
        policy = rclpy.create_node("policy", context=self._context)
        for name, default in (("instruction", ""), ("episode", ""), ("step_limit", 0)):
            declare(policy, name, default, "of the episode")
        self._policy = policy
        self._nodes = (arms, policy)
        self._joints = arms.create_publisher(JointState, "joint_states", 50)
        self._setpoints = arms.create_publisher(JointState, "setpoints", 50)
        self._executed = arms.create_publisher(DiagnosticArray, "arms/executed", 50)
        self._limits = arms.create_publisher(DiagnosticArray, "arms/limits", 50)
        self._state = policy.create_publisher(DiagnosticArray, "policy/state", 10)
        self._chunks = policy.create_publisher(DiagnosticArray, "policy/chunks", 10)
        for node, service in (
            (arms, "~/enable"), (arms, "~/go_home"), (policy, "~/start"), (policy, "~/stop"),
        ):  # fmt: skip
            node.create_service(Trigger, service, self._serve(f"{node.get_name()}/{service[2:]}"))
        arms.create_timer(0.02, self._tick)
        self._actions, self._phase = 0, "idle"
        self._executor = SingleThreadedExecutor(context=self._context)
        for node in self._nodes:
            self._executor.add_node(node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._executor.shutdown()
        self._thread.join(5)
        for node in self._nodes:
            node.destroy_node()
        self._context.try_shutdown()

    def check(self) -> None:
        """Raise if a part is dead."""
        if self.dead:
            raise ProcessEndedError("arms", "arms ended with status -9", "see its log")

    def _serve(self, name: str):
        def serve(_, response):
            self.calls.append(name)
            response.success = name not in self.refuses
            if name in self.refuses:
                self.refuses.remove(name)
            if name == "policy/start":
                self._actions, self._phase = 0, "running"
            if name == "policy/stop" and self._phase == "running":
                self._phase = "idle"
            return response

        return serve

    def _tick(self) -> None:
        from sensor_msgs.msg import JointState

        from robot_bridge.nodes.process import diagnostics, set_stamp, status

        if self.silent:
            return
        embodiment = load_embodiment("piper_dual")
        now_ns = time.time_ns()
        message = JointState(name=embodiment.names(), position=embodiment.home().tolist())
        set_stamp(message.header.stamp, now_ns)
        self._joints.publish(message)
        self._setpoints.publish(message)
        step_limit = self._policy.get_parameter("step_limit").value
        if self._phase == "running":
            self._actions += 1
            times = {"capture_ns": 30_000_000, "request_ns": 20_000_000, "reply_ns": 5_000_000}
            asked = {key: now_ns - ago for key, ago in times.items()}
            asked |= {"index": self._actions, "inference_ms": 10.0}
            self._chunks.publish(diagnostics(now_ns, status("chunk", "", asked)))
            played = {"first_setpoint_ns": now_ns, "executed": 1}
            self._executed.publish(diagnostics(now_ns, status("executed", "", played)))
            self._limits.publish(diagnostics(now_ns, status("limits: velocity", "left_joint1", {})))
            if self.fails_with is not None and self._actions >= 3:
                self._phase = "failed"
            elif self._actions >= step_limit:
                self._phase = "finished"
        values = {
            "phase": self._phase,
            "episode": self._policy.get_parameter("episode").value,
            "actions": self._actions,
            "failure": (self.fails_with or FailureCode.NONE).value,
            "reason": "it is gone" if self.fails_with else "",
        }
        self._state.publish(diagnostics(now_ns, status("policy", "", values)))


@contextlib.contextmanager
def running(plan: Plan, scene, *, silent_after_s: float = 10.0, **stack_settings):
    """A run on a small stack, which may be kept from speaking by all else that this process does."""
    from robot_bridge.nodes.trial import TrialNode

    with (
        SmallStack(**stack_settings) as stack,
        TrialNode(plan.embodiment, silent_after_s=silent_after_s) as node,
    ):
        yield Run(plan, node, scene, stack.check), stack


def test_a_run_is_counted_recorded_and_reported(bundle, tmp_path):
    plan = make_plan(bundle, tmp_path / "run", trials=2, seed=41, step_limit=1000)
    scene = ScriptedScene(looks_to_success=8)
    with running(plan, scene) as (run, stack):
        run.make()
        assert run.errors == 0
    assert scene.seeds == [41, 42]
    assert stack.calls[:3] == ["arms/enable", "arms/go_home", "policy/start"]
    assert stack.calls.count("policy/stop") == 2
    index = load_index(plan.out)
    assert index == run.index
    assert index.run.demonstrations == 7
    for trial in index.trials:
        assert (trial.outcome, trial.strategy) == (Outcome.SUCCESS, Strategy.PUSH)
        assert trial.actions > 3
        assert trial.latency.capture_to_request_ms == pytest.approx(10)
        assert trial.latency.request_to_reply_ms == pytest.approx(15)
        assert trial.latency.total_ms == pytest.approx(30)
        assert trial.real_time_factor == pytest.approx(0.5, abs=0.05)
        recording = read_recording(plan.out / trial.recording)
        assert trial.limits == {"velocity": recording.counts["arms/limits"]}
        assert recording.counts["policy/chunks"] >= trial.actions
        assert recording.metadata["seed"] == str(trial.seed)
    lines = "\n".join(summary(index, run.traces))
    assert "2/2 = 100.0 %" in lines
    assert "below real time" in lines
    assert make_report(plan.out).is_file()


def test_no_success_before_the_step_limit_is_a_failure(bundle, tmp_path):
    plan = make_plan(bundle, tmp_path / "run", trials=1, step_limit=10)
    with running(plan, ScriptedScene()) as (run, _):
        run.make()
    (trial,) = load_index(plan.out).trials
    assert (trial.outcome, trial.failure) == (Outcome.FAILURE, FailureCode.TIME_LIMIT)
    assert trial.actions == 10


def test_a_lost_server_is_an_error_and_two_in_a_row_end_the_run(bundle, tmp_path):
    plan = make_plan(bundle, tmp_path / "run", trials=5)
    with running(plan, ScriptedScene(), fails_with=FailureCode.SERVER_LOST) as (run, _):
        with pytest.raises(UnavailableError, match="2 trials in a row"):
            run.make()
        assert run.errors == 2
    trials = load_index(plan.out).trials
    assert [(t.outcome, t.failure) for t in trials] == [(Outcome.ERROR, FailureCode.SERVER_LOST)] * 2
    assert all("it is gone" in t.note for t in trials)
    assert load_index(plan.out).success().trials == 0
    assert "2 of 2 trials" in "\n".join(summary(run.index, run.traces))


def test_silent_arms_are_an_error(bundle, tmp_path):
    plan = make_plan(bundle, tmp_path / "run", trials=1)
    with running(plan, ScriptedScene(), silent_after_s=1.0) as (run, stack):
        threading.Timer(2.0, lambda: setattr(stack, "silent", True)).start()
        run.make()
    (trial,) = load_index(plan.out).trials
    assert (trial.outcome, trial.failure) == (Outcome.ERROR, FailureCode.ARM_LOST)


def test_a_way_home_that_was_interrupted_is_tried_again(bundle, tmp_path):
    plan = make_plan(bundle, tmp_path / "run", trials=1)
    with running(plan, ScriptedScene(looks_to_success=3)) as (run, stack):
        stack.refuses = ["arms/go_home"]
        run.make()
    assert stack.calls.count("arms/go_home") == 2
    assert run.errors == 0


def test_arms_that_never_get_home_are_an_error(bundle, tmp_path):
    plan = make_plan(bundle, tmp_path / "run", trials=1)
    with running(plan, ScriptedScene(looks_to_success=3)) as (run, stack):
        stack.refuses = ["arms/go_home"] * 3
        run.make()
    (trial,) = load_index(plan.out).trials
    assert (trial.outcome, trial.recording) == (Outcome.ERROR, "")
    assert "arms/go_home" in trial.note


def test_an_operator_answers_at_the_terminal_that_a_launch_was_started_from(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", (tmp_path / "input").open("w+"))
    monkeypatch.setattr("robot_bridge.scene.TERMINAL", str(tmp_path / "none"))
    assert not has_operator()
    master, slave = pty.openpty()
    monkeypatch.setattr("robot_bridge.scene.TERMINAL", os.ttyname(slave))
    assert has_operator()
    with operator_terminal() as (answers, questions):
        scene = OperatorScene("move_can_pot", "move it", answers=answers, questions=questions)
        os.write(master, b"\n")
        scene.clear_to_move()
        assert b"Stand clear" in os.read(master, 1000)
    os.close(master)
    os.close(slave)


def test_the_next_trial_waits_for_a_part_that_comes_back(bundle, tmp_path):
    states = iter([False, False, None, True])

    def check() -> None:
        if (for_good := next(states)) is not None:
            raise ProcessEndedError("server", "server ended", "see its log", for_good=for_good)

    run = Run(make_plan(bundle, tmp_path / "run"), None, ScriptedScene(), check)
    run._wait_for_stack()
    with pytest.raises(ProcessEndedError):
        run._wait_for_stack()
    assert next(states, "all seen") == "all seen"


def test_a_dead_part_ends_the_run_after_the_trial_that_saw_it(bundle, tmp_path):
    plan = make_plan(bundle, tmp_path / "run", trials=3)
    with running(plan, ScriptedScene()) as (run, stack):
        threading.Timer(2.0, lambda: setattr(stack, "dead", True)).start()
        with pytest.raises(UnavailableError, match="arms ended with status -9"):
            run.make()
    (trial,) = load_index(plan.out).trials
    assert (trial.outcome, trial.failure) == (Outcome.ERROR, FailureCode.ARM_LOST)
    assert "arms ended" in trial.note


def test_an_interrupt_stops_the_policy_and_keeps_what_was_done(bundle, tmp_path):
    class Interrupted(ScriptedScene):
        def watch(self) -> Judgement:
            if len(self.seeds) == 2 and self.looks > 3:
                raise KeyboardInterrupt
            return super().watch()

    plan = make_plan(bundle, tmp_path / "run", trials=3)
    with running(plan, Interrupted(looks_to_success=6)) as (run, stack):
        with pytest.raises(KeyboardInterrupt):
            run.make()
        assert stack.calls[-1] == "policy/stop"
    assert [trial.id for trial in load_index(plan.out).trials] == ["trial_000"]
    assert (plan.out / "trial_000").is_dir()
    assert not (plan.out / "trial_001").exists()
    assert (plan.out / INTERRUPTED / "trial_001" / "trial_001.mcap").is_file()


def test_nobody_there_is_one_clear_error_and_leaves_nothing(plan):
    from robot_bridge.nodes.trial import TrialNode

    with TrialNode(plan.embodiment) as node:
        with pytest.raises(UnavailableError, match="no joint states"):
            node.wait_for_joints(0.3)
        with pytest.raises(UnavailableError, match="nothing offers the service policy/start"):
            node.call("policy/start", 0.3)
    assert not plan.out.exists()


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"task": "fold_towel"}, ConfigError, "unknown task 'fold_towel'"),
        ({"bundle": Path("nowhere")}, BundleError, "not a policy bundle"),
        ({"rig": "spaceship"}, ConfigError, "unknown rig"),
        ({"rig": "twin_single"}, EmbodimentError, "wrong embodiment"),
        ({"trials": 0}, ConfigError, "must be positive"),
        ({"server": "tcp://127.0.0.1:1"}, SimplevlaError, "127.0.0.1:1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(bundle, tmp_path, changes, kind, message):
    settings = {"bundle": bundle, "out": tmp_path / "run", **changes}
    with pytest.raises(kind, match=message) as caught:
        prepare(TrialSettings(**settings))
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tampered_bundle_is_refused(tmp_path):
    path = make_bundle(tmp_path / "b", "piper_dual")
    (path / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(BundleError):
        make_plan(path, tmp_path / "run")


def test_a_folder_with_something_in_it_is_refused(bundle, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        make_plan(bundle, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_gets_a_folder_of_its_own_by_default(bundle):
    plan = prepare(TrialSettings(bundle=bundle))
    assert plan.out.parent == Path("runs")
    assert plan.bundle.id == load_bundle(bundle).id
    assert plan.rig == load_rig("twin")


@contextlib.contextmanager
def operator(*lines: str):
    """An operator who has typed ``lines``, on a pipe, and what was asked."""
    import io

    receive, send = os.pipe()
    os.write(send, "".join(f"{line}\n" for line in lines).encode())
    os.close(send)
    questions = io.StringIO()
    with os.fdopen(receive, encoding="utf-8") as answers:
        yield OperatorScene("move_can_pot", INSTRUCTION, answers=answers, questions=questions), questions


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["y", "g", "neat"], Judgement(True, True, Strategy.GRASP, FailureCode.NONE, note="neat")),
        (["yes", "push", ""], Judgement(True, True, Strategy.PUSH, FailureCode.NONE)),
        (["maybe", "n", "d", ""], Judgement(False, True, Strategy.UNKNOWN, FailureCode.DROPPED)),
        (["A", "lamp fell"], Judgement(None, True, Strategy.UNKNOWN, FailureCode.NONE, note="lamp fell")),
    ],
)
def test_the_operator_judges(lines, expected):
    with operator(*lines) as (scene, questions):
        assert scene.judge() == expected
    assert "Did it succeed?" in questions.getvalue()


def test_the_operator_sets_up_and_ends_a_trial_with_enter():
    receive, send = os.pipe()
    with os.fdopen(receive) as answers, os.fdopen(send, "w") as typed, open(os.devnull, "w") as questions:
        scene = OperatorScene("move_can_pot", INSTRUCTION, answers=answers, questions=questions)
        print(file=typed, flush=True)
        scene.clear_to_move()
        print(file=typed, flush=True)
        scene.reset(3)
        assert not scene.watch().ended
        print(file=typed, flush=True)
        assert scene.watch().ended
        assert not scene.watch().ended


def test_an_operator_who_is_not_there_is_one_clear_error():
    with operator() as (scene, _), pytest.raises(UnavailableError, match="nobody answers"):
        scene.reset(0)
