"""What calibration found reaches the metal and the nodes: joint zeros, stamps, lenses, transforms."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from robot_bridge.bringup import Settings, processes
from robot_bridge.clearance import Workspace
from robot_bridge.drivers.choice import arm_driver, camera_driver
from robot_bridge.limits import Limiter
from robot_bridge.rig import load_rig, with_free_ports
from robot_bridge.twin.bench import BenchArm
from robot_bridge.twin.frames import FrameWriter, slot_name
from robot_bridge.twin.metal import Metal, Plate
from simplevla.embodiment import Pose, load_embodiment
from simplevla.errors import ConfigError
from simplevla.motion import FOLLOWING_DELAY_S
from simplevla.session_record import Check, Lens, SessionRecord, save_session_record

pytestmark = pytest.mark.realtime

ROBOT = load_embodiment("piper_dual")
(LEFT, PART), _ = ROBOT.slices()
CAMERA = ROBOT.camera("head")
ZEROS = (0.0, 0.01, -0.02, 0.03, 0.0, 0.0)


def record(**changes: object) -> SessionRecord:
    one = SessionRecord(
        created_ns=time.time_ns(),
        embodiment="piper_dual",
        serials={"head": "TWIN-HEAD"},
        checks=(Check(name="all", passed=True),),
        joint_zeros_rad={"left": ZEROS},
        delays_s={"head_stamp": 0.03, "left_command": 0.05, "right_command": 0.09},
        lenses={"head": Lens(width=640, height=480, fx=610, fy=612, cx=322, cy=241)},
    )
    return msgspec.structs.replace(one, **changes)


def test_states_and_setpoints_are_true_positions() -> None:
    """The arm is spoken to in its own positions, 0.01 rad and more off; nobody else sees them."""
    rig = with_free_ports(load_rig("twin"))
    wanted = ROBOT.home()
    wanted[PART] += [0.1, 0.1, 0.1, 0.1, -0.1, 0.1, -0.01]
    with BenchArm(LEFT, rig.arms["left"].channel) as bench, arm_driver(rig, LEFT, record()) as driver:
        np.testing.assert_allclose(driver.state().position[:6] + ZEROS, LEFT.home_rad, atol=2e-5)
        driver.enable()
        np.testing.assert_allclose(bench.position[:6], LEFT.home_rad, atol=2e-5)  # nothing moved
        setpoint = Limiter(ROBOT).reset(wanted)
        sent = None
        for _ in range(200):
            sent = driver.send(setpoint, PART)
            time.sleep(0.005)
        np.testing.assert_allclose(sent, wanted[PART], atol=2e-5)
        np.testing.assert_allclose(driver.state().position, wanted[PART], atol=2e-5)
        np.testing.assert_allclose(bench.position, wanted[PART] + [*ZEROS, 0.0], atol=2e-5)


def test_pictures_are_stamped_when_they_were_exposed_and_the_lens_is_the_devices() -> None:
    rig = with_free_ports(load_rig("twin"))
    assert rig.twin is not None
    over = threading.Event()
    stamps: set[int] = set()

    def project() -> None:
        with FrameWriter(slot_name(rig.twin.shared_memory, "head"), CAMERA.height, CAMERA.width) as writer:
            while not over.wait(0.03):
                stamps.add(time.time_ns() // 1000)
                writer.write(np.zeros((CAMERA.height, CAMERA.width, 3), np.uint8), max(stamps) * 1000)

    thread = threading.Thread(target=project, daemon=True)
    thread.start()
    try:
        time.sleep(0.1)
        with camera_driver(rig, CAMERA, record()) as driver:
            frame = driver.wait_newer(0, 5.0)
            lens = driver.intrinsics
    finally:
        over.set()
        thread.join()
    exposed_us = round(frame.capture_ns / 1000) + 30_000
    assert min(abs(exposed_us - stamp) for stamp in stamps) <= 1
    # The SDK counts pixels from the middle of the first one, the embodiment from its corner.
    assert (lens.fx, lens.cx, lens.cy) == (302.5, 159.5, 119.5)


@pytest.mark.parametrize("good", [True, False])
def test_nodes_are_told_of_a_record_that_is_true_for_the_rig(tmp_path: Path, good: bool) -> None:
    path = tmp_path / "session.json"
    save_session_record(record() if good else record(serials={"head": "another"}), path)
    described = {p.name: " ".join(p.command) for p in processes(Settings(session_record=path))}
    for node in ("arms", "policy"):
        assert (f"session_record:={path}" in described[node]) is good


def test_camera_info_and_settling_come_from_the_record() -> None:
    pytest.importorskip("rclpy", reason="no ROS 2 and no ROS wheels here")
    from robot_bridge.nodes.camera_topics import camera_info
    from robot_bridge.nodes.policy import settle_s

    nominal, measured = camera_info(CAMERA), camera_info(CAMERA, record().lenses["head"])
    assert list(nominal.k)[:3] == [302.5, 0.0, 159.5]
    assert list(measured.k) == [305.0, 0.0, 160.5, 0.0, 306.0, 120.0, 0.0, 0.0, 1.0]
    assert settle_s(None, ROBOT) == 0.0
    assert settle_s(record(), ROBOT) == pytest.approx(0.09 - FOLLOWING_DELAY_S)


def test_transforms_are_published_for_a_late_listener() -> None:
    rclpy = pytest.importorskip("rclpy", reason="no ROS 2 and no ROS wheels here")
    from geometry_msgs.msg import TransformStamped
    from rclpy.qos import DurabilityPolicy, QoSProfile

    from robot_bridge.nodes.transforms import publish_transforms

    rclpy.init()
    try:
        speaker, listener = rclpy.create_node("speaker"), rclpy.create_node("listener")
        poses = {"head": Pose(xyz_m=(1.0, 2.0, 3.0)), "left_base": Pose(xyz_m=(0.0, 0.0, 0.5))}
        publish_transforms(speaker, poses)
        heard: list[TransformStamped] = []
        latched = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        listener.create_subscription(TransformStamped, "static_transforms", heard.append, latched)
        deadline = time.monotonic() + 20
        while len(heard) < 2 and time.monotonic() < deadline:
            rclpy.spin_once(listener, timeout_sec=0.1)
        assert {each.child_frame_id for each in heard} == set(poses)
        head = next(each for each in heard if each.child_frame_id == "head")
        assert head.header.frame_id == "world"
        assert (head.transform.translation.z, head.transform.rotation.w) == (3.0, 1.0)
    finally:
        rclpy.shutdown()


def test_what_a_gripper_carries_keeps_clear_too() -> None:
    home = ROBOT.home()
    rod = np.array([[0.0, 0, 0], [0.15, 0, 0], [0.3, 0, 0]])
    bare, loaded = Workspace(ROBOT), Workspace(ROBOT, carried={"left": rod})
    assert loaded.heights(home)[0] < bare.heights(home)[0] - 0.15
    assert loaded.heights(home)[1] == bare.heights(home)[1]
    across = np.array([[0.0, -0.5, 0.0], [0.0, 0.5, 0.0]])
    assert Workspace(ROBOT, carried={"left": across}).gap(home) < bare.gap(home) - 0.05
    assert len(loaded.spheres(home)[0]) == len(bare.spheres(home)[0])  # links alone


@pytest.mark.parametrize(
    "metal",
    [
        Metal(joint_zeros_rad={"third": (0.0,) * 6}),
        Metal(stamp_offsets_s={"tail": 0.1}),
        Metal(plate=Plate(picture="x.png", size_m=(0.1, 0.1), holder="wall", pose=Pose(xyz_m=(0, 0, 0)))),
    ],
)
def test_metal_names_parts_that_exist(metal: Metal) -> None:
    with pytest.raises(ConfigError, match="unknown part"):
        metal.check(ROBOT)


def test_metal_is_altered_part_by_part() -> None:
    one = Metal(command_delays_s={"left": 0.1}, stamp_offsets_s={"head": 0.02})
    both = one.altered(Metal(command_delays_s={"right": 0.2}))
    assert both.command_delays_s == {"left": 0.1, "right": 0.2}
    assert both.stamp_offsets_s == {"head": 0.02}
    np.testing.assert_array_equal(
        one.altered(Metal(joint_zeros_rad={"left": ZEROS})).zeros("left")[:6], ZEROS
    )
