"""The session record: comes back as written, and lets a rig move only while it is true."""

import msgspec
import pytest

from simplevla.embodiment import Pose
from simplevla.errors import RecordError
from simplevla.session_record import (
    Check,
    SessionRecord,
    load_session_record,
    require_valid,
    save_session_record,
)

HOUR_NS = 3_600_000_000_000
SERIALS = {"head": "0123", "left": "can_left"}


def record(**changes):
    """Return a record that passed, with ``changes``."""
    good = SessionRecord(
        created_ns=1_000 * HOUR_NS,
        embodiment="piper_dual",
        serials=SERIALS,
        checks=(Check(name="hand_eye", passed=True, figures={"rms_px": 0.3}, limits={"rms_px": 0.5}),),
        camera_in_world={"head": Pose(xyz_m=(0.0, -0.45, 1.35))},
        delays_s={"head_capture": 0.031},
    )
    return msgspec.structs.replace(good, **changes)


def require(one, **changes):
    """Ask whether ``one`` lets the rig move an hour later."""
    asked = {
        "embodiment": "piper_dual",
        "serials": SERIALS,
        "now_ns": 1_001 * HOUR_NS,
        "max_age_s": 4 * 3600.0,
    }
    require_valid(one, **{**asked, **changes})


def test_a_record_comes_back_as_it_was(tmp_path):
    path = tmp_path / "session.json"
    save_session_record(record(), path)
    assert load_session_record(path) == record()


def test_a_good_record_lets_the_rig_move():
    require(record())


FAILED = Check(name="latency", passed=False)


@pytest.mark.parametrize(
    ("one", "asked", "says"),
    [
        pytest.param(record(checks=(FAILED,)), {}, "did not pass: latency", id="a check failed"),
        pytest.param(record(checks=()), {}, "no check was made", id="nothing was checked"),
        pytest.param(record(), {"now_ns": 1_010 * HOUR_NS}, "10.0 h old", id="stale"),
        pytest.param(record(), {"now_ns": 999 * HOUR_NS}, "-1.0 h old", id="from the future"),
        pytest.param(record(), {"embodiment": "piper_single"}, "not 'piper_single'", id="another robot"),
        pytest.param(
            record(), {"serials": {**SERIALS, "head": "9"}}, "for the devices", id="another camera"
        ),
    ],
)
def test_a_record_that_is_not_true_now_stops_the_rig(one, asked, says):
    with pytest.raises(RecordError, match=says) as caught:
        require(one, **asked)
    assert "simplevla calibrate" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("{", "is not valid"),
        (
            '{"created_ns": 1, "embodiment": "x", "serials": {}, "checks": [], "schema": 2, "extra": 1}',
            "extra",
        ),
        ('{"created_ns": 1, "embodiment": "x", "serials": {}, "checks": []}', "schema"),
        ('{"created_ns": 1, "embodiment": "x", "serials": {}, "checks": [], "schema": 9}', "schema 9"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path, text, says):
    path = tmp_path / "session.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecordError, match=says):
        load_session_record(path)
