"""The whole twin process: SAPIEN behind the vendors' libraries, as the bridge meets it."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from robot_bridge.drivers.choice import arm_driver, camera_driver
from robot_bridge.limits import Limiter
from robot_bridge.rig import Rig, load_rig, save_rig, with_free_ports
from robot_bridge.twin.control import GetStatus, Reset, Shutdown, TwinControl, decode_request
from robot_bridge.twin.process import Twin, _Board, _Pace
from sim_training.world import PHYSICS_DT_S
from simplevla.cli import main
from simplevla.errors import ConfigError, UnavailableError

pytestmark = pytest.mark.realtime

RUN = """
import sys
from robot_bridge.rig import load_rig
from robot_bridge.twin.process import run
from simplevla.errors import SimplevlaError
try:
    sys.exit(run(load_rig(sys.argv[1]), seed=3))
except SimplevlaError as error:
    sys.exit(str(error))
"""


def start(rig: Rig, folder: Path) -> "subprocess.Popen[str]":
    path = folder / "rig.yaml"
    save_rig(rig, path)
    return subprocess.Popen([sys.executable, "-c", RUN, str(path)], stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def rig() -> Rig:
    return with_free_ports(load_rig("twin"))


@pytest.fixture(scope="module")
def control(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwinControl]:
    assert rig.twin is not None
    process = start(rig, tmp_path_factory.mktemp("twin"))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready twin"), line
        with TwinControl(rig.twin.control, timeout_s=5.0) as control:
            yield control
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert not list(Path("/dev/shm").glob(f"{rig.twin.shared_memory}*"))
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_command_moves_the_arm_on_the_bus_and_in_the_picture(rig: Rig, control: TwinControl) -> None:
    embodiment = rig.load_embodiment()
    control.reset(5, arms_home=True)
    (left, part), (right, _) = embodiment.slices()
    with (
        camera_driver(rig, embodiment.cameras[0]) as camera,
        arm_driver(rig, left) as arm,
        arm_driver(rig, right) as other,
    ):
        arm.enable()
        before = camera.wait_newer(time.time_ns(), 3.0)
        goal = embodiment.home()
        goal[0:2] += [-0.8, 0.4]
        limiter = Limiter(embodiment)
        limiter.reset(embodiment.home())
        began_s = last_s = time.monotonic()
        while time.monotonic() - began_s < 2.5:
            measured = np.concatenate([arm.state().position, other.state().position])
            time.sleep(0.005)
            now_s = time.monotonic()
            arm.send(limiter.admit(goal, measured, now_s - last_s), part)
            last_s = now_s
        after = camera.wait_newer(time.time_ns(), 3.0)
        assert 0 <= time.time_ns() - after.capture_ns < 1e9
        np.testing.assert_allclose(arm.state().position[:6], goal[:6], atol=0.03)
        np.testing.assert_allclose(other.state().position, embodiment.home()[7:], atol=0.01)
        assert (np.abs(after.image.astype(int) - before.image) > 30).mean() > 0.01
        assert before.image.std() > 10

        where = arm.state().position
        control.reset(6)
        time.sleep(0.2)
        np.testing.assert_allclose(arm.state().position, where, atol=0.01)
        assert arm.state().enabled
        control.reset(6, arms_home=True)  # no arm moves so fast: the driver takes some cycles to believe it
        assert wait_for(lambda: np.abs(arm.state().position - embodiment.home()[part]).max() < 0.01)


@pytest.mark.slow
def test_a_reset_places_what_the_seed_says(rig: Rig, control: TwinControl) -> None:
    with camera_driver(rig, rig.load_embodiment().cameras[0]) as camera:

        def look(seed: int) -> np.ndarray:
            status = control.reset(seed, arms_home=True)
            assert (status.seed, status.success, status.time_s) == (seed, False, 0.0)
            return camera.wait_newer(time.time_ns() + 200_000_000, 5.0).image.astype(int)

        first, other, again = look(11), look(12), look(11)
    assert np.abs(first - again).max() <= 8
    assert (np.abs(first - other) > 30).mean() > 0.01


@pytest.mark.slow
def test_time_passes_and_its_pace_is_told(control: TwinControl) -> None:
    control.reset(1)
    time.sleep(1.2)
    status = control.status()
    assert status.task == "move_can_pot"
    assert 0.1 < status.time_s < 3.0
    assert 0.05 < status.real_time_factor <= 1.0
    assert 0.05 < status.real_time_factor_since_reset <= 1.0


@pytest.mark.slow
@pytest.mark.usefixtures("control")
def test_what_goes_wrong_is_asked_for_by_command(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_rig(rig, tmp_path / "rig.yaml")
    where = ["--rig", str(tmp_path / "rig.yaml")]
    embodiment = rig.load_embodiment()
    with camera_driver(rig, embodiment.cameras[0]) as camera, arm_driver(rig, embodiment.arms[0]) as arm:

        def told(*words: str, status: int = 0) -> str:
            assert main(["twin", "fault", *words, *where]) == status
            out = capsys.readouterr()
            return out.err if status else out.out

        assert told("can_silence", "left", "--seconds", "0.6") == "can_silence left\n"
        assert wait_for(lambda: arm.state().age_s > 0.3)
        assert wait_for(lambda: arm.state().age_s < 0.2)
        assert told("camera_freeze", "head") == "camera_freeze head\n"
        assert wait_for(lambda: not camera.health().streaming)
        assert told("list") == "camera_freeze head\n"
        assert told("clear") == "nothing is wrong\n"
        assert wait_for(lambda: camera.health().streaming)
        assert "name one of: left, right" in told("stuck_joint", "middle", "--joint", "1", status=2)
        assert "one joint, 1 to 6" in told("stuck_joint", "left", status=2)
        assert "an amount from 0 to 1" in told("can_drop", "left", "--amount", "7", status=2)
        assert "unknown fault 'rain'" in told("rain", "left", status=2)
        assert "nobody listens" in told("server_kill", "--server", "tcp://127.0.0.1:1", status=2)


@pytest.mark.slow
def test_faults_come_by_service_too(rig: Rig, control: TwinControl, tmp_path: Path) -> None:
    rclpy = pytest.importorskip("rclpy", reason="no ROS 2 and no ROS wheels here")
    from robot_bridge.nodes.faults import FaultsNode

    save_rig(rig, tmp_path / "rig.yaml")
    said = {
        "rig": tmp_path / "rig.yaml",
        "kind": "stuck_joint",
        "part": "right",
        "joint": 2,
        "seconds": 30.0,
    }
    given = [word for name, value in said.items() for word in ("-p", f"{name}:={value}")]
    rclpy.init(args=["--ros-args", *given])
    try:
        with FaultsNode() as node:
            node.bring_up()
            assert node.inject() == "stuck_joint right joint 2"
            assert [str(fault) for fault in control.faults().faults] == ["stuck_joint right joint 2"]
            assert node.diagnose()[0].message == "stuck_joint right joint 2"
            services = {name for name, _ in node.get_service_names_and_types_by_node("faults", "/")}
            assert services >= {"/faults/inject", "/faults/clear"}
            node.clear()
        assert control.faults().faults == ()
    finally:
        rclpy.try_shutdown()


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.slow
def test_an_impossible_request_is_refused_and_the_twin_goes_on(rig: Rig, control: TwinControl) -> None:
    import zmq

    assert rig.twin is not None
    with pytest.raises(UnavailableError, match="unknown task 'juggle'"):
        control.reset(1, task="juggle")
    with zmq.Context.instance().socket(zmq.REQ) as stranger:
        stranger.linger = 0
        stranger.connect(rig.twin.control)
        for junk in (b"", b"not json", b'{"type":"reset","seed":-1}', b'{"type":"explode"}'):
            stranger.send(junk)
            assert stranger.poll(5000)
            assert b"not a request" in stranger.recv()
    assert control.status().seed >= 0


@pytest.mark.slow
def test_a_second_twin_on_the_same_ports_is_refused(rig: Rig, control: TwinControl) -> None:
    with pytest.raises(UnavailableError, match="end the other twin"), Twin(rig):
        pass
    assert control.status().seed >= 0


def test_a_twin_that_is_not_there_is_said() -> None:
    rig = with_free_ports(load_rig("twin"))
    assert rig.twin is not None
    with TwinControl(rig.twin.control, timeout_s=0.1) as control:
        for _ in range(2):
            with pytest.raises(UnavailableError, match="does not answer"):
                control.status()


def test_a_twin_needs_a_twins_rig_and_a_known_task(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown task 'juggle'"):
        Twin(rig, task="juggle")
    text = Path("config/rig/hardware.yaml").read_text(encoding="utf-8").replace("FILL-IN", "1")
    (tmp_path / "hardware.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="not a twin's"):
        Twin(load_rig(str(tmp_path / "hardware.yaml")))


def test_requests_are_told_apart() -> None:
    assert decode_request(b'{"type":"reset","seed":4}') == Reset(seed=4)
    assert decode_request(b'{"type":"get_status"}') == GetStatus()
    assert decode_request(b'{"type":"shutdown"}') == Shutdown()


def test_a_step_that_is_made_late_does_what_was_wanted_when_it_was_due():
    pace, board = _Pace(0.0), _Board(np.zeros(1))
    for turn in range(1, 9):
        board.set_targets(np.full(1, float(turn)), 0.005 * turn - 1e-6)
    pace.stepped(3, 0.041)  # a drawing kept the rest of 40 ms up
    begins_s = pace.begins_s(4)
    assert begins_s == pytest.approx([0.012, 0.016, 0.020, 0.024])
    assert [board.targets_at(t)[0] for t in begins_s] == [2.0, 3.0, 4.0, 4.0]
    assert board.targets()[0] == 8.0
    assert board.targets_at(-1.0)[0] == 0.0


def test_a_pace_that_is_kept_is_one() -> None:
    pace = _Pace(0.0)
    for tick in range(1, 500):
        now_s = tick * PHYSICS_DT_S + 1e-4
        assert pace.owed_steps(now_s) == 1
        pace.stepped(1, now_s)
    assert pace.factor(now_s) == pytest.approx(1.0, abs=0.01)
    assert pace.recent_factor(now_s) == pytest.approx(1.0, abs=0.01)


def test_a_pace_that_is_not_kept_is_told_and_not_made_up_for() -> None:
    pace = _Pace(0.0)
    now_s = 0.0
    while now_s < 4.0:  # five steps take 40 ms: half the pace
        now_s += 0.04
        pace.stepped(min(pace.owed_steps(now_s), 5), now_s)
    assert pace.factor(now_s) == pytest.approx(0.5, abs=0.02)
    assert pace.recent_factor(now_s) == pytest.approx(0.5, abs=0.05)
    assert pace.owed_steps(now_s + 10.0) <= 0.1 / PHYSICS_DT_S + 1
