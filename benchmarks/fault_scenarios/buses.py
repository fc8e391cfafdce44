"""What goes wrong on the buses, between driver and arm."""

# ruff: noqa: D103 - each says in its row what it is about

from __future__ import annotations

import time
from unittest import mock

import numpy as np

from benchmarks.fault_scenarios.cell import Cell
from benchmarks.fault_scenarios.row import (
    AGAIN,
    BY_ITSELF,
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
from robot_bridge.twin import can_bus
from robot_bridge.twin.faults import FaultKind


def fault_short_silence() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = cell.inject(FaultKind.CAN_SILENCE, seconds=cell.feedback_age_s + 0.035)
        seen_s = cell.cause(began_s, "feedback")
        cell.until(began_s + seen_s, lambda tick: not tick.reason)
        cell.until(time.monotonic(), lambda tick: tick.sent is not None and bool(tick.played))
        return Row(
            "an arm's bus is silent for a moment, 75 ms",
            ms(seen_s),
            "brake; go on with the same trajectory when feedback is back",
            BY_ITSELF,
            cell.recorded(began_s),
        )


def fault_silence() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = cell.inject(FaultKind.CAN_SILENCE)
        seen_s = cell.reason(began_s, "no joint feedback from: right")
        moved = cell.rest(began_s + seen_s)
        refuses(cell, "no joint feedback")
        time.sleep(0.05)  # nothing that the arm has not heard is on its way any more
        back_s = cell.clear()
        again_s = cell.until(back_s, lambda tick: tick.mode is Mode.ON and not tick.reason)[0]
        cell.swing()
        return Row(
            "an arm's bus goes silent (cable pulled) and comes back within a second",
            ms(seen_s),
            f"all joints brake ({moved:.2f} rad more) and hold; the rest of the trajectory is forgotten",
            f"{BY_ITSELF}, {ms(again_s)} after the bus is back",
            cell.recorded(began_s),
        )


def fault_long_silence() -> Row:
    with Cell("twin") as cell:
        cell.swing()
        began_s = cell.inject(FaultKind.CAN_MUTE, arm=0)
        seen_s = cell.reason(began_s, "no joint feedback from: left")
        stopped_s = cell.until(began_s, lambda tick: tick.mode is Mode.STOPPED)[0]
        wait_for(lambda: cell.benches[0].emulator._stopped, "the silent arm got no stop")
        require(not cell.benches[1].emulator._stopped, "the arm that talks was stopped too")
        refuses(cell, "are stopped")
        recorded = cell.recorded(began_s)
        cell.clear()
        wait_for(lambda: cell.drivers[0].state().stopped, "the stop was not confirmed")
        reset_and_go_on(cell)
        require(bool(cell.benches[1].emulator._powered.all()), "the arm that talks lost power")
        return Row(
            "one of two arms falls silent and stays so; it still hears",
            f"{ms(seen_s)}; stopped after {stopped_s:.2f} s",
            "both brake and hold; the silent arm is stopped in its own damped way, the other keeps holding",
            RESET,
            recorded,
        )


def fault_deaf_arm() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = cell.inject(FaultKind.CAN_DEAF)
        drive(cell, 1.5)
        seen_s = cell.cause(began_s, "tracking")
        cell.rest(began_s + seen_s)
        lead = float(np.abs(cell.position() - cell.benches[0].position)[:6].max())
        require(lead < 1.6, f"the setpoint leads by {lead:.2f} rad")
        cell.reason(began_s, "does not follow")
        recorded = cell.recorded(began_s)
        cell.clear()
        stood = cell.benches[0].position
        go_on(cell, lambda: require(np.abs(stood - cell.benches[0].position).max() < 0.01, "it jumped"))
        return Row(
            "an arm hears nothing and goes on talking (broken transmit line)",
            f"{ms(seen_s)}, when the setpoint leads by 0.5 rad",
            f"the arm holds by itself; the setpoint brakes {lead:.2f} rad ahead of it and is not pushed on",
            f"{AGAIN}: it goes on from where it stands",
            recorded,
        )


def fault_dropped_frames() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = cell.inject(FaultKind.CAN_DROP, amount=0.3)
        time.sleep(0.8)
        gaps = max(tick.states[0].age_s for at_s, tick in cell._ticks if at_s > began_s)
        recorded = cell.recorded(began_s)
        back_s = cell.clear()
        cell.until(back_s, lambda tick: tick.mode is Mode.ON and not tick.reason)
        cell.loop.hold()
        cell.rest(back_s)
        wait_for(
            lambda: np.abs(cell.position() - cell.benches[0].position).max() < 0.01, "it did not arrive"
        )
        cell.swing()
        return Row(
            "three of ten frames are lost, each way",
            f"shows as the feedback's age, at most {ms(gaps)} here",
            "incomplete cycles are left out; the arms go on, and brake through gaps above 40 ms",
            BY_ITSELF,
            recorded or "feedback age in diagnostics",
        )


def fault_corrupted_frames() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = cell.inject(FaultKind.CAN_CORRUPT, amount=0.05)
        wait_for(lambda: cell.drivers[0].doubted > 0, "no damaged frame was noticed")
        seen_s = time.monotonic() - began_s
        time.sleep(0.3)
        believed = [tick.states[0].position for at_s, tick in cell._ticks if at_s > began_s]
        jump = float(np.abs(np.diff(believed, axis=0))[:, :6].max())
        require(jump < 0.3, f"a measured pose jumped by {jump:.2f} rad")
        recorded = cell.recorded(began_s)
        cell.clear()
        time.sleep(0.1)
        cell.loop.hold()
        go_on(cell)
        return Row(
            "a bit is wrong in one of twenty frames from an arm",
            f"{ms(seen_s)} to the first frame that was left out",
            "a pose that cannot be is left out; what reads as a fault makes the arms hold",
            f"{BY_ITSELF}, or {AGAIN} if a fault was read",
            f"log: frames left out; {recorded}".rstrip("; "),
        )


def fault_noisy_feedback() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = cell.inject(FaultKind.NOISE, amount=0.005)
        time.sleep(0.4)
        modes = {tick.mode for at_s, tick in cell._ticks if at_s > began_s}
        require(modes == {Mode.ON}, f"modes {modes}")
        return Row(
            "measured joints are noisy, 5 mrad",
            "needs no detection",
            "none: setpoints follow from the last setpoint, not from what is measured",
            BY_ITSELF,
            "joint states as measured",
        )


def fault_late_frames() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = cell.inject(FaultKind.CAN_DELAY, amount=cell.feedback_age_s + 0.02)
        seen_s = cell.cause(began_s, "feedback")
        back_s = cell.until(began_s + seen_s, lambda tick: not tick.reason)[0]
        recorded = cell.recorded(began_s)
        time.sleep(0.2)
        return Row(
            "an arm's frames are late by 60 ms, each way",
            f"{ms(seen_s)} at the onset; a steady delay is found by calibration",
            f"brake at the onset, go on {ms(back_s)} later, later than planned",
            BY_ITSELF,
            recorded,
        )


def fault_adapter_unplugged() -> Row:
    with Cell(stop_silent_after_s=5.0) as cell:
        cell.swing()
        began_s = time.monotonic()
        cell.unplugged.add(cell.drivers[0].can.channel)
        seen_s = cell.reason(began_s, "no joint feedback")
        cell.rest(began_s + seen_s)
        time.sleep(0.5)  # the driver gives the bus up and tries to open it anew
        recorded = cell.recorded(began_s)
        back_s = time.monotonic()
        cell.unplugged.clear()
        cell.until(back_s, lambda tick: not tick.reason)
        go_on(cell)
        return Row(
            "the CAN adapter is unplugged and plugged in again",
            ms(seen_s),
            "the arm holds its last setpoint by itself; the loop brakes and holds",
            f"{BY_ITSELF} within the bound of fault 3: the bus is opened anew; later: {RESET}",
            recorded,
        )


def fault_clock_jump() -> Row:
    with Cell() as cell:
        cell.swing()
        began_s = time.monotonic()
        with mock.patch.object(can_bus, "time", _Jumped(3600.0)):
            time.sleep(0.25)
            age_s = cell.drivers[0].state().age_s
            modes = {tick.mode for at_s, tick in cell._ticks if at_s > began_s}
        require(modes == {Mode.ON} and age_s < 0.5, f"modes {modes}, age {age_s:.2f} s")
        return Row(
            "the clock that stamps an arm's frames jumps by an hour",
            "needs no detection",
            "none: age is judged on the monotonic clock, and so is everything that is played",
            BY_ITSELF,
            "stamps of joint states as they came",
        )


class _Jumped:
    """The module ``time`` with a wall clock that is off."""

    def __init__(self, by_s: float) -> None:
        self._by_s = by_s

    def time(self) -> float:
        return time.time() + self._by_s

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)
