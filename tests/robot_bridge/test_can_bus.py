"""The loopback CAN bus under python-can: frames arrive whole, once, and only from the other end."""

import contextlib
import socket
import time
from collections.abc import Iterator

import can
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robot_bridge.rig import load_rig, with_free_ports
from robot_bridge.twin.can_bus import CanFrame, CanHub, TwinCanBus, pack_frames, unpack_frames
from simplevla.errors import UnavailableError

pytestmark = pytest.mark.realtime

FRAMES = st.builds(CanFrame, st.integers(0, 0x7FF), st.binary(max_size=8))


@pytest.fixture
def channel() -> str:
    return with_free_ports(load_rig("twin")).arms["left"].channel


@pytest.fixture
def hub(channel: str) -> Iterator[CanHub]:
    with CanHub(channel) as hub:
        yield hub


@given(st.lists(FRAMES, max_size=20))
def test_frames_survive_the_way(frames: list[CanFrame]) -> None:
    assert unpack_frames(pack_frames(frames)) == frames


@given(st.binary(max_size=64))
def test_anything_else_is_refused_or_valid(datagram: bytes) -> None:
    try:
        frames = unpack_frames(datagram)
    except ValueError:
        return
    assert all(frame.id <= 0x7FF and len(frame.data) <= 8 for frame in frames)
    assert len(frames) == len(datagram) / 16


def test_python_can_finds_the_interface_by_name(channel: str) -> None:
    with can.Bus(interface="simplevla_twin", channel=channel) as bus:
        assert isinstance(bus, TwinCanBus)


def test_frames_go_both_ways_in_order_and_nothing_echoes(hub: CanHub, channel: str) -> None:
    with TwinCanBus(channel) as bus:
        assert bus.recv(0.05) is None
        sent = [CanFrame(0x100 + i, bytes([i, 255])) for i in range(5)]
        for frame in sent:
            bus.send(can.Message(arbitration_id=frame.id, data=frame.data, is_extended_id=False))
        assert arrived(hub, 5) == sent
        assert bus.recv(0.05) is None
        hub.send(sent[:3])
        hub.send(sent[3:])
        before = time.time()
        messages = [bus.recv(1.0) for _ in sent]
        assert [CanFrame(m.arbitration_id, bytes(m.data)) for m in messages if m] == sent
        assert all(m and abs(m.timestamp - before) < 1 and m.is_rx and m.dlc == 2 for m in messages)


def test_two_arms_do_not_hear_each_other(hub: CanHub, channel: str) -> None:
    other = with_free_ports(load_rig("twin")).arms["right"].channel
    with CanHub(other) as other_hub, TwinCanBus(channel) as bus, TwinCanBus(other) as other_bus:
        for each in (bus, other_bus):
            assert each.recv(0.02) is None
        list(hub.receive()), list(other_hub.receive())
        hub.send([CanFrame(1, b"left")])
        message = bus.recv(1.0)
        assert message is not None
        assert bytes(message.data) == b"left"
        assert other_bus.recv(0.05) is None


def test_a_bus_that_only_sends_is_sent_nothing(hub: CanHub, channel: str) -> None:
    with TwinCanBus(channel) as bus:
        bus.send(can.Message(arbitration_id=1, data=b"x", is_extended_id=False))
        arrived(hub, 1)
        hub.send([CanFrame(2, b"y")])
        time.sleep(0.05)
        with pytest.raises(BlockingIOError):
            bus._socket.recv(100)


def test_a_bus_hears_a_hub_that_comes_back(channel: str) -> None:
    with TwinCanBus(channel) as bus:
        with CanHub(channel) as hub:
            assert bus.recv(0.02) is None
            list(hub.receive())
        bus.send(can.Message(arbitration_id=1, data=b"x", is_extended_id=False))
        assert bus.recv(0.35) is None
        with CanHub(channel) as hub:
            deadline = time.monotonic() + 5
            heard = None
            while heard is None and time.monotonic() < deadline:
                heard = bus.recv(0.05)
                list(hub.receive())
                hub.send([CanFrame(7, b"back")])
            assert heard is not None
            assert bytes(heard.data) == b"back"


def test_garbage_on_the_port_is_dropped(hub: CanHub, channel: str) -> None:
    host, _, port = channel.partition(":")
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as stranger:
        for junk in (b"hello", bytes(15), b"\xff" * 16, b"\xff" * 2048):
            stranger.sendto(junk, (host, int(port)))
        stranger.sendto(pack_frames([CanFrame(5, b"fine")]), (host, int(port)))
    assert arrived(hub, 1) == [CanFrame(5, b"fine")]


@pytest.mark.parametrize(
    "channel", ["can0", "127.0.0.1:", "127.0.0.1:0", "10.0.0.1:5000", "127.0.0.1:99999"]
)
def test_a_channel_off_loopback_is_refused(channel: str) -> None:
    with pytest.raises(can.CanInitializationError, match=r"127\.0\.0\.1"):
        TwinCanBus(channel)


@pytest.mark.parametrize(
    "message",
    [
        can.Message(arbitration_id=0x12345, is_extended_id=True),
        can.Message(arbitration_id=1, is_extended_id=False, is_remote_frame=True),
    ],
)
def test_what_a_piper_never_sends_is_refused(message: can.Message, channel: str) -> None:
    with TwinCanBus(channel) as bus, pytest.raises(can.CanOperationError, match="11-bit"):
        bus.send(message)


def test_a_taken_port_is_named(hub: CanHub) -> None:
    with pytest.raises(UnavailableError, match=hub.channel), CanHub(hub.channel):
        pass


def test_reading_ends_when_the_bus_is_shut(channel: str) -> None:
    bus = TwinCanBus(channel)
    bus.shutdown()
    with pytest.raises(can.CanOperationError):
        bus.recv(0.1)


def arrived(hub: CanHub, count: int) -> list[CanFrame]:
    """Return what reached the hub, waiting a little for ``count`` frames."""
    deadline = time.monotonic() + 2
    frames: list[CanFrame] = []
    while len(frames) < count and time.monotonic() < deadline:
        frames += hub.receive()
        time.sleep(0.001)
    return frames
