"""Nothing that a policy can want puts an unsafe frame on a bus; and the watch would see it if it did."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.adversarial_limits import POLICIES, Door, Search, run_policy
from robot_bridge.twin.can_bus import CanFrame
from robot_bridge.twin.setpoint_watch import SetpointWatch
from simplevla.embodiment import load_embodiment

ARM = load_embodiment("piper_single").arms[0]
HOME = np.array([*ARM.home_rad, ARM.home_gripper_m])


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    with Door("twin_single") as door:
        yield door


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_gets_an_unsafe_frame_onto_the_bus(door: Door, name: str) -> None:
    (watch,) = door.watches.values()
    before = watch.setpoints
    run_policy(door, name, 1500, seed=1)
    assert watch.setpoints - before == 1500 + 3  # each course begins where the arm stands
    assert door.violations == []


def test_no_search_finds_one_either(door: Door) -> None:
    Search(door, seed=2, left=2500).run()
    assert door.violations == []
    assert door.worst["velocity"] > 0.9
    assert door.worst["acceleration"] > 0.9


class Bus:
    """A watch, and a sender who may send what no limits would."""

    def __init__(self) -> None:
        self.tick = 0
        self.watch = SetpointWatch(ARM, clock=lambda: self.tick)

    def send(self, positions: np.ndarray, effort: int = 1000) -> list[str]:
        counts = [round(float(value)) for value in np.degrees(positions[:6]) * 1e3]
        for i, frame in enumerate((0x155, 0x156, 0x157)):
            self.watch(CanFrame(frame, struct.pack(">ii", *counts[2 * i : 2 * i + 2])))
        self.watch(CanFrame(0x159, struct.pack(">iHBB", round(positions[6] * 1e6), effort, 1, 0)))
        self.tick += 1
        return self.watch.violations


def test_the_watch_sees_a_joint_beyond_its_limit() -> None:
    beyond = HOME.copy()
    beyond[4] = ARM.joints[4].upper_rad + 1e-4
    assert "joint5 at" in Bus().send(beyond)[0]
    beyond[4], beyond[6] = 0.0, ARM.gripper.stroke_m + 1e-5
    assert "gripper at" in Bus().send(beyond)[0]


def test_the_watch_sees_speed_and_acceleration() -> None:
    bus = Bus()
    bus.send(HOME)
    faster = HOME.copy()
    faster[0] += 5.0 * 0.005**2 * 1.5 + 2e-4
    assert "joint1: acceleration" in bus.send(faster)[0]
    bus = Bus()
    position, speed = HOME.copy(), 0.0
    bus.send(position)
    for _ in range(200):
        speed += 5.0 * 0.005
        position[0] += speed * 0.005
        if bus.send(position):
            break
    assert "joint1: velocity 3.0" in bus.watch.violations[0]


def test_the_watch_lets_what_is_allowed_pass() -> None:
    bus = Bus()
    t = np.arange(0, 2, 0.005)
    for angle in 0.4 * (1 - np.cos(2 * t)):
        assert bus.send(HOME + np.array([angle, 0, 0, 0, 0, 0, 0])) == []
    assert bus.watch.setpoints == len(t)


def test_the_watch_sees_frames_out_of_order_and_a_grip_too_hard() -> None:
    assert "gripper effort 2000" in Bus().send(HOME, effort=2000)[0]
    bus = Bus()
    bus.watch(CanFrame(0x156, bytes(8)))
    assert (bus.watch.incomplete, bus.watch.setpoints) == (1, 0)
