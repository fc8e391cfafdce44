"""A RealSense camera as its SDK shows it, without a camera.

Pictures of the twin process come through the SDK's own software device, so that the driver above it
is the one that hardware has.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from robot_bridge.drivers.realsense_sdk import DeviceSource, missing_camera
from robot_bridge.rig import Rig
from robot_bridge.twin.frames import FrameReader, Picture, slot_name
from simplevla.embodiment import Camera
from simplevla.errors import ConfigError, UnavailableError

logger = logging.getLogger(__name__)

_POLL_S = 0.002
_LOST_AFTER_S = 0.2
_BYTES_PER_PIXEL = 3


def twin_device_source(rig: Rig) -> DeviceSource:
    """Return what makes the twin's cameras from serial numbers.

    Raises:
        ConfigError: the rig is not a twin's.
    """
    if rig.twin is None:
        raise ConfigError(f"rig {rig.name!r} is not a twin's", "use the rig: twin")
    prefix = rig.twin.shared_memory
    names = {serial: name for name, serial in rig.cameras.items()}
    embodiment = rig.load_embodiment()

    @contextlib.contextmanager
    def device_source(context: Any, serial: str) -> Iterator[Any]:
        if serial not in names:
            raise missing_camera(serial, sorted(names))
        camera = embodiment.camera(names[serial])
        with software_camera(context, camera, serial, slot_name(prefix, camera.name)) as device:
            yield device

    return device_source


@contextlib.contextmanager
def software_camera(context: Any, camera: Camera, serial: str, slot: str) -> Iterator[Any]:
    """Yield an ``rs.software_device`` that shows the pictures of a shared-memory slot as they come.

    Args:
        context: the ``rs.context`` that the device joins.
        camera: size, rate and intrinsics of its colour stream.
        serial: its serial number.
        slot: name of the slot.

    Raises:
        UnavailableError: there is no such slot, or its pictures have another size.
    """
    import pyrealsense2 as rs

    with contextlib.closing(FrameReader(slot)) as reader:
        _check_size(reader, camera)
    device = rs.software_device()
    device.register_info(rs.camera_info.name, f"Twin {camera.name}")
    device.register_info(rs.camera_info.serial_number, serial)
    device.register_info(rs.camera_info.usb_type_descriptor, "3.2")
    sensor = device.add_sensor("RGB Camera")
    profile = sensor.add_video_stream(_stream(rs, camera), True)
    device.add_to(context)
    stream = profile.as_video_stream_profile()
    closing = threading.Event()
    feed = threading.Thread(
        target=_feed,
        args=(
            camera,
            slot,
            lambda picture: sensor.on_video_frame(_video_frame(rs, picture, stream)),
            closing,
        ),
        name=f"twin-{camera.name}",
        daemon=True,
    )
    feed.start()
    try:
        yield device
    finally:
        closing.set()
        feed.join()


def _stream(rs: Any, camera: Camera) -> Any:
    intrinsics = rs.intrinsics()
    intrinsics.width, intrinsics.height = camera.width, camera.height
    intrinsics.fx, intrinsics.fy = camera.fx, camera.fy
    # The SDK counts pixels from the middle of the first one, the renderer from its corner.
    intrinsics.ppx, intrinsics.ppy = camera.cx - 0.5, camera.cy - 0.5
    intrinsics.model = rs.distortion.none
    intrinsics.coeffs = [0.0] * 5
    stream = rs.video_stream()
    stream.type, stream.index, stream.uid = rs.stream.color, 0, 1
    stream.width, stream.height, stream.fps = camera.width, camera.height, round(camera.rate_hz)
    stream.bpp, stream.fmt, stream.intrinsics = _BYTES_PER_PIXEL, rs.format.rgb8, intrinsics
    return stream


def _feed(camera: Camera, slot: str, push: Callable[[Picture], None], closing: threading.Event) -> None:
    """Push each new picture; follow the slot when a new twin process replaces it."""
    while not closing.is_set():
        try:
            with FrameReader(slot) as reader:
                _check_size(reader, camera)
                _feed_from(reader, push, closing)
        except UnavailableError as error:
            logger.debug("camera %s: %s", camera.name, error)
        closing.wait(_LOST_AFTER_S)


def _feed_from(reader: FrameReader, push: Callable[[Picture], None], closing: threading.Event) -> None:
    number, quiet_s = 0, 0.0
    while not closing.wait(_POLL_S):
        picture = reader.read_newer(number)
        if picture is not None:
            number, quiet_s = picture.number, 0.0
            closing.wait(max(0.0, (picture.due_ns - time.time_ns()) / 1e9))
            push(picture)
            continue
        quiet_s += _POLL_S
        if quiet_s > _LOST_AFTER_S:
            quiet_s = 0.0
            if reader.is_replaced():
                return


def _video_frame(rs: Any, picture: Picture, stream: Any) -> Any:
    frame = rs.software_video_frame()
    frame.pixels = picture.image
    frame.stride, frame.bpp = picture.image.shape[1] * _BYTES_PER_PIXEL, _BYTES_PER_PIXEL
    frame.timestamp = picture.capture_ns / 1e6  # ms; a float64 holds it to 0.3 us
    frame.domain = rs.timestamp_domain.system_time
    frame.frame_number = picture.number
    frame.profile = stream
    return frame


def _check_size(reader: FrameReader, camera: Camera) -> None:
    if reader.shape != (camera.height, camera.width, 3):
        raise UnavailableError(
            f"the twin's camera {camera.name} is {reader.shape[1]}x{reader.shape[0]}, "
            f"not {camera.width}x{camera.height}",
            "start the twin with the same rig",
        )
