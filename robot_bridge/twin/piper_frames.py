"""The Piper's CAN frames as the arm itself writes and reads them: pure packing and unpacking.

The driver does not use this module; the vendor's SDK encodes and decodes on that side, so the two are
independent. Layouts follow the vendor's protocol V2 (piper_sdk 0.6.2): big-endian, eight bytes.
Counts are whole numbers in the bus's units: 0.001 deg, 0.001 mm, 0.001 rad/s, mA, 0.001 N·m.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from robot_bridge.twin.can_bus import CanFrame

JOINTS = 6

STOP, MODE, GRIPPER_COMMAND, ENABLE = 0x150, 0x151, 0x159, 0x471
JOINT_COMMANDS = (0x155, 0x156, 0x157)
LIMIT_QUERY, PARAMETER_QUERY, FIRMWARE = 0x472, 0x477, 0x4AF

_I32_PAIR = struct.Struct(">ii")
_STATUS = struct.Struct(">6BH")
_GRIPPER = struct.Struct(">ihBx")
_GRIPPER_COMMAND = struct.Struct(">iHBB")
_MOTOR_HIGH = struct.Struct(">hhi")
_MOTOR_LOW = struct.Struct(">HhbBH")
_JOINT_LIMIT = struct.Struct(">BhhHx")
_ACCELERATION_LIMIT = struct.Struct(">BH5x")
_END_LIMITS = struct.Struct(">4H")


@dataclass(frozen=True)
class Stop:
    """0x150. ``reset`` False: damped stop. True: clear it, which cuts the motors' power."""

    reset: bool


@dataclass(frozen=True)
class Mode:
    """0x151. ``control`` 1 is CAN control; ``move`` 1 is joint moves; ``mit`` 0xAD is MIT mode."""

    control: int
    move: int
    speed_percent: int
    mit: int


@dataclass(frozen=True)
class JointPair:
    """0x155 to 0x157. Targets of joints ``first`` and ``first + 1`` (from 0), 0.001 deg."""

    first: int
    counts: tuple[int, int]


@dataclass(frozen=True)
class GripperCommand:
    """0x159. Opening in 0.001 mm, effort in 0.001 N·m; ``enable`` from bit 0 of the code."""

    opening: int
    effort: int
    enable: bool
    set_zero: bool


@dataclass(frozen=True)
class Enable:
    """0x471. ``motors`` are joints from 0."""

    motors: tuple[int, ...]
    on: bool


@dataclass(frozen=True)
class LimitQuery:
    """0x472. Asks for joint ``motor`` (from 0) its acceleration limit, or its angles and speed."""

    motor: int
    acceleration: bool


@dataclass(frozen=True)
class ParameterQuery:
    """0x477. 1 end velocity and acceleration, 2 collision protection, 4 gripper and teaching."""

    what: int


@dataclass(frozen=True)
class FirmwareQuery:
    """0x4AF."""


Command = Stop | Mode | JointPair | GripperCommand | Enable | LimitQuery | ParameterQuery | FirmwareQuery


def decode_command(frame: CanFrame) -> Command | None:  # noqa: PLR0911 - one return a frame
    """Return what a frame asks of the arm, or None where the arm knows no such frame or value."""
    if len(frame.data) != 8:
        return None
    data = frame.data
    if frame.id in JOINT_COMMANDS:
        return JointPair(2 * JOINT_COMMANDS.index(frame.id), _I32_PAIR.unpack(data))
    if frame.id == GRIPPER_COMMAND:
        opening, effort, code, zero = _GRIPPER_COMMAND.unpack(data)
        return GripperCommand(opening, effort, enable=bool(code & 1), set_zero=zero == 0xAE)
    if frame.id == MODE:
        return Mode(data[0], data[1], data[2], data[3])
    if frame.id == STOP and data[0] in (1, 2):
        return Stop(reset=data[0] == 2)
    if frame.id == ENABLE and data[1] in (1, 2) and (1 <= data[0] <= 7 or data[0] == 0xFF):
        motors = (data[0] - 1,) if data[0] <= JOINTS else tuple(range(JOINTS))
        return Enable(motors, on=data[1] == 2)
    if frame.id == LIMIT_QUERY and 1 <= data[0] <= JOINTS and data[1] in (1, 2):
        return LimitQuery(data[0] - 1, acceleration=data[1] == 2)
    if frame.id == PARAMETER_QUERY and data[0] in (1, 2, 4):
        return ParameterQuery(data[0])
    return FirmwareQuery() if frame.id == FIRMWARE else None


def status_frame(
    control: int, arm_status: int, move: int, *, teaching: int = 0, moving: bool = False, errors: int = 0
) -> CanFrame:
    """0x2A1. ``errors``: bits 8 to 13 joint beyond its limit, bits 0 to 5 joint not answering."""
    return CanFrame(0x2A1, _STATUS.pack(control, arm_status, move, teaching, moving, 0, errors))


def joint_frames(counts: Sequence[int]) -> list[CanFrame]:
    """0x2A5 to 0x2A7 from six angles, 0.001 deg."""
    return [CanFrame(0x2A5 + i, _I32_PAIR.pack(*counts[2 * i : 2 * i + 2])) for i in range(3)]


def end_pose_frames(pose: NDArray[np.float64]) -> list[CanFrame]:
    """0x2A2 to 0x2A4 from the (4, 4) pose of the flange in the base; 0.001 mm and 0.001 deg."""
    x, y, z = (round(float(value) * 1e6) for value in pose[:3, 3])
    angles = Rotation.from_matrix(pose[:3, :3]).as_euler("xyz", degrees=True)
    rx, ry, rz = (round(float(value) * 1e3) for value in angles)
    return [
        CanFrame(0x2A2 + i, _I32_PAIR.pack(*pair)) for i, pair in enumerate(((x, y), (z, rx), (ry, rz)))
    ]


def gripper_frame(opening: int, effort: int, *, enabled: bool, homed: bool = True) -> CanFrame:
    """0x2A8 from 0.001 mm and 0.001 N·m."""
    return CanFrame(0x2A8, _GRIPPER.pack(opening, _clip(effort, 15), enabled << 6 | homed << 7))


def motor_high_frame(motor: int, speed: int, current: int, position: int) -> CanFrame:
    """0x251 to 0x256 for ``motor`` from 0: 0.001 rad/s, mA, and the position count."""
    return CanFrame(0x251 + motor, _MOTOR_HIGH.pack(_clip(speed, 15), _clip(current, 15), position))


def motor_low_frame(
    motor: int, *, volts: float, driver_c: int, motor_c: int, enabled: bool, flags: int = 0
) -> CanFrame:
    """0x261 to 0x266 for ``motor`` from 0. ``flags`` are the fault bits; bit 6 is ``enabled``."""
    bits = (flags & ~(1 << 6)) | enabled << 6
    return CanFrame(0x261 + motor, _MOTOR_LOW.pack(round(volts * 10), driver_c, motor_c, bits, 0))


def acknowledge_frame(frame_id: int) -> CanFrame:
    """0x476, which acknowledges a setting by the last byte of its identifier."""
    return CanFrame(0x476, bytes([frame_id & 0xFF]) + bytes(7))


def joint_limit_frame(motor: int, upper_deg: float, lower_deg: float, speed_rad_s: float) -> CanFrame:
    """0x473 for ``motor`` from 0; the bus counts 0.1 deg and 0.001 rad/s."""
    data = _JOINT_LIMIT.pack(
        motor + 1, round(upper_deg * 10), round(lower_deg * 10), round(speed_rad_s * 1e3)
    )
    return CanFrame(0x473, data)


def acceleration_limit_frame(motor: int, acceleration_rad_s2: float) -> CanFrame:
    """0x47C for ``motor`` from 0; the bus counts 0.001 rad/s2."""
    return CanFrame(0x47C, _ACCELERATION_LIMIT.pack(motor + 1, round(acceleration_rad_s2 * 1e3)))


def parameter_frame(what: int, stroke_m: float) -> CanFrame:
    """The answer to a :class:`ParameterQuery`: 0x478, 0x47B or 0x47E."""
    if what == 1:
        return CanFrame(0x478, _END_LIMITS.pack(1000, 3000, 2500, 10000))
    if what == 2:
        return CanFrame(0x47B, bytes(8))
    return CanFrame(0x47E, bytes([100, round(stroke_m * 1000), 1, 0, 0, 0, 0, 0]))


def firmware_frame(version: str) -> CanFrame:
    """0x4AF, eight characters such as ``S-V1.8-2``."""
    return CanFrame(FIRMWARE, version.encode("ascii")[:8].ljust(8))


def _clip(value: int, bits: int) -> int:
    return max(-(1 << bits), min(value, (1 << bits) - 1))
