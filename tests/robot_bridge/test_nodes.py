"""The arms' node in a process of its own, driving emulated arms over their bus, through DDS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robot_bridge.rig import load_rig, save_rig, with_free_ports
from robot_bridge.twin.bench import BenchArm
from simplevla.embodiment import load_embodiment

rclpy = pytest.importorskip("rclpy", reason="no ROS 2 and no ROS wheels here")

from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from lifecycle_msgs.msg import Transition  # noqa: E402
from lifecycle_msgs.srv import ChangeState  # noqa: E402
from rcl_interfaces.srv import SetParameters  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import qos_profile_sensor_data  # noqa: E402
from rclpy.signals import SignalHandlerOptions  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402
from std_msgs.msg import Bool  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint  # noqa: E402

pytestmark = pytest.mark.realtime

ROBOT = load_embodiment("piper_dual")
HOME = ROBOT.home()
MAX_FEEDBACK_AGE_S = 0.3  # longer than a busy machine pauses a process


class Robot:
    """Two emulated arms, the node that drives them, and a ROS node that watches."""

    def __init__(self, folder: Path, resources: ExitStack) -> None:
        rig = with_free_ports(load_rig("twin"))
        save_rig(rig, folder / "rig.yaml")
        self.benches = [
            resources.enter_context(BenchArm(arm, rig.arms[arm.name].channel)) for arm in ROBOT.arms
        ]
        self.log = folder / "arms.log"
        stream = resources.enter_context(self.log.open("wb"))
        parameters = {
            "rig": folder / "rig.yaml",
            "max_feedback_age_s": MAX_FEEDBACK_AGE_S,
            "stop_silent_after_s": 30.0,
        }
        given = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "robot_bridge.nodes.arms", "--ros-args", *given],
            stdout=subprocess.PIPE,
            stderr=stream,
            env=os.environ | {"SIMPLEVLA_LOG_LEVEL": "info"},
        )
        resources.callback(self._end)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready arms\n", self.log.read_text()
        self._watch(resources)

    def _watch(self, resources: ExitStack) -> None:
        context = rclpy.Context()
        rclpy.init(context=context, signal_handler_options=SignalHandlerOptions.NO)
        resources.callback(context.try_shutdown)
        self.node = rclpy.create_node("watcher", context=context)
        self.measured: list[np.ndarray] = []
        self.setpoints: list[np.ndarray] = []
        self.executed: dict[int, dict[str, str]] = {}
        self.limits: set[tuple[str, str]] = set()
        self.health: dict[str, str] = {}
        self.lifecycle = ""
        self.node.create_subscription(
            JointState, "joint_states", lambda m: self.measured.append(np.array(m.position)), 100
        )
        self.node.create_subscription(
            JointState, "setpoints", lambda m: self.setpoints.append(np.array(m.position)), 100
        )
        self.node.create_subscription(DiagnosticArray, "arms/executed", self._take_executed, 100)
        self.node.create_subscription(
            DiagnosticArray,
            "arms/limits",
            lambda m: self.limits.update((s.name, s.message) for s in m.status),
            100,
        )
        self.node.create_subscription(DiagnosticArray, "diagnostics", self._take_health, 10)
        self.trajectories = self.node.create_publisher(JointTrajectory, "joint_trajectory", 10)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(self.node)
        thread = threading.Thread(target=executor.spin, daemon=True)
        thread.start()
        resources.callback(thread.join)
        resources.callback(lambda: executor.shutdown(timeout_sec=2))
        self.until(lambda: self.measured and self.trajectories.get_subscription_count())

    def call(self, service: str) -> Trigger.Response:
        return self._ask(Trigger, f"arms/{service}", Trigger.Request())

    def transition(self, number: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=number))
        return self._ask(ChangeState, "arms/change_state", request).success

    def set_publish_rate(self, rate_hz: float) -> str:
        """Return why it was refused."""
        value = Parameter("publish_rate_hz", value=rate_hz).to_parameter_msg()
        request = SetParameters.Request(parameters=[value])
        return self._ask(SetParameters, "arms/set_parameters", request).results[0].reason

    def press(self) -> None:
        """Hold a button down that publishes as sensors do, again and again, until the arms stand."""
        button = self.node.create_publisher(Bool, "estop", qos_profile_sensor_data)
        self.until(lambda: button.get_subscription_count() == 1)  # the reliable one cannot hear it
        button.publish(Bool(data=False))

        def stands() -> bool:
            button.publish(Bool(data=True))
            return self.health.get("mode") == "stopped"

        self.until(stands)

    def _ask(self, kind: type, service: str, request: object) -> Any:
        client = self.node.create_client(kind, service)
        assert client.wait_for_service(timeout_sec=5)
        future, done = client.call_async(request), threading.Event()
        future.add_done_callback(lambda _: done.set())
        assert done.wait(15), f"{service} did not answer"
        return future.result()

    def play(self, targets: list[np.ndarray], *, dt: float = 0.1, names: list[str] | None = None) -> int:
        message = JointTrajectory(joint_names=ROBOT.names() if names is None else names)
        stamp = time.time_ns() + 200_000_000  # early enough for a busy machine to play all of it
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 1_000_000_000)
        for i, target in enumerate(targets):
            point = JointTrajectoryPoint(positions=np.asarray(target, dtype=float).tolist())
            point.time_from_start.nanosec = round((i + 1) * dt * 1e9)
            message.points.append(point)
        self.trajectories.publish(message)
        return stamp

    @staticmethod
    def until(condition, timeout: float = 10.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)

    def _take_executed(self, message: DiagnosticArray) -> None:
        stamp = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
        self.executed[stamp] = {pair.key: pair.value for pair in message.status[0].values}

    def _take_health(self, message: DiagnosticArray) -> None:
        self.health = {pair.key: pair.value for pair in message.status[0].values}
        self.health["message"] = message.status[0].message
        self.lifecycle = message.status[-1].message
        pairs = [(status.name, pair) for status in message.status for pair in status.values]
        self.stopped = {name: pair.value for name, pair in pairs if pair.key == "stopped"}
        self.arms = {(name, pair.key): pair.value for name, pair in pairs if name != message.status[0].name}

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def robot(tmp_path: Path) -> Iterator[Robot]:
    with ExitStack() as resources:
        yield Robot(tmp_path, resources)


def test_the_arms_node_from_start_to_end(robot: Robot):
    """One story, for a start costs seconds: off, enabled, playing, holding, refusing, silent, ended."""
    # Motors are off at the start, nothing is sent, and trajectories are refused.
    robot.play([HOME + 0.01])
    robot.until(lambda: "motors are off" in robot.log.read_text())
    assert not robot.setpoints

    # Enabled, the arms hold the pose they had.
    answer = robot.call("enable")
    assert answer.success, answer.message
    robot.until(lambda: len(robot.setpoints) > 5)
    assert np.abs(np.array(robot.setpoints) - HOME).max() < 1e-5

    # A feasible trajectory is played, counted and timed, and its end is held.
    goal = HOME.copy()
    goal[[0, 10]] += 0.1, -0.05
    stamp = robot.play([HOME + (goal - HOME) * (i / 5) for i in range(1, 6)])
    robot.until(lambda: robot.executed.get(stamp, {}).get("executed") == "5")
    assert 0 < int(robot.executed[stamp]["first_setpoint_ns"]) - stamp < 1e9
    robot.until(lambda: np.abs(robot.measured[-1] - goal).max() < 1e-3)
    time.sleep(0.3)
    assert np.abs(robot.setpoints[-1] - goal).max() < 1e-5
    assert np.abs(np.diff(robot.setpoints, axis=0)).max() < 3.0 * 0.05

    # What is malformed, or asks for too much, moves nothing it should not.
    robot.play([goal + 0.1], names=["somebody", "else"])
    robot.play([np.full(14, np.nan)])
    robot.until(lambda: "somebody" in robot.log.read_text() and "not finite" in robot.log.read_text())
    assert np.abs(robot.setpoints[-1] - goal).max() < 1e-5
    beyond = goal.copy()
    beyond[0] = 9.0
    robot.play([beyond])
    robot.until(lambda: ("limits: position", "left_joint1") in robot.limits)
    robot.until(lambda: abs(robot.measured[-1][0] - ROBOT.position_limits()[1][0]) < 1e-3)

    # Home is reached smoothly, and the answer comes when it is.
    answer = robot.call("go_home")
    assert answer.success, answer.message
    robot.until(lambda: np.abs(robot.measured[-1] - HOME).max() < 1e-3)

    # Silence of an arm: the arms hold, say so, refuse, and go on when it is back.
    robot.benches[1].silent.set()
    robot.until(lambda: "no joint feedback from: right" in robot.health.get("message", ""))
    robot.play([goal])
    robot.until(lambda: "trajectory refused: no joint feedback" in robot.log.read_text())
    assert np.abs(robot.setpoints[-1] - HOME).max() < 1e-5
    robot.benches[1].silent.clear()
    robot.until(lambda: robot.health.get("message") == "on")
    assert float(robot.health["period_p50_ms"]) > 0
    assert robot.arms["arms: right", "firmware"].startswith("S-V")
    assert float(robot.arms["arms: left", "supply_v"]) > 20
    for i in range(1, 7):
        assert 10 < float(robot.arms["arms: left", f"joint{i}.motor_c"]) < 60

    # The end: brake first, then a clean exit; the arms still have power and hold.
    robot.play([goal], dt=0.5)
    robot.until(lambda: np.abs(robot.measured[-1] - HOME).max() > 5e-3)
    robot.process.send_signal(signal.SIGINT)
    assert robot.process.wait(10) == 0
    for bench in robot.benches:
        stopped = bench.position
        time.sleep(0.2)
        assert np.abs(bench.position - stopped).max() < 1e-3
    assert "Traceback" not in robot.log.read_text()


def test_an_emergency_stop_is_latched_and_only_a_person_goes_on(robot: Robot):
    """By a button's topic, by service, in every state that has the arms open; and the states themselves."""
    assert robot.call("enable").success
    robot.press()
    robot.until(lambda: robot.stopped == {"arms: left": "True", "arms: right": "True"})
    seen = len(robot.setpoints)
    robot.play([HOME + 0.01])
    robot.until(lambda: "trajectory refused: emergency stop" in robot.log.read_text())
    refused = robot.call("enable")
    assert not refused.success
    assert "reset" in refused.message
    assert len(robot.setpoints) <= seen + 1

    # Inactive, the arms are read and can be stopped, but not enabled; what is open keeps its parameters.
    assert robot.transition(Transition.TRANSITION_DEACTIVATE)
    refused = robot.call("enable")
    assert "not active" in refused.message
    assert not refused.success
    assert robot.call("estop").success
    assert "cleanup" in robot.set_publish_rate(50.0)
    seen = len(robot.measured)
    robot.until(lambda: len(robot.measured) > seen)

    # Unconfigured, the bus is closed and nothing is said but that; then all of it once more.
    assert robot.transition(Transition.TRANSITION_CLEANUP)
    robot.until(lambda: robot.lifecycle == "unconfigured")
    assert robot.set_publish_rate(50.0) == ""
    assert robot.transition(Transition.TRANSITION_CONFIGURE)
    assert robot.transition(Transition.TRANSITION_ACTIVATE)
    robot.until(lambda: robot.lifecycle == "active")
    assert robot.call("reset").success
    answer = robot.call("enable")
    assert answer.success, answer.message
    robot.process.send_signal(signal.SIGTERM)
    assert robot.process.wait(10) == 0


def test_a_rig_that_is_not_there_ends_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "robot_bridge.nodes.arms", "--ros-args", "-p", "rig:=nowhere"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("arms: unknown rig 'nowhere'")
    assert "Traceback" not in done.stderr
