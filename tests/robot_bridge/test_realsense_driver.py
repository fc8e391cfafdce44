"""The RealSense driver on the vendor's SDK, against the SDK's own software device."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robot_bridge.drivers.choice import camera_driver
from robot_bridge.drivers.realsense import RealSenseDriver
from robot_bridge.rig import Rig, load_rig, with_free_ports
from robot_bridge.twin.frames import FrameReader, FrameWriter, slot_name
from robot_bridge.twin.realsense_device import twin_device_source
from simplevla.embodiment import load_embodiment
from simplevla.errors import UnavailableError

pytestmark = pytest.mark.realtime

CAMERA = load_embodiment("piper_dual").camera("head")
SHAPE = (CAMERA.height, CAMERA.width, 3)
PERIOD_S = 0.02


@pytest.fixture
def rig() -> Rig:
    return with_free_ports(load_rig("twin"))


class Projector:
    """Writes a picture every 20 ms: its number is its colour, and no two pixels in a row are equal.

    It is due ``late_s`` after it was taken.
    """

    def __init__(self, rig: Rig, late_s: float = 0.0) -> None:
        assert rig.twin is not None
        self.slot = slot_name(rig.twin.shared_memory, "head")
        self.stamps: dict[int, int] = {}
        self._late_ns = round(late_s * 1e9)
        self.frozen = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Projector":
        self._writer = FrameWriter(self.slot, *SHAPE[:2])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with self._writer as writer:
            number = 0
            while not self._over.wait(PERIOD_S):
                if not self.frozen.is_set():
                    number += 1
                    now_ns = self.stamps[number] = time.time_ns()
                    writer.write(picture(number), now_ns, now_ns + self._late_ns)


def picture(number: int) -> np.ndarray:
    ramp = np.arange(np.prod(SHAPE), dtype=np.uint64) * 7 + number
    return (ramp % 251).astype(np.uint8).reshape(SHAPE)


@pytest.fixture
def projector(rig: Rig) -> Iterator[Projector]:
    with Projector(rig) as projector:
        yield projector


def test_pictures_arrive_in_order_with_their_pixels_and_stamps(rig: Rig, projector: Projector) -> None:
    with camera_driver(rig, CAMERA) as driver:
        assert driver.latest is not None
        seen = [driver.latest]
        for _ in range(20):
            seen.append(driver.wait_newer(seen[-1].capture_ns, 2.0))
    numbers = [frame.sequence for frame in seen]
    assert numbers == sorted(set(numbers))
    for frame in seen:
        np.testing.assert_array_equal(frame.image, picture(frame.sequence))
        assert abs(frame.capture_ns - projector.stamps[frame.sequence]) < 1000
        assert not frame.image.flags.writeable


def test_a_picture_that_is_due_later_is_handed_on_then(rig: Rig) -> None:
    with Projector(rig, late_s=0.06), camera_driver(rig, CAMERA) as driver:
        seen = [driver.wait_newer(0, 2.0)]
        while len(seen) < 5:
            seen.append(driver.wait_newer(seen[-1].capture_ns, 2.0))
    assert min(frame.arrival_ns - frame.capture_ns for frame in seen) >= 60_000_000


@pytest.mark.usefixtures("projector")
def test_a_picture_is_a_copy(rig: Rig) -> None:
    with camera_driver(rig, CAMERA) as driver:
        first = driver.latest
        assert first is not None
        driver.wait_newer(first.capture_ns + 200_000_000, 3.0)
    np.testing.assert_array_equal(first.image, picture(first.sequence))


def test_a_frozen_camera_is_said_and_comes_back(rig: Rig, projector: Projector) -> None:
    with camera_driver(rig, CAMERA) as driver:
        projector.frozen.set()
        time.sleep(0.1)
        assert driver.latest is not None
        with pytest.raises(UnavailableError, match=r"head.*no new picture within 0.2 s"):
            driver.wait_newer(driver.latest.capture_ns, 0.2)
        projector.frozen.clear()
        driver.wait_newer(driver.latest.capture_ns, 2.0)


def test_the_driver_follows_a_twin_that_is_started_anew(rig: Rig) -> None:
    with Projector(rig):
        driver = camera_driver(rig, CAMERA)
        driver.__enter__()
    try:
        assert driver.latest is not None
        last = driver.latest.capture_ns
        with Projector(rig):
            driver.wait_newer(last + 1_000_000, 5.0)
    finally:
        driver.close()


@pytest.mark.usefixtures("projector")
def test_a_wrong_serial_number_lists_those_that_are_there(rig: Rig) -> None:
    with (
        pytest.raises(UnavailableError, match=r"serial number 999 \(found: TWIN-HEAD\)"),
        RealSenseDriver(CAMERA, "999", device_source=twin_device_source(rig)),
    ):
        pass


def test_a_serial_number_of_no_attached_camera_is_named() -> None:
    with (
        pytest.raises(UnavailableError, match="no camera with serial number 000000000000"),
        RealSenseDriver(CAMERA, "000000000000"),
    ):
        pass


@pytest.mark.usefixtures("projector")
def test_a_size_the_camera_has_not_lists_what_it_offers(rig: Rig) -> None:
    large = msgspec.structs.replace(CAMERA, width=640, height=480)
    with pytest.raises(UnavailableError, match=r"640x480.*320x240 at 15 Hz"), camera_driver(rig, large):
        pass


def test_a_twin_that_does_not_run_is_said(rig: Rig) -> None:
    with pytest.raises(UnavailableError) as raised, camera_driver(rig, CAMERA):
        pass
    assert "simplevla twin" in raised.value.remedy


def test_a_lost_camera_is_said_and_won_back(rig: Rig) -> None:
    with Projector(rig):
        driver = camera_driver(rig, CAMERA)
        driver.__enter__()
        assert driver.health().streaming
        assert driver.health().clock == "system_time"
        assert driver.health().usb == "3.2"
        assert -0.1 < driver.health().stamp_error_s < 1.0
    try:
        deadline = time.monotonic() + 5
        while driver.health().streaming and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not driver.health().streaming
        time.sleep(0.8)  # the stream is stopped and looked for again meanwhile
        with Projector(rig):
            driver.wait_newer(time.time_ns(), 6.0)
        assert driver.health().reconnects >= 1
    finally:
        driver.close()


class DepthCamera:
    """The SDK's software device with a colour and a depth sensor, and options that a camera has."""

    def __init__(self) -> None:
        self.options: dict[str, float] = {}
        self._over = threading.Event()

    @contextlib.contextmanager
    def __call__(self, context: Any, _serial: str) -> Iterator[Any]:
        import pyrealsense2 as rs

        device = rs.software_device()
        color, depth = device.add_sensor("RGB Camera"), device.add_sensor("Stereo Module")
        for option, low, high, now in (
            (rs.option.enable_auto_exposure, 0, 1, 1),
            (rs.option.exposure, 1, 1000, 156),
            (rs.option.gain, 0, 128, 64),
        ):
            color.add_option(option, rs.option_range(low, high, now, 1), True)
            color.set_option(option, now)
        depth.add_read_only_option(rs.option.depth_units, 0.001)
        streams = [
            _profile(rs, color, rs.stream.color, 1, 3, rs.format.rgb8),
            _profile(rs, depth, rs.stream.depth, 2, 2, rs.format.z16),
        ]
        same = rs.extrinsics()
        same.rotation, same.translation = [1, 0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0]
        streams[1].register_extrinsics_to(streams[0], same)
        device.add_to(context)
        self.color = color
        thread = threading.Thread(target=self._feed, args=(rs, color, depth, streams), daemon=True)
        thread.start()
        try:
            yield device
        finally:
            self._over.set()
            thread.join()

    def _feed(self, rs: Any, color: Any, depth: Any, streams: list[Any]) -> None:
        number = 0
        while not self._over.wait(0.03):
            number += 1
            for sensor, stream, pixels, size in (
                (color, streams[0], np.full(SHAPE, number % 256, np.uint8), 3),
                (depth, streams[1], np.full(SHAPE[:2], 1500, np.uint16), 2),
            ):
                frame = rs.software_video_frame()
                frame.pixels, frame.stride, frame.bpp = pixels, CAMERA.width * size, size
                frame.timestamp, frame.domain = time.time() * 1e3, rs.timestamp_domain.system_time
                frame.frame_number, frame.profile = number, stream
                sensor.on_video_frame(frame)


def _profile(rs: Any, sensor: Any, kind: Any, uid: int, size: int, form: Any) -> Any:
    intrinsics = rs.intrinsics()
    intrinsics.width, intrinsics.height = CAMERA.width, CAMERA.height
    intrinsics.fx, intrinsics.fy, intrinsics.ppx, intrinsics.ppy = (
        CAMERA.fx,
        CAMERA.fy,
        CAMERA.cx,
        CAMERA.cy,
    )
    intrinsics.model, intrinsics.coeffs = rs.distortion.none, [0.0] * 5
    stream = rs.video_stream()
    stream.type, stream.index, stream.uid, stream.fmt = kind, 0, uid, form
    stream.width, stream.height, stream.fps = CAMERA.width, CAMERA.height, round(CAMERA.rate_hz)
    stream.bpp, stream.intrinsics = size, intrinsics
    return sensor.add_video_stream(stream, True).as_video_stream_profile()


def test_depth_comes_in_metres_and_exposure_is_locked_to_what_it_was() -> None:
    camera = DepthCamera()
    with RealSenseDriver(CAMERA, "any", device_source=camera, depth=True, warm_up_s=0.1) as driver:
        frame = driver.wait_newer(time.time_ns(), 3.0)
        assert frame.depth_m is not None
        assert frame.depth_m.shape == SHAPE[:2]
        assert np.median(frame.depth_m) == pytest.approx(1.5)
        assert driver.health().locked == {"enable_auto_exposure": 0.0, "exposure": 156.0, "gain": 64.0}


@pytest.mark.usefixtures("projector")
def test_closing_ends_every_thread(rig: Rig) -> None:
    before = set(threading.enumerate())
    for _ in range(2):
        with camera_driver(rig, CAMERA):
            assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before


@given(st.integers(1, 40), st.integers(1, 40), st.integers(-(1 << 62), 1 << 62), st.integers(1, 5))
def test_a_slot_gives_back_the_newest_picture(height: int, width: int, stamp: int, count: int) -> None:
    rng = np.random.default_rng(count)
    pictures = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    with (
        FrameWriter("simplevla_test_slot", height, width) as writer,
        FrameReader("simplevla_test_slot") as reader,
    ):
        assert reader.read_newer(0) is None
        for image in pictures:
            writer.write(image, stamp)
        newest = reader.read_newer(0)
        assert newest is not None
        assert (newest.capture_ns, newest.number) == (stamp, count)
        np.testing.assert_array_equal(newest.image, pictures[-1])
        assert reader.read_newer(count) is None


def test_no_reader_ever_sees_half_a_picture() -> None:
    over = threading.Event()
    torn = []
    with FrameWriter("simplevla_test_torn", 240, 320) as writer:

        def read() -> None:
            number = 0
            with FrameReader("simplevla_test_torn") as reader:
                while not over.is_set():
                    new = reader.read_newer(number)
                    if new is not None:
                        number = new.number
                        if (new.image != number % 256).any() or new.capture_ns != number:
                            torn.append(number)

        thread = threading.Thread(target=read)
        thread.start()
        for number in range(1, 1500):
            writer.write(np.full((240, 320, 3), number % 256, np.uint8), number)
        over.set()
        thread.join()
    assert not torn


def test_a_slot_is_removed_by_its_writer_alone() -> None:
    path = Path("/dev/shm/simplevla_test_owner")
    with FrameWriter("simplevla_test_owner", 2, 2):
        with FrameReader("simplevla_test_owner") as reader:
            assert not reader.is_replaced()
        assert path.exists()
    assert not path.exists()


def test_a_file_that_holds_no_pictures_is_refused() -> None:
    path = Path("/dev/shm/simplevla_test_junk")
    for content in (b"", b"x" * 10, b"y" * 1000):
        path.write_bytes(content)
        try:
            with pytest.raises(UnavailableError):
                FrameReader("simplevla_test_junk")
        finally:
            path.unlink()


@pytest.mark.parametrize("name", ["", "../etc", "a/b", "a" * 200])
def test_a_name_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        FrameWriter(name, 2, 2)
