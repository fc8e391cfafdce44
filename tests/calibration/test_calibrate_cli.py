"""``simplevla calibrate``: shows a record truly, writes its report, and says in one line what is wrong."""

import msgspec
import pytest

from simplevla.cli import main
from simplevla.embodiment import Pose
from simplevla.session_record import Check, SessionRecord, save_session_record

GOOD = Check(name="hand_eye", passed=True, figures={"rms_px": 0.31, "poses": 15.0}, limits={"rms_px": 0.5})
BAD = Check(name="latency", passed=False, figures={"jitter_ms": 12.5}, limits={"jitter_ms": 5.0})


def record(checks=(GOOD,), **changes):
    one = SessionRecord(
        created_ns=10**18,
        embodiment="piper_dual",
        serials={"head": "0123"},
        checks=checks,
        camera_in_world={"head": Pose(xyz_m=(0.0, -0.45, 1.35))},
        joint_zeros_rad={"right": (0.0, 0.0, 0.01, 0.0, 0.0, 0.0)},
        covariances={"camera head": tuple(1e-8 * (i % 7 == 0) for i in range(36))},
        delays_s={"head_capture": 0.031},
    )
    return msgspec.structs.replace(one, **changes)


@pytest.mark.parametrize(
    ("checks", "status", "verdict"),
    [
        ((GOOD,), 0, "passed: all 1 checks"),
        ((GOOD, BAD), 1, "NOT passed: 1 of 2 checks failed"),
        ((), 1, "NOT passed: no check"),
    ],
)
def test_show_prints_every_check_and_ends_with_the_verdict(tmp_path, capsys, checks, status, verdict):
    path = tmp_path / "session.json"
    save_session_record(record(checks), path)
    assert main(["calibrate", "show", str(path)]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == verdict
    assert (
        "camera head in world: xyz (0.0000, -0.4500, 1.3500) m, rpy (0.0000, 0.0000, 0.0000) rad" in lines
    )
    assert "delay head_capture: 31.0 ms" in lines
    assert "joint zeros right: 0.000, 0.000, 0.573, 0.000, 0.000, 0.000 deg" in lines
    assert ("pass  hand_eye: rms_px 0.31 (limit 0.5), poses 15" in lines) == (GOOD in checks)
    assert ("FAIL  latency: jitter_ms 12.5 (limit 5)" in lines) == (BAD in checks)


def test_the_report_shows_the_last_record_and_how_it_came_to_that(tmp_path, capsys):
    path = tmp_path / "session.json"
    moved = {"head": Pose(xyz_m=(0.003, -0.45, 1.35))}
    other = record(created_ns=10**18 - 10**9, serials={"head": "<another>"})
    for one in (
        other,
        record(),
        record((GOOD, BAD), created_ns=10**18 + 10**14, camera_in_world=moved),
    ):
        save_session_record(one, path)
    assert main(["calibrate", "report", str(path)]) == 0
    page = (tmp_path / "session.html").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "session.html")
    assert "not passed" in page
    assert "jitter_ms" in page
    assert "Over 2 sessions" in page  # the other camera's session is not this rig's
    assert "0.10 mm" in page  # the camera's largest standard deviation
    assert page.count("data:image/png") >= 4


def test_a_report_shows_what_names_hold_as_text(tmp_path):
    path = tmp_path / "session.json"
    save_session_record(record((Check(name="<script>x</script>", passed=True),)), path)
    assert main(["calibrate", "report", str(path)]) == 0
    assert "<script>" not in (tmp_path / "session.html").read_text()


def test_a_board_is_printed_as_the_settings_describe_it(tmp_path, capsys):
    out = tmp_path / "board.pdf"
    assert main(["calibrate", "board", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"%PDF")
    assert "5 x 4 squares of 36.00 mm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "{tmp}/none.json"], "cannot be read"),
        (["report", "{tmp}/none.json"], "cannot be read"),
        (["session"], "fill in the serial number"),
        (["check", "--twin", "--record", "{tmp}/none.json"], "cannot be read"),
        (["session", "--rig", "nowhere"], "unknown rig 'nowhere'"),
        (["session", "--samples", "{tmp}"], "needs a robot or its twin"),
        (["latency", "--samples", "{tmp}/none.npz"], "is no recorded swing"),
        (["intrinsics", "--samples", "{tmp}"], "board.yaml"),
        (["session", "--twin", "--settings", "{tmp}/none.yaml"], "cannot be read"),
        (["hand-eye", "--twin", "--arm", "third"], "unknown arm 'third'"),
        (["hand-eye", "--twin", "--setup", "eye-in-hand"], "are for recorded data"),
        (["touch", "--rig", "twin"], "touching takes a robot"),
        (["arms", "--twin", "--touches", "{tmp}/none.yaml"], "cannot be read"),
        (["session", "--metal", "{tmp}/metal.yaml", "--rig", "{tmp}/lab.yaml"], "--metal is for a twin"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rig = {
        "name": "lab",
        "embodiment": "piper_single",
        "arms": {"right": {"interface": "socketcan", "channel": "can0"}},
        "cameras": {"head": "1"},
    }
    (tmp_path / "lab.yaml").write_bytes(msgspec.yaml.encode(rig))
    before = sorted(tmp_path.iterdir())
    assert main(["calibrate", *(word.replace("{tmp}", str(tmp_path)) for word in arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert " -> " in said[0]
    assert sorted(tmp_path.iterdir()) == before
