"""``simplevla calibrate``: shows a record truly, and refuses what is not built."""

import pytest

from calibration.cli import PLANNED
from simplevla.cli import main
from simplevla.embodiment import Pose
from simplevla.session_record import Check, SessionRecord, save_session_record

GOOD = Check(name="hand_eye", passed=True, figures={"rms_px": 0.31, "poses": 15.0}, limits={"rms_px": 0.5})
BAD = Check(name="latency", passed=False, figures={"jitter_ms": 12.5}, limits={"jitter_ms": 5.0})


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
    one = SessionRecord(
        created_ns=1,
        embodiment="piper_dual",
        serials={"head": "0123"},
        checks=checks,
        camera_in_world={"head": Pose(xyz_m=(0.0, -0.45, 1.35))},
        delays_s={"head_capture": 0.031},
    )
    save_session_record(one, path)
    assert main(["calibrate", "show", str(path)]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == verdict
    assert (
        "camera head in world: xyz (0.0000, -0.4500, 1.3500) m, rpy (0.0000, 0.0000, 0.0000) rad" in lines
    )
    assert "delay head_capture: 31.0 ms" in lines
    assert ("pass  hand_eye: rms_px 0.31 (limit 0.5), poses 15" in lines) == (GOOD in checks)
    assert ("FAIL  latency: jitter_ms 12.5 (limit 5)" in lines) == (BAD in checks)


@pytest.mark.parametrize("step", list(PLANNED))
def test_a_planned_step_says_that_it_is_not_built(capsys, step):
    assert main(["calibrate", step]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.count("\n") == 1
    assert "not built yet" in out.err
