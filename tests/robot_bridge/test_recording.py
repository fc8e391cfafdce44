"""Recording: what DDS delivers is what the MCAP holds, and a cut recording never passes for a whole one."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robot_bridge.recording import (
    COMPRESSED_IMAGE,
    DIAGNOSTICS,
    INTERRUPTED,
    JOINT_STATE,
    RecordedTopic,
    TrialRecorder,
    read_recording,
)
from robot_bridge.recovery import recover
from simplevla.cli import main
from simplevla.errors import RecordError

rclpy = pytest.importorskip("rclpy")

pytestmark = pytest.mark.realtime

IMAGE = "head/color/image_raw/compressed"
TOPICS = (
    RecordedTopic("joint_states", JOINT_STATE),
    RecordedTopic("setpoints", JOINT_STATE),
    RecordedTopic("policy/chunks", DIAGNOSTICS),
    RecordedTopic(IMAGE, COMPRESSED_IMAGE, vital=False),
)
NAMES = ["left_joint1", "left_gripper"]


def joint_message(index: int, names: list[str] = NAMES):
    from sensor_msgs.msg import JointState

    message = JointState(name=names, position=[0.01 * index, 0.02])
    message.header.stamp.sec, message.header.stamp.nanosec = 1_700_000_000, index
    return message


def serialised(message) -> bytes:
    from rclpy.serialization import serialize_message

    return serialize_message(message)


@pytest.fixture
def ros():
    """A node, and an executor that spins it in a thread."""
    from rclpy.executors import SingleThreadedExecutor

    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("recording_test", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin, daemon=True)
    thread.start()
    yield node
    executor.shutdown()
    thread.join(5)
    node.destroy_node()
    rclpy.shutdown(context=context)


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_what_is_published_is_read_back(ros, tmp_path):
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
    from sensor_msgs.msg import CompressedImage, JointState

    joints = ros.create_publisher(JointState, "joint_states", 500)
    chunks = ros.create_publisher(DiagnosticArray, "policy/chunks", 10)
    images = ros.create_publisher(CompressedImage, IMAGE, 10)
    from robot_bridge.nodes.topic_tap import TopicTap

    tap = TopicTap(ros, TOPICS)
    wait_for(lambda: all(p.get_subscription_count() for p in (joints, chunks, images)))
    jpeg = cv2.imencode(".jpg", np.full((24, 32, 3), 90, np.uint8))[1].tobytes()
    status = DiagnosticStatus(name="chunk", message="ok", values=[KeyValue(key="index", value="3")])
    array = DiagnosticArray(status=[status])
    array.header.stamp.sec = 12
    picture = CompressedImage(format="rgb8; jpeg compressed bgr8", data=jpeg)
    picture.header.stamp.sec = 13

    with TrialRecorder(tmp_path, "trial_000", TOPICS, metadata={"task": "<move>"}) as recorder:
        tap.recorder = recorder
        assert not (tmp_path / "trial_000").exists()
        for index in range(200):
            joints.publish(joint_message(index))
            time.sleep(0.001)
        chunks.publish(array)
        images.publish(picture)
        wait_for(lambda: IMAGE in tap.latest and "policy/chunks" in tap.latest)
        summary = recorder.finish()
        tap.recorder = None

    recording = read_recording(tmp_path / "trial_000")
    assert recording.counts == summary.counts
    assert recording.counts == {"joint_states": 200, "setpoints": 0, "policy/chunks": 1, IMAGE: 1}
    assert recording.metadata == {"task": "<move>"}
    assert recording.measured.names == tuple(NAMES)
    np.testing.assert_array_equal(recording.measured.position[:, 0], 0.01 * np.arange(200))
    np.testing.assert_array_equal(recording.measured.stamp_ns % 1_000_000_000, np.arange(200))
    assert len(recording.commanded.stamp_ns) == 0
    (chunk,) = recording.statuses["policy/chunks"]
    assert (chunk.stamp_ns, chunk.name, chunk.values) == (12_000_000_000, "chunk", {"index": "3"})
    (frame,) = recording.frames["head"]
    assert (frame.stamp_ns, frame.jpeg) == (13_000_000_000, jpeg)
    assert not (tmp_path / INTERRUPTED).exists()


def test_nothing_is_recorded_between_trials(ros, tmp_path):
    from sensor_msgs.msg import JointState

    joints = ros.create_publisher(JointState, "joint_states", 10)
    from robot_bridge.nodes.topic_tap import TopicTap

    tap = TopicTap(ros, TOPICS)
    wait_for(joints.get_subscription_count)
    joints.publish(joint_message(1))
    wait_for(lambda: "joint_states" in tap.latest)
    with TrialRecorder(tmp_path, "a", TOPICS):
        pass
    assert sum(read_recording(tmp_path / "a").counts.values()) == 0


@settings(max_examples=15, deadline=None)
@given(
    burst=st.lists(st.booleans(), min_size=1, max_size=300),
    image_bytes=st.integers(2_000, 60_000),
)
def test_a_flood_of_images_never_costs_a_joint_message(tmp_path_factory, burst, image_bytes):
    folder = tmp_path_factory.mktemp("flood")
    joint = serialised(joint_message(0))
    image = bytes(image_bytes)
    recorder = TrialRecorder(folder, "t", TOPICS, max_pending_bytes=100_000)
    for index, is_image in enumerate(burst):
        recorder.write(IMAGE if is_image else "setpoints", image if is_image else joint, index)
    summary = recorder.finish()
    assert summary.counts["setpoints"] == burst.count(False)
    assert summary.counts[IMAGE] + summary.dropped.get(IMAGE, 0) == burst.count(True)


def test_queued_images_make_room_and_are_counted(tmp_path, monkeypatch):
    release = threading.Event()
    recorder = TrialRecorder(tmp_path, "t", TOPICS, max_pending_bytes=100_000)
    write = recorder._writer.write
    monkeypatch.setattr(recorder._writer, "write", lambda *a: (release.wait(10), write(*a)))
    joint = serialised(joint_message(0))
    for index in range(60):
        recorder.write(IMAGE, bytes(10_000), index)
    for index in range(2_000):
        recorder.write("joint_states", joint, index)
    release.set()
    summary = recorder.finish()
    assert summary.counts["joint_states"] == 2_000
    assert summary.dropped[IMAGE] >= 59
    assert summary.counts[IMAGE] + summary.dropped[IMAGE] == 60
    assert read_recording(tmp_path / "t", images=False).dropped == summary.dropped


def test_an_interrupted_trial_is_kept_apart(tmp_path):
    def trial() -> None:
        with TrialRecorder(tmp_path, "t", TOPICS) as recorder:
            recorder.write("joint_states", serialised(joint_message(0)), 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trial()
    assert not (tmp_path / "t").exists()
    assert (tmp_path / INTERRUPTED / "t" / "t.mcap").stat().st_size > 0
    with pytest.raises(RecordError, match="was interrupted"):
        read_recording(tmp_path / INTERRUPTED / "t")


def test_a_killed_recording_is_recovered_by_command(tmp_path, capsys):
    """It is no recording until it is recovered; then all of it is there but what was in memory still."""
    total = 2500
    script = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_recording import TOPICS, joint_message, serialised
from robot_bridge.recording import TrialRecorder
recorder = TrialRecorder(Path({str(tmp_path)!r}), "t", TOPICS, namespace="/lab", metadata={{"seed": "7"}})
data = serialised(joint_message(0, ["x" * 1000, "y"]))
for index in range({total}):
    recorder.write("joint_states", data, 1_000_000_000 + index * 10_000_000)
while recorder.so_far.counts["joint_states"] < {total}:
    time.sleep(0.01)
print("going", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        with pytest.raises(RecordError, match="is being written"):
            recover(tmp_path / INTERRUPTED / "t")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    assert not (tmp_path / "t").exists()
    left = tmp_path / INTERRUPTED / "t"
    with pytest.raises(RecordError, match="was interrupted"):
        read_recording(left)

    assert main(["recording", "recover", str(tmp_path)]) == 0
    assert f"{tmp_path / 't'}: " in capsys.readouterr().out
    found = read_recording(tmp_path / "t")
    assert 0.7 * total < found.counts["joint_states"] <= total
    assert len(found.measured.stamp_ns) == found.counts["joint_states"]
    assert found.metadata == {"seed": "7", "recovered": "true"}
    assert (left / "t.mcap").stat().st_size > 1_000_000
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    # Once is enough, and what it holds can be shown.
    assert main(["recording", "recover", str(left)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["recording", "show", str(tmp_path / "t")]) == 0
    assert f"joint_states                   {found.counts['joint_states']}" in capsys.readouterr().out


@pytest.fixture
def cut(tmp_path):
    """Return the folder of an interrupted recording of 3000 messages in several chunks."""
    recorder = TrialRecorder(tmp_path, "t", TOPICS)
    data = serialised(joint_message(0, ["x" * 1000, "y"]))
    for index in range(3000):
        recorder.write("joint_states", data, index)
    recorder.abandon()
    return tmp_path / INTERRUPTED / "t"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1), garbage=st.binary(max_size=64))
def test_wherever_a_recording_is_cut_it_is_recovered_to_there_or_refused(cut, where, garbage):
    whole = (cut / "t.mcap").read_bytes()
    damaged = cut.parent / "u"
    damaged.mkdir(exist_ok=True)
    length = int(where * len(whole))
    (damaged / "u.mcap").write_bytes(whole[:length] + garbage)
    final = cut.parent.parent / "u"
    try:
        found = recover(damaged)
    except RecordError as error:
        refused = error.message
    else:
        refused = ""
    if refused:
        assert "nothing can be read" in refused
        assert length < len(whole) / 2
        assert not final.exists()
        return
    count = len(read_recording(final).measured.stamp_ns)
    assert found.counts == {"/joint_states": count}
    assert count >= 3000 * where - 1500
    shutil.rmtree(final)


def test_what_is_no_interrupted_recording_is_refused(tmp_path, capsys):
    assert main(["recording", "recover", str(tmp_path)]) == 2
    assert "holds no interrupted recording" in capsys.readouterr().err
    assert main(["recording", "show", str(tmp_path)]) == 2
    (tmp_path / INTERRUPTED / "t").mkdir(parents=True)
    (tmp_path / INTERRUPTED / "t" / "t.mcap").write_bytes(b"")
    (tmp_path / INTERRUPTED / "t" / "about.json").write_text("{")
    with pytest.raises(RecordError, match="is damaged"):
        recover(tmp_path / INTERRUPTED / "t")


def test_a_recording_is_never_overwritten(tmp_path):
    with TrialRecorder(tmp_path, "t", TOPICS):
        pass
    with pytest.raises(RecordError, match="exists already"):
        TrialRecorder(tmp_path, "t", TOPICS)


@pytest.mark.parametrize("damage", ["truncate", "garble", "metadata"])
def test_a_damaged_recording_is_one_clear_error(tmp_path, damage):
    with TrialRecorder(tmp_path, "t", TOPICS) as recorder:
        for index in range(50):
            recorder.write("joint_states", serialised(joint_message(index)), index)
    bag = tmp_path / "t" / "t.mcap"
    raw = bag.read_bytes()
    if damage == "truncate":
        bag.write_bytes(raw[: len(raw) // 2])
    elif damage == "garble":
        bag.write_bytes(bytes(len(raw)))
    else:
        (tmp_path / "t" / "metadata.yaml").write_text("rosbag2_bagfile_information: [1, 2]")
    with pytest.raises(RecordError, match="damaged"):
        read_recording(tmp_path / "t")


def test_a_missing_recording_says_so(tmp_path: Path):
    with pytest.raises(RecordError, match="does not exist"):
        read_recording(tmp_path / "nothing")


def test_a_full_disk_ends_in_a_clear_error(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    recorder = TrialRecorder(tmp_path, "t", TOPICS)
    monkeypatch.setattr(recorder._writer, "write", full)
    recorder.write("joint_states", serialised(joint_message(0)), 1)
    with pytest.raises(RecordError, match="No space left"):
        recorder.finish()
    assert not (tmp_path / "t").exists()
