"""Rigs: what ships loads, and a rig that cannot work is refused in words that say what to do."""

from pathlib import Path

import msgspec
import pytest

from robot_bridge.rig import CanPort, Rig, TwinSettings, load_rig, named, save_rig, with_free_ports
from simplevla.errors import ConfigError

TWIN = load_rig("twin")


@pytest.mark.parametrize(("name", "arms"), [("twin", {"left", "right"}), ("twin_single", {"right"})])
def test_the_twins_that_ship_load(name: str, arms: set[str]) -> None:
    rig = load_rig(name)
    assert rig.is_twin
    assert set(rig.arms) == arms
    assert {arm.name for arm in rig.load_embodiment().arms} == arms


def test_the_hardware_example_asks_for_its_serial_numbers() -> None:
    with pytest.raises(ConfigError, match="fill in the serial number of camera head"):
        load_rig("hardware")


def test_the_hardware_example_loads_once_it_is_filled_in(tmp_path: Path) -> None:
    text = Path("config/rig/hardware.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("FILL-IN serial number", "123456789012"), encoding="utf-8")
    rig = load_rig(str(path))
    assert not rig.is_twin
    assert rig.cameras == {"head": "123456789012"}


def test_an_unknown_rig_lists_those_that_ship() -> None:
    with pytest.raises(ConfigError, match=r"unknown rig 'moon'.*hardware, twin, twin_single"):
        load_rig("moon")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": {"left": TWIN.arms["left"]}}, "arms are"),
        (
            {"arms": {**TWIN.arms, "third": CanPort(interface="simplevla_twin", channel="127.0.0.1:1")}},
            "arms",
        ),
        ({"cameras": {}}, "cameras are"),
        ({"embodiment": "spider"}, "unknown embodiment"),
    ],
)
def test_a_rig_must_fit_its_embodiment(change: dict[str, object], says: str, tmp_path: Path) -> None:
    path = tmp_path / "rig.yaml"
    save_rig(msgspec.structs.replace(TWIN, **change), path)
    with pytest.raises(Exception, match=says):
        load_rig(str(path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": {"left": TWIN.arms["left"], "right": TWIN.arms["left"]}}, "given twice"),
        ({"cameras": {"head": "1", "wrist": "1"}}, "given twice"),
        ({"twin": None}, "no twin section"),
        ({"arms": {"left": CanPort(interface="socketcan", channel="can0")}}, "has a twin section"),
        ({"arms": {"left": CanPort(interface="simplevla_twin", channel="0.0.0.0:1")}}, "127.0.0.1"),
    ],
)
def test_a_contradiction_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Rig(**{**msgspec.structs.asdict(TWIN), **change})


def test_the_control_endpoint_stays_on_loopback() -> None:
    with pytest.raises(ValueError, match="tcp://127"):
        TwinSettings(control="tcp://0.0.0.0:47000")


def test_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rig.yaml"
    save_rig(TWIN, path)
    path.write_text(path.read_text(encoding="utf-8") + "colour: red\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="colour"):
        load_rig(str(path))


def test_free_ports_keep_two_twins_apart(tmp_path: Path) -> None:
    first, second = with_free_ports(TWIN), with_free_ports(TWIN)
    assert first.twin is not None
    assert second.twin is not None
    channels = [p.channel for rig in (first, second) for p in rig.arms.values()]
    assert len(set(channels)) == 4
    assert first.twin.control != second.twin.control
    assert first.twin.shared_memory != second.twin.shared_memory
    save_rig(first, tmp_path / "rig.yaml")
    assert load_rig(str(tmp_path / "rig.yaml")) == first


def test_a_rig_may_be_driven_with_some_of_its_arms():
    rig = load_rig("twin")
    left = rig.with_arms(["left"])
    assert left.load_embodiment().names() == rig.load_embodiment().names()[:7]
    assert list(left.arms) == ["left"]
    assert rig.with_arms([]) == rig
    with pytest.raises(ConfigError, match="unknown arm 'third'"):
        rig.with_arms(["left", "third"])


def test_names_are_separated_by_commas():
    assert named(" left, right ,") == ["left", "right"]
    assert named("") == []
