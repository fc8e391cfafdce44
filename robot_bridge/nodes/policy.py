"""The policy's node: the cameras and the policy server's client in one process.

Frames of the control path stay in this process; what goes over DDS is for people and recordings. A
lifecycle node (:mod:`robot_bridge.nodes.managed`): inactive, cameras stream; active, episodes may start.

=========================  ==================================================================
subscribes                 ``joint_states``, ``arms/executed``
publishes                  ``joint_trajectory`` (what of an answer is to be played),
                           ``policy/answers`` (the whole answer) and ``policy/chunks`` (its times and
                           its policy), both keyed by the trajectory's stamp, ``policy/state``
                           (on change and at 2 Hz), ``/diagnostics`` at 1 Hz, each camera's topics
                           (:mod:`robot_bridge.nodes.camera_topics`)
services, std_srvs/Trigger  ``~/start``, ``~/stop``
parameters set by a trial  ``instruction``, ``episode``, ``step_limit``
=========================  ==================================================================
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from numpy.typing import NDArray
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from policy_server.client import PolicyClient, ServerInfo, keys_for
from policy_server.protocol import DEFAULT_ADDRESS
from robot_bridge.bringup import NO_SERVER
from robot_bridge.drivers.choice import camera_driver
from robot_bridge.execution_modes import MAX_HORIZON, Execution, ExecutionMode
from robot_bridge.nodes.camera_topics import CameraTopics
from robot_bridge.nodes.managed import ManagedNode
from robot_bridge.nodes.process import diagnostics, run_node, set_stamp, stamp_ns, status, trigger
from robot_bridge.policy_loop import (
    EpisodeState,
    JointTimeline,
    Phase,
    PlayedChunk,
    PlayedCounts,
    PolicyLoop,
    Request,
)
from robot_bridge.rig import load_rig, named
from simplevla.cli import require_choice
from simplevla.embodiment import Camera, Embodiment
from simplevla.errors import ConfigError, UnavailableError
from simplevla.motion import FOLLOWING_DELAY_S
from simplevla.session_record import SessionRecord

logger = logging.getLogger(__name__)

_STEP_LIMIT = 200
_MAX_STEPS = 100_000
_STATE_PERIOD_S = 0.05
_REPEAT_STATE_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node until it is asked to end; return the exit status."""
    return run_node("policy", PolicyNode, sys.argv if argv is None else argv)


def choose_cameras(embodiment: Embodiment, wanted: Sequence[str], needed: Sequence[str]) -> list[Camera]:
    """Return the cameras to start: those wanted, or all, which must include those the policy needs.

    Raises:
        ConfigError: one is missing or unknown.
    """
    known = [camera.name for camera in embodiment.cameras]
    names = list(wanted) or known
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown camera {name!r}", f"choose from: {', '.join(known)}")
    for name in needed:
        if name not in names:
            raise ConfigError(f"the policy needs camera {name!r}, which is left out", "start that camera")
    return [embodiment.camera(name) for name in names]


class PolicyNode(ManagedNode):
    """ROS's view of a :class:`~robot_bridge.policy_loop.PolicyLoop` and of the cameras."""

    def __init__(self) -> None:
        super().__init__("policy")
        self.declare("rig", "twin", "name of a rig in config/rig, or a path to a .yaml file")
        self.declare("arms", "", "names of the arms that are driven, by commas; empty: all of the rig")
        self.declare("server", DEFAULT_ADDRESS, f"address of the policy server; {NO_SERVER}: cameras alone")
        self.declare("server_timeout_s", 2.0, "longest wait for an answer, s", low=0.05, high=60)
        self.declare("server_wait_s", 30.0, "how long the start waits for the server, s", low=0, high=600)
        self.declare("task", "", "task whose instruction is the default; empty: the only one")
        self.declare("cameras", "", "names of the cameras to start, by commas; empty for all")
        self.declare(
            "input_timeout_s", 1.0, "longest wait for a picture or joint feedback, s", low=0.05, high=10
        )
        self.declare_record()
        self._declare_execution()
        self.declare("jpeg_quality", 90, "quality of the compressed pictures, percent", low=1, high=100)
        self.declare("instruction", "", "what to do, in words; empty: as the task has it", changing=True)
        self.declare("episode", "", "name of the next episode", changing=True)
        self.declare(
            "step_limit",
            _STEP_LIMIT,
            "actions at most",
            low=1,
            high=_MAX_STEPS,
            changing=True,
        )
        self._info: ServerInfo | None = None
        self._loop: PolicyLoop | None = None

    @contextmanager
    def configured(self) -> Iterator[None]:
        """Connect to the server, and have the cameras stream and publish."""
        with ExitStack() as resources:
            record = self.record()
            rig = load_rig(self.value("rig")).with_arms(named(self.value("arms")))
            embodiment = rig.load_embodiment()
            client = self._connected(embodiment, resources)
            self._info = client.info if client is not None else None
            needed = [need.name for need in self._info.cameras] if self._info is not None else []
            if self._info is not None and self.value("task"):
                require_choice("task", self.value("task"), sorted(self._info.instructions))
            streams = choose_cameras(embodiment, named(self.value("cameras")), needed)
            cameras = {
                camera.name: resources.enter_context(camera_driver(rig, camera, record))
                for camera in streams
            }
            self._names = embodiment.names()
            self._joints, self._played = JointTimeline(), PlayedCounts()
            self._said: tuple[EpisodeState, float] = (EpisodeState(), 0.0)
            lenses, quality = record.lenses if record else {}, self.value("jpeg_quality")
            self._topics = {
                name: resources.enter_context(CameraTopics(self, driver, lenses.get(name), quality))
                for name, driver in cameras.items()
            }
            if client is not None:
                self._open_topics()
                self._loop = PolicyLoop(
                    client,
                    {name: cameras[name] for name in needed},
                    self._joints,
                    self._played,
                    self.publish_chunk,
                    execution=replace(self._execution(), settle_s=settle_s(record, embodiment)),
                    timeout_s=self.value("input_timeout_s"),
                )
                resources.enter_context(self._loop)
            try:
                yield
            finally:
                self._info = self._loop = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Allow episodes; the one that runs at the end is stopped."""
        try:
            yield
        finally:
            if self._loop is not None:
                self._loop.stop()

    def diagnose(self) -> list[DiagnosticStatus]:
        """Return how the server, the episode and each camera are."""
        statuses = [topics.diagnose() for topics in self._topics.values()]
        if self._loop is None or self._info is None:
            return [status("policy", "no policy server is used", {}), *statuses]
        state = self._loop.state
        values = {
            "server": self.value("server"),
            "policy_id": self._info.policy_id,
            "phase": state.phase.value,
            "episode": state.episode,
            "actions": state.actions,
        }
        failed = state.phase is Phase.FAILED
        own = status("policy", state.reason or state.phase.value, values, level="error" if failed else "ok")
        return [own, *statuses]

    def _connected(self, embodiment: Embodiment, resources: ExitStack) -> PolicyClient | None:
        server = self.value("server")
        if server == NO_SERVER:
            return None
        return resources.enter_context(
            PolicyClient(
                server,
                embodiment=embodiment,
                timeout_s=self.value("server_timeout_s"),
                wait_s=self.value("server_wait_s"),
                keys=keys_for(server),
            )
        )

    def _declare_execution(self) -> None:
        modes = ", ".join(mode.value for mode in ExecutionMode)
        self.declare(
            "execution",
            ExecutionMode.SYNCHRONOUS.value,
            f"how chunks become motion: {modes} (docs/chunk_execution.md)",
        )
        self.declare(
            "horizon",
            0,
            "new actions of an answer to be played, receding or in real time; 0: as the mode has it",
            low=0,
            high=MAX_HORIZON,
        )
        self.declare("max_age_s", 2.0, "an answer to an older observation is refused, s", low=0.05, high=60)
        self.declare("lead_s", 0.005, "how far ahead of now a trajectory starts, s", low=0, high=1)

    def _execution(self) -> Execution:
        """Return how chunks become motion.

        Raises:
            ConfigError: there is no such mode, or it has no horizon.
        """
        mode = require_choice("execution", self.value("execution"), [m.value for m in ExecutionMode])
        bounds = self.value("horizon"), self.value("max_age_s"), self.value("lead_s")
        return Execution(ExecutionMode(mode), *bounds)

    def _open_topics(self) -> None:
        self._trajectories = self.create_publisher(JointTrajectory, "joint_trajectory", 10)
        self._answers = self.create_publisher(JointTrajectory, "policy/answers", 10)
        self._chunks = self.create_publisher(DiagnosticArray, "policy/chunks", 50)
        self._states = self.create_publisher(DiagnosticArray, "policy/state", 10)
        self.create_subscription(JointState, "joint_states", self._take_joints, 10)
        self.create_subscription(DiagnosticArray, "arms/executed", self._take_executed, 50)
        self.repeat(_STATE_PERIOD_S, self._publish_state)
        trigger(self, "~/start", self._start)
        trigger(self, "~/stop", self._stop)

    def publish_chunk(self, chunk: PlayedChunk) -> None:
        """Hand a chunk to the arms, and tell what it is; in the episode's thread."""
        hand, answer = chunk.hand, chunk.reply.chunk
        self._trajectories.publish(self._trajectory(hand.targets, hand.dt_s, hand.start_ns))
        publish_ns = time.time_ns()
        self._answers.publish(self._trajectory(answer.actions, answer.dt_s, hand.start_ns))
        capture_ns = chunk.reply.chunk.capture_ns
        timing = chunk.reply.timing
        values = {
            "index": chunk.index,
            "first_action": hand.first,
            "first_new_action": hand.splice,
            "actions": len(hand.targets),
            "asked": chunk.asked,
            "committed": chunk.committed,
            "held": hand.held,
            "policy_id": chunk.reply.chunk.policy_id,
            "capture_ns": capture_ns,
            "request_ns": chunk.request_ns,
            "reply_ns": chunk.reply_ns,
            "publish_ns": publish_ns,
            "inference_ms": f"{timing.inference_ms:.3f}",
            "capture_to_request_ms": f"{(chunk.request_ns - capture_ns) / 1e6:.3f}",
            "request_to_reply_ms": f"{(chunk.reply_ns - chunk.request_ns) / 1e6:.3f}",
            "reply_to_publish_ms": f"{(publish_ns - chunk.reply_ns) / 1e6:.3f}",
        }
        self._chunks.publish(diagnostics(hand.start_ns, status("chunk", "", values)))

    def _trajectory(self, targets: NDArray[np.float32], dt_s: float, stamp: int) -> JointTrajectory:
        message = JointTrajectory(joint_names=self._names)
        set_stamp(message.header.stamp, stamp)
        dt_ns = round(dt_s * 1e9)
        for i, target in enumerate(targets):
            point = JointTrajectoryPoint(positions=target.astype(np.float64).tolist())
            set_stamp(point.time_from_start, (i + 1) * dt_ns)
            message.points.append(point)
        return message

    def _take_joints(self, message: JointState) -> None:
        if list(message.name) == self._names and len(message.position) == len(self._names):
            self._joints.add(stamp_ns(message.header.stamp), np.array(message.position))

    def _take_executed(self, message: DiagnosticArray) -> None:
        heard_ns = str(time.time_ns())
        for each in message.status:
            values = {pair.key: pair.value for pair in each.values}
            count, at_ns = values.get("executed", ""), values.get("at_ns", heard_ns)
            if count.isdigit() and at_ns.isdigit():
                self._played.add(stamp_ns(message.header.stamp), int(count), int(at_ns))

    def _publish_state(self) -> None:
        loop, info = self._loop, self._info
        if loop is None or info is None:
            return
        now, state = time.monotonic(), loop.state
        if state == self._said[0] and now - self._said[1] < _REPEAT_STATE_S:
            return
        self._said = (state, now)
        values = {
            "phase": state.phase.value,
            "episode": state.episode,
            "actions": state.actions,
            "failure": state.failure.value,
            "reason": state.reason,
            "policy_id": info.policy_id,
        }
        level = "error" if state.phase is Phase.FAILED else "ok"
        self._states.publish(
            diagnostics(time.time_ns(), status("policy", state.reason, values, level=level))
        )

    def _start(self) -> str:
        self.require_active()
        loop, info = self._with_policy()
        instruction = self.value("instruction") or self._task_instruction(info)
        loop.start(Request(instruction, self.value("episode"), self.value("step_limit")))
        return f"running: {instruction}"

    def _stop(self) -> str:
        loop, _ = self._with_policy()
        loop.stop()
        return f"stopped after {loop.state.actions} actions"

    def _with_policy(self) -> tuple[PolicyLoop, ServerInfo]:
        loop, info = self._loop, self._info
        if loop is None or info is None:
            raise UnavailableError("the policy's node is not configured", "configure it, with a server")
        return loop, info

    def _task_instruction(self, info: ServerInfo) -> str:
        known = info.instructions
        if self.value("task"):
            return known[self.value("task")]
        if len(known) != 1:
            raise ConfigError("no instruction is set", f"set one, such as: {'; '.join(known.values())}")
        return next(iter(known.values()))


def settle_s(record: SessionRecord | None, embodiment: Embodiment) -> float:
    """Return how much later than simulated arms the measured ones reach a setpoint, s."""
    measured = record.command_delay_s(embodiment) if record else 0.0
    return max(0.0, measured - FOLLOWING_DELAY_S)


if __name__ == "__main__":
    sys.exit(main())
