"""An emulated camera: pictures of the simulated world at its rate, in a slot of shared memory."""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from robot_bridge.twin.faults import ActiveFaults, Fault, FaultKind
from robot_bridge.twin.frames import FrameWriter, slot_name
from sim_training.world import World
from simplevla.embodiment import Camera

_DRAW_S, _MIN_DRAW_S, _MAX_DRAW_S = 0.03, 0.01, 0.12  # from exposing a picture to asking for it
_WAITED_S = 0.005  # beyond what handing out a picture takes that is done
_LATER_S, _SOONER_S = 0.001, 0.001
_KEPT = 30


class EmulatedCamera:
    """Takes a picture at the camera's rate: exposes, lets it be drawn, then publishes it.

    The driver draws beside the caller, but handing a picture out waits for it and keeps the other
    thread, and with it the arms' buses, from running. So a picture is fetched when it should be done,
    and how long that takes is learned: longer after a wait, a little shorter after none. A real
    camera's pictures are 30 to 50 ms old as well when they arrive.

    Attributes:
        stamp_offset_ns: how much later than its exposure a picture is stamped.
        delivery_s: how long a picture takes at least from its exposure to the host.
    """

    def __init__(self, camera: Camera, prefix: str, world: World) -> None:
        self.name = camera.name
        self.stamp_offset_ns = 0
        self.delivery_s = 0.0
        self._camera = camera
        self._slot_name = slot_name(prefix, camera.name)
        self._deliveries: deque[float] = deque(maxlen=_KEPT)
        self._handed_out_s: deque[float] = deque(maxlen=_KEPT)
        self._period_s = 1 / camera.rate_hz
        self._world = world
        self._next_s = time.monotonic()
        self._draw_s = _DRAW_S
        self._exposed: tuple[float, int] | None = None
        self._last: tuple[NDArray[np.uint8], int, int] | None = None
        self._faults = ActiveFaults()
        self._plug = ExitStack()
        self._slot: FrameWriter | None = None

    def __enter__(self) -> EmulatedCamera:
        self._plug_in()
        return self

    def __exit__(self, *_: object) -> None:
        self._plug.close()

    @property
    def faults(self) -> list[Fault]:
        """What is wrong now."""
        return self._faults.now()

    def inject(self, fault: Fault) -> None:
        """Let ``fault`` begin, which must be a camera's."""
        self._faults.add(fault, time.monotonic())
        if fault.kind is FaultKind.CAMERA_UNPLUG and self._slot is not None:
            self._slot = None
            self._plug.close()

    def clear(self) -> None:
        """End every fault."""
        self._faults.clear()
        self._plug_in()

    def attend(self, now_s: float) -> None:
        """Do what is due."""
        if self._faults.expired(now_s) and not self._amount(FaultKind.CAMERA_UNPLUG):
            self._plug_in()
        if self._exposed is not None:
            exposed_s, capture_ns = self._exposed
            if now_s >= exposed_s + self._draw_s:
                self._publish(capture_ns)
                self._deliveries.append(max(time.monotonic() - exposed_s, self._wanted_delivery_s()))
        elif now_s >= self._next_s and not self._world.drawing:  # cameras of one scene take turns
            self._next_s = max(self._next_s + self._period_s, now_s)
            self._exposed = (now_s, time.time_ns())
            self._world.expose(self.name)

    def measured_delivery_s(self) -> float:
        """Return how long the last pictures took from exposure until they were handed on, s; the median."""
        return float(np.median(self._deliveries)) if self._deliveries else self.delivery_s

    def finish(self) -> None:
        """Let a picture that is being drawn be done; the scene it shows is about to go."""
        if self._exposed is not None:
            self._publish(self._exposed[1])

    def _plug_in(self) -> None:
        if self._slot is None:
            writer = FrameWriter(self._slot_name, self._camera.height, self._camera.width)
            self._slot = self._plug.enter_context(writer)

    def _publish(self, capture_ns: int) -> None:
        began_s = time.monotonic()
        picture = self._world.develop(self.name)
        jump_ns = round(self._amount(FaultKind.CLOCK_JUMP) * 1e9)
        delivery_s = self._wanted_delivery_s()
        due_ns = capture_ns + round(delivery_s * 1e9) if delivery_s else 0
        shown = (picture, capture_ns + self.stamp_offset_ns + jump_ns, due_ns)
        if self._amount(FaultKind.CAMERA_FREEZE) and self._last is not None:
            shown = self._last
        self._last = shown
        if self._slot is not None:
            self._slot.write(*shown)
        self._learn(time.monotonic() - began_s)
        self._exposed = None

    def _learn(self, took_s: float) -> None:
        """Ask later or sooner for the next picture, by how long this one took to be handed out."""
        self._handed_out_s.append(took_s)
        waited_s = took_s - float(np.quantile(self._handed_out_s, 0.1))
        change_s = _LATER_S if waited_s > _WAITED_S else -_SOONER_S
        self._draw_s = float(np.clip(self._draw_s + change_s, _MIN_DRAW_S, _MAX_DRAW_S))

    def _wanted_delivery_s(self) -> float:
        return self.delivery_s + self._amount(FaultKind.CAMERA_DELAY)

    def _amount(self, kind: FaultKind) -> float:
        return self._faults.amount(kind, self.name)
