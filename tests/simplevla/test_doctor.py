"""The doctor: what each finding means to each role, and that no check takes the doctor down."""

import json
import socket

import pytest

from simplevla import doctor
from simplevla.cli import main
from simplevla.doctor import Check, Finding, describe, diagnose, probe

pytestmark = pytest.mark.by_the_clock

GOOD = Check("python", lambda: Finding(True, "3.11", "unused"), required=("laptop", "robot-pc"))
NO_CAN = Check("CAN", lambda: Finding(False, "none", "plug it in"), required=("robot-pc",))
NO_ROS2 = Check("ros2", lambda: Finding(False, "none", "use up"), useful=("laptop", "robot-pc"))


def test_a_finding_means_to_each_role_what_the_role_needs():
    report = diagnose([GOOD, NO_CAN, NO_ROS2], ["laptop", "robot-pc"])
    assert [row.status for row in report.checks] == [
        {"laptop": "ok", "robot-pc": "ok"},
        {"laptop": "-", "robot-pc": "missing"},
        {"laptop": "warn", "robot-pc": "warn"},
    ]
    assert report.complete == {"laptop": True, "robot-pc": False}


def test_a_check_that_no_asked_role_needs_is_not_made():
    def never():
        pytest.fail("asked for nothing")

    report = diagnose([GOOD, Check("GPU", never, required=("gpu-server",))], ["laptop"])
    assert [row.name for row in report.checks] == ["python"]


def test_a_check_that_raises_is_a_bad_finding_of_its_own():
    def broken():
        raise RuntimeError("boom")

    report = diagnose([Check("broken", broken, required=("laptop",)), GOOD], ["laptop"])
    assert report.checks[0].found == "RuntimeError: boom"
    assert report.complete == {"laptop": False}
    assert report.checks[1].status == {"laptop": "ok"}


def test_the_table_says_what_to_do_and_nothing_about_what_is_good():
    text = describe(diagnose([GOOD, NO_CAN], ["robot-pc"]))
    assert "CAN: plug it in" in text
    assert "unused" not in text
    assert text.endswith("robot-pc: NOT complete")


@pytest.mark.parametrize(("checks", "status"), [([GOOD], 0), ([GOOD, NO_CAN], 1), ([GOOD, NO_ROS2], 0)])
def test_the_exit_status_is_that_of_the_role(monkeypatch, capsys, checks, status):
    monkeypatch.setattr(doctor, "machine_checks", lambda: checks)
    assert main(["doctor", "--role", "robot-pc", "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] == {"robot-pc": status == 0}
    assert len(report["checks"]) == len(checks)


def test_without_a_role_one_that_the_machine_can_play_is_enough(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "machine_checks", lambda: [GOOD, NO_CAN])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "laptop: complete" in out
    assert "robot-pc: NOT complete" in out


@pytest.mark.parametrize(
    ("code", "good", "text"),
    [
        ("print('first'); print('last')", True, "last"),
        ("raise ImportError('no such library')", False, "ImportError: no such library"),
        ("import os; os.kill(os.getpid(), 6)", False, "crashed (signal 6)"),
        ("import time; time.sleep(60)", False, "no answer in 1 s"),
        ("raise SystemExit(3)", False, "exit status 3"),
    ],
)
def test_a_probe_survives_whatever_its_code_does(code, good, text):
    assert probe(code, timeout_s=1 if "sleep" in code else 30) == (good, text)


def test_an_extra_names_what_is_lacking():
    asked = ["numpy>=2", 'no-such-thing>=1; extra == "robot"', 'pyzmq>=26; extra == "robot"']
    core, robot = doctor.look_at_extra("", asked), doctor.look_at_extra("robot", asked)
    assert core.good
    assert core.found.startswith("numpy ")
    assert not robot.good
    assert robot.found == "no no-such-thing"
    assert 'pip install "simplevla[robot]"' in robot.remedy


def interface(net, name, kind, flags):
    """Write a network interface as Linux shows it below /sys/class/net."""
    (net / name).mkdir()
    (net / name / "type").write_text(f"{kind}\n")
    (net / name / "flags").write_text(f"{flags}\n")


def test_can_interfaces_are_told_from_others_and_must_be_up(tmp_path):
    interface(tmp_path, "eth7", 1, "0x1003")
    assert doctor.look_at_can(tmp_path) == Finding(False, "none", doctor.look_at_can(tmp_path).remedy)
    interface(tmp_path, "can_left", 280, "0x40041")
    assert doctor.look_at_can(tmp_path).good
    interface(tmp_path, "can_right", 280, "0x40080")
    finding = doctor.look_at_can(tmp_path)
    assert not finding.good
    assert finding.found == "can_left up, can_right down"
    assert "bitrate 1000000" in finding.remedy


def test_a_machine_without_that_folder_has_no_can(tmp_path):
    assert doctor.look_at_can(tmp_path / "none").found == "none"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_taken_port_is_named(kind):
    with socket.socket(socket.AF_INET, kind) as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            listener.listen()
        port = listener.getsockname()[1]
        finding = doctor.look_at_ports([port])
        assert not finding.good
        assert finding.found == f"taken: {port}"
    assert doctor.look_at_ports([port]).good


def test_the_ports_are_those_that_the_shipped_twin_uses():
    assert set(doctor._ports()) == {5555, 47000, 47001, 47002}


def test_a_laptop_that_runs_these_tests_can_render_and_start_a_node():
    assert doctor.look_at_rendering().good, doctor.look_at_rendering()
    assert doctor.look_at_ros().good, doctor.look_at_ros()
    assert doctor.look_at_libusb().good
    assert doctor.look_at_python().good
