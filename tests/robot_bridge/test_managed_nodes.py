"""Lifecycle nodes: states, parameters, what they publish, and the emergency stop's own line."""

from __future__ import annotations

import os
import pty
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import can
import msgspec
import numpy as np
import pytest
import yaml

from robot_bridge.rig import CanPort, load_rig, with_free_ports
from simplevla.embodiment import load_embodiment
from simplevla.errors import ChunkError, ConfigError, UnavailableError
from simplevla.files import share_dir

rclpy = pytest.importorskip("rclpy", reason="no ROS 2 and no ROS wheels here")

from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from geometry_msgs.msg import TransformStamped  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image, JointState  # noqa: E402
from std_msgs.msg import Bool, String  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402

from robot_bridge.estop import StopButton, run_button, stop_now, stop_on_bus  # noqa: E402
from robot_bridge.nodes.managed import ManagedNode  # noqa: E402
from robot_bridge.nodes.stop_line import stop_line  # noqa: E402
from robot_bridge.twin.bench import BenchArm  # noqa: E402

pytestmark = pytest.mark.realtime

ROBOT = load_embodiment("piper_dual")
LATCHED = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@pytest.fixture
def ros() -> Iterator[None]:
    rclpy.init()
    try:
        yield
    finally:
        rclpy.try_shutdown()


@contextmanager
def spinning(node) -> Iterator[None]:
    """Spin a node in a thread while the block runs."""
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        executor.shutdown(timeout_sec=2)
        thread.join(2)


@contextmanager
def watcher() -> Iterator[object]:
    node = rclpy.create_node("watcher")
    try:
        with spinning(node):
            yield node
    finally:
        node.destroy_node()


def until(condition, timeout_s: float = 20.0) -> None:
    assert happens(condition, timeout_s), "it did not happen in time"


def happens(condition, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


class Steps(ManagedNode):
    """Notes what opens and closes."""

    def __init__(self) -> None:
        super().__init__("steps")
        self.notes: list[str] = []
        self.fails: Exception | None = None
        self.declare("size", 3, "how many", low=1, high=9)
        self.declare("word", "", "said", changing=True)

    @contextmanager
    def configured(self) -> Iterator[None]:
        self.create_publisher(Bool, "one", 10)
        if self.fails is not None:
            raise self.fails
        self.notes.append("open")
        yield
        self.notes.append("closed")

    @contextmanager
    def active(self) -> Iterator[None]:
        self.create_service(Trigger, "~/two", lambda _, response: response)
        self.notes.append("works")
        yield
        self.notes.append("rests")


@pytest.mark.usefixtures("ros")
def test_states_open_and_close_what_belongs_to_them():
    def names(node: ManagedNode) -> tuple[bool, bool]:
        topics = {topic.topic_name for topic in node.publishers}
        return "/one" in topics, any(each.srv_name.endswith("two") for each in node.services)

    with Steps() as node:
        assert names(node) == (False, False)
        node.bring_up()
        assert (node.is_configured, node.is_active, names(node)) == (True, True, (True, True))
        assert node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
        assert (node.is_configured, node.is_active, names(node)) == (True, False, (True, False))
        with pytest.raises(
            UnavailableError, match="steps is not active -> ros2 lifecycle set /steps activate"
        ):
            node.require_active()
        node.trigger_activate()
        node.trigger_deactivate()
        node.trigger_cleanup()
        assert (node.is_configured, names(node)) == (False, (False, False))
        node.bring_up()
    assert node.notes == ["open", *["works", "rests"] * 2, "closed", "open", "works", "rests", "closed"]


@pytest.mark.usefixtures("ros")
@pytest.mark.parametrize("error", [ConfigError("no such bus", "plug it in"), ZeroDivisionError()])
def test_what_fails_leaves_nothing_open_and_can_be_tried_again(error):
    with Steps() as node:
        node.fails = error
        with pytest.raises(type(error)):
            node.bring_up()
        assert not node.is_configured
        assert "/one" not in {topic.topic_name for topic in node.publishers}
        node.fails = None
        node.bring_up()
        assert node.is_active


@pytest.mark.usefixtures("ros")
def test_parameters_have_ranges_and_the_fixed_ones_a_time():
    with Steps() as node:
        (described,) = node.describe_parameters(["size"])
        assert (described.description, described.integer_range[0].to_value) == ("how many", 9)
        assert node.set_parameters([Parameter("size", value=4)])[0].successful
        assert not node.set_parameters([Parameter("size", value=10)])[0].successful
        node.bring_up()
        refused = node.set_parameters([Parameter("size", value=5)])[0]
        assert "ros2 lifecycle set /steps cleanup" in refused.reason
        assert node.value("size") == 4
        assert node.set_parameters([Parameter("word", value="now")])[0].successful


@pytest.mark.usefixtures("ros")
def test_diagnostics_come_by_themselves_in_every_state():
    heard: list[DiagnosticArray] = []
    with watcher() as listener, Steps() as node, spinning(node):
        listener.create_subscription(DiagnosticArray, "/diagnostics", heard.append, 10)
        until(lambda: len(heard) >= 2)
        assert {s.message for m in heard for s in m.status} == {"unconfigured"}
        node.bring_up()
        until(lambda: heard[-1].status[-1].message == "active")
        stamps = [m.header.stamp.sec + 1e-9 * m.header.stamp.nanosec for m in heard]
    assert 0.5 < np.diff(stamps).min() < 2


@pytest.mark.usefixtures("ros")
def test_the_file_of_parameters_names_parameters_that_exist_at_their_defaults():
    from robot_bridge.nodes.arms import ArmsNode
    from robot_bridge.nodes.policy import PolicyNode
    from robot_bridge.nodes.recorder import RecorderNode
    from robot_bridge.nodes.transforms import TransformsNode

    content = yaml.safe_load((share_dir() / "config/nodes.yaml").read_text())
    kinds = {"arms": ArmsNode, "policy": PolicyNode, "recorder": RecorderNode, "transforms": TransformsNode}
    assert {key.removeprefix("/**/") for key in content} == set(kinds)
    for name, kind in kinds.items():
        with kind() as node:
            for key, value in content[f"/**/{name}"]["ros__parameters"].items():
                assert node.value(key) == value, key
            own = [p for p in node._parameters if p != "use_sim_time" and "qos" not in p]
            assert all(node.describe_parameter(key).description for key in own if "." not in key)


@pytest.mark.usefixtures("ros")
def test_a_busy_executor_does_not_delay_the_emergency_stop():
    """The arms' own executor hangs in a callback; the stop is heard by service, and by topic."""
    release, hanging = threading.Event(), threading.Event()
    stops: list[float] = []

    def hang(_, response):
        hanging.set()
        release.wait(30)
        return response

    def stop() -> str:
        stops.append(time.monotonic())
        return "stopped"

    with ExitStack() as resources:
        arms = resources.enter_context(Steps())
        arms.create_service(Trigger, "~/hang", hang)
        resources.enter_context(spinning(arms))
        resources.enter_context(stop_line(arms, stop))
        resources.callback(release.set)
        person = resources.enter_context(watcher())
        hanger, stopper = (person.create_client(Trigger, f"steps/{name}") for name in ("hang", "estop"))
        button = person.create_publisher(Bool, "estop", 10)
        assert hanger.wait_for_service(10)
        assert stopper.wait_for_service(10)
        hanger.call_async(Trigger.Request())
        assert hanging.wait(10)
        answer = stopper.call(Trigger.Request(), timeout_sec=10)
        assert (answer.success, answer.message, len(stops)) == (True, "stopped", 1)
        until(lambda: button.get_subscription_count() == 2)
        button.publish(Bool(data=False))
        button.publish(Bool(data=True))
        until(lambda: len(stops) == 3)  # it listens reliably, and to whoever is not reliable
        assert not release.is_set()


@pytest.mark.usefixtures("ros")
def test_the_stop_key_reaches_the_arms_node_and_without_one_the_bus():
    rig = with_free_ports(load_rig("twin"))
    stops: list[None] = []
    master, slave = pty.openpty()
    said, terminal = os.pipe()
    with ExitStack() as resources:
        keys = resources.enter_context(os.fdopen(slave, "r"))
        out = resources.enter_context(os.fdopen(terminal, "w"))
        heard = resources.enter_context(os.fdopen(said, "r"))
        button = resources.enter_context(StopButton(rig))
        with Steps() as arms, stop_line(_Named(arms, "arms"), lambda: stops.append(None) or "stopped"):
            assert button.wait(10)
            statuses: list[int] = []
            person = threading.Thread(target=lambda: statuses.append(run_button(button, keys, out)))
            person.start()
            for _ in range(5):  # DDS loses what is sent before the other side, too, has found this one
                os.write(master, b" ")
                if happens(lambda: bool(stops), 2):
                    break
            os.write(master, b"q")
            person.join(10)
            assert statuses == [0]
        out.flush()
        text = os.read(heard.fileno(), 10_000).decode()
        assert stops
        assert "stopped" in text
        assert "the arms' node says nothing" in text  # it is no real one: it publishes no diagnostics

        benches = [resources.enter_context(BenchArm(arm, rig.arms[arm.name].channel)) for arm in ROBOT.arms]
        until(lambda: not button._client.service_is_ready())
        assert button.press(0.1).way == "bus"
        assert len(benches) == 2
        assert all(says_stopped(port.channel) for port in rig.arms.values())
    with pytest.raises(UnavailableError, match="the stop did not reach every bus"):
        stop_on_bus(
            msgspec.structs.replace(
                rig,
                name="without a bus",
                twin=None,
                cameras={},
                arms={"left": CanPort("no_such_bus", "can_left")},
            )
        )
    os.close(master)


def test_a_stop_without_ros_goes_to_the_buses(monkeypatch):
    """Whatever is wrong with ROS, and before it is asked at all."""
    rig = with_free_ports(load_rig("twin_single"))
    (arm,) = rig.load_embodiment().arms
    asked: list[bool] = []

    def broken(_: StopButton) -> None:
        asked.append(says_stopped(rig.arms[arm.name].channel))
        raise RuntimeError("no middleware")

    monkeypatch.setattr(StopButton, "__enter__", broken)
    with BenchArm(arm, rig.arms[arm.name].channel):
        stopped = stop_now(rig, "")
    assert asked == [True]
    assert stopped.way == "bus"
    assert "does not confirm" in stopped.message


class _Named:
    """A node under another name, as far as the stop's line asks for it."""

    def __init__(self, node, name: str) -> None:
        self.context = node.context
        self.get_name = lambda: name
        self.get_namespace = node.get_namespace
        self.resolve_topic_name = node.resolve_topic_name
        self.resolve_service_name = lambda each: f"/{name}/{each[2:]}"


def says_stopped(channel: str) -> bool:
    """Return whether an arm reports on its bus, within a moment, that it is stopped."""
    deadline = time.monotonic() + 5
    with can.Bus(interface="simplevla_twin", channel=channel) as bus:
        while time.monotonic() < deadline:
            frame = bus.recv(0.5)
            if frame is not None and frame.arbitration_id == 0x2A1 and frame.data[1] == 1:
                return True
    return False


@pytest.mark.usefixtures("ros")
def test_a_late_listener_hears_what_the_robot_looks_like_and_where_it_stands():
    from robot_bridge.nodes.transforms import TransformsNode

    descriptions: list[String] = []
    frames: list[TransformStamped] = []
    with TransformsNode() as node, spinning(node):
        node.bring_up()
        with watcher() as listener:
            listener.create_subscription(String, "robot_description", descriptions.append, LATCHED)
            listener.create_subscription(TransformStamped, "static_transforms", frames.append, LATCHED)
            until(lambda: descriptions and len(frames) >= 3)
    assert {each.child_frame_id for each in frames} == {
        "left_base_link",
        "right_base_link",
        ROBOT.cameras[0].frame,
    }
    assert {each.header.frame_id for each in frames} == {"world"}
    assert '<link name="left_link6"' in descriptions[0].data


@pytest.mark.usefixtures("ros")
def test_a_trials_recording_begins_with_what_was_said_before_it(tmp_path):
    from robot_bridge.nodes.topic_tap import TopicTap
    from robot_bridge.recording import TrialRecorder, read_recording, trial_topics

    topics = trial_topics(ROBOT)
    with watcher() as node:
        tap = TopicTap(node, topics)
        latched = node.create_publisher(String, "robot_description", LATCHED)
        latched.publish(String(data="<robot/>"))
        until(lambda: "robot_description" in tap.latest)
        for name in ("a", "b"):
            with TrialRecorder(tmp_path, name, topics, namespace="/lab") as recorder:
                tap.recorder = recorder
                tap.recorder = None
            found = read_recording(tmp_path / name)
            assert found.counts["robot_description"] == 1
            assert found.counts["diagnostics"] == 0


@pytest.mark.usefixtures("ros")
def test_the_recorder_records_while_it_is_active(tmp_path):
    from robot_bridge.nodes.recorder import RecorderNode
    from robot_bridge.recording import read_recording

    with RecorderNode() as node:
        node.set_parameters([Parameter("out", value=str(tmp_path))])
        with spinning(node), watcher() as speaker:
            joints = speaker.create_publisher(JointState, "joint_states", 10)
            for expected in ("session", "session_001"):
                node.bring_up()
                until(joints.get_subscription_count)
                until(lambda: joints.publish(JointState(name=["a"], position=[1.0])) or written(node))
                node.trigger_deactivate()
                assert read_recording(tmp_path / expected).counts["joint_states"] > 0
                node.trigger_cleanup()


def written(node) -> bool:
    (found,) = node.diagnose()
    values = {pair.key: pair.value for pair in found.values}
    return int(values["written"]) > 0


class FakeLoop:
    """Takes what a control loop takes."""

    def __init__(self) -> None:
        self.played: list[object] = []
        self.calls: list[str] = []

    def play(self, trajectory) -> int:
        self.played.append(trajectory)
        return 0

    def __getattr__(self, name: str):
        return lambda: self.calls.append(name)


def tick(position: np.ndarray):
    from robot_bridge.control_loop import Mode, Tick

    class State:
        stamp_ns = 5_000_000_000

        def __init__(self, part: slice) -> None:
            self.position = position[part]
            self.velocity = self.effort = np.zeros(7)

    states = tuple(State(part) for _, part in ROBOT.slices())
    return Tick(0, 0, states, position, (), Mode.ON, "", ())


@pytest.mark.usefixtures("ros")
def test_what_users_of_the_vendors_driver_know():
    from robot_bridge.nodes.piper_topics import PiperTopics

    loop, states = FakeLoop(), []
    with Steps() as node, watcher() as user:
        topics = PiperTopics(node, ROBOT, loop, node.require_active)
        with spinning(node):
            user.create_subscription(JointState, "right/joint_states_single", states.append, 10)
            control = user.create_publisher(JointState, "left/joint_ctrl_single", 10)
            flag = user.create_publisher(Bool, "left/enable_flag", 10)
            until(lambda: control.get_subscription_count() and flag.get_subscription_count())
            until(lambda: topics.publish(tick(ROBOT.home())) or states)
            assert list(states[0].name) == [*(f"joint{i}" for i in range(1, 7)), "gripper"]
            np.testing.assert_allclose(states[0].position, ROBOT.home()[7:])

            goal = ROBOT.home()[:6] + 0.1
            control.publish(JointState(position=goal.tolist()))  # not active: refused
            node.bring_up()
            until(lambda: control.publish(JointState(position=goal.tolist())) or loop.played)
            (target,) = loop.played[0].targets
            np.testing.assert_allclose(target[:6], goal)
            np.testing.assert_allclose(target[6:], ROBOT.home()[6:])
            assert loop.played[0].dt_s == pytest.approx(0.1 / (ROBOT.velocity_limits()[:6].min() / 3))
            flag.publish(Bool(data=False))
            flag.publish(Bool(data=True))
            until(lambda: loop.calls == ["enable"])
            stop = user.create_client(Trigger, "left/stop_srv")
            assert stop.wait_for_service(10)
            assert stop.call(Trigger.Request(), timeout_sec=10).success
            assert loop.calls == ["enable", "stop"]


@pytest.mark.parametrize(
    "message",
    [
        {"position": [0.0] * 5},
        {"position": [0.0] * 8},
        {"position": [float("nan")] * 6},
        {"name": ["joint1"], "position": [0.0]},
        {"name": [f"joint{i}" for i in range(1, 7)], "position": [0.0] * 5},
        {"name": [f"link{i}" for i in range(1, 7)], "position": [0.0] * 6},
    ],
)
def test_a_joint_command_that_fits_no_arm_is_refused(message):
    from robot_bridge.nodes.piper_topics import arm_positions

    with pytest.raises(ChunkError):
        arm_positions(JointState(**message), ROBOT.arms[0])


def test_a_joint_command_is_read_by_name():
    from robot_bridge.nodes.piper_topics import arm_positions

    names = [f"joint{i}" for i in range(6, 0, -1)]
    found = arm_positions(JointState(name=names, position=[6.0, 5, 4, 3, 2, 1]), ROBOT.arms[0])
    assert found.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("ros")
def test_a_camera_publishes_what_somebody_listens_to():
    from robot_bridge.drivers.realsense import CameraHealth, Frame
    from robot_bridge.nodes.camera_topics import CameraTopics

    camera = ROBOT.cameras[0]
    picture = np.arange(camera.height * camera.width * 3, dtype=np.uint64).astype(np.uint8)
    picture = picture.reshape(camera.height, camera.width, 3)

    class Driver:
        def __init__(self) -> None:
            self.camera = camera

        def wait_newer(self, _: int, timeout_s: float) -> Frame:
            time.sleep(min(0.05, timeout_s))
            return Frame(image=picture, capture_ns=time.time_ns(), sequence=1, arrival_ns=time.time_ns())

        def health(self) -> CameraHealth:
            return CameraHealth(True, 2, 3, 0.02, "global_time", "2.1", {"exposure": 156.0})

    raw: list[Image] = []
    jpeg: list[CompressedImage] = []
    with watcher() as node, CameraTopics(node, Driver(), None, 90) as topics:
        node.create_subscription(
            Image, f"{camera.name}/color/image_raw", raw.append, qos_profile_sensor_data
        )
        until(lambda: raw)
        assert not jpeg
        assert (raw[0].encoding, raw[0].step) == ("rgb8", 3 * camera.width)
        assert raw[0].header.frame_id == camera.frame
        np.testing.assert_array_equal(np.frombuffer(raw[0].data, np.uint8).reshape(picture.shape), picture)
        name = f"{camera.name}/color/image_raw/compressed"
        node.create_subscription(CompressedImage, name, jpeg.append, qos_profile_sensor_data)
        until(lambda: jpeg)
        assert bytes(jpeg[0].data[:2]) == b"\xff\xd8"
        found = {pair.key: pair.value for pair in topics.diagnose().values}
        assert float(found["rate_hz"]) > 0
        assert (found["reconnects"], found["lost_frames"], found["stamp_error_ms"]) == ("2", "3", "20")
        assert (found["clock"], found["usb"], found["exposure"]) == ("global_time", "2.1", "156.0")


def test_names_are_taken_once(tmp_path: Path):
    from robot_bridge.nodes.recorder import free_name

    assert free_name(tmp_path) == "session"
    (tmp_path / "session").mkdir()
    (tmp_path / "interrupted/session_001").mkdir(parents=True)
    assert free_name(tmp_path) == "session_002"
