"""One description of what runs; the launch file and ``simplevla up`` both follow it."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from robot_bridge.bringup import ARGUMENTS, Process, Settings, check, environment, processes
from robot_bridge.cli import TRIAL, UP
from robot_bridge.rig import CanPort, Rig, load_rig, save_rig
from robot_bridge.stack import Stack, private
from simplevla.cli import main
from simplevla.errors import ConfigError, RecordError, SimplevlaError, UnavailableError
from simplevla.files import share_dir
from simplevla.session_record import Check, SessionRecord, save_session_record

ROOT = Path(__file__).resolve().parents[2]


def metal(folder: Path) -> str:
    """Return the path of a filled-in hardware rig."""
    rig = Rig(
        name="lab",
        embodiment="piper_dual",
        arms={"left": CanPort("socketcan", "can_left"), "right": CanPort("socketcan", "can_right")},
        cameras={"head": "012345"},
    )
    save_rig(rig, folder / "lab.yaml")
    return str(folder / "lab.yaml")


def test_arguments_and_settings_agree():
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert {argument.name for argument in ARGUMENTS} == fields
    assert all(argument.description for argument in ARGUMENTS)
    assert all(argument.default in argument.choices for argument in ARGUMENTS if argument.choices)
    defaults = Settings.from_arguments({})
    assert dataclasses.replace(defaults, out=Path()) == dataclasses.replace(Settings(), out=Path())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"record": "maybe"}, "record 'maybe'"),
        ({"backend": "abacus"}, "onnxruntime, torch"),
        ({"seed": "-1"}, "seed is '-1'"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Settings.from_arguments(values)


def test_a_twin_with_a_local_server_runs_these_processes_in_this_order():
    described = processes(
        Settings(cameras=("head",), record=True, namespace="lab", execution="real-time", horizon=3)
    )
    assert [p.name for p in described] == ["twin", "server", "arms", "recorder", "policy"]
    seen: set[str] = set()
    for process in described:
        assert seen.issuperset(process.after)
        seen.add(process.name)
    ending = [p.name for p in sorted(described, key=lambda p: p.stop_order)]
    assert ending == ["policy", "recorder", "arms", "server", "twin"]
    commands = {p.name: " ".join(p.command) for p in described}
    assert all(command.startswith(sys.executable) for command in commands.values())
    assert "-r __ns:=/lab" in commands["arms"]
    assert "-p cameras:=head" in commands["policy"]
    assert "-p task:=move_can_pot" in commands["policy"]
    assert "-p execution:=real-time -p horizon:=3" in commands["policy"]


def test_with_metal_and_a_remote_server_only_the_bridge_runs(tmp_path):
    described = processes(Settings(rig=metal(tmp_path), server="tcp://10.0.0.5:5555"))
    assert [p.name for p in described] == ["arms", "policy"]
    assert all(not p.after for p in described)
    assert "server:=tcp://10.0.0.5:5555" in " ".join(described[-1].command)


def test_twin_and_metal_do_not_share_a_ros_domain(tmp_path, monkeypatch):
    for name in ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE", "AMENT_PREFIX_PATH"):
        monkeypatch.delenv(name, raising=False)
    twin = environment(Settings(), load_rig("twin"))
    lab = environment(Settings(), load_rig(metal(tmp_path)))
    assert twin["ROS_DOMAIN_ID"] != lab["ROS_DOMAIN_ID"]
    assert twin["ROS_AUTOMATIC_DISCOVERY_RANGE"] == lab["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
    monkeypatch.setenv("ROS_DOMAIN_ID", "5")
    assert "ROS_DOMAIN_ID" not in environment(Settings(), load_rig("twin"))


def test_metal_needs_a_valid_session_record_or_an_override_by_name(tmp_path):
    settings = Settings(
        rig=metal(tmp_path), session_record=tmp_path / "session.json", server="tcp://127.0.0.1:9"
    )
    with pytest.raises(RecordError, match=r"rig lab may not move: .*override_session_record"):
        check(settings)
    good = SessionRecord(
        created_ns=time.time_ns(),
        embodiment="piper_dual",
        serials={"head": "012345"},
        checks=(Check(name="camera", passed=True),),
    )
    failed = (Check(name="camera", passed=False),)
    for record, reason in (
        (msgspec.structs.replace(good, checks=failed), "did not pass"),
        (msgspec.structs.replace(good, created_ns=good.created_ns - int(25 * 3.6e12)), "25.0 h old"),
        (msgspec.structs.replace(good, serials={"head": "other"}), "for the devices"),
    ):
        save_session_record(record, settings.session_record)
        with pytest.raises(RecordError, match=reason):
            check(settings)
    # With a good record, or without one by name, the next thing missing is the server.
    save_session_record(good, settings.session_record)
    with pytest.raises(UnavailableError, match="no policy server"):
        check(settings)
    settings.session_record.unlink()
    with pytest.raises(UnavailableError, match="no policy server"):
        check(dataclasses.replace(settings, override_session_record=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rig", "nowhere"], "unknown rig 'nowhere'"),
        (["--bundle", "{tmp}/none"], "is not a policy bundle"),
        (["--cameras", "tail"], "unknown camera 'tail'"),
        (["--task", "juggle"], "unknown task 'juggle'"),
        (["--server", "tcp://127.0.0.1:9"], "no policy server answers"),
        (["--seed", "x"], "seed is 'x'"),
        (["--horizon", "x"], "horizon is 'x'"),
        (["--horizon", "2"], "synchronous execution has no horizon"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    assert main(["up", *given]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert " -> " in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [UP, TRIAL])
def test_help_names_every_option_with_its_default_and_shows_examples(command):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    text = " ".join(parser.format_help().split())
    assert "examples:" in text
    assert "--rig" in text
    assert "default: move_can_pot" in text


def test_private_settings_meet_nobody(tmp_path):
    one = private(Settings(out=tmp_path / "one"))
    two = private(Settings(out=tmp_path / "two"))
    assert one.address != two.address
    rigs = [load_rig(settings.rig) for settings in (one, two)]
    assert rigs[0].twin != rigs[1].twin
    assert rigs[0].arms != rigs[1].arms


def small_process(name: str, code: str, **fields: object) -> Process:
    return Process(name, (sys.executable, "-c", code), {}, **fields)


SLEEPER = "import time\nprint('ready', flush=True)\ntime.sleep(60)"
NOTING = """
import signal, sys, time
def end(*_):
    open({path!r}, "a").write({name!r} + " ")
    sys.exit(0)
signal.signal(signal.SIGINT, end)
print("ready", flush=True)
time.sleep(60)
"""


def stack_of(monkeypatch, out: Path, described: list[Process]) -> Stack:
    """Return a stack of small processes in the place of the real ones."""
    monkeypatch.setattr("robot_bridge.stack.processes", lambda _: described)
    return Stack(Settings(out=out))


def test_a_stack_starts_when_ready_and_ends_in_order(tmp_path, monkeypatch):
    note = str(tmp_path / "note")
    first = small_process("first", NOTING.format(path=note, name="first"), stop_order=2)
    second = small_process(
        "second", NOTING.format(path=note, name="second"), after=("first",), stop_order=1
    )
    with stack_of(monkeypatch, tmp_path, [first, second]) as stack:
        stack.check()
        pids = [running._child.pid for running in stack._running.values()]
        assert sorted(path.name for path in stack.logs.iterdir()) == ["first.log", "second.log"]
    assert Path(note).read_text().split() == ["second", "first"]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_required_process_that_dies_is_named_with_its_log(tmp_path, monkeypatch):
    code = (
        "import time\nprint('ready', flush=True)\ntime.sleep(1)\nprint('out of luck')\nraise SystemExit(3)"
    )
    dying = small_process("dying", code)
    steady = small_process("steady", SLEEPER)
    with stack_of(monkeypatch, tmp_path, [dying, steady]) as stack:
        with pytest.raises(
            UnavailableError, match=r"dying ended with status 3: out of luck -> see .*dying\.log"
        ):
            stack.wait()
        child = stack._running["steady"]._child
    assert child.poll() is not None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no such camera')", "late ended with status 1: no such camera"),
        ("import time; time.sleep(60)", "late was not ready within 0.5 s"),
    ],
)
def test_a_stack_that_does_not_start_leaves_nothing_running(tmp_path, monkeypatch, code, message):
    described = [small_process("steady", SLEEPER), small_process("late", code, ready_timeout_s=0.5)]
    stack = stack_of(monkeypatch, tmp_path, described)
    with pytest.raises(SimplevlaError, match=message), stack:
        pytest.fail("it started")
    assert not stack._running


def test_a_process_that_ignores_every_plea_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "robot_bridge.stack._PATIENCE_S",
        ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGKILL, 3.0)),
    )
    deaf = "import signal\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\n" + SLEEPER
    with stack_of(monkeypatch, tmp_path, [small_process("deaf", deaf)]) as stack:
        child = stack._running["deaf"]._child
    assert child.returncode == -signal.SIGKILL


def launch_file() -> Path:
    return share_dir() / "launch/bringup.launch.py"


def test_the_launch_file_reads_the_same_description():
    """Without ROS's launch: it declares nothing of its own and takes everything from bringup."""
    tree = ast.parse(launch_file().read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "robot_bridge.bringup"
        for alias in node.names
    }
    assert {"ARGUMENTS", "Settings", "check", "processes"} <= imported
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    declaring = [c for c in calls if getattr(c.func, "id", "") == "DeclareLaunchArgument"]
    executing = [c for c in calls if getattr(c.func, "id", "") == "ExecuteProcess"]
    assert len(declaring) == len(executing) == 1


def ros_launch_is_here() -> bool:
    """Whether ROS's launch can be imported; our folder of that name is a namespace without modules."""
    try:
        return importlib.util.find_spec("launch.actions") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.skipif(not ros_launch_is_here(), reason="ROS 2's launch is not installed here")
def test_the_launch_file_loads_and_shows_its_arguments():
    from launch.launch_description_sources import PythonLaunchDescriptionSource

    description = PythonLaunchDescriptionSource(
        str(launch_file())
    ).try_get_launch_description_without_context()
    declared = {a.name: a for a in description.get_launch_arguments()}
    assert set(declared) == {argument.name for argument in ARGUMENTS}
    for argument in ARGUMENTS:
        assert declared[argument.name].description.startswith(argument.description)
        assert tuple(declared[argument.name].choices or ()) == argument.choices


@pytest.mark.skipif(not ros_launch_is_here(), reason="ROS 2's launch is not installed here")
def test_the_launch_file_refuses_bad_input():
    script = (
        "import sys\n"
        "from launch import LaunchDescription, LaunchService\n"
        "from launch.actions import IncludeLaunchDescription\n"
        "from launch.launch_description_sources import PythonLaunchDescriptionSource as Source\n"
        "service = LaunchService()\n"
        f"include = IncludeLaunchDescription(Source({str(launch_file())!r}),\n"
        "    launch_arguments={'rig': 'nowhere'}.items())\n"
        "service.include_launch_description(LaunchDescription([include]))\n"
        "sys.exit(service.run())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "unknown rig 'nowhere'" in done.stdout + done.stderr
