"""A RealSense camera's colour stream, and its depth if wanted, through the vendor's pyrealsense2.

A camera is found by its serial number and by nothing else: with two cameras on a hub, order means
nothing. Where the device comes from is the one seam, :data:`DeviceSource`; the twin puts the SDK's
own software device there, and everything after it is the same code.

A camera that sends nothing new is lost after half a second, and is won back in steps: it is waited for,
its stream is stopped and started, the device is reset and looked for by its serial number again, every
second, until it is back. Its picture is then locked to the exposure that it had.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robot_bridge.drivers.realsense_sdk import (
    DeviceSource,
    Intrinsics,
    attached_device,
    choose_depth,
    choose_rate,
    color_sensor,
    exposed_ns,
    intrinsics,
    library,
    quietly,
    set_option,
    usb_speed,
)
from simplevla.embodiment import Camera
from simplevla.errors import UnavailableError

logger = logging.getLogger(__name__)

_POLL_MS = 50
_RESTART_AFTER, _RESET_AFTER = 2.0, 4.0  # times the time after which it is lost
_AGAIN_S = 1.0


@dataclass(frozen=True)
class Frame:
    """One picture.

    Attributes:
        image: (H, W, 3) uint8 RGB, read-only, a copy of its own.
        capture_ns: when it was exposed, ns of the system clock.
        sequence: the device's frame number; a gap is a lost frame.
        arrival_ns: when it was there to be used, ns of the system clock.
        depth_m: (H, W) float32 distances along the optical axis, seen by the colour camera; 0 where
            nothing is known; None without depth.
    """

    image: NDArray[np.uint8]
    capture_ns: int
    sequence: int
    arrival_ns: int
    depth_m: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class CameraHealth:
    """How a camera is.

    Attributes:
        streaming: whether new pictures come.
        reconnects: how often its stream was started anew since the driver was opened.
        lost_frames: gaps in the device's frame numbers.
        stamp_error_s: how much earlier than its arrival the last picture was exposed, by its stamp: some
            ten milliseconds, or a clock is wrong.
        clock: whose clock stamps the pictures: ``global_time``, ``system_time`` or ``hardware_clock``.
        usb: speed of its port, such as ``3.2``; empty if it does not say.
        locked: {option: value} that exposure, gain and white balance were locked to.
    """

    streaming: bool
    reconnects: int
    lost_frames: int
    stamp_error_s: float
    clock: str
    usb: str
    locked: dict[str, float]


@dataclass
class _Stream:
    """A pipeline that runs, and what must outlive it."""

    resources: ExitStack
    pipeline: Any
    device: Any
    sensor: Any  # None where the device has no colour sensor of its own
    profile: Any
    align: Any  # None without depth


class RealSenseDriver:
    """One colour stream. A context manager: it streams inside the ``with`` block.

    Args:
        camera: size and rate of the stream, as the embodiment has them.
        serial: the device's serial number.
        device_source: how a serial number becomes a device; attached hardware by default.
        warm_up_s: how long exposure and white balance adapt before they are locked.
        first_frame_timeout_s: how long to wait for the first picture.
        stamp_offset_s: how much later than its exposure this camera stamps a picture, as calibration
            found; it is taken off, s.
        depth: take depth as well, brought to the colour camera's view.
        lost_after_s: without a new picture for so long the camera counts as lost.

    Raises:
        UnavailableError: on entering, no device has this serial number, it does not offer the
            stream, it is in use by another process, or it sends no picture.
        MissingExtraError: pyrealsense2 is not installed.
    """

    def __init__(
        self,
        camera: Camera,
        serial: str,
        *,
        device_source: DeviceSource | None = None,
        warm_up_s: float = 1.0,
        first_frame_timeout_s: float = 5.0,
        stamp_offset_s: float = 0.0,
        depth: bool = False,
        lost_after_s: float = 0.5,
    ) -> None:
        self.camera = camera
        self.serial = serial
        self._device_source = device_source or attached_device
        self._warm_up_s = warm_up_s
        self._first_frame_timeout_s = first_frame_timeout_s
        self._stamp_offset_ns = round(stamp_offset_s * 1e9)
        self._news = threading.Condition()
        self._closing = threading.Event()
        self._latest: Frame | None = None
        self._intrinsics: Intrinsics | None = None
        self._depth = depth
        self._lost_after_s = max(lost_after_s, 2.0 / camera.rate_hz)
        self._stream: _Stream | None = None
        self._reader: threading.Thread | None = None
        self._locked: dict[Any, float] = {}
        self._streaming = False
        self._reconnects = self._lost_frames = 0
        self._stamp_error_s = 0.0
        self._clock = self._usb = ""

    def __enter__(self) -> RealSenseDriver:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop streaming, end the reader and give the device back."""
        self._closing.set()
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        self._end(self._stream)
        self._stream, self._streaming = None, False

    def health(self) -> CameraHealth:
        """Return how the camera is."""
        return CameraHealth(
            self._streaming,
            self._reconnects,
            self._lost_frames,
            self._stamp_error_s,
            self._clock,
            self._usb,
            {option.name: value for option, value in self._locked.items()},
        )

    @property
    def intrinsics(self) -> Intrinsics:
        """What the device says of its lens.

        Raises:
            UnavailableError: the driver is not open.
        """
        if self._intrinsics is None:
            raise UnavailableError(f"camera {self.camera.name}: the driver is not open", "open it first")
        return self._intrinsics

    @property
    def latest(self) -> Frame | None:
        """The newest picture, or None before the first."""
        return self._latest

    def wait_newer(self, capture_ns: int, timeout_s: float = 1.0) -> Frame:
        """Return the newest picture once there is one that was exposed after ``capture_ns``.

        Args:
            capture_ns: ns of the system clock.
            timeout_s: how long to wait.

        Raises:
            UnavailableError: none came in time.
        """
        with self._news:
            if self._news.wait_for(lambda: self._is_newer(capture_ns), timeout_s):
                assert self._latest is not None
                return self._latest
        raise UnavailableError(
            f"camera {self.camera.name} ({self.serial}) sent no new picture within {timeout_s:g} s",
            "check its USB cable",
        )

    def _is_newer(self, capture_ns: int) -> bool:
        return self._latest is not None and self._latest.capture_ns > capture_ns

    def _start(self) -> None:
        rs = library()
        self._closing.clear()
        self._latest = None
        self._locked = {}
        self._reconnects = self._lost_frames = 0
        self._stream = stream = self._open(rs)
        self._reader = threading.Thread(
            target=self._read, args=(rs,), name=f"camera-{self.camera.name}", daemon=True
        )
        self._reader.start()
        with self._news:
            if not self._news.wait_for(lambda: self._latest is not None, self._first_frame_timeout_s):
                raise UnavailableError(
                    f"camera {self.camera.name} ({self.serial}) sent no picture within "
                    f"{self._first_frame_timeout_s:g} s",
                    "check its USB cable; on the twin, check that the twin process renders",
                )
        if stream.sensor is not None:
            self._lock_picture(rs, stream.sensor)
        logger.info(
            "camera %s (%s): %d x %d, stamped by %s",
            self.camera.name,
            self.serial,
            self.camera.width,
            self.camera.height,
            self._clock,
        )

    def _open(self, rs: Any) -> _Stream:
        """Return a stream that runs, of the device with this serial number.

        Raises:
            UnavailableError: see the class.
        """
        resources = ExitStack()
        try:
            context = rs.context()  # must outlive the pipeline
            device = resources.enter_context(self._device_source(context, self.serial))
            self._usb = usb_speed(rs, device, self.camera.name)
            rate_hz = choose_rate(rs, device, self.camera)
            config = rs.config()
            config.enable_stream(
                rs.stream.color, -1, self.camera.width, self.camera.height, rs.format.rgb8, rate_hz
            )
            if self._depth:
                width, height = choose_depth(rs, device, self.camera, rate_hz)
                config.enable_stream(rs.stream.depth, -1, width, height, rs.format.z16, rate_hz)
            pipeline = rs.pipeline(context)
            pipeline.set_device(device)
            try:
                profile = pipeline.start(config)
            except RuntimeError as error:
                raise UnavailableError(
                    f"camera {self.camera.name} ({self.serial}) does not start: {error}",
                    "end other programs that use it, or plug it in again",
                ) from error
            resources.callback(quietly, pipeline.stop)
            self._intrinsics = intrinsics(profile.get_stream(rs.stream.color))
            sensor = color_sensor(rs, device)
            if sensor is not None:
                set_option(sensor, rs.option.global_time_enabled, 1, self.camera.name)
                set_option(sensor, rs.option.auto_exposure_priority, 0, self.camera.name)
                for option, value in self._locked.items():
                    set_option(sensor, option, value, self.camera.name)
        except BaseException:
            resources.close()
            raise
        align = rs.align(rs.stream.color) if self._depth else None
        return _Stream(resources, pipeline, device, sensor, profile, align)

    def _lock_picture(self, rs: Any, sensor: Any) -> None:
        """After the warm-up keep exposure, gain and white balance, where the device has them."""
        automatic = (rs.option.enable_auto_exposure, rs.option.enable_auto_white_balance)
        if any(sensor.supports(option) for option in automatic):
            time.sleep(self._warm_up_s)
        found = dict.fromkeys((option for option in automatic if sensor.supports(option)), 0.0)
        for option in (rs.option.exposure, rs.option.gain, rs.option.white_balance):
            if sensor.supports(option):
                found[option] = float(sensor.get_option(option))
        for option, value in found.items():
            set_option(sensor, option, value, self.camera.name)
        self._locked = found

    def _read(self, rs: Any) -> None:
        """Take pictures until the driver closes; win back a camera that sends none."""
        heard_s = time.monotonic()
        restarted, next_s = False, self._lost_after_s * _RESTART_AFTER
        while not self._closing.is_set():
            if self._stream is not None and self._take(rs, self._stream):
                if not self._streaming and self._reconnects:
                    logger.warning("camera %s (%s) is back", self.camera.name, self.serial)
                self._streaming, heard_s = True, time.monotonic()
                restarted, next_s = False, self._lost_after_s * _RESTART_AFTER
                continue
            quiet_s = time.monotonic() - heard_s
            if self._streaming and quiet_s > self._lost_after_s:
                self._streaming = False
                logger.error("camera %s (%s) sends nothing new", self.camera.name, self.serial)
            if self._latest is None or quiet_s < next_s:
                self._closing.wait(0.02 if self._stream is None else 0.0)
                continue
            before, self._stream = self._stream, None
            if not restarted:
                restarted, next_s = True, self._lost_after_s * _RESET_AFTER
                self._end(before)
            else:
                next_s = quiet_s + _AGAIN_S
                if before is not None:
                    quietly(before.device.hardware_reset)
                self._end(before)
            try:
                self._stream = self._open(rs)
                self._reconnects += 1
            except UnavailableError as error:
                logger.debug("%s", error)

    def _take(self, rs: Any, stream: _Stream) -> bool:
        """Wait a moment for a picture and publish it; return whether a new one came."""
        try:
            arrived, frames = stream.pipeline.try_wait_for_frames(_POLL_MS)
            if not arrived:
                return False
            if stream.align is not None:
                frames = stream.align.process(frames)
            color = frames.get_color_frame()
            return bool(color) and self._publish(
                rs, color, frames.get_depth_frame() if self._depth else None
            )
        except RuntimeError as error:
            logger.warning("camera %s: %s", self.camera.name, error)
            self._closing.wait(0.1)
            return False

    def _publish(self, rs: Any, color: Any, depth: Any) -> bool:
        domain = color.get_frame_timestamp_domain()
        self._clock = str(domain).rpartition(".")[2]
        capture_ns = exposed_ns(rs, color, domain) - self._stamp_offset_ns
        sequence, latest = int(color.get_frame_number()), self._latest
        if latest is not None and latest.capture_ns == capture_ns:
            return False  # the same picture again
        image = np.array(color.get_data(), dtype=np.uint8)  # copied: the view is the SDK's memory
        image.setflags(write=False)
        distances = None
        if depth:
            distances = np.asarray(depth.get_data()).astype(np.float32) * np.float32(depth.get_units())
            distances.setflags(write=False)
        if latest is not None and sequence > latest.sequence + 1:
            self._lost_frames += sequence - latest.sequence - 1
        arrival_ns = time.time_ns()
        self._stamp_error_s = (arrival_ns - capture_ns) / 1e9
        with self._news:
            self._latest = Frame(image, capture_ns, sequence, arrival_ns, distances)
            self._news.notify_all()
        return True

    @staticmethod
    def _end(stream: _Stream | None) -> None:
        if stream is not None:
            stream.resources.close()
