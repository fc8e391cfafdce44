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

from robot_bridge.bringup import (
    ARGUMENTS,
    TRIAL_ARGUMENTS,
    TWIN_ARGUMENTS,
    Process,
    Settings,
    check,
    check_params_file,
    environment,
    processes,
    require_twin,
    trial_process,
)
from robot_bridge.cli import TRIAL, UP
from robot_bridge.order import OUTLIVES
from robot_bridge.rig import CanPort, Rig, load_rig, save_rig
from robot_bridge.stack import Stack, private
from simplevla.cli import main
from simplevla.errors import ConfigError, RecordError, SimplevlaError, UnavailableError
from simplevla.files import share_dir
from simplevla.session_record import Check, SessionRecord, save_session_record

pytestmark = pytest.mark.by_the_clock

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
    assert [p.name for p in described] == ["twin", "server", "arms", "transforms", "recorder", "policy"]
    seen: set[str] = set()
    for process in described:
        assert seen.issuperset(process.after)
        seen.add(process.name)
    ending = [p.name for p in sorted(described, key=lambda p: p.stop_order)]
    assert ending == ["arms", "policy", "transforms", "recorder", "server", "twin"]
    outlives = {p.name: p.env[OUTLIVES] for p in described}
    assert outlives["arms"] == "policy"
    assert outlives["recorder"] == outlives["twin"] == "policy,arms"
    assert not outlives["policy"]
    commands = {p.name: " ".join(p.command) for p in described}
    assert all(command.startswith(sys.executable) for command in commands.values())
    assert "-r __ns:=/lab" in commands["arms"]
    assert "-p cameras:=head" in commands["policy"]
    assert "-p task:=move_can_pot" in commands["policy"]
    assert "-p execution:=real-time -p horizon:=3" in commands["policy"]


def test_with_metal_and_a_remote_server_only_the_bridge_runs(tmp_path):
    described = processes(Settings(rig=metal(tmp_path), server="tcp://10.0.0.5:5555"))
    assert [p.name for p in described] == ["arms", "transforms", "policy"]
    assert all(not p.after for p in described)
    assert "server:=tcp://10.0.0.5:5555" in " ".join(described[-1].command)


def test_without_a_server_arms_and_cameras_come_up_alone(tmp_path):
    settings = Settings.from_arguments(
        {"rig": metal(tmp_path), "server": "none", "arms": "left", "override_session_record": "true"}
    )
    check(settings)
    commands = {p.name: " ".join(p.command) for p in processes(settings)}
    assert sorted(commands) == ["arms", "policy", "transforms"]
    assert "-p server:=none" in commands["policy"]
    assert "task:=" not in commands["policy"]
    assert all("-p arms:=left" in command for command in commands.values())
    with pytest.raises(ConfigError, match="unknown arm 'third'"):
        check(dataclasses.replace(settings, arms=("third",)))
    with pytest.raises(ConfigError, match="no twin's"):
        check(dataclasses.replace(settings, faults=True))


def test_a_twin_offers_faults_when_asked():
    described = {p.name: p for p in processes(Settings.from_arguments({"faults": "true"}))}
    assert "-p rig:=twin" in " ".join(described["faults"].command)
    assert described["faults"].after == ("twin",)
    assert not described["faults"].required


def test_a_policy_for_two_arms_is_not_run_with_one():
    with pytest.raises(SimplevlaError, match="state names differ"):
        check(Settings(arms=("left",)))


def test_parameters_of_a_file_win_over_defaults_and_arguments_over_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("/**/arms:\n  ros__parameters:\n    max_feedback_age_s: 0.2\n")
    check_params_file(path)
    words = list(next(p for p in processes(Settings(params_file=path)) if p.name == "arms").command)
    places = [words.index(word) for word in ("max_feedback_age_s:=0.5", str(path), "rig:=twin")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "cannot be read"),
        ("", "no file of ROS 2 parameters"),
        ("/arms:\n  lead_s: 1\n", "no file of ROS 2 parameters"),
    ],
)
def test_a_file_that_holds_no_parameters_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        check(Settings(params_file=path))


def test_keys_reach_every_process_and_must_be_there(tmp_path):
    settings = Settings(keys=tmp_path, server="tcp://10.0.0.5:5555")
    assert {p.env["SIMPLEVLA_KEYS"] for p in processes(settings)} == {str(tmp_path)}
    with pytest.raises(ConfigError, match="no folder of keys"):
        check(dataclasses.replace(settings, keys=tmp_path / "none"))


def test_the_trials_of_a_launch_attach_to_what_it_has_started(tmp_path):
    settings = Settings(out=tmp_path, namespace="lab", server="tcp://127.0.0.1:5556")
    values = {argument.name: argument.default for argument in TRIAL_ARGUMENTS}
    trial = trial_process(settings, values | {"trials": "3", "operator": "maria"})
    parser = argparse.ArgumentParser()
    TRIAL.configure(parser)
    args = parser.parse_args(trial.command[trial.command.index("trial") + 1 :])
    assert (args.attach, args.trials, args.seed, args.operator) == (True, 3, 10_000, "maria")
    assert (args.namespace, args.server, args.out) == ("lab", settings.server, tmp_path / "trials")
    assert set(trial.after) == {p.name for p in processes(settings)}


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


@pytest.fixture
def quick_respawn(monkeypatch):
    """Processes that end are started again at once."""
    monkeypatch.setattr("robot_bridge.stack.DELAY_S", 0.05)


def checked(stack: Stack, condition, timeout_s: float = 20.0) -> None:
    """Check ``stack`` again and again until ``condition`` holds of the error, or of None."""
    deadline = time.monotonic() + timeout_s
    while True:
        error = None
        try:
            stack.check()
        except UnavailableError as raised:
            error = raised
        if condition(error):
            return
        assert time.monotonic() < deadline, error
        time.sleep(0.02)


@pytest.mark.usefixtures("quick_respawn")
def test_a_process_that_may_is_started_again(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    code = f"""
import pathlib, time
print("ready", flush=True)
mark = pathlib.Path({str(mark)!r})
if not mark.exists():
    mark.touch()
    time.sleep(0.3)
    raise SystemExit("stumbled")
time.sleep(60)
"""
    described = [small_process("stumbling", code, respawn=True), small_process("steady", SLEEPER)]
    with stack_of(monkeypatch, tmp_path, described) as stack:
        first = stack._running["stumbling"]._child.pid
        checked(stack, lambda error: error is not None and "stumbled" in str(error))
        checked(stack, lambda error: error is None)
        assert stack._running["stumbling"]._child.pid != first
    assert (stack.logs / "stumbling.log").read_text().split()[:3] == ["ready", "stumbled", "ready"]


@pytest.mark.usefixtures("quick_respawn")
def test_a_process_that_never_lasts_ends_the_run(tmp_path, monkeypatch):
    code = "import time\nprint('ready', flush=True)\ntime.sleep(0.2)\nraise SystemExit('again')"
    with (
        stack_of(monkeypatch, tmp_path, [small_process("falling", code, respawn=True)]) as stack,
        pytest.raises(UnavailableError, match="falling ended with status 1: again"),
    ):
        stack.wait()
    assert (stack.logs / "falling.log").read_text().split() == ["ready", "again"] * 4


def test_a_process_that_ignores_every_plea_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "robot_bridge.stack._PATIENCE_S",
        ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGKILL, 3.0)),
    )
    deaf = "import signal\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\n" + SLEEPER
    with stack_of(monkeypatch, tmp_path, [small_process("deaf", deaf)]) as stack:
        child = stack._running["deaf"]._child
    assert child.returncode == -signal.SIGKILL


LAUNCH_FILES = {
    "bringup": ARGUMENTS,
    "twin": TWIN_ARGUMENTS,
    "trial": ARGUMENTS + TRIAL_ARGUMENTS,
}


def launch_file(name: str) -> Path:
    return share_dir() / f"launch/{name}.launch.py"


def test_twin_launch_takes_no_robot(tmp_path):
    require_twin(Settings(rig="twin_single"))
    with pytest.raises(ConfigError, match="no twin's"):
        require_twin(Settings(rig=metal(tmp_path)))


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_a_launch_file_reads_the_same_description(name):
    """Without ROS's launch: it declares nothing of its own and takes everything from bringup."""
    tree = ast.parse(launch_file(name).read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module in ("robot_bridge.bringup", "robot_bridge.launching")
        for alias in node.names
    }
    assert {"Settings", "bring_up", "declared", "given"} <= imported
    assert any(word.endswith("ARGUMENTS") for word in imported)
    called = {getattr(node.func, "id", "") for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"DeclareLaunchArgument", "ExecuteProcess", "Node"}


def ros_launch_is_here() -> bool:
    """Whether ROS's launch can be imported; our folder of that name is a namespace without modules."""
    try:
        return importlib.util.find_spec("launch.actions") is not None
    except ModuleNotFoundError:
        return False


needs_launch = pytest.mark.skipif(not ros_launch_is_here(), reason="ROS 2's launch is not installed here")


@needs_launch
@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_a_launch_file_loads_and_shows_its_arguments(name):
    from launch.launch_description_sources import PythonLaunchDescriptionSource

    source = PythonLaunchDescriptionSource(str(launch_file(name)))
    declared = {
        a.name: a for a in source.try_get_launch_description_without_context().get_launch_arguments()
    }
    assert set(declared) == {argument.name for argument in LAUNCH_FILES[name]}
    for argument in LAUNCH_FILES[name]:
        assert declared[argument.name].description.startswith(argument.description)
        assert tuple(declared[argument.name].choices or ()) == argument.choices


def launched(
    name: str, arguments: dict[str, str], patch: str = "", *, end_on: str = "\0"
) -> subprocess.CompletedProcess[str]:
    """Run a launch file as ``ros2 launch`` does without a terminal; interrupt it at ``end_on``."""
    script = (
        "import sys\n"
        "from launch import LaunchDescription, LaunchService\n"
        "from launch.actions import IncludeLaunchDescription\n"
        "from launch.launch_description_sources import PythonLaunchDescriptionSource as Source\n"
        f"{patch}\n"
        "service = LaunchService(noninteractive=True)\n"
        f"include = IncludeLaunchDescription(Source({str(launch_file(name))!r}),\n"
        f"    launch_arguments={arguments!r}.items())\n"
        "service.include_launch_description(LaunchDescription([include]))\n"
        "sys.exit(service.run())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = ""
    try:
        for line in process.stdout:
            said += line
            if end_on in line:
                process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, said)


@needs_launch
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bringup", {"rig": "nowhere"}, "unknown rig 'nowhere'"),
        ("twin", {"task": "juggle"}, "unknown task 'juggle'"),
        ("trial", {"arms": "third"}, "unknown arm 'third'"),
    ],
)
def test_a_launch_file_refuses_bad_input(name, arguments, message):
    done = launched(name, arguments)
    assert done.returncode != 0
    assert message in done.stdout


@needs_launch
def test_a_launch_starts_in_order_starts_again_and_ends_on_ctrl_c(tmp_path):
    mark = tmp_path / "mark"
    stumbling = (
        f"import pathlib, time; mark = pathlib.Path({str(mark)!r}); here = mark.exists(); mark.touch()\n"
        "print('ready', flush=True); time.sleep(60 if here else 0.3)"
    )
    last = "import time; print('ready, all of us', flush=True); time.sleep(60)"
    patch = (
        "import robot_bridge.launching as launching\n"
        "from robot_bridge.bringup import Process\n"
        "launching.check = lambda _: None\n"
        f"first = Process('first', (sys.executable, '-c', {stumbling!r}), {{}}, respawn=True)\n"
        f"second = Process('second', (sys.executable, '-c', {last!r}), {{}}, after=('first',))\n"
        "launching.processes = lambda _: [first, second]\n"
    )
    done = launched("bringup", {}, patch, end_on="it is started again")
    assert done.stdout.index("[first-1]: process started") < done.stdout.index("[second-")
    assert "first has ended with status 0: it is started again" in done.stdout
    assert done.returncode == 0, done.stdout
