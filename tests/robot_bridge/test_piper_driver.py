"""The Piper driver on the vendor's SDK, against an emulated arm on its bus."""

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robot_bridge.drivers.claim import claim
from robot_bridge.drivers.piper import PiperDriver
from robot_bridge.drivers.piper_faults import describe_faults, must_hold
from robot_bridge.limits import Limiter, SafeSetpoint
from robot_bridge.rig import CanPort, load_rig, with_free_ports
from robot_bridge.twin import piper_frames as frames
from robot_bridge.twin.bench import BenchArm
from robot_bridge.twin.can_bus import CanFrame
from robot_bridge.twin.faults import Fault, FaultKind
from simplevla.embodiment import load_embodiment
from simplevla.errors import UnavailableError

pytestmark = pytest.mark.realtime

ROBOT = load_embodiment("piper_dual")
(LEFT, PART), (RIGHT, RIGHT_PART) = ROBOT.slices()
MIDDLE = np.array([0.1, 1.0, -0.8, 0.1, 0.5, -0.2, 0.04] * 2)
ROUNDING = 1.5e-5  # rad: half of 0.001 deg, and a little


@pytest.fixture
def can() -> CanPort:
    return with_free_ports(load_rig("twin")).arms["left"]


@pytest.fixture
def bench(can: CanPort) -> Iterator[BenchArm]:
    with BenchArm(LEFT, can.channel) as bench:
        yield bench


@pytest.fixture
def driver(can: CanPort, bench: BenchArm) -> Iterator[PiperDriver]:  # noqa: ARG001 - the arm that answers
    with PiperDriver(LEFT, can) as driver:
        yield driver


def safe(positions: np.ndarray) -> SafeSetpoint:
    return Limiter(ROBOT).reset(positions)


def wait_for(condition: Callable[[], bool], timeout_s: float = 3.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


def play(driver: PiperDriver, positions: np.ndarray, seconds: float = 1.0) -> None:
    setpoint = safe(positions)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        driver.send(setpoint, PART)
        time.sleep(0.005)


def test_a_state_is_whole_fresh_and_in_si_units(driver: PiperDriver) -> None:
    state = driver.state()
    np.testing.assert_allclose(state.position, ROBOT.home()[PART], atol=ROUNDING)
    assert state.velocity.shape == state.effort.shape == (7,)
    assert 0 <= state.age_s < 0.2
    assert abs(state.stamp_ns - time.time_ns()) < 1e9
    assert (state.enabled, state.stopped, state.status, state.faults) == (False, False, "normal", ())
    with pytest.raises(ValueError, match="read-only"):
        state.position[0] = 1.0
    assert wait_for(lambda: driver.firmware == "S-V1.8-2")


def test_opening_moves_and_powers_nothing(driver: PiperDriver, bench: BenchArm) -> None:
    time.sleep(0.1)
    assert not driver.state().enabled
    np.testing.assert_array_equal(bench.position, ROBOT.home()[PART])


def test_enabling_holds_the_measured_pose(driver: PiperDriver, bench: BenchArm) -> None:
    # An older target is left in the arm; enabling must not go there.
    for i, frame in enumerate(frames.joint_frames([0, 90_000, -90_000, 0, 0, 0])):
        bench.emulator.receive(CanFrame(frames.JOINT_COMMANDS[i], frame.data))
    driver.enable()
    assert driver.state().enabled
    time.sleep(0.1)
    np.testing.assert_allclose(bench.position, ROBOT.home()[PART], atol=ROUNDING)


def test_a_setpoint_is_reached_and_what_was_sent_is_returned(driver: PiperDriver) -> None:
    driver.enable()
    sent = driver.send(safe(MIDDLE), PART)
    assert sent is not None
    np.testing.assert_allclose(sent, MIDDLE[PART], atol=ROUNDING)
    play(driver, MIDDLE)
    np.testing.assert_allclose(driver.state().position, sent, atol=1e-9)


@pytest.mark.usefixtures("bench")
def test_the_right_part_of_a_setpoint_goes_to_the_arm(can: CanPort) -> None:
    both = MIDDLE.copy()
    both[RIGHT_PART] = [-0.1, 1.1, -0.9, -0.1, 0.4, 0.2, 0.03]
    with PiperDriver(LEFT, can) as driver:
        driver.enable()
        sent = driver.send(safe(both), RIGHT_PART)
    assert sent is not None
    np.testing.assert_allclose(sent, both[RIGHT_PART], atol=ROUNDING)


def test_hold_repeats_the_last_setpoint(driver: PiperDriver) -> None:
    driver.enable()
    play(driver, MIDDLE, 0.5)
    held = driver.hold()
    assert held is not None
    np.testing.assert_allclose(held, MIDDLE[PART], atol=ROUNDING)


def test_velocity_is_reported_while_moving(driver: PiperDriver) -> None:
    driver.enable()
    goal = MIDDLE.copy()
    goal[0] = 1.5
    driver.send(safe(goal), PART)
    assert wait_for(lambda: driver.state().velocity[0] > 2.0, 1.0)


def test_only_the_limits_can_make_what_is_sent(driver: PiperDriver) -> None:
    driver.enable()
    with pytest.raises(TypeError, match="SafeSetpoint"):
        driver.send(MIDDLE, PART)  # type: ignore[arg-type]


@given(bad=st.sampled_from([np.nan, np.inf, -np.inf]), place=st.integers(0, 6))
def test_nan_and_infinity_never_reach_the_bus(bad: float, place: int) -> None:
    setpoint = safe(MIDDLE)
    forged = setpoint.positions.copy()
    forged[place] = bad
    object.__setattr__(setpoint, "positions", forged)
    driver = PiperDriver(LEFT, CanPort(interface="simplevla_twin", channel="127.0.0.1:9"))
    with pytest.raises(ValueError, match="finite"):
        driver.send(setpoint, PART)


def test_a_wrong_part_is_refused(driver: PiperDriver) -> None:
    with pytest.raises(ValueError, match="7"):
        driver.send(safe(MIDDLE), slice(0, 5))


def test_before_enabling_nothing_is_sent_and_the_gripper_stays_off(
    driver: PiperDriver, bench: BenchArm
) -> None:
    assert driver.send(safe(MIDDLE), PART) is None
    assert driver.hold() is None
    play(driver, MIDDLE, 0.2)
    np.testing.assert_array_equal(bench.position, ROBOT.home()[PART])
    assert not driver.state().enabled


def test_stop_brakes_and_nothing_moves_until_a_person_resets(driver: PiperDriver, bench: BenchArm) -> None:
    driver.enable()
    play(driver, MIDDLE, 0.1)
    driver.stop()
    assert wait_for(lambda: driver.state().stopped)
    assert driver.state().status == "emergency stop"
    assert driver.state().enabled
    assert driver.send(safe(MIDDLE), PART) is None
    assert driver.hold() is None
    with pytest.raises(UnavailableError, match="emergency stop"):
        driver.enable()
    time.sleep(0.3)
    place = bench.position
    time.sleep(0.2)
    np.testing.assert_array_equal(bench.position, place)
    driver.reset()
    assert wait_for(lambda: not driver.state().stopped and not driver.state().enabled)
    driver.enable()
    assert driver.send(safe(MIDDLE), PART) is not None


def test_a_stop_is_not_lost_among_concurrent_senders(driver: PiperDriver) -> None:
    driver.enable()
    setpoint, over = safe(MIDDLE), threading.Event()

    def send() -> None:
        while not over.is_set():
            driver.send(setpoint, PART)
            time.sleep(0.002)

    senders = [threading.Thread(target=send) for _ in range(3)]
    for sender in senders:
        sender.start()
    time.sleep(0.2)
    driver.stop()
    stopped = wait_for(lambda: driver.state().stopped)
    over.set()
    for sender in senders:
        sender.join()
    assert stopped


def test_a_lost_stop_is_sent_again(driver: PiperDriver, bench: BenchArm) -> None:
    driver.enable()
    bench.silent.set()
    driver.stop()
    time.sleep(0.1)
    bench.silent.clear()
    time.sleep(0.1)
    assert not driver.state().stopped
    assert driver.hold() is None
    assert wait_for(lambda: driver.state().stopped)


def test_disable_cuts_power(driver: PiperDriver) -> None:
    driver.enable()
    driver.disable()
    assert wait_for(lambda: not driver.state().enabled)
    assert driver.hold() is None


def test_silence_shows_as_age_and_passes(driver: PiperDriver, bench: BenchArm) -> None:
    bench.silent.set()
    assert wait_for(lambda: driver.state().age_s > 0.3, 1.0)
    frozen = driver.state()
    assert wait_for(lambda: driver.state().age_s > 0.55)
    with pytest.raises(UnavailableError, match="silent for"):
        driver.enable()
    assert driver.state().stamp_ns == frozen.stamp_ns
    bench.silent.clear()
    assert wait_for(lambda: driver.state().age_s < 0.1)


def test_half_a_cycle_is_no_state(driver: PiperDriver, bench: BenchArm) -> None:
    bench.silent.set()
    time.sleep(0.1)
    before = driver.state()
    torn = frames.joint_frames([1000] * 6)
    for some in ([torn[0], torn[2]], [torn[1], torn[2]], [torn[2], torn[1], torn[0]]):
        bench._hub.send(some)
    time.sleep(0.1)
    assert driver.state().stamp_ns == before.stamp_ns
    bench._hub.send(torn)
    assert wait_for(lambda: driver.state().stamp_ns > before.stamp_ns)
    np.testing.assert_allclose(driver.state().position[:6], np.radians(1.0), atol=ROUNDING)


def test_garbage_on_the_bus_does_not_stop_the_reader(driver: PiperDriver, bench: BenchArm) -> None:
    bench._hub.send([CanFrame(0x2A5, b"abc"), CanFrame(0x7FF, bytes(8)), CanFrame(0x2A1, b"\xff" * 8)])
    time.sleep(0.05)
    assert driver.state().age_s < 0.2


def test_teach_mode_is_said_and_not_enabled(driver: PiperDriver, bench: BenchArm) -> None:
    bench.silent.set()
    time.sleep(0.15)
    bench._hub.send([frames.status_frame(2, 0x0B, 0), *frames.joint_frames([0] * 6)])
    assert wait_for(lambda: any("taught by hand" in fault for fault in driver.state().faults))
    with pytest.raises(UnavailableError, match="taught by hand"):
        driver.enable()


def test_an_arm_that_already_holds_goes_on_holding(bench: BenchArm, can: CanPort) -> None:
    with PiperDriver(LEFT, can) as driver:
        driver.enable()
        play(driver, MIDDLE)
    time.sleep(0.1)
    np.testing.assert_allclose(bench.position, MIDDLE[PART], atol=ROUNDING)
    with PiperDriver(LEFT, can) as driver:
        assert driver.state().enabled
        time.sleep(0.1)
        np.testing.assert_allclose(bench.position, MIDDLE[PART], atol=2 * ROUNDING)


@pytest.mark.usefixtures("bench")
def test_closing_ends_every_thread(can: CanPort) -> None:
    before = set(threading.enumerate())
    with PiperDriver(LEFT, can) as driver:
        driver.enable()
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before


def test_a_dead_bus_is_named_with_what_to_do(can: CanPort) -> None:
    before = set(threading.enumerate())
    with (
        pytest.raises(UnavailableError, match=can.channel) as raised,
        PiperDriver(LEFT, can, connect_timeout_s=0.3),
    ):
        pass
    assert "simplevla twin" in raised.value.remedy
    assert set(threading.enumerate()) == before


def test_a_missing_adapter_is_named_with_what_to_do() -> None:
    can = CanPort(interface="socketcan", channel="can_nowhere")
    with pytest.raises(UnavailableError, match="can_nowhere") as raised, PiperDriver(LEFT, can):
        pass
    assert "ip link set can_nowhere up" in raised.value.remedy


def test_one_bus_has_one_driver(driver: PiperDriver, can: CanPort) -> None:
    with pytest.raises(UnavailableError, match="is driven by another"), PiperDriver(RIGHT, can):
        pass
    assert driver.state().age_s < 0.2


CLAIM = """
import sys
from robot_bridge.drivers.claim import claim
from robot_bridge.rig import CanPort
held = claim(CanPort(interface="socketcan", channel=sys.argv[1]))
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_bus_is_claimed_from_other_programs_until_they_end_however_they_do() -> None:
    port = CanPort(interface="socketcan", channel=f"can_{uuid.uuid4().hex[:8]}")
    command = [sys.executable, "-c", CLAIM, port.channel]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"claimed\n"
            with pytest.raises(UnavailableError, match=f"{port.channel} is driven by another program"):
                claim(port)
            claim(msgspec.structs.replace(port, channel=port.channel + "_")).close()
        finally:
            other.kill()
    claim(port).close()
    claim(port).close()


def test_temperatures_currents_and_voltage_are_told(driver: PiperDriver, bench: BenchArm) -> None:
    bench.emulator.motor_c = 41
    assert wait_for(lambda: driver.state().motor_c.tolist() == [41.0] * 6)
    state = driver.state()
    assert state.driver_c.tolist() == [30.0] * 6
    assert state.current_a.shape == (6,)
    assert state.supply_v == pytest.approx(24.0)


def test_an_older_arm_counts_two_joints_from_another_zero(can: CanPort) -> None:
    older = msgspec.structs.replace(can, dh="old")
    with BenchArm(LEFT, can.channel) as bench:
        bench.emulator.zeros[1:3] = np.radians([2.0, -2.0])
        with PiperDriver(LEFT, older) as driver:
            np.testing.assert_allclose(driver.state().position, ROBOT.home()[PART], atol=ROUNDING)
            driver.enable()
            play(driver, MIDDLE)
            np.testing.assert_allclose(bench.position, MIDDLE[PART], atol=2 * ROUNDING)


def test_a_wider_gripper_is_taken_and_said(can: CanPort, caplog: pytest.LogCaptureFixture) -> None:
    with BenchArm(LEFT, can.channel, gripper_range_m=0.1), PiperDriver(LEFT, can):
        pass
    assert "set to open 100 mm; the embodiment uses 70 mm" in caplog.text


def test_an_arm_cannot_be_where_no_arm_can_get_to_so_soon(driver: PiperDriver, bench: BenchArm) -> None:
    before = driver.state().position
    for count in (2_000_000, 90_000):
        bench._hub.send(frames.joint_frames([count] * 6))
        time.sleep(0.02)
        assert driver.doubted > 0
        assert np.abs(driver.state().position - before).max() < 0.1


def test_nothing_is_sent_to_an_arm_that_a_hand_guides(driver: PiperDriver, bench: BenchArm) -> None:
    driver.enable()
    bench.inject(Fault(kind=FaultKind.TEACH_BUTTON, part="left"))
    assert wait_for(lambda: driver.state().must_hold)
    assert driver.send(safe(MIDDLE), PART) is None
    bench.clear()
    assert wait_for(lambda: not driver.state().must_hold)
    assert driver.send(safe(MIDDLE), PART) is None
    driver.enable()
    assert driver.send(safe(MIDDLE), PART) is not None


@pytest.mark.parametrize(
    ("codes", "holds"),
    [
        ((1, 0, 0, 0b11000000, (0b01000000,) * 6), False),
        ((1, 4, 1 << 8, 0b11000000, (0b01000000,) * 6), False),  # one target beyond a limit
        ((2, 0, 0, 0b11000000, (0b01000000,) * 6), True),
        ((1, 7, 0, 0b11000000, (0b01000000,) * 6), True),
        ((1, 0, 1, 0b11000000, (0b01000000,) * 6), True),
        ((1, 0, 0, 0b11010000, (0b01000000,) * 6), True),
        ((1, 0, 0, 0b11000000, (0b01000000,) * 5 + (0b11000000,)), True),
    ],
)
def test_what_an_arm_cannot_be_moved_with_is_told_apart(codes: tuple, holds: bool) -> None:
    assert must_hold(*codes) is holds


def test_faults_are_told_in_plain_words() -> None:
    well = (0b01000000,) * 6
    assert describe_faults(1, 0, 0, 0b11000000, well) == ()
    assert describe_faults(1, 7, 1 << 10 | 1 << 4, 0b01000010, (*well[:5], 0b00001000)) == (
        "collision",
        "joint 3 beyond its limit",
        "joint 5 does not answer its controller",
        "joint 6: driver too hot",
        "gripper: motor too hot",
    )


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 0xFFFF), st.integers(0, 255))
def test_every_code_has_words(mode: int, status: int, errors: int, bits: int) -> None:
    assert all(
        isinstance(fault, str) and fault
        for fault in describe_faults(mode, status, errors, bits, (bits,) * 6)
    )
