"""An emulated arm on its bus without a simulator: the drives' targets are reached at once.

For trying a driver, or for tests, where no scene is needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from robot_bridge.twin.arm_on_bus import BUS_TICK_S, ArmOnBus
from robot_bridge.twin.can_bus import CanFrame, CanHub
from robot_bridge.twin.faults import Fault, FaultKind
from robot_bridge.twin.piper_emulator import FeedbackRates, PiperEmulator
from simplevla.embodiment import Arm


class BenchArm:
    """One emulated arm that stands on no table. A context manager: it answers inside the block.

    Args:
        arm: the arm; it starts at its home pose, motors off.
        channel: ``127.0.0.1:<port>`` of its bus.
        rates: how often it gives feedback.
        firmware: what it answers to a firmware query.
        gripper_range_m: the stroke that it says its gripper has; the arm's by default.

    Attributes:
        emulator: the arm's logic, for looking at.
        bus: the arm's end of the bus.
        silent: while set, the arm hears and says nothing, as if its cable were pulled.
    """

    def __init__(
        self,
        arm: Arm,
        channel: str,
        rates: FeedbackRates | None = None,
        *,
        firmware: str = "S-V1.8-2",
        gripper_range_m: float | None = None,
        seed: int = 0,
    ) -> None:
        self._position = np.array([*arm.home_rad, arm.home_gripper_m])
        self.emulator = PiperEmulator(
            arm, self._position, rates=rates, firmware=firmware, gripper_range_m=gripper_range_m
        )
        self.silent = threading.Event()
        self._hub = CanHub(channel)
        self.bus = ArmOnBus(self._hub, self.emulator, seed=seed)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._resources = ExitStack()

    def __enter__(self) -> BenchArm:
        self._resources.enter_context(self._hub)
        thread = threading.Thread(target=self._run, name="bench-arm", daemon=True)
        thread.start()
        self._resources.callback(thread.join)
        self._resources.callback(self._closing.set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    @property
    def position(self) -> NDArray[np.float64]:
        """(7,) where the arm is; rad and m."""
        return self._position.copy()

    def inject(self, fault: Fault) -> None:
        """Let ``fault`` begin."""
        with self._lock:
            self.bus.inject(fault)

    def clear(self) -> None:
        """End every fault."""
        with self._lock:
            self.bus.clear()

    def guide(self, position: NDArray[np.float64]) -> None:
        """Move the arm by hand to ``position`` (7,), as its teach button lets one."""
        self._position = position.copy()

    def watch(self, watcher: Callable[[CanFrame], None] | None) -> None:
        """Let ``watcher`` see every frame that is sent to the arm."""
        self.bus.watch = watcher

    def _run(self) -> None:
        velocity = np.zeros_like(self._position)
        silence = Fault(kind=FaultKind.CAN_SILENCE, part=self.emulator.arm.name)
        was_silent = False
        tick_s = time.monotonic()
        while not self._closing.is_set():
            with self._lock:
                if self.silent.is_set() != was_silent:
                    was_silent = not was_silent
                    self.bus.inject(silence) if was_silent else self.bus.clear()
                at = self._position
                reached = self.bus.turn(tick_s, at, velocity)
            velocity = (reached - at) / BUS_TICK_S
            if self._position is at:  # not guided meanwhile
                self._position = reached
            tick_s = max(tick_s + BUS_TICK_S, time.monotonic() - BUS_TICK_S)
            time.sleep(max(0.0, tick_s - time.monotonic()))
