"""A camera's topics, for people, tools and recordings; the control path's frames never take this way.

=======================================  ======================================================
``<camera>/color/image_raw``             sensor_msgs/Image, rgb8; over DDS between processes raw
                                         frames are lost easily: prefer the compressed ones
``<camera>/color/image_raw/compressed``  sensor_msgs/CompressedImage, JPEG
``<camera>/color/camera_info``           sensor_msgs/CameraInfo: as measured, else nominal
=======================================  ======================================================

Nothing is made that nobody listens to. Frames are stamped with their exposure, in the optical frame.
"""

from __future__ import annotations

import array
import logging
import threading
import time
from types import TracebackType

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from robot_bridge.drivers.realsense import Frame, RealSenseDriver
from robot_bridge.nodes.process import set_stamp, status
from simplevla.embodiment import Camera
from simplevla.errors import ConfigError, SimplevlaError
from simplevla.session_record import Lens

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
_SLOW = 0.8  # of the camera's rate


class CameraTopics:
    """Publishes one camera from a thread of its own. A context manager.

    Args:
        node: whose topics they are.
        driver: the camera, open.
        lens: as calibration measured it; None: the nominal pinhole.
        quality: of the JPEGs, percent.
    """

    def __init__(self, node: Node, driver: RealSenseDriver, lens: Lens | None, quality: int) -> None:
        camera = driver.camera
        self._driver = driver
        self._camera = camera
        self._quality = quality
        name = f"{camera.name}/color"
        self._raw = node.create_publisher(Image, f"{name}/image_raw", qos_profile_sensor_data)
        self._jpeg = node.create_publisher(
            CompressedImage, f"{name}/image_raw/compressed", qos_profile_sensor_data
        )
        self._infos = node.create_publisher(CameraInfo, f"{name}/camera_info", qos_profile_sensor_data)
        self._info = camera_info(camera, lens)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"publish-{camera.name}", daemon=True)
        self._seen = 0
        self._asked: tuple[int, float] = (0, time.monotonic())
        self._newest_ns = 0

    def __enter__(self) -> CameraTopics:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()

    def diagnose(self) -> DiagnosticStatus:
        """Return how the camera is: pictures a second since the last call, the newest one's age, health."""
        (before, then_s), self._asked = self._asked, (self._seen, time.monotonic())
        rate_hz = (self._seen - before) / max(1e-3, self._asked[1] - then_s)
        health = self._driver.health()
        values: dict[str, object] = {
            "rate_hz": f"{rate_hz:.1f}",
            "expected_hz": self._camera.rate_hz,
            "lost_frames": health.lost_frames,
            "reconnects": health.reconnects,
            "stamp_error_ms": f"{1e3 * health.stamp_error_s:.0f}",
            "clock": health.clock,
            "usb": health.usb,
            **health.locked,
        }
        if self._newest_ns:
            values["age_ms"] = f"{(time.time_ns() - self._newest_ns) / 1e6:.0f}"
        if not rate_hz:
            return status(f"camera: {self._camera.name}", "no pictures", values, level="error")
        slow = rate_hz < _SLOW * self._camera.rate_hz
        text = "slower than it should be" if slow else "streaming"
        return status(f"camera: {self._camera.name}", text, values, level="warn" if slow else "ok")

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                frame = self._driver.wait_newer(self._newest_ns, _LOOK_S)
                self._newest_ns = frame.capture_ns
                self._seen += 1
                self._publish(frame)
            except SimplevlaError as error:
                logger.debug("%s", error)

    def _publish(self, frame: Frame) -> None:
        if self._raw.get_subscription_count():
            self._raw.publish(raw_image(frame, self._camera.frame))
        if self._jpeg.get_subscription_count():
            self._jpeg.publish(compressed_image(frame, self._camera.frame, self._quality))
        set_stamp(self._info.header.stamp, frame.capture_ns)
        self._infos.publish(self._info)


def raw_image(frame: Frame, frame_id: str) -> Image:
    """Return a frame as an rgb8 message."""
    height, width, channels = frame.image.shape
    return Image(
        header=_header(frame.capture_ns, frame_id),
        height=height,
        width=width,
        encoding="rgb8",
        step=width * channels,
        data=_bytes(frame.image.tobytes()),
    )


def compressed_image(frame: Frame, frame_id: str, quality: int) -> CompressedImage:
    """Return a frame as a JPEG message."""
    return CompressedImage(
        header=_header(frame.capture_ns, frame_id), format="jpeg", data=_jpeg(frame.image, quality)
    )


def camera_info(camera: Camera, measured: Lens | None = None) -> CameraInfo:
    """Return the camera as a message without a stamp: as measured, else the nominal pinhole.

    ROS counts pixels from the middle of the first one, an embodiment from its corner.
    """
    lens = (
        measured.scaled(camera.width, camera.height)
        if measured
        else Lens(
            width=camera.width, height=camera.height, fx=camera.fx, fy=camera.fy, cx=camera.cx, cy=camera.cy
        )
    )
    cx, cy = lens.cx - 0.5, lens.cy - 0.5
    info = CameraInfo(header=_header(0, camera.frame), width=camera.width, height=camera.height)
    info.distortion_model = "plumb_bob"
    info.d = list(lens.distortion)
    info.k = [lens.fx, 0.0, cx, 0.0, lens.fy, cy, 0.0, 0.0, 1.0]
    info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    info.p = [lens.fx, 0.0, cx, 0.0, 0.0, lens.fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0]
    return info


def _header(capture_ns: int, frame_id: str) -> Header:
    header = Header(frame_id=frame_id)
    set_stamp(header.stamp, capture_ns)
    return header


def _jpeg(image: NDArray[np.uint8], quality: int) -> array.array[int]:
    done, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    if not done:
        raise ConfigError(f"an image of shape {image.shape} could not be encoded", "check the camera")
    return _bytes(encoded.tobytes())


def _bytes(raw: bytes) -> array.array[int]:
    data = array.array("B")  # what rclpy takes without walking through every byte
    data.frombytes(raw)
    return data
