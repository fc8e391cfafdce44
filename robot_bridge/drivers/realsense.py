"""A RealSense camera's colour stream, through the vendor's pyrealsense2.

A camera is found by its serial number and by nothing else: with two cameras on a hub, order means
nothing. Where the device comes from is the one seam, :data:`DeviceSource`; the twin puts the SDK's
own software device there, and everything after it is the same code.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simplevla.embodiment import Camera
from simplevla.errors import MissingExtraError, UnavailableError

logger = logging.getLogger(__name__)

DeviceSource = Callable[[Any, str], AbstractContextManager[Any]]
"""Makes a context manager of an ``rs.device`` from an ``rs.context`` and a serial number."""

_POLL_MS = 100


@dataclass(frozen=True)
class Frame:
    """One picture.

    Attributes:
        image: (H, W, 3) uint8 RGB, read-only, a copy of its own.
        capture_ns: when it was exposed, ns of the system clock.
        sequence: the device's frame number; a gap is a lost frame.
    """

    image: NDArray[np.uint8]
    capture_ns: int
    sequence: int


@dataclass(frozen=True)
class Intrinsics:
    """What the device says of its lens, as the SDK counts: the centre of the first pixel is (0, 0).

    Attributes:
        fx, fy, cx, cy: pixels of the stream's size.
        distortion: k1, k2, p1, p2, k3.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    distortion: tuple[float, float, float, float, float]


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
        self._resources = ExitStack()

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
        self._resources.close()

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
        rs = _library()
        self._closing.clear()
        self._latest = None
        context = rs.context()  # must outlive the pipeline
        device = self._resources.enter_context(self._device_source(context, self.serial))
        _warn_if_usb2(rs, device, self.camera.name)
        rate_hz = _choose_rate(rs, device, self.camera)
        config = rs.config()
        config.enable_stream(
            rs.stream.color, -1, self.camera.width, self.camera.height, rs.format.rgb8, rate_hz
        )
        pipeline = rs.pipeline(context)
        pipeline.set_device(device)
        try:
            profile = pipeline.start(config)
        except RuntimeError as error:
            raise UnavailableError(
                f"camera {self.camera.name} ({self.serial}) does not start: {error}",
                "end other programs that use it, or plug it in again",
            ) from error
        self._resources.callback(pipeline.stop)
        self._intrinsics = _intrinsics(profile.get_stream(rs.stream.color))
        sensor = profile.get_device().first_color_sensor() if _has_color_sensor(device) else None
        if sensor is not None:
            _set_option(sensor, rs.option.global_time_enabled, 1, self.camera.name)
            _set_option(sensor, rs.option.auto_exposure_priority, 0, self.camera.name)
        reader = threading.Thread(
            target=self._read, args=(rs, pipeline), name=f"camera-{self.camera.name}", daemon=True
        )
        reader.start()
        self._resources.callback(reader.join)
        self._resources.callback(self._closing.set)
        with self._news:
            if not self._news.wait_for(lambda: self._latest is not None, self._first_frame_timeout_s):
                raise UnavailableError(
                    f"camera {self.camera.name} ({self.serial}) sent no picture within "
                    f"{self._first_frame_timeout_s:g} s",
                    "check its USB cable; on the twin, check that the twin process renders",
                )
        if sensor is not None:
            self._lock_picture(rs, sensor)
        logger.info(
            "camera %s (%s): %d x %d at %d Hz",
            self.camera.name,
            self.serial,
            self.camera.width,
            self.camera.height,
            rate_hz,
        )

    def _lock_picture(self, rs: Any, sensor: Any) -> None:
        """After the warm-up keep exposure and white balance as they are, where the device has them."""
        automatic = (rs.option.enable_auto_exposure, rs.option.enable_auto_white_balance)
        if any(sensor.supports(option) for option in automatic):
            time.sleep(self._warm_up_s)
        for option in automatic:
            _set_option(sensor, option, 0, self.camera.name)

    def _read(self, rs: Any, pipeline: Any) -> None:
        while not self._closing.is_set():
            try:
                arrived, frames = pipeline.try_wait_for_frames(_POLL_MS)
                if not arrived:
                    continue
                color = frames.get_color_frame()
                if color:
                    self._publish(rs, color)
            except RuntimeError as error:
                logger.warning("camera %s: %s", self.camera.name, error)
                self._closing.wait(0.1)

    def _publish(self, rs: Any, color: Any) -> None:
        image = np.array(color.get_data(), dtype=np.uint8)  # copied: the view is the SDK's memory
        image.setflags(write=False)
        capture_ns = _capture_ns(rs, color) - self._stamp_offset_ns
        frame = Frame(image, capture_ns, int(color.get_frame_number()))
        with self._news:
            self._latest = frame
            self._news.notify_all()


@contextlib.contextmanager
def attached_device(context: Any, serial: str) -> Iterator[Any]:
    """Yield the attached device with this serial number.

    Raises:
        UnavailableError: there is none; the message lists the serial numbers that are there.
    """
    rs = _library()
    devices = list(context.query_devices())
    found = [device.get_info(rs.camera_info.serial_number) for device in devices]
    if serial not in found:
        raise missing_camera(serial, found)
    yield devices[found.index(serial)]


def missing_camera(serial: str, found: list[str]) -> UnavailableError:
    """Return the error for a serial number that is not among those found."""
    return UnavailableError(
        f"no camera with serial number {serial} (found: {', '.join(found) or 'none'})",
        "plug it in, or correct the serial number in the rig",
    )


def _library() -> Any:
    try:
        import pyrealsense2
    except ImportError as error:
        raise MissingExtraError("pyrealsense2 (or its libusb-1.0)", "robot") from error
    return pyrealsense2


def _choose_rate(rs: Any, device: Any, camera: Camera) -> int:
    """Return the slowest rate the device offers in this size that is at least the camera's."""
    offered = {
        (video.width(), video.height(), video.fps())
        for sensor in device.query_sensors()
        for profile in sensor.get_stream_profiles()
        if profile.stream_type() == rs.stream.color and profile.format() == rs.format.rgb8
        for video in [profile.as_video_stream_profile()]
    }
    rates = sorted(
        fps
        for width, height, fps in offered
        if (width, height) == (camera.width, camera.height) and fps >= camera.rate_hz
    )
    if not rates:
        sizes = ", ".join(f"{w}x{h} at {fps} Hz" for w, h, fps in sorted(offered)) or "no RGB8 stream"
        raise UnavailableError(
            f"camera {camera.name} does not offer {camera.width}x{camera.height} at {camera.rate_hz:g} Hz "
            f"or more (offers: {sizes})",
            "plug it into a USB 3 port, or use an embodiment with a size that it offers",
        )
    return int(rates[0])


def _capture_ns(rs: Any, frame: Any) -> int:
    """Return when ``frame`` was exposed, ns of the system clock.

    Global time is the device's clock mapped to the system's by the SDK. Without it the device's
    clock means nothing here, and the time of arrival is the nearest that can be said.
    """
    domain = frame.get_frame_timestamp_domain()
    if domain == rs.timestamp_domain.hardware_clock:
        key = rs.frame_metadata_value.time_of_arrival
        if frame.supports_frame_metadata(key):
            return int(frame.get_frame_metadata(key)) * 1_000_000
        return time.time_ns()
    return int(frame.get_timestamp() * 1e6 + 0.5)


def _intrinsics(stream: Any) -> Intrinsics:
    found = stream.as_video_stream_profile().get_intrinsics()
    k1, k2, p1, p2, k3 = (float(value) for value in found.coeffs)
    return Intrinsics(found.fx, found.fy, found.ppx, found.ppy, (k1, k2, p1, p2, k3))


def _has_color_sensor(device: Any) -> bool:
    return any(sensor.is_color_sensor() for sensor in device.query_sensors())


def _set_option(sensor: Any, option: Any, value: float, name: str) -> None:
    if not sensor.supports(option):
        logger.debug("camera %s has no option %s", name, option)
        return
    try:
        sensor.set_option(option, value)
    except RuntimeError as error:
        logger.warning("camera %s: %s was not set to %g: %s", name, option, value, error)


def _warn_if_usb2(rs: Any, device: Any, name: str) -> None:
    if device.supports(rs.camera_info.usb_type_descriptor):
        speed = device.get_info(rs.camera_info.usb_type_descriptor)
        if speed.startswith("2"):
            logger.warning("camera %s is on USB %s and may lose frames: use a USB 3 port", name, speed)
