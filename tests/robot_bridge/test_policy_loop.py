"""An episode: what is asked, what is counted, and what is said when something is lost."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from policy_server.client import Reply
from policy_server.protocol import ServerTiming
from robot_bridge.drivers.realsense import Frame
from robot_bridge.execution_modes import Execution, ExecutionMode
from robot_bridge.policy_loop import JointTimeline, Phase, PlayedChunk, PlayedCounts, PolicyLoop, Request
from simplevla.action_chunk import ActionChunk
from simplevla.errors import UnavailableError
from simplevla.observation import Observation
from simplevla.trial import FailureCode

pytestmark = pytest.mark.realtime

DT = 0.02
K = 5
BEGAN_NS = time.time_ns()


class Camera:
    """A camera that exposes a picture whenever it is asked for one."""

    gone = False

    def wait_newer(self, capture_ns: int, timeout_s: float) -> Frame:
        if self.gone:
            raise UnavailableError(f"camera head sent no new picture within {timeout_s:g} s", "check it")
        now_ns = time.time_ns()
        return Frame(np.zeros((4, 4, 3), np.uint8), max(capture_ns + 1, now_ns), 1, now_ns)


@dataclass
class Server:
    """A policy that counts its actions, begins with what is committed, and remembers what it was shown."""

    seen: list[Observation] = field(default_factory=list)
    gone: bool = False
    thinks_s: float = 0.0

    def act(self, observation: Observation) -> Reply:
        if self.gone:
            raise UnavailableError("no policy server answers", "start one")
        self.seen.append(observation)
        time.sleep(self.thinks_s)
        first = observation.last_action + 1
        actions = np.repeat(np.arange(first, first + K, dtype=np.float32)[:, None], 2, axis=1)
        if observation.committed is not None:
            assert (actions[: len(observation.committed)] == observation.committed).all()
        chunk = ActionChunk(actions, DT, observation.capture_ns, "policy")
        return Reply(chunk, ServerTiming(receive_ms=0, preprocess_ms=0, inference_ms=0, decode_ms=0), 0.0)


class Arms:
    """Arms that report their joints, and play every trajectory as it is meant, or none at all."""

    def __init__(self, *, silent: bool = False) -> None:
        self.joints, self.played = JointTimeline(), PlayedCounts()
        self.chunks: list[PlayedChunk] = []
        self.deaf, self.silent = False, silent
        self._closing = threading.Event()
        threading.Thread(target=self._report, daemon=True).start()

    def publish(self, chunk: PlayedChunk) -> None:
        self.chunks.append(chunk)

    def close(self) -> None:
        self._closing.set()

    def _report(self) -> None:
        while not self._closing.wait(0.005):
            now = time.time_ns()
            if not self.silent:
                self.joints.add(now, np.array([(now - BEGAN_NS) / 1e9, 0.0]))
            for chunk in self.chunks[-2:]:
                reached = int((now - chunk.hand.start_ns) / 1e9 / chunk.hand.dt_s)
                if reached >= 0 and not self.deaf:
                    self.played.add(chunk.hand.start_ns, min(reached, len(chunk.hand.targets)), now)


@dataclass
class Bench:
    """All of them, and the loop between them."""

    camera: Camera
    server: Server
    arms: Arms
    loop: PolicyLoop

    def run(self, request: Request) -> None:
        self.loop.start(request)
        deadline = time.monotonic() + 5
        while self.loop.state.phase is Phase.RUNNING:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextlib.contextmanager
def a_bench(execution: Execution):
    camera, server, arms = Camera(), Server(), Arms()
    with PolicyLoop(
        server,
        {"head": camera},
        arms.joints,
        arms.played,
        arms.publish,
        execution=execution,
        timeout_s=0.2,
    ) as loop:
        assert arms.joints.heard(2.0)
        yield Bench(camera, server, arms, loop)
    arms.close()


@pytest.fixture
def bench():
    with a_bench(Execution()) as each:
        yield each


@pytest.fixture(params=["real-time", "ensembling"])
def moving_bench(request):
    with a_bench(Execution(ExecutionMode(request.param))) as each:
        yield each


def test_an_episode_ends_at_its_step_limit_with_every_action_counted(bench):
    bench.run(Request("move it", "one", 12))
    state = bench.loop.state
    assert (state.phase, state.actions, state.failure) == (Phase.FINISHED, 12, FailureCode.NONE)
    assert [len(chunk.hand.targets) for chunk in bench.arms.chunks] == [5, 5, 2]
    assert [chunk.hand.first for chunk in bench.arms.chunks] == [0, 5, 10]
    assert [seen.last_action for seen in bench.server.seen] == [-1, 4, 9]
    assert {(seen.instruction, seen.episode) for seen in bench.server.seen} == {("move it", "one")}


def test_arms_that_were_never_heard_are_waited_for_longer_than_arms_that_fell_silent():
    camera, server, arms = Camera(), Server(), Arms(silent=True)
    with PolicyLoop(
        server, {"head": camera}, arms.joints, arms.played, arms.publish, timeout_s=0.2
    ) as loop:
        loop.start(Request("move it", "one", 5))
        time.sleep(0.6)
        assert loop.state.phase is Phase.RUNNING
        arms.silent = False
        deadline = time.monotonic() + 5
        while loop.state.phase is Phase.RUNNING and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (loop.state.phase, loop.state.actions) == (Phase.FINISHED, 5)
    arms.close()


def test_it_looks_again_only_when_the_last_chunk_was_played(bench):
    bench.run(Request("move it", "one", 15))
    assert len(bench.server.seen) == len(bench.arms.chunks) == 3
    for before, seen in zip(bench.arms.chunks, bench.server.seen[1:], strict=False):
        assert seen.capture_ns >= before.hand.ends_ns
    for seen in bench.server.seen:  # the joints are not older than the picture, and hardly newer
        age_s = float(seen.state[0]) - (seen.capture_ns - BEGAN_NS) / 1e9
        assert -1e-4 < age_s < 0.1


@pytest.mark.parametrize(
    ("lose", "failure", "reason"),
    [
        (lambda b: setattr(b.server, "gone", True), FailureCode.SERVER_LOST, "no policy server answers"),
        (lambda b: setattr(b.camera, "gone", True), FailureCode.CAMERA_LOST, "no new picture"),
        (lambda b: setattr(b.arms, "silent", True), FailureCode.ARM_LOST, "no joint feedback"),
        (lambda b: setattr(b.arms, "deaf", True), FailureCode.ARM_LOST, "did not play"),
    ],
    ids=["server", "camera", "joints", "arms"],
)
def test_what_is_lost_ends_the_episode_by_name_and_the_next_one_works(bench, lose, failure, reason):
    lose(bench)
    bench.run(Request("move it", "one", 10))
    state = bench.loop.state
    assert (state.phase, state.failure) == (Phase.FAILED, failure)
    assert reason in state.reason
    bench.server.gone = bench.camera.gone = bench.arms.silent = bench.arms.deaf = False
    bench.run(Request("move it", "two", 5))
    assert bench.loop.state.phase is Phase.FINISHED
    assert bench.loop.state.episode == "two"


def test_after_one_refused_trajectory_the_policy_looks_again(bench):
    bench.arms.deaf = True
    bench.loop.start(Request("move it", "one", 10))
    while len(bench.arms.chunks) < 2:  # the first was not played, and another followed
        assert bench.loop.state.phase is Phase.RUNNING
        time.sleep(0.01)
    bench.arms.deaf = False
    while bench.loop.state.phase is Phase.RUNNING:
        time.sleep(0.01)
    assert (bench.loop.state.phase, bench.loop.state.actions) == (Phase.FINISHED, 10)
    assert [chunk.hand.first for chunk in bench.arms.chunks] == [0, 0, 5]


def test_while_the_arms_move_every_action_is_handed_over_in_order_and_counted(moving_bench):
    moving_bench.server.thinks_s = 0.01
    moving_bench.run(Request("move it", "one", 40))
    state = moving_bench.loop.state
    assert (state.phase, state.actions) == (Phase.FINISHED, 40)
    played: dict[int, float] = {}
    for chunk in moving_bench.arms.chunks:
        assert chunk.hand.first <= len(played)  # no index is left out
        played.update(enumerate(chunk.hand.targets[:, 0], start=chunk.hand.first))
    assert [played[i] for i in range(40)] == pytest.approx(list(range(40)))
    stamps = [chunk.hand.start_ns for chunk in moving_bench.arms.chunks]
    assert stamps == sorted(set(stamps))
    assert len(moving_bench.arms.chunks) >= 8


def test_in_real_time_the_request_says_what_is_committed_and_the_answer_starts_where_that_ends():
    with a_bench(Execution(ExecutionMode.REAL_TIME)) as bench:
        bench.server.thinks_s = 0.01
        bench.run(Request("move it", "one", 40))
        chunks, seen = bench.arms.chunks, bench.server.seen
    assert seen[0].committed is None
    assert any(each.committed is not None for each in seen)
    for before, chunk, observation in zip(chunks, chunks[1:], seen[1:], strict=False):
        given = 0 if observation.committed is None else len(observation.committed)
        assert chunk.committed == given
        assert observation.last_action + 1 + given == chunk.hand.splice
        assert chunk.hand.splice == before.hand.first + len(before.hand.targets)
        assert chunk.hand.first <= chunk.hand.splice  # what is not under way may come once more
        assert after_s(before, chunk) > -1e-6
        assert not chunk.hand.held or after_s(before, chunk) > 0
    assert any(abs(after_s(before, chunk)) < 1e-6 for before, chunk in itertools.pairwise(chunks))


def after_s(before: PlayedChunk, chunk: PlayedChunk) -> float:
    """Return how much later than before the first action that is handed over is begun or, again, due."""
    first = chunk.hand.first
    if first == chunk.hand.splice:
        return (chunk.hand.start_ns - before.hand.ends_ns) / 1e9
    return (chunk.hand.reached_ns(first + 1) - before.hand.reached_ns(first + 1)) / 1e9


def test_a_policy_that_becomes_too_slow_finds_the_arms_holding_and_goes_on():
    with a_bench(Execution(ExecutionMode.REAL_TIME)) as bench:
        bench.loop.start(Request("move it", "one", 40))
        time.sleep(0.1)
        bench.server.thinks_s = 0.3
        while len(bench.arms.chunks) < 1 or not bench.arms.chunks[-1].hand.held:
            assert bench.loop.state.phase is Phase.RUNNING
            time.sleep(0.01)
        bench.server.thinks_s = 0.0
        while bench.loop.state.phase is Phase.RUNNING:
            time.sleep(0.01)
        assert (bench.loop.state.phase, bench.loop.state.actions) == (Phase.FINISHED, 40)


def test_answers_that_are_always_too_old_end_the_episode_by_name():
    with a_bench(Execution(ExecutionMode.REAL_TIME, max_age_s=0.05)) as bench:
        bench.server.thinks_s = 0.1
        bench.run(Request("move it", "one", 40))
        state = bench.loop.state
    assert (state.phase, state.failure) == (Phase.FAILED, FailureCode.SERVER_LOST)
    assert "its observation is" in state.reason
    assert bench.arms.chunks == []


def test_arms_that_stop_following_are_looked_at_again_at_rest(moving_bench):
    moving_bench.server.thinks_s = 0.01
    moving_bench.loop.start(Request("move it", "one", 40))
    while len(moving_bench.arms.chunks) < 2:
        time.sleep(0.005)
    moving_bench.arms.deaf = True  # a person holds them
    time.sleep(0.7)
    held_at = moving_bench.loop.state.actions
    moving_bench.arms.chunks.clear()
    moving_bench.arms.deaf = False
    while moving_bench.loop.state.phase is Phase.RUNNING:
        time.sleep(0.01)
    assert moving_bench.loop.state.phase is Phase.FINISHED
    assert moving_bench.loop.state.actions == 40
    assert moving_bench.arms.chunks[0].hand.first >= held_at


def test_stopping_ends_it_early_and_counts_what_was_played(bench):
    bench.loop.start(Request("move it", "one", 1000))
    with pytest.raises(UnavailableError, match="is running"):
        bench.loop.start(Request("move it", "two", 5))
    time.sleep(0.3)
    bench.loop.stop()
    state = bench.loop.state
    assert state.phase is Phase.IDLE
    assert 0 < state.actions <= sum(len(chunk.hand.targets) for chunk in bench.arms.chunks)
    asked = len(bench.server.seen)
    time.sleep(0.1)
    assert len(bench.server.seen) == asked


def test_what_the_arms_left_out_is_not_counted():
    played = PlayedCounts()
    assert played.wait(1, 5, 0.0) is None
    played.add(1, 2, 10)
    played.add(1, 3, 20)
    assert played.wait(1, 5, 0.0) == 3
    played.add(2, 0, 30)
    assert played.wait(1, 5, 0.0) == 3
    assert (played.by(9), played.by(15), played.by(30)) == ({}, {1: 2}, {1: 3, 2: 0})


def test_joints_are_never_older_than_asked():
    joints = JointTimeline()
    for stamp in (10, 20, 30):
        joints.add(stamp, np.array([stamp]))
    assert joints.at(15, 0.0)[0] == 20
    assert joints.at(20, 0.0)[0] == 20
    with pytest.raises(UnavailableError, match="no joint feedback"):
        joints.at(31, 0.01)
