"""A robot of emulated arms in this process, for making things go wrong: buses, drivers, limits, loop.

Everything above the bus is the bridge's own, at its own pace, on the vendor's SDK. Every setpoint that is
put on a bus is judged by a :class:`~robot_bridge.twin.setpoint_watch.SetpointWatch`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, ClassVar
from unittest import mock

import can
import numpy as np
from numpy.typing import NDArray

from robot_bridge.chunk_execution import Trajectory
from robot_bridge.clearance import Workspace
from robot_bridge.control_loop import ControlLoop, Mode, Tick
from robot_bridge.drivers.piper import PiperDriver
from robot_bridge.limits import Limiter
from robot_bridge.rig import load_rig, with_free_ports
from robot_bridge.twin.bench import BenchArm
from robot_bridge.twin.can_bus import CanFrame, TwinCanBus
from robot_bridge.twin.faults import Fault, FaultKind
from robot_bridge.twin.setpoint_watch import SetpointWatch

Vector = NDArray[np.float64]

_SWING_RAD, _SWING_S, _SPACING_S = 0.7, 2.0, 0.05
_MOVES_RAD = 0.08
PATIENCE_S = 5.0  # what a busy machine may take for what takes milliseconds


class FaultError(AssertionError):
    """The bridge did not do what it promises."""


class Cell:
    """Arms that are on, and everything that the control loop saw since. A context manager.

    Args:
        rig: name of a twin's rig.
        max_setpoint_age_s, stop_silent_after_s: see :class:`~robot_bridge.control_loop.ControlLoop`.
        seed: of the arms' chance.

    Attributes:
        feedback_age_s: joint feedback older than this: the arms hold. The bridge's own bound on metal; a
            busy machine that tests on a twin needs a longer one.
        stall_s: set, the loop's next turn lasts that much longer, as in a starved process.
        unplugged: channels whose adapter is gone.

    Raises:
        FaultError: at the end of the block, a setpoint outside the limits was put on a bus, or none at all.
    """

    feedback_age_s: ClassVar[float] = 0.04

    def __init__(
        self,
        rig: str = "twin_single",
        *,
        max_setpoint_age_s: float | None = 3.0,
        stop_silent_after_s: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.rig = with_free_ports(load_rig(rig))
        self.robot = self.rig.load_embodiment()
        self.benches = [
            BenchArm(arm, self.rig.arms[arm.name].channel, seed=seed + i)
            for i, arm in enumerate(self.robot.arms)
        ]
        self.drivers = [PiperDriver(arm, self.rig.arms[arm.name]) for arm in self.robot.arms]
        self.limiter = Limiter(self.robot, Workspace(self.robot))
        self.loop = ControlLoop(
            self.robot,
            self.drivers,
            self.limiter,
            self._remember,
            max_feedback_age_s=self.feedback_age_s,
            max_setpoint_age_s=max_setpoint_age_s,
            stop_silent_after_s=stop_silent_after_s,
        )
        self.stall_s = 0.0
        self.unplugged: set[str] = set()
        self.watches = {
            self.rig.arms[arm.name].channel: SetpointWatch(
                arm, clock=lambda: self._tick, pose=lambda bench=bench: bench.position
            )
            for arm, bench in zip(self.robot.arms, self.benches, strict=True)
        }
        self._ticks: list[tuple[float, Tick]] = []
        self._tick = 0
        self._watching = threading.Lock()
        self._resources = ExitStack()

    def __enter__(self) -> Cell:
        try:
            self._start()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()
        if error is None and self.violations:
            raise FaultError(f"on the bus: {self.violations[:3]}")
        if error is None and not self.setpoints:
            raise FaultError("no setpoint was seen on the bus")

    @property
    def violations(self) -> list[str]:
        """What the watches found on the buses."""
        return [line for watch in self.watches.values() for line in watch.violations]

    @property
    def setpoints(self) -> int:
        """How many setpoints the watches saw."""
        return sum(watch.setpoints for watch in self.watches.values())

    def swing(self, seconds: float = 2.5, *, wait: bool = True) -> None:
        """Play a long, smooth swing of every first joint, and wait until the arms move."""
        times = np.arange(1, round(seconds / _SPACING_S) + 1) * _SPACING_S
        path = np.tile(self.position(), (len(times), 1))
        for arm, part in self.robot.slices():  # outwards, away from another arm
            far = _SWING_RAD if arm.base.xyz_m[0] < 0 else -_SWING_RAD
            path[:, part.start] += far * (1 - np.cos(2 * np.pi * times / _SWING_S)) / 2
        self.loop.play(Trajectory(time.monotonic(), _SPACING_S, path, time.time_ns()))
        if wait:
            began_s, start = time.monotonic(), self.position()

            def moves(tick: Tick) -> bool:
                return tick.sent is not None and bool(np.abs(tick.sent - start).max() > _MOVES_RAD)

            self.until(began_s, moves)

    def position(self) -> Vector:
        """Return the last setpoint (D,)."""
        position = self.limiter.position
        return self.robot.home() if position is None else position.copy()

    def inject(self, kind: FaultKind, arm: int = 0, **how: Any) -> float:
        """Let a fault befall an arm; return when, on the monotonic clock."""
        fault = Fault(kind=kind, part=self.robot.arms[arm].name, **how)
        fault.check(self.robot)
        began_s = time.monotonic()
        self.benches[arm].inject(fault)
        return began_s

    def clear(self) -> float:
        """End every fault; return when."""
        for bench in self.benches:
            bench.clear()
        return time.monotonic()

    def until(
        self, began_s: float, seen: Callable[[Tick], bool], patience_s: float = PATIENCE_S
    ) -> tuple[float, Tick]:
        """Return the first turn after ``began_s`` of which ``seen`` is true, and how long after, s."""
        index, deadline = 0, time.monotonic() + patience_s
        while True:
            ticks = self._ticks
            while index < len(ticks):
                at_s, tick = ticks[index]
                index += 1
                if at_s >= began_s and seen(tick):
                    return at_s - began_s, tick
            if time.monotonic() > deadline:
                modes = {(tick.mode.value, tick.reason) for at_s, tick in ticks if at_s >= began_s}
                raise FaultError(f"it did not happen within {patience_s:g} s; modes since: {modes}")
            time.sleep(0.002)

    def reason(self, began_s: float, words: str) -> float:
        """Wait until the loop's reason contains ``words``; return how long that took, s."""
        return self.until(began_s, lambda tick: words in tick.reason)[0]

    def cause(self, began_s: float, cause: str) -> float:
        """Wait for a limit event; return how long that took, s."""
        return self.until(began_s, lambda tick: any(e.cause.value == cause for e in tick.events))[0]

    def rest(self, since_s: float) -> float:
        """Wait until no setpoint moves any more; return how far they moved after ``since_s``, rad."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.limiter.resting and self.loop.health().mode is not Mode.STOPPED:
            if time.monotonic() > deadline:
                raise FaultError("the setpoints went on moving")
            time.sleep(0.005)
        return self.moved(since_s)

    def moved(self, since_s: float) -> float:
        """Return how far the setpoints moved after ``since_s``, at the most, rad."""
        sent = [tick.sent for at_s, tick in self._ticks if at_s >= since_s and tick.sent is not None]
        return float(np.ptp(sent, axis=0).max()) if sent else 0.0

    def recorded(self, since_s: float) -> str:
        """Return what the arms' node would record of what happened after ``since_s``."""
        since = [tick for at_s, tick in self._ticks if at_s >= since_s]
        causes = sorted({event.cause.value for tick in since for event in tick.events})
        reasons = list(dict.fromkeys((tick.mode.value, tick.reason) for tick in since if tick.reason))
        words = [f"limit events: {', '.join(causes)}"] if causes else []
        return "; ".join(words + [f"mode {mode}: {reason}" for mode, reason in reasons])

    def _start(self) -> None:
        keep = self._resources.enter_context
        cell, send, receive = self, TwinCanBus.send, TwinCanBus._recv_internal

        def spy(bus: TwinCanBus, msg: can.Message, timeout: float | None = None) -> None:
            channel = bus.channel_info.split()[-1]
            if channel in cell.unplugged:
                raise can.CanOperationError("no such device")
            watch = cell.watches.get(channel)
            if watch is not None:
                with cell._watching:
                    if threading.current_thread().name != "control-loop":
                        watch.begin()  # where the arm stands, on enabling
                    watch(CanFrame(msg.arbitration_id, bytes(msg.data)))
            send(bus, msg, timeout)

        def recv(bus: TwinCanBus, timeout: float | None) -> Any:
            if bus.channel_info.split()[-1] in cell.unplugged:
                raise can.CanOperationError("no such device")
            return receive(bus, timeout)

        keep(mock.patch.object(TwinCanBus, "send", spy))
        keep(mock.patch.object(TwinCanBus, "_recv_internal", recv))
        for bench in self.benches:
            keep(bench)
        for driver in self.drivers:
            keep(driver)
        turn = self.loop._turn

        def counted(index: int, t_s: float, dt_s: float) -> None:
            self._tick = index
            turn(index, t_s, dt_s)

        self.loop._turn = counted  # type: ignore[method-assign]
        keep(self.loop)
        self.loop.enable()

    def _remember(self, tick: Tick) -> None:
        self._ticks.append((time.monotonic(), tick))
        if self.stall_s:
            stall_s, self.stall_s = self.stall_s, 0.0
            time.sleep(stall_s)
