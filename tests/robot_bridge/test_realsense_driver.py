"""The RealSense driver on the vendor's SDK, against the SDK's own software device."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

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
    """Writes a picture every 20 ms: its number is its colour, and no two pixels in a row are equal."""

    def __init__(self, rig: Rig) -> None:
        assert rig.twin is not None
        self.slot = slot_name(rig.twin.shared_memory, "head")
        self.stamps: dict[int, int] = {}
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
                    self.stamps[number] = time.time_ns()
                    writer.write(picture(number), self.stamps[number])


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
