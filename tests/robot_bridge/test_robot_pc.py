"""The robot PC's scripts: what they install, what they refuse, and that they may be run again.

There is no CAN adapter here: ``ip`` is a script that keeps one interface's state in a file, and
/sys/class/net a folder like it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "robot_pc"
IP = """#!/bin/sh
echo "$@" >>"$STATE/calls"
case "$*" in
*" down") echo NOARP,ECHO >"$STATE/flags" ;;
*" up") echo NOARP,UP,LOWER_UP,ECHO >"$STATE/flags" ;;
*"type can bitrate"*) echo "restart-ms ${10}  bitrate $8 sample-point 0.750" >"$STATE/can" ;;
-details*) echo "7: x: <$(cat "$STATE/flags")> mtu 16"; cat "$STATE/can"; echo "tq 125" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """Return a runner of a script of the folder, on a machine with one CAN adapter that is down."""
    state, net, usb = tmp_path / "state", tmp_path / "net", tmp_path / "usb"
    binaries = tmp_path / "bin"
    for folder in (state, binaries, usb / "1-2:1.0", net / "can0", net / "eth0"):
        folder.mkdir(parents=True)
    (state / "flags").write_text("NOARP,ECHO\n")
    (state / "can").write_text("can state STOPPED restart-ms 0\n")
    (binaries / "ip").write_text(IP)
    (binaries / "ip").chmod(0o755)
    (usb / "serial").write_text("00AB12\n")
    (net / "can0/device").symlink_to(usb / "1-2:1.0")
    (net / "can0/type").write_text("280\n")
    (net / "eth0/type").write_text("1\n")

    def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "STATE": str(state),
            "SIMPLEVLA_NET": str(net),
            "DESTDIR": str(tmp_path / "root"),
        }
        return subprocess.run(
            [FOLDER / script, *words], env=environment, capture_output=True, text=True, check=False
        )

    return run


def calls(tmp_path: Path) -> list[str]:
    """Return the calls that would have changed the interface."""
    lines = (tmp_path / "state/calls").read_text().splitlines()
    return [line for line in lines if not line.startswith("-details")]


def test_an_interface_comes_up_once_and_is_then_left_alone(machine, tmp_path):
    first = machine("can_up.sh", "can0")
    assert (first.returncode, first.stdout) == (0, "can0: up at 1000000 bit/s\n")
    made = calls(tmp_path)
    assert made == [
        "link set dev can0 down",
        "link set dev can0 type can bitrate 1000000 restart-ms 100",
        "link set dev can0 up",
    ]
    again = machine("can_up.sh", "can0")
    assert (again.returncode, again.stdout) == (0, "can0: is up already\n")
    assert calls(tmp_path) == made


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "no interface is named"),
        (["can0;reboot"], "no interface's name"),
        (["$(reboot)"], "no interface's name"),
        (["../../sys"], "no interface's name"),
        (["a" * 16], "no interface's name"),
        (["can1"], "there is no interface can1"),
        (["can0", "eth0"], "eth0 is no CAN interface"),
    ],
)
def test_what_is_no_can_interface_is_refused_before_anything_is_changed(machine, tmp_path, names, reason):
    done = machine("can_up.sh", *names)
    assert done.returncode != 0
    assert reason in done.stderr
    assert not (tmp_path / "state/calls").exists()


def test_adapters_are_listed_with_their_serial_numbers(machine):
    assert machine("install.sh").stdout == "can0 serial 00AB12\n"


def test_install_names_adapters_by_serial_and_keeps_what_a_person_has_set(machine, tmp_path):
    root = tmp_path / "root"
    assert machine("install.sh", "can_left=00AB12", "can_right=00CD34").returncode == 0
    rules = (root / "etc/udev/rules.d/70-simplevla-can.rules").read_text().splitlines()
    assert len(rules) == 3
    assert 'ATTRS{serial}=="00CD34", NAME="can_right"' in rules[2]
    assert '"simplevla-can@can_right.service"' in rules[2]
    assert (root / "etc/systemd/system/simplevla-can@.service").is_file()
    for word in ("can_up.sh", "bring_up.sh"):
        assert os.access(root / "usr/local/lib/simplevla" / word, os.X_OK)
    settings = root / "etc/simplevla/robot.env"
    settings.write_text("TASK=mine\n")
    assert machine("install.sh", "can_left=00EF56").returncode == 0
    assert settings.read_text() == "TASK=mine\n"
    assert len((root / "etc/udev/rules.d/70-simplevla-can.rules").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (['can_left=1", RUN+="/bin/reboot'], "is not NAME=SERIAL"),
        (["can_left=1\nRUN+=x"], "is not NAME=SERIAL"),
        (["can_left"], "is not NAME=SERIAL"),
        (["can_of_the_left_arm=1"], "is not NAME=SERIAL"),
        (["can_left=1", "can_left=2"], "a name is given twice"),
        (["can_left=1", "can_right=1"], "a serial number is given twice"),
    ],
)
def test_install_writes_nothing_that_could_end_a_rule(machine, tmp_path, words, reason):
    done = machine("install.sh", *words)
    assert done.returncode != 0
    assert reason in done.stderr
    assert not (tmp_path / "root").exists()


def test_bring_up_names_the_setting_that_is_missing(machine):
    done = machine("bring_up.sh")
    assert done.returncode != 0
    assert "ROS_SETUP is not set; see /etc/simplevla/robot.env" in done.stderr
