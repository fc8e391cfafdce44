"""``simplevla calibrate``: show a session record. The steps that measure one are not built yet."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from simplevla.cli import Command
from simplevla.errors import NotBuiltYetError
from simplevla.session_record import SessionRecord, load_session_record

PLANNED = {
    "cameras": "intrinsics of each camera from pictures of a ChArUco board",
    "hand-eye": "where each camera stands, from board poses that an arm shows it",
    "arms": "zero, repeatability and tracking of each arm",
    "latency": "delay of each camera and each arm, on one clock",
    "session": "all of these in order, ending with a session record",
}
_EPILOG = """\
there today:
  show RECORD   print a session record, check by check; exit status 0 if it passed, else 1

planned, and refused with one line until they are built:
{planned}

A session record is one JSON file: when, for which serial numbers, which checks passed with which
figures, where cameras and arm bases stand, and how late each of them is.

example:
  simplevla calibrate show runs/session.json
"""


def describe(record: SessionRecord, *, now_ns: int) -> str:
    """Return ``record`` in words, one line a check, the verdict last."""
    lines = [
        f"session record of {record.embodiment}, {(now_ns - record.created_ns) / 3.6e12:.1f} h old",
        "devices: " + (", ".join(f"{name} {serial}" for name, serial in record.serials.items()) or "none"),
    ]
    for check in record.checks:
        figures = ", ".join(
            f"{name} {value:g}" + (f" (limit {check.limits[name]:g})" if name in check.limits else "")
            for name, value in check.figures.items()
        )
        lines.append(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {figures or 'no figures'}")
    for kind, poses in (("camera", record.camera_in_world), ("base", record.base_in_world)):
        for name, pose in poses.items():
            xyz = ", ".join(f"{value:.4f}" for value in pose.xyz_m)
            rpy = ", ".join(f"{value:.4f}" for value in pose.rpy_rad)
            lines.append(f"{kind} {name} in world: xyz ({xyz}) m, rpy ({rpy}) rad")
    lines += [f"delay {name}: {1e3 * seconds:.1f} ms" for name, seconds in record.delays_s.items()]
    failed = sum(not check.passed for check in record.checks)
    if record.passed:
        verdict = f"passed: all {len(record.checks)} checks"
    else:
        verdict = (
            f"NOT passed: {failed} of {len(record.checks)} checks failed"
            if failed
            else "NOT passed: no check"
        )
    return "\n".join([*lines, verdict])


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG.format(
        planned="\n".join(f"  {name:<12}  {text}" for name, text in PLANNED.items())
    )
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    show = steps.add_parser("show", help="print a session record, check by check")
    show.add_argument("record", type=Path, help="a session record (JSON)")
    for name, text in PLANNED.items():
        steps.add_parser(name, help=f"not built yet: {text}")


def _run(args: argparse.Namespace) -> int:
    if args.step in PLANNED:
        raise NotBuiltYetError(
            f"`calibrate {args.step}` is planned ({PLANNED[args.step]}) and not built yet",
            "until then measure by hand what config/embodiment names, and bring a robot up with "
            "override_session_record",
        )
    record = load_session_record(args.record)
    print(describe(record, now_ns=time.time_ns()))
    return 0 if record.passed else 1


CALIBRATE = Command("show a session record; its measuring steps are not built yet", _configure, _run)
