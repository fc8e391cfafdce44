"""An emulated arm on its bus without a simulator: the drives' targets are reached at once.

For trying a driver, or for tests, where no scene is needed.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from robot_bridge.twin.can_bus import CanHub
from robot_bridge.twin.piper_emulator import FeedbackRates, PiperEmulator
from simplevla.embodiment import Arm

_TICK_S = 0.005


class BenchArm:
    """One emulated arm that stands on no table. A context manager: it answers inside the block.

    Args:
        arm: the arm; it starts at its home pose, motors off.
        channel: ``127.0.0.1:<port>`` of its bus.
        rates: how often it gives feedback.

    Attributes:
        emulator: the arm's logic, for looking at.
        silent: while set, the arm hears and says nothing, as if its cable were pulled.
    """

    def __init__(self, arm: Arm, channel: str, rates: FeedbackRates | None = None) -> None:
        self._position = np.array([*arm.home_rad, arm.home_gripper_m])
        self.emulator = PiperEmulator(arm, self._position, rates=rates)
        self.silent = threading.Event()
        self._hub = CanHub(channel)
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

    def _run(self) -> None:
        velocity = np.zeros_like(self._position)
        tick_s = time.monotonic()
        while not self._closing.is_set():
            for frame in self._hub.receive():
                if not self.silent.is_set():
                    self._hub.send(self.emulator.receive(frame))
            reached = self.emulator.advance(_TICK_S, self._position, velocity)
            velocity = (reached - self._position) / _TICK_S
            self._position = reached
            if not self.silent.is_set():
                self._hub.send(self.emulator.feedback(tick_s))
            tick_s = max(tick_s + _TICK_S, time.monotonic() - _TICK_S)
            time.sleep(max(0.0, tick_s - time.monotonic()))
