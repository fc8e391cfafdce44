"""What a Piper says is wrong with it, in plain words, and whether it can be moved on in spite of it.

Codes follow the vendor's protocol V2 (piper_sdk 0.6.2).
"""

from __future__ import annotations

JOINTS = 6
TEACHING, LEADER = 0x02, 0x06
EMERGENCY_STOP = 0x01
ENABLED_BIT = 1 << 6

_ARM_STATUS = {
    0x00: "normal",
    EMERGENCY_STOP: "emergency stop",
    0x02: "no solution",
    0x03: "singularity",
    0x04: "target beyond a limit",
    0x05: "joint communication lost",
    0x06: "joint brake not released",
    0x07: "collision",
    0x08: "overspeed while taught by hand",
    0x09: "joint in an abnormal state",
    0x0A: "other fault",
    0x0B: "recording by hand",
    0x0C: "replaying a recording",
    0x0D: "replay paused",
    0x0E: "controller too hot",
    0x0F: "release resistor too hot",
}
_PASSING = {0x00, 0x02, 0x03, 0x04}  # about one target: the next one may be well again
TEACH_FAULT = {
    TEACHING: "taught by hand: commands are ignored; leave it with the button on the arm",
    LEADER: "leader of a pair: commands are ignored; set it as a follower and power it up again",
}
_MOTOR_FAULT = (
    "supply voltage low",
    "motor too hot",
    "driver over-current",
    "driver too hot",
    "collision protection",
    "driver fault",
    None,
    "stalled",
)
_GRIPPER_FAULT = (
    "supply voltage low",
    "motor too hot",
    "driver over-current",
    "driver too hot",
    "sensor fault",
    "driver fault",
    None,
    None,
)
_ALL_JOINTS = (1 << JOINTS) - 1


def describe_status(arm_status: int) -> str:
    """Return the arm's own word for its state, byte 1 of frame 0x2A1; ``normal`` when it is well."""
    return _ARM_STATUS.get(arm_status, f"unknown ({arm_status:#04x})")


def describe_faults(
    mode: int, arm_status: int, error_bits: int, gripper_bits: int, motor_bits: tuple[int, ...]
) -> tuple[str, ...]:
    """Return what is wrong, in plain words.

    Args:
        mode: byte 0 of frame 0x2A1.
        arm_status: byte 1 of frame 0x2A1.
        error_bits: bytes 6 and 7 of frame 0x2A1.
        gripper_bits: byte 6 of frame 0x2A8.
        motor_bits: byte 5 of frames 0x261 to 0x266.
    """
    faults = [TEACH_FAULT[mode]] if mode in TEACH_FAULT else []
    if arm_status != 0:
        faults.append(_ARM_STATUS.get(arm_status, f"unknown arm status {arm_status:#04x}"))
    for joint in range(JOINTS):
        if error_bits & (1 << (8 + joint)):
            faults.append(f"joint {joint + 1} beyond its limit")
        if error_bits & (1 << joint):
            faults.append(f"joint {joint + 1} does not answer its controller")
    for joint, bits in enumerate(motor_bits):
        faults += [f"joint {joint + 1}: {word}" for word in _named(bits, _MOTOR_FAULT)]
    faults += [f"gripper: {word}" for word in _named(gripper_bits, _GRIPPER_FAULT)]
    return tuple(faults)


def must_hold(
    mode: int, arm_status: int, error_bits: int, gripper_bits: int, motor_bits: tuple[int, ...]
) -> bool:
    """Return whether the arm cannot be trusted to follow; arguments as for :func:`describe_faults`.

    A single target that the arm finds beyond a limit is no such case; a hand that guides the arm, a
    joint that does not answer and every fault of a motor is.
    """
    return (
        mode in TEACH_FAULT
        or arm_status not in _PASSING
        or bool(error_bits & _ALL_JOINTS)
        or any(_named(bits, _MOTOR_FAULT) for bits in motor_bits)
        or bool(_named(gripper_bits, _GRIPPER_FAULT))
    )


def _named(bits: int, names: tuple[str | None, ...]) -> list[str]:
    return [name for bit, name in enumerate(names) if name and bits & (1 << bit)]
