"""What goes wrong with an arm, or is done to it by hand."""

# ruff: noqa: D103 - each says in its row what it is about

from __future__ import annotations

import time

import numpy as np

from benchmarks.fault_scenarios.cell import Cell, FaultError
from benchmarks.fault_scenarios.row import (
    AGAIN,
    RESET,
    Row,
    drive,
    go_on,
    ms,
    refuses,
    require,
    reset_and_go_on,
    wait_for,
)
from robot_bridge.control_loop import Mode
from robot_bridge.drivers.piper import PiperDriver
from robot_bridge.rig import load_rig, with_free_ports
from robot_bridge.twin.bench import BenchArm
from robot_bridge.twin.faults import FaultKind
from simplevla.errors import EmbodimentError, SimplevlaError, UnavailableError


def fault_stuck_joint() -> Row:
    with Cell() as cell:
        began_s = cell.inject(FaultKind.STUCK_JOINT, joint=1)
        drive(cell, 1.5)
        seen_s = cell.cause(began_s, "tracking")
        cell.rest(began_s + seen_s)
        cell.reason(began_s, "does not follow: right_joint1")
        recorded = cell.recorded(began_s)
        cell.clear()
        stood = cell.benches[0].position
        go_on(cell, lambda: require(np.abs(stood - cell.benches[0].position).max() < 0.01, "it jumped"))
        return Row(
            "a joint is stuck, or something stands in its way",
            f"{ms(seen_s)} after it was driven on, when the setpoint leads by 0.5 rad",
            "that joint is not pushed on; after half a second all hold",
            f"{AGAIN}: it goes on from where it stands",
            recorded,
        )


def fault_power_loss() -> Row:
    return _arm_fault(
        FaultKind.POWER_LOSS,
        "the motors of an arm lose power",
        "has lost motor power",
        "the setpoint brakes and holds; on metal the arm without power drops",
        AGAIN,
    )


def fault_over_current() -> Row:
    return _arm_fault(
        FaultKind.OVER_CURRENT,
        "a motor's driver reports over-current",
        "joint 3: driver over-current",
        "brake and hold, motors on",
        f"{AGAIN}, once it is cleared",
        joint=3,
    )


def fault_overheated() -> Row:
    return _arm_fault(
        FaultKind.OVERHEATED,
        "a motor is too hot",
        "joint 2: motor too hot",
        "brake and hold, motors on",
        f"{AGAIN}, once it is cool",
        joint=2,
    )


def fault_lost_joint() -> Row:
    return _arm_fault(
        FaultKind.LOST_JOINT,
        "a joint does not answer the arm's controller",
        "joint 5 does not answer",
        "brake and hold",
        f"{AGAIN}, once it answers",
        joint=5,
    )


def fault_collision() -> Row:
    return _arm_fault(
        FaultKind.COLLISION,
        "the arm's own collision protection trips",
        "collision",
        "brake and hold",
        f"{AGAIN}, once it is cleared",
    )


def fault_stop_button() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = cell.inject(FaultKind.STOP_BUTTON)
        seen_s = cell.reason(began_s, "is stopped")
        cell.rest(began_s + seen_s)
        recorded = cell.recorded(began_s)
        try:
            cell.loop.enable()
        except UnavailableError:
            pass
        else:
            raise FaultError("a stopped arm was enabled without a reset")
        reset_and_go_on(cell)
        return Row(
            "someone presses an arm's own stop button",
            ms(seen_s),
            "that arm's damped stop; the loop brakes and holds all others",
            RESET,
            recorded,
        )


def fault_teach_button() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = cell.inject(FaultKind.TEACH_BUTTON)
        seen_s = cell.reason(began_s, "taught by hand")
        cell.rest(began_s + seen_s)
        elsewhere = cell.benches[0].position
        elsewhere[:2] += 0.3, 0.2
        cell.benches[0].guide(elsewhere)
        recorded = cell.recorded(began_s)
        time.sleep(0.05)
        cell.clear()
        time.sleep(0.15)
        require(np.abs(cell.benches[0].position - elsewhere).max() < 1e-3, "the arm jumped back")
        cell.loop.enable()
        time.sleep(0.05)
        require(np.abs(cell.benches[0].position - elsewhere).max() < 1e-3, "the arm jumped on enabling")
        cell.swing()
        return Row(
            "someone presses the teach button and moves the arm by hand",
            ms(seen_s),
            "nothing is sent to that arm any more; it stays where the hand leaves it",
            f"{AGAIN}: it goes on from where it was left",
            recorded,
        )


def fault_emergency_stop() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = time.monotonic()
        cell.loop.stop()
        sent_s = time.monotonic() - began_s
        wait_for(lambda: cell.benches[0].emulator._stopped, "the arm got no stop")
        wait_for(lambda: cell.drivers[0].state().stopped, "the arm did not confirm")
        done_s = time.monotonic() - began_s
        seen = cell.setpoints
        time.sleep(0.1)
        require(cell.setpoints == seen, "a setpoint followed the stop")
        refuses(cell, "emergency stop")
        recorded = cell.recorded(began_s)
        reset_and_go_on(cell)
        return Row(
            "someone asks for the emergency stop; the policy's process may be dead",
            f"sent after {ms(sent_s)}, confirmed after {ms(done_s)}",
            "the arms' own damped stop; not one setpoint follows",
            RESET,
            recorded,
        )


def fault_lost_stop() -> Row:
    with Cell() as cell:
        cell.swing()
        cell.inject(FaultKind.CAN_DEAF)
        began_s = time.monotonic()
        cell.loop.stop()
        time.sleep(0.15)
        require(not cell.benches[0].emulator._stopped, "it was to be lost")
        recorded = cell.recorded(began_s)
        back_s = cell.clear()
        wait_for(lambda: cell.benches[0].emulator._stopped, "the stop was not repeated")
        again_s = time.monotonic() - back_s
        reset_and_go_on(cell)
        return Row(
            "the frame of an emergency stop is lost",
            f"repeated every 100 ms until it is confirmed; {ms(again_s)} after the arm hears again",
            "no setpoint is sent meanwhile; the arm stops as soon as it hears",
            RESET,
            recorded,
        )


def fault_old_firmware() -> Row:
    return _refused_arm(
        "an arm has a firmware that speaks another protocol",
        UnavailableError,
        "firmware",
        "bring the firmware up to date",
        firmware="S-V1.4-9",
    )


def fault_wrong_gripper() -> Row:
    return _refused_arm(
        "an arm's gripper is set to another stroke than the embodiment's",
        EmbodimentError,
        "gripper",
        "set the gripper's range, or correct the embodiment",
        gripper_range_m=0.05,
    )


def _arm_fault(kind: FaultKind, fault: str, words: str, did: str, recovery: str, joint: int = 0) -> Row:
    """Let a fault befall an arm that moves, and see that it holds until someone enables it again."""
    with Cell() as cell:
        cell.swing()
        began_s = cell.inject(kind, joint=joint)
        seen_s, tick = cell.until(began_s, lambda tick: words in tick.reason)
        require(tick.mode is Mode.FAULT, f"mode {tick.mode}")
        cell.rest(began_s + seen_s)
        refuses(cell, words)
        recorded = cell.recorded(began_s)
        cell.clear()
        time.sleep(0.1)
        require(cell.loop.health().mode is Mode.FAULT, "it went on by itself")
        go_on(cell)
        return Row(fault, ms(seen_s), did, recovery, recorded)


def _refused_arm(
    fault: str, error: type[SimplevlaError], words: str, recovery: str, **bench: object
) -> Row:
    rig = with_free_ports(load_rig("twin_single"))
    arm = rig.load_embodiment().arms[0]
    can = rig.arms[arm.name]
    began_s = time.monotonic()
    with BenchArm(arm, can.channel, **bench) as emulated:  # type: ignore[arg-type]
        try:
            with PiperDriver(arm, can):
                raise FaultError("the arm was taken")
        except error as found:
            seen_s, why = time.monotonic() - began_s, found.message
        require(words in why, why)
        require(not emulated.emulator._powered.any(), "the motors were powered")
    return Row(
        fault, f"{seen_s:.2f} s, on connecting", "none: the arm is not taken", recovery, f"log: {why}"
    )
