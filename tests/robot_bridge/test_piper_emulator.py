"""The emulated Piper: its frames against the vendor's own encoder and decoder, and what it does."""

from typing import Any

import can
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from piper_sdk.kinematics.piper_fk import C_PiperForwardKinematics
from piper_sdk.piper_msgs.msg_v2 import (
    ArmMsgGripperCtrl,
    ArmMsgJointCtrl,
    ArmMsgMotionCtrl_1,
    ArmMsgMotionCtrl_2,
    ArmMsgMotorEnableDisableConfig,
    ArmMsgParamEnquiryAndConfig,
    ArmMsgSearchMotorMaxAngleSpdAccLimit,
    ArmMsgType,
    PiperMessage,
)
from piper_sdk.protocol.protocol_v2 import C_PiperParserV2

from robot_bridge.twin import piper_frames as frames
from robot_bridge.twin.can_bus import CanFrame
from robot_bridge.twin.piper_emulator import VENDOR_RATES, FeedbackRates, PiperEmulator
from simplevla.embodiment import load_embodiment

ARM = load_embodiment("piper_dual").arms[0]
HOME = np.array([*ARM.home_rad, ARM.home_gripper_m])
SDK = C_PiperParserV2()
COUNT = st.integers(-(1 << 31), (1 << 31) - 1)
BYTE = st.integers(0, 255)
TICK_S = 0.005


def decoded(frame: CanFrame) -> PiperMessage:
    """Return the frame as the vendor's SDK reads it."""
    message = PiperMessage()
    raw = can.Message(arbitration_id=frame.id, data=frame.data, is_extended_id=False, timestamp=1.0)
    assert SDK.DecodeMessage(raw, message)
    return message


def encoded(kind: Any, **content: Any) -> CanFrame:
    """Return the frame that the vendor's SDK sends."""
    message, raw = PiperMessage(), can.Message()
    message.type_ = kind
    for name, value in content.items():
        setattr(message, name, value)
    assert SDK.EncodeMessage(message, raw)
    return CanFrame(raw.arbitration_id, bytes(raw.data))


@given(st.lists(COUNT, min_size=6, max_size=6))
def test_the_sdk_reads_our_joints(counts: list[int]) -> None:
    for i, frame in enumerate(frames.joint_frames(counts)):
        joints = decoded(frame).arm_joint_feedback
        pair = [
            (joints.joint_1, joints.joint_2),
            (joints.joint_3, joints.joint_4),
            (joints.joint_5, joints.joint_6),
        ]
        assert pair[i] == tuple(counts[2 * i : 2 * i + 2])


@given(COUNT, st.integers(-(1 << 15), (1 << 15) - 1), st.booleans(), st.booleans())
def test_the_sdk_reads_our_gripper(opening: int, effort: int, enabled: bool, homed: bool) -> None:
    gripper = decoded(frames.gripper_frame(opening, effort, enabled=enabled, homed=homed)).gripper_feedback
    assert (gripper.grippers_angle, gripper.grippers_effort) == (opening, effort)
    assert gripper.status_code == 64 * enabled + 128 * homed


@given(st.integers(0, 7), st.integers(0, 15), st.integers(0, 5), st.booleans(), st.integers(0, 0xFFFF))
def test_the_sdk_reads_our_status(control: int, status: int, move: int, moving: bool, errors: int) -> None:
    frame = frames.status_frame(control, status, move, moving=moving, errors=errors)
    read = decoded(frame).arm_status_msgs
    assert (read.ctrl_mode, read.arm_status, read.mode_feed) == (control, status, move)
    assert (read.motion_status, read.err_code) == (int(moving), errors)


@given(st.integers(0, 5), st.integers(-(1 << 15), (1 << 15) - 1), st.integers(0, 9000), COUNT)
def test_the_sdk_reads_our_fast_motor_frames(motor: int, speed: int, current: int, position: int) -> None:
    message = decoded(frames.motor_high_frame(motor, speed, current, position))
    read = getattr(message, f"arm_high_spd_feedback_{motor + 1}")
    assert (read.motor_speed, read.current, read.pos) == (speed, current, position)


@given(st.integers(0, 5), st.integers(0, 600), st.integers(-40, 120), st.booleans(), BYTE)
def test_the_sdk_reads_our_slow_motor_frames(
    motor: int, decivolts: int, celsius: int, enabled: bool, flags: int
) -> None:
    message = decoded(
        frames.motor_low_frame(
            motor, volts=decivolts / 10, driver_c=celsius, motor_c=celsius, enabled=enabled, flags=flags
        )
    )
    read = getattr(message, f"arm_low_spd_feedback_{motor + 1}")
    assert (read.vol, read.foc_temp, read.motor_temp) == (decivolts, celsius, celsius)
    assert read.foc_status_code == (flags & 0b10111111) + 64 * enabled


def test_the_sdk_reads_our_answers() -> None:
    assert (
        decoded(frames.acknowledge_frame(0x471)).arm_feedback_resp_set_instruction.instruction_index == 0x71
    )
    limits = decoded(
        frames.joint_limit_frame(2, 0.0, -170.0, 3.0)
    ).arm_feedback_current_motor_angle_limit_max_spd
    assert (limits.motor_num, limits.max_angle_limit, limits.min_angle_limit) == (3, 0, -1700)
    assert limits.max_joint_spd == 3000
    acceleration = decoded(frames.acceleration_limit_frame(5, 5.0)).arm_feedback_current_motor_max_acc_limit
    assert (acceleration.joint_motor_num, acceleration.max_joint_acc) == (6, 5000)
    teaching = decoded(frames.parameter_frame(4, 0.07)).arm_gripper_teaching_param_feedback
    assert (teaching.teaching_range_per, teaching.max_range_config) == (100, 70)
    assert (
        decoded(frames.parameter_frame(1, 0.07)).arm_feedback_current_end_vel_acc_param.end_max_linear_vel
        > 0
    )
    assert decoded(frames.firmware_frame("S-V1.8-2")).firmware_data == b"S-V1.8-2"


@given(st.lists(COUNT, min_size=6, max_size=6))
def test_we_read_the_sdks_joint_commands(counts: list[int]) -> None:
    joints = ArmMsgJointCtrl(*counts)
    kinds = (
        ArmMsgType.PiperMsgJointCtrl_12,
        ArmMsgType.PiperMsgJointCtrl_34,
        ArmMsgType.PiperMsgJointCtrl_56,
    )
    for i, kind in enumerate(kinds):
        command = frames.decode_command(encoded(kind, arm_joint_ctrl=joints))
        assert command == frames.JointPair(2 * i, tuple(counts[2 * i : 2 * i + 2]))


@given(COUNT, st.integers(0, 5000), st.integers(0, 3), st.sampled_from([0, 0xAE]))
def test_we_read_the_sdks_gripper_commands(opening: int, effort: int, code: int, zero: int) -> None:
    frame = encoded(
        ArmMsgType.PiperMsgGripperCtrl, arm_gripper_ctrl=ArmMsgGripperCtrl(opening, effort, code, zero)
    )
    assert frames.decode_command(frame) == frames.GripperCommand(
        opening, effort, bool(code & 1), zero == 0xAE
    )


@given(st.sampled_from([0, 1]), st.integers(0, 5), st.integers(0, 100), st.sampled_from([0, 0xAD]))
def test_we_read_the_sdks_modes(control: int, move: int, speed: int, mit: int) -> None:
    frame = encoded(
        ArmMsgType.PiperMsgMotionCtrl_2, arm_motion_ctrl_2=ArmMsgMotionCtrl_2(control, move, speed, mit)
    )
    assert frames.decode_command(frame) == frames.Mode(control, move, speed, mit)


def test_we_read_the_sdks_other_commands() -> None:
    def stop(value: int) -> CanFrame:
        return encoded(ArmMsgType.PiperMsgMotionCtrl_1, arm_motion_ctrl_1=ArmMsgMotionCtrl_1(value, 0, 0))

    assert frames.decode_command(stop(1)) == frames.Stop(reset=False)
    assert frames.decode_command(stop(2)) == frames.Stop(reset=True)
    assert frames.decode_command(stop(0)) is None
    for motor, motors in ((3, (2,)), (7, tuple(range(6))), (0xFF, tuple(range(6)))):
        frame = encoded(
            ArmMsgType.PiperMsgMotorEnableDisableConfig,
            arm_motor_enable=ArmMsgMotorEnableDisableConfig(motor, 2),
        )
        assert frames.decode_command(frame) == frames.Enable(motors, on=True)
    query = ArmMsgSearchMotorMaxAngleSpdAccLimit(4, 2)
    frame = encoded(
        ArmMsgType.PiperMsgSearchMotorMaxAngleSpdAccLimit, arm_search_motor_max_angle_spd_acc_limit=query
    )
    assert frames.decode_command(frame) == frames.LimitQuery(3, acceleration=True)
    frame = encoded(
        ArmMsgType.PiperMsgParamEnquiryAndConfig,
        arm_param_enquiry_and_config=ArmMsgParamEnquiryAndConfig(4),
    )
    assert frames.decode_command(frame) == frames.ParameterQuery(4)


@given(st.integers(0, 0x7FF), st.binary(max_size=8))
def test_no_frame_breaks_the_arm(identifier: int, data: bytes) -> None:
    emulator = PiperEmulator(ARM, HOME)
    emulator.receive(CanFrame(identifier, data))
    emulator.advance(TICK_S, HOME, np.zeros(7))
    assert emulator.feedback(0.0)


class Bench:
    """An emulator whose joints are where its drives are."""

    def __init__(self) -> None:
        self.emulator = PiperEmulator(ARM, HOME)
        self.position = HOME.copy()
        self.velocity = np.zeros(7)
        self.clock_s = 0.0

    def pass_time(self, seconds: float) -> None:
        """Let the drives and the joints run."""
        for _ in range(round(seconds / TICK_S)):
            reached = self.emulator.advance(TICK_S, self.position, self.velocity)
            self.velocity = (reached - self.position) / TICK_S
            self.position = reached

    def enable(self) -> None:
        """Switch all motors on."""
        self.emulator.receive(CanFrame(frames.ENABLE, bytes([7, 2, 0, 0, 0, 0, 0, 0])))
        self.gripper(HOME[6])

    def mode(self, speed_percent: int = 100) -> None:
        """Choose joint moves under CAN control."""
        self.emulator.receive(CanFrame(frames.MODE, bytes([1, 1, speed_percent, 0, 0, 0, 0, 0])))

    def joints(self, radians: np.ndarray) -> None:
        """Command six joints, rad."""
        counts = [round(float(c)) for c in np.degrees(radians) * 1000]
        for i, frame in enumerate(frames.joint_frames(counts)):
            self.emulator.receive(CanFrame(frames.JOINT_COMMANDS[i], frame.data))

    def gripper(self, opening_m: float) -> None:
        """Command the gripper, m."""
        data = frames._GRIPPER_COMMAND.pack(round(opening_m * 1e6), 1000, 1, 0)
        self.emulator.receive(CanFrame(frames.GRIPPER_COMMAND, data))

    def status(self) -> Any:
        """Return the arm's status as the vendor's SDK reads it."""
        return decoded(self.feedback(0x2A1)).arm_status_msgs

    def feedback(self, identifier: int) -> CanFrame:
        """Return the next feedback frame with this identifier."""
        self.clock_s += 1.0
        (frame,) = [f for f in self.emulator.feedback(self.clock_s) if f.id == identifier]
        return frame


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_arm_without_power_ignores_commands(bench: Bench) -> None:
    bench.mode()
    bench.joints(HOME[:6] + 0.3)
    bench.pass_time(0.5)
    np.testing.assert_array_equal(bench.position, HOME)


def test_an_arm_in_standby_ignores_commands(bench: Bench) -> None:
    bench.enable()
    bench.joints(HOME[:6] + 0.3)
    bench.pass_time(0.5)
    np.testing.assert_array_equal(bench.position[:6], HOME[:6])


def test_an_enabled_arm_goes_where_it_is_told_at_its_own_speed(bench: Bench) -> None:
    bench.mode()
    bench.joints(HOME[:6])
    bench.enable()
    goal = HOME[:6] + np.array([1.0, 0.5, -0.5, 0.1, -0.1, 0.2])
    bench.joints(goal)
    bench.gripper(0.02)
    bench.pass_time(0.2)
    assert bench.position[0] == pytest.approx(3.0 * 0.2, abs=1e-3)
    bench.pass_time(0.5)
    np.testing.assert_allclose(bench.position[:6], goal, atol=1e-5)
    assert bench.position[6] == pytest.approx(0.02, abs=1e-6)


def test_the_speed_setting_slows_the_arm(bench: Bench) -> None:
    bench.mode(speed_percent=10)
    bench.joints(HOME[:6])
    bench.enable()
    bench.joints(HOME[:6] + np.array([1.0, 0, 0, 0, 0, 0]))
    bench.pass_time(1.0)
    assert bench.position[0] == pytest.approx(0.3, abs=1e-3)


def test_a_stale_target_is_gone_to_when_power_comes_as_on_the_metal(bench: Bench) -> None:
    bench.mode()
    bench.joints(HOME[:6] + 0.1)
    bench.enable()
    bench.pass_time(0.5)
    np.testing.assert_allclose(bench.position[:6], HOME[:6] + 0.1, atol=1e-5)


def test_a_stop_brakes_and_only_a_reset_ends_it(bench: Bench) -> None:
    bench.mode()
    bench.joints(HOME[:6])
    bench.enable()
    bench.joints(HOME[:6] + np.array([2.0, 0, 0, 0, 0, 0]))
    bench.pass_time(0.2)
    before = bench.position[0]
    bench.emulator.receive(CanFrame(frames.STOP, bytes([1]) + bytes(7)))
    bench.pass_time(1.0)
    stopped = bench.position.copy()
    assert 0 <= stopped[0] - before <= 3.0**2 / (2 * 5.0) + 0.02
    bench.joints(HOME[:6])
    bench.mode()
    bench.enable()
    bench.pass_time(0.5)
    np.testing.assert_array_equal(bench.position, stopped)
    assert bench.status().arm_status == 1
    bench.emulator.receive(CanFrame(frames.STOP, bytes([2]) + bytes(7)))
    assert bench.status().arm_status == 0
    assert not decoded(bench.feedback(0x261)).arm_low_spd_feedback_1.foc_status_code & 64


def test_a_target_beyond_a_limit_is_cut_and_named(bench: Bench) -> None:
    bench.mode()
    bench.joints(HOME[:6])
    bench.enable()
    bench.joints(np.array([9.0, *HOME[1:6]]))
    bench.pass_time(2.0)
    assert bench.position[0] == pytest.approx(ARM.joints[0].upper_rad)
    assert (bench.status().arm_status, bench.status().err_code) == (4, 1 << 8)
    bench.joints(HOME[:6])
    assert (bench.status().arm_status, bench.status().err_code) == (0, 0)


def test_feedback_comes_at_its_rates() -> None:
    emulator = PiperEmulator(ARM, HOME, rates=FeedbackRates(pose_hz=200, motor_high_hz=50, motor_low_hz=40))
    counts: dict[int, int] = {}
    for tick in range(400):
        for frame in emulator.feedback(100 + tick * TICK_S):
            counts[frame.id] = counts.get(frame.id, 0) + 1
    for identifier, expected in (
        (0x2A1, 400),
        (0x2A5, 400),
        (0x2A7, 400),
        (0x2A8, 400),
        (0x251, 100),
        (0x266, 80),
    ):
        assert abs(counts[identifier] - expected) <= 1


def test_at_the_vendors_rates_an_arm_says_what_the_metal_says() -> None:
    emulator = PiperEmulator(ARM, HOME, rates=VENDOR_RATES)
    count = sum(len(emulator.feedback(100 + tick * TICK_S)) for tick in range(200))
    assert count == pytest.approx(3040, abs=30)
    pose: dict[str, int] = {}
    for frame in emulator.feedback(500.0):
        if 0x2A2 <= frame.id <= 0x2A4:
            end = decoded(frame).arm_end_pose
            pose |= {name: value for name, value in vars(end).items() if value}
    flange = C_PiperForwardKinematics(0x01).CalFK(HOME[:6].tolist())[-1]  # mm, deg
    said = [pose[name] * 1e-3 for name in ("X_axis", "Y_axis", "Z_axis") if name in pose]
    np.testing.assert_allclose(said, [v for v in flange[:3] if abs(v) > 1e-3], atol=0.5)


def test_no_burst_follows_a_pause() -> None:
    emulator = PiperEmulator(ARM, HOME)
    emulator.feedback(0.0)
    assert emulator.feedback(10.0)
    assert not emulator.feedback(10.001)


def test_feedback_carries_a_moving_joint_on() -> None:
    emulator = PiperEmulator(ARM, HOME)
    velocity = np.array([1.0, 0, 0, 0, 0, 0, 0])
    emulator.advance(TICK_S, HOME, velocity)
    (frame,) = [f for f in emulator.feedback(1.0, lag_s=0.004) if f.id == 0x2A5]
    assert decoded(frame).arm_joint_feedback.joint_1 == pytest.approx(np.degrees(0.004) * 1000, abs=1)
