"""What the RealSense driver asks of the SDK and of a device: which one, what it offers, its clock."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from simplevla.embodiment import Camera
from simplevla.errors import MissingExtraError, UnavailableError

logger = logging.getLogger(__name__)

DeviceSource = Callable[[Any, str], AbstractContextManager[Any]]
"""Makes a context manager of an ``rs.device`` from an ``rs.context`` and a serial number."""


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


@contextlib.contextmanager
def attached_device(context: Any, serial: str) -> Iterator[Any]:
    """Yield the attached device with this serial number.

    Raises:
        UnavailableError: there is none; the message lists the serial numbers that are there.
    """
    rs = library()
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


def library() -> Any:
    """Return the vendor's library, or say which extra brings it."""
    try:
        import pyrealsense2
    except ImportError as error:
        raise MissingExtraError("pyrealsense2 (or its libusb-1.0)", "robot") from error
    return pyrealsense2


def choose_rate(rs: Any, device: Any, camera: Camera) -> int:
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


def choose_depth(rs: Any, device: Any, camera: Camera, rate_hz: int) -> tuple[int, int]:
    """Return the size of the depth stream at this rate that is nearest to the colour stream's width."""
    sizes = {
        (video.width(), video.height())
        for sensor in device.query_sensors()
        for profile in sensor.get_stream_profiles()
        if profile.stream_type() == rs.stream.depth and profile.format() == rs.format.z16
        for video in [profile.as_video_stream_profile()]
        if video.fps() == rate_hz
    }
    if not sizes:
        raise UnavailableError(
            f"camera {camera.name} does not offer depth at {rate_hz} Hz", "do without depth, or use another"
        )
    width, height = min(sizes, key=lambda size: (abs(size[0] - camera.width), size[0]))
    return int(width), int(height)


def exposed_ns(rs: Any, frame: Any, domain: Any) -> int:
    """Return when ``frame`` was exposed, ns of the system clock.

    Global time is the device's clock mapped to the system's by the SDK. Without it the device's
    clock means nothing here, and the time of arrival is the nearest that can be said.
    """
    if domain == rs.timestamp_domain.hardware_clock:
        key = rs.frame_metadata_value.time_of_arrival
        if frame.supports_frame_metadata(key):
            return int(frame.get_frame_metadata(key)) * 1_000_000
        return time.time_ns()
    return int(frame.get_timestamp() * 1e6 + 0.5)


def intrinsics(stream: Any) -> Intrinsics:
    """Return what the device says of the lens of a stream."""
    found = stream.as_video_stream_profile().get_intrinsics()
    k1, k2, p1, p2, k3 = (float(value) for value in found.coeffs)
    return Intrinsics(found.fx, found.fy, found.ppx, found.ppy, (k1, k2, p1, p2, k3))


def color_sensor(rs: Any, device: Any) -> Any:
    """Return the device's sensor that gives colour, None without one; a D405's is its stereo module."""
    for sensor in device.query_sensors():
        if any(profile.stream_type() == rs.stream.color for profile in sensor.get_stream_profiles()):
            return sensor
    return None


def set_option(sensor: Any, option: Any, value: float, name: str) -> None:
    """Set an option where the device has it; one that refuses is logged."""
    if not sensor.supports(option):
        logger.debug("camera %s has no option %s", name, option)
        return
    try:
        sensor.set_option(option, value)
    except RuntimeError as error:
        logger.warning("camera %s: %s was not set to %g: %s", name, option, value, error)


def usb_speed(rs: Any, device: Any, name: str) -> str:
    """Return the speed of the device's port, and warn of one that is too slow."""
    if not device.supports(rs.camera_info.usb_type_descriptor):
        return ""
    speed = str(device.get_info(rs.camera_info.usb_type_descriptor))
    if speed.startswith("2"):
        logger.warning("camera %s is on USB %s and may lose frames: use a USB 3 port", name, speed)
    return speed


def quietly(work: Callable[[], Any]) -> None:
    """Do what may fail because the device is gone already."""
    try:
        work()
    except RuntimeError as error:
        logger.debug("%s", error)
