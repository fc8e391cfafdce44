"""What goes wrong with a camera."""

# ruff: noqa: D103 - each says in its row what it is about

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import numpy as np

from benchmarks.fault_scenarios.cell import FaultError
from benchmarks.fault_scenarios.row import BY_ITSELF, Row, ms, require, wait_for
from robot_bridge.drivers.choice import camera_driver
from robot_bridge.drivers.realsense import RealSenseDriver
from robot_bridge.rig import Rig, load_rig, with_free_ports
from robot_bridge.twin.frames import FrameWriter, slot_name
from simplevla.errors import UnavailableError


def fault_camera_unplugged() -> Row:
    with ExitStack() as stack:
        projector, driver = _camera(stack)
        driver.wait_newer(time.time_ns(), 2.0)
        began_s = time.monotonic()
        projector.unplug()
        seen_s = _lost(driver, began_s)
        time.sleep(0.8)  # the stream was stopped by now, and there is no device to start
        projector.plug_in()
        back_s = time.monotonic()
        driver.wait_newer(time.time_ns(), 6.0)
        again_s = time.monotonic() - back_s
        require(driver.health().reconnects > 0, "it was not connected anew")
        return Row(
            "a camera is unplugged and plugged in again",
            f"{seen_s:.2f} s",
            "the arms play the chunk they have and hold; no chunk is made without a picture",
            f"{BY_ITSELF}, {again_s:.1f} s after it is back: wait, restart the stream, reset the device",
            "failure code camera_lost and why; the pictures' stamps",
        )


def fault_camera_frozen() -> Row:
    with ExitStack() as stack:
        projector, driver = _camera(stack)
        driver.wait_newer(time.time_ns(), 2.0)
        began_s = time.monotonic()
        projector.frozen = True
        seen_s = _lost(driver, began_s)
        projector.frozen = False
        driver.wait_newer(time.time_ns(), 6.0)
        return Row(
            "a camera sends the same frame over and over",
            f"{seen_s:.2f} s",
            "as above: a picture that is not newer is none",
            BY_ITSELF,
            "as above",
        )


def fault_camera_clock() -> Row:
    with ExitStack() as stack:
        projector, driver = _camera(stack)
        driver.wait_newer(time.time_ns(), 2.0)
        began_s = time.monotonic()
        projector.jump_ns = -3_600_000_000_000
        wait_for(lambda: driver.health().stamp_error_s > 1800, "the jump was not noticed")
        seen_s = time.monotonic() - began_s
        try:
            driver.wait_newer(time.time_ns(), 0.2)
        except UnavailableError:
            pass
        else:
            raise FaultError("a picture of an hour ago passed as a new one")
        projector.jump_ns = 0
        driver.wait_newer(time.time_ns(), 4.0)
        return Row(
            "a camera's clock jumps back by an hour",
            ms(seen_s),
            "as above: its pictures count as old, and no chunk is made from them",
            BY_ITSELF,
            "as above",
        )


def _camera(stack: ExitStack) -> tuple[_Projector, RealSenseDriver]:
    rig = with_free_ports(load_rig("twin_single"))
    projector = _Projector(rig, stack)
    return projector, stack.enter_context(camera_driver(rig, rig.load_embodiment().cameras[0]))


def _lost(driver: RealSenseDriver, began_s: float) -> float:
    """Wait until the driver says that its camera is lost; return how long after, s."""
    wait_for(lambda: not driver.health().streaming, "the camera's loss was not noticed")
    return time.monotonic() - began_s


class _Projector:
    """Feeds a camera's slot with pictures that differ."""

    def __init__(self, rig: Rig, stack: ExitStack) -> None:
        assert rig.twin is not None
        self._camera = rig.load_embodiment().cameras[0]
        self._slot = slot_name(rig.twin.shared_memory, self._camera.name)
        self._writer: FrameWriter | None = None
        self._plug = ExitStack()
        self.frozen = False
        self.jump_ns = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.plug_in()
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        stack.callback(self.unplug)
        stack.callback(thread.join)
        stack.callback(self._over.set)

    def unplug(self) -> None:
        with self._lock:
            self._writer = None
            self._plug.close()

    def plug_in(self) -> None:
        with self._lock:
            writer = FrameWriter(self._slot, self._camera.height, self._camera.width)
            self._writer = self._plug.enter_context(writer)

    def _run(self) -> None:
        image = np.zeros((self._camera.height, self._camera.width, 3), np.uint8)
        stamp_ns = 0
        while not self._over.wait(1 / 30):
            if not self.frozen:
                image = image + np.uint8(1)
                stamp_ns = time.time_ns()
            with self._lock:
                if self._writer is not None:
                    self._writer.write(image, stamp_ns + self.jump_ns)
