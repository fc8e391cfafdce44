"""``simplevla calibrate``: five minutes before each session, and numbers one can rely on."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from simplevla.cli import Command, require_choice, whole_number
from simplevla.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from calibration.session import Job
    from calibration.settings import Settings
    from simplevla.session_record import Check, SessionRecord

_EPILOG = """\
examples; before each session, on the robot PC:
  simplevla calibrate board --out board.pdf       once: print it, glue it on its wedge
  simplevla calibrate session                     all that is due, guided: may the robot move today?
  simplevla calibrate check                       under a minute: is the last calibration still true?

one part alone, live or from recorded data (--samples): intrinsics, hand-eye, arms, latency, scene
  simplevla calibrate hand-eye --samples DIR --setup eye-to-hand --json out.json
  simplevla calibrate latency --samples runs/calibration/swing_right_head.npz

a second opinion on where the arms' bases stand: touch, then arms --touches FILE

to look at: show RECORD (exit status 0 if it passed, else 1), report

without a robot: add --twin. docs/calibration.md says what each figure means, and what to do when a
check fails.
"""
_LIVE = {
    "intrinsics": "lens of each camera, from a board that an arm shows",
    "hand-eye": "where each camera stands, and the arms' bases",
    "arms": "joint zeros, errors at rest, the gripper's stroke, base to base",
    "latency": "how late cameras and arms are, by moving and watching",
    "scene": "the table's plane, and the simulator's scene with everything where it is",
    "check": "the quick one: is the last calibration still true?",
    "session": "all that is due, in order, ending with a session record",
}
_RECORD, _TWIN_RECORD = Path("runs/session.json"), Path("runs/session_twin.json")


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
    for arm, zeros in record.joint_zeros_rad.items():
        degrees = ", ".join(f"{57.29577951308232 * value:.3f}" for value in zeros)
        lines.append(f"joint zeros {arm}: {degrees} deg")
    lines += [f"delay {name}: {1e3 * seconds:.1f} ms" for name, seconds in record.delays_s.items()]
    if record.table_top_m is not None:
        lines.append(f"table top: {record.table_top_m:.4f} m")
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
    parser.epilog = _EPILOG
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    board = steps.add_parser("board", help="print the ChArUco board as PDF or PNG, at true scale")
    board.add_argument("--out", type=Path, default=Path("board.pdf"), help="file (default: board.pdf)")
    board.add_argument("--paper", default="a4", help="a4, a3 or letter (default: a4)")
    board.add_argument("--board", type=Path, help="its description, YAML (default: that of the settings)")
    board.add_argument(
        "--settings", type=Path, help="calibration settings (default: config/calibration.yaml)"
    )
    for name, text in _LIVE.items():
        step = steps.add_parser(name, help=text, description=text)
        _add_live(step)
        step.add_argument(
            "--samples",
            type=Path,
            action="append",
            default=[],
            help="from recorded data instead of a robot; of two arms give it twice",
        )
        if name == "hand-eye":
            step.add_argument(
                "--setup",
                choices=["eye-to-hand", "eye-in-hand"],
                default="eye-to-hand",
                help="with --samples: whether the camera stands or rides on the arm (default: eye-to-hand)",
            )
            step.add_argument(
                "--json", type=Path, metavar="FILE", help="with --samples: write the result here"
            )
        if name == "arms":
            step.add_argument(
                "--touches", type=Path, help="points that both arms touched, YAML: left, right"
            )
        if name == "scene":
            step.add_argument("--overlay", action="store_true", help="draw the scene over the live picture")
    text = "points that both arms touch, led there by hand, for: arms --touches"
    touch = steps.add_parser("touch", help=text, description=text)
    touch.add_argument("--rig", default="hardware", help="name of a rig, or a path to a .yaml file")
    touch.add_argument("--record", type=Path, help=f"session record, for joint zeros (default: {_RECORD})")
    touch.add_argument(
        "--out", type=Path, help="folder for touches.yaml (default: runs/calibration_<time>)"
    )
    touch.add_argument(
        "--points", type=whole_number(3, 50), default=5, metavar="N", help="how many (default: 5)"
    )
    show = steps.add_parser("show", help="print a session record, check by check")
    show.add_argument("record", type=Path, nargs="?", default=_RECORD, help=f"(default: {_RECORD})")
    report = steps.add_parser("report", help="the record and its drift over the sessions, as HTML")
    report.add_argument("record", type=Path, nargs="?", default=_RECORD, help=f"(default: {_RECORD})")
    report.add_argument("--out", type=Path, help="file (default: beside the record)")


def _add_live(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--twin", action="store_true", help="on a twin of its own, unattended")
    where.add_argument("--rig", default="hardware", help="name of a rig, or a path to a .yaml file")
    parser.add_argument(
        "--record", type=Path, help=f"session record (default: {_RECORD}, with --twin {_TWIN_RECORD})"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for samples and logs (default: runs/calibration_<time>)"
    )
    parser.add_argument(
        "--settings", type=Path, help="calibration settings (default: config/calibration.yaml)"
    )
    parser.add_argument("--arm", default="", help="only this arm; for check: which arm shows the board")
    parser.add_argument(
        "--lens", action="append", default=[], metavar="CAMERA=FILE", help="a measured lens (camera.yaml)"
    )
    parser.add_argument(
        "--poses", type=whole_number(6, 200), metavar="N", help="poses of each arm (default: the settings')"
    )
    parser.add_argument("--metal", type=Path, metavar="FILE", help="how the twin differs; see: twin --help")
    parser.add_argument("--no-window", action="store_true", help="pictures go to preview.png alone")


def _run(args: argparse.Namespace) -> int:
    alone = {"board": _board, "show": _show, "report": _report, "touch": _touch}.get(args.step)
    if alone is not None:
        return alone(args)
    if args.samples and args.step == "hand-eye":
        from calibration.hand_eye_command import run

        return run(args)
    if not args.samples and (getattr(args, "json", None) or getattr(args, "setup", "") == "eye-in-hand"):
        raise ConfigError(
            "--json and --setup eye-in-hand are for recorded data: the bridge drives cameras that stand",
            "give --samples; docs/calibration.md describes the format",
        )
    return _verdict(_offline(args)) if args.samples else _live(args)


def _show(args: argparse.Namespace) -> int:
    from simplevla.session_record import load_session_record

    record = load_session_record(args.record)
    print(describe(record, now_ns=time.time_ns()))
    return 0 if record.passed else 1


def _report(args: argparse.Namespace) -> int:
    from calibration.report import write_report

    out = args.out or args.record.with_suffix(".html")
    write_report(args.record, out)
    print(out)
    return 0


def _board(args: argparse.Namespace) -> int:
    from calibration.board import load_board, print_board

    board = load_board(args.board) if args.board else _settings(args).board
    print_board(board, args.out, paper=args.paper)
    print(f"{args.out}: {board.describe()}; print it at 100 % and measure the bar")
    return 0


def _touch(args: argparse.Namespace) -> int:
    from calibration.session import Job, run_touch
    from calibration.settings import load_settings
    from robot_bridge.rig import load_rig
    from robot_bridge.stack import interruptible

    job = Job(
        rig=load_rig(args.rig),
        settings=load_settings(),
        path=args.record or _RECORD,
        folder=args.out or _run_folder(),
        say=print,
        window=False,
    )
    with interruptible():
        print(run_touch(job, args.points))
    return 0


def _live(args: argparse.Namespace) -> int:
    from calibration import session
    from calibration.steps.touch import Touches
    from robot_bridge.stack import interruptible
    from simplevla.config import load_yaml

    job = _job(args)
    began_s = time.monotonic()
    with interruptible():
        match args.step:
            case "session":
                record = session.run_session(job)
                print(describe(record, now_ns=time.time_ns()))
                print(f"written to {job.path} ({time.monotonic() - began_s:.0f} s)")
                return 0 if record.passed else 1
            case "check":
                checks = session.run_check(job, args.arm)
            case "intrinsics":
                checks = session.run_intrinsics(job, args.arm)
            case _:
                touches = None
                if getattr(args, "touches", None):
                    touches = load_yaml(args.touches, Touches)
                checks = session.run_step(
                    job,
                    args.step,
                    args.arm,
                    overlaid=getattr(args, "overlay", False),
                    touches=touches,
                )
    print(f"{args.step}: {time.monotonic() - began_s:.0f} s")
    return _verdict(checks)


def _offline(args: argparse.Namespace) -> list[Check]:
    from calibration import offline
    from robot_bridge.rig import load_rig
    from simplevla.session_record import load_session_record

    if args.step == "session":
        raise ConfigError(
            "a whole session needs a robot or its twin", "give --twin, or one step's --samples"
        )
    settings = _settings(args)
    path: Path = args.samples[0]
    if args.step == "intrinsics":
        from calibration.camera import save_camera

        camera, check = offline.intrinsics(path, settings)
        if args.out:
            save_camera(camera, args.out / "camera.yaml")
        return [check]
    if args.step == "latency":
        return [offline.latency(each, settings) for each in args.samples]
    embodiment = load_rig("twin" if args.twin else args.rig).load_embodiment()
    if args.step == "arms":
        return offline.bases(args.samples, settings, embodiment, args.touches)
    record = load_session_record(_record_path(args))
    first = embodiment.cameras[0].name
    if args.step == "scene":
        return [offline.scene(path, settings, record, first)]
    name = require_choice(
        "arm", args.arm or embodiment.arms[-1].name, [arm.name for arm in embodiment.arms]
    )
    arm = next(each for each in embodiment.arms if each.name == name)
    return [offline.check(path, settings, record, arm, first)]


def _verdict(checks: list[Check]) -> int:
    from calibration.steps.checks import one_line

    for check in checks:
        print(one_line(check))
    passed = bool(checks) and all(check.passed for check in checks)
    print("passed" if passed else "NOT passed: see docs/calibration.md for what to do")
    return 0 if passed else 1


def _job(args: argparse.Namespace) -> Job:
    from calibration.camera import load_camera
    from calibration.session import Job
    from robot_bridge.rig import load_rig

    rig = load_rig("twin" if args.twin else args.rig)
    metal = None
    if args.metal is not None:
        from robot_bridge.twin.metal import Metal
        from simplevla.config import load_yaml

        if not rig.is_twin:
            raise ConfigError("--metal is for a twin", "leave it out, or give --twin")
        metal = load_yaml(args.metal, Metal)
    lenses = {}
    for each in args.lens:
        name, _, path = each.partition("=")
        rig.load_embodiment().camera(name)
        lenses[name] = load_camera(Path(path))
    return Job(
        rig=rig,
        settings=_settings(args),
        path=_record_path(args),
        folder=args.out or _run_folder(),
        say=_teller(),
        metal=metal,
        window=False if args.no_window or rig.is_twin else None,
        lenses=lenses,
    )


def _run_folder() -> Path:
    return Path("runs") / time.strftime("calibration_%Y-%m-%d_%H-%M-%S")


def _settings(args: argparse.Namespace) -> Settings:
    import msgspec

    from calibration.settings import load_settings

    settings = load_settings(args.settings)
    poses = getattr(args, "poses", None)
    return msgspec.structs.replace(settings, poses=poses) if poses else settings


def _record_path(args: argparse.Namespace) -> Path:
    path: Path = args.record or (_TWIN_RECORD if args.twin else _RECORD)
    return path


def _teller() -> Callable[[str], None]:
    """Return what prints a line: in colour on a terminal, plain in a log."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    styles = {"pass": "green", "FAIL": "bold red"}

    def tell(line: str) -> None:
        console.print(Text(line, style=styles.get(line[:4], "")))

    return tell


CALIBRATE = Command(
    "find where cameras and arms are and how late, and whether the robot may move", _configure, _run
)
