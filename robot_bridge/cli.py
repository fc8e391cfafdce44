"""``simplevla up``, ``trial``, ``twin``, ``estop`` and ``recording``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from robot_bridge.bringup import ARGUMENTS, EXECUTIONS, LOCAL, Settings
from simplevla.cli import Command, whole_number
from simplevla.errors import RecordError

_UP_EPILOG = """\
Starts, in order and each when what it needs is ready: the twin (for a twin's rig), the policy server
(unless --server names one), the nodes of the arms, of transforms and of the policy. Logs go to the run's
folder. What dies is started again, at most three times in two minutes; arms that come back are off. On
Ctrl-C the arms brake and hold at once; the twin ends last. Motors are off until you enable the arms:

  ros2 service call /arms/enable std_srvs/srv/Trigger
  ros2 service call /arms/go_home std_srvs/srv/Trigger
  ros2 service call /policy/start std_srvs/srv/Trigger
  simplevla estop                                          the arms' own damped stop, by a key

The twin uses ROS_DOMAIN_ID 77 unless you set another, so that it never meets a robot.

examples:
  simplevla up                                             twin and policy server on this machine
  simplevla up --rig my_rig.yaml --server tcp://127.0.0.1:5555
  simplevla up --record true --log-level debug
  simplevla up --rig my_rig.yaml --server none --arms left   one arm, and cameras, without a policy
"""
_TRIAL_EPILOG = """\
Makes trials of a policy, judges and records each, and writes a report. It starts everything that it
needs on ports of its own, and ends it again. On the twin the simulation judges; on a robot you do.
The folder of the run gets: one MCAP a trial, index.json, report.html, and logs.

examples:
  simplevla trial --twin                                   five trials on the twin
  simplevla trial --twin --trials 20 --seed 500 --out runs/twenty
  simplevla trial --rig my_rig.yaml --server tcp://127.0.0.1:5555 --operator maria
  simplevla trial --rig twin --attach                      with a stack that `simplevla up` has started
"""
_TWIN_EPILOG = """\
One simulated world that answers on the rig's CAN ports as Pipers do and feeds its cameras' frames to
the RealSense SDK. `simplevla up` and `simplevla trial --twin` start it themselves; run it alone to try
a driver or a node by hand. Prints one line that starts with "ready". Ctrl-C ends it.

examples:
  simplevla twin
  simplevla twin --rig twin_single --seed 3
  simplevla twin --metal metal.yaml --frame-rates vendor
  simplevla twin fault can_silence left --seconds 0.5     something goes wrong on a twin that runs
  simplevla twin fault clear
  simplevla twin fit runs/five/trial_000 --out metal.yaml
"""
_ESTOP_EPILOG = """\
Waits for a key, and stops all arms at each but q: their own damped stop, motors on, latched. It asks the
arms' node, which listens in a thread of its own; if that does not confirm within 0.3 s, the stop is sent
straight to every arm's bus; with --now it goes there first. To go on: support the arms, reset them (which
cuts their power), enable them. The same by a topic, for a button: std_msgs/Bool true on estop; by a
service: arms/estop.

examples:
  simplevla estop                                          for the twin, in its ROS domain
  simplevla estop --rig /etc/simplevla/rig.yaml
  simplevla estop --rig /etc/simplevla/rig.yaml --now      without a key; exit status 0 if it was done
"""
_RECORDING_EPILOG = """\
A recording that was cut lies in the run's folder, in interrupted/. recover writes what can be read of it
to its place in the run's folder, as a whole recording; what was interrupted stays where it is.

examples:
  simplevla recording recover runs/2026-11-25_10-00-00
  simplevla recording recover runs/2026-11-25_10-00-00/interrupted/trial_003
  simplevla recording show runs/2026-11-25_10-00-00/trial_000
"""


def _configure_up(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _UP_EPILOG
    for argument in ARGUMENTS:
        parser.add_argument(
            f"--{argument.name.replace('_', '-')}",
            # The command's own --log-level comes before its name and must not be overwritten here.
            default=argparse.SUPPRESS,
            choices=argument.choices or None,
            metavar=None if argument.choices else argument.name.upper(),
            help=f"{argument.description} (default: {argument.default or 'empty'})",
        )


def _up(args: argparse.Namespace) -> int:
    from robot_bridge.stack import run_up

    given = {name: value for name, value in vars(args).items() if isinstance(value, str)}
    return run_up(Settings.from_arguments(given))


def _configure_trial(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _TRIAL_EPILOG
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--twin", action="store_true", help="on the twin, the same as --rig twin (the default)"
    )
    where.add_argument(
        "--rig", default="twin", help="name of a rig in config/rig, or a path to a .yaml file"
    )
    parser.add_argument("--task", default="move_can_pot", help="what to try (default: move_can_pot)")
    parser.add_argument(
        "--bundle", type=Path, help="folder of the policy bundle (default: bundles/<task> that ships)"
    )
    parser.add_argument(
        "--trials", type=whole_number(1, 10_000), default=5, metavar="N", help="how many (default: 5)"
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**31 - 1),
        default=10_000,
        metavar="N",
        help="of the first trial; the next have the seeds that follow (default: 10000)",
    )
    parser.add_argument(
        "--step-limit",
        type=whole_number(1, 100_000),
        default=200,
        metavar="N",
        help="actions after which a trial has failed (default: 200)",
    )
    parser.add_argument(
        "--server",
        default=LOCAL,
        metavar="ADDRESS",
        help=f"'{LOCAL}' starts a policy server; an address uses one that runs (default: {LOCAL})",
    )
    parser.add_argument(
        "--backend",
        default="onnxruntime",
        choices=["onnxruntime", "torch"],
        help="what computes the network in a local server (default: onnxruntime)",
    )
    parser.add_argument(
        "--execution",
        default="synchronous",
        choices=EXECUTIONS,
        help="how chunks become motion, see docs/chunk_execution.md (default: synchronous)",
    )
    parser.add_argument(
        "--horizon",
        type=whole_number(0, 512),
        default=0,
        metavar="N",
        help="actions played of each answer, receding or real-time; 0: as the mode has it (default: 0)",
    )
    parser.add_argument(
        "--attach", action="store_true", help="use the stack that `simplevla up` has started"
    )
    parser.add_argument("--namespace", default="", help="ROS namespace of the stack (default: none)")
    parser.add_argument(
        "--session-record",
        type=Path,
        default=Settings.session_record,
        help=f"the last calibration's record, for metal (default: {Settings.session_record})",
    )
    parser.add_argument(
        "--override-session-record", action="store_true", help="move metal without a valid session record"
    )
    parser.add_argument("--operator", default="", help="who makes the trials (default: your user name)")
    parser.add_argument("--out", type=Path, help="folder of the run, new or empty (default: runs/<time>)")


def _trial(args: argparse.Namespace) -> int:
    from robot_bridge.trial_plan import TrialSettings
    from robot_bridge.trials import run_trials

    names = {field.name for field in dataclasses.fields(TrialSettings)}
    values = {name: value for name, value in vars(args).items() if name in names}
    values["server"] = None if args.server == LOCAL else args.server
    return run_trials(TrialSettings(**values))


def _configure_twin(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _TWIN_EPILOG
    parser.add_argument("--rig", default="twin", help="name of a twin's rig, or a path to a .yaml file")
    parser.add_argument("--task", help="the scene at the start (default: the rig's)")
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="decides the first scene (default: 0)",
    )
    parser.add_argument(
        "--metal",
        type=Path,
        metavar="FILE",
        help="how the metal differs from the embodiment, YAML: camera_in_world, joint_zeros_rad, "
        "command_delays_s, feedback_delays_s, jitters_s, noises_rad, responses, stamp_offsets_s, "
        "deliveries_s, plate (default: not at all)",
    )
    parser.add_argument(
        "--frame-rates",
        choices=["light", "vendor"],
        default="light",
        help="how often the arms speak: as the metal, 3040 frames a second each, or what is needed of it "
        "(default: light)",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    _configure_fault(actions.add_parser("fault", help="let something go wrong on a twin that runs"))
    fit = actions.add_parser("fit", help="find from a recorded trial how an arm's joints follow")
    fit.epilog = "Writes what simplevla twin --metal takes: dead time, frequency and damping of each joint."
    fit.add_argument("log", type=Path, metavar="LOG", help="folder of a trial's recording, or its MCAP")
    fit.add_argument("--rig", default=argparse.SUPPRESS, help="whose trial it is (default: twin)")
    fit.add_argument(
        "--out", type=Path, default=Path("metal.yaml"), help="file to write (default: metal.yaml)"
    )


def _configure_fault(parser: argparse.ArgumentParser) -> None:
    from robot_bridge.twin.faults import AMOUNTS, EXPLAINED

    width = max(len(kind.value) for kind in EXPLAINED)
    lines = [
        f"  {kind.value:{width}}  {text}{' (an amount)' if kind in AMOUNTS else ''}"
        for kind, text in EXPLAINED.items()
    ]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "kinds:\n" + "\n".join(lines) + "\n  clear: end every fault;  list: what is wrong now"
    parser.add_argument("kind", metavar="KIND", help="what goes wrong, see below; or: clear, list")
    parser.add_argument("part", metavar="PART", nargs="?", default="", help="the arm or the camera")
    parser.add_argument(
        "--joint", type=whole_number(1, 6), default=0, metavar="N", help="which joint of the arm, from 1"
    )
    parser.add_argument("--amount", type=float, metavar="X", help="how much, for the kinds that have it")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="how long (default: until it is cleared)"
    )
    parser.add_argument("--rig", default=argparse.SUPPRESS, help="the twin's rig (default: twin)")
    parser.add_argument(
        "--server",
        default="tcp://127.0.0.1:5555",
        metavar="ADDRESS",
        help="the policy server, for its faults (default: tcp://127.0.0.1:5555)",
    )


def _twin(args: argparse.Namespace) -> int:
    if args.action == "fault":
        return _fault(args)
    if args.action == "fit":
        return _fit(args)
    from robot_bridge.rig import load_rig
    from robot_bridge.twin import process
    from robot_bridge.twin.metal import Metal
    from robot_bridge.twin.piper_emulator import VENDOR_RATES
    from simplevla.config import load_yaml

    metal = load_yaml(args.metal, Metal) if args.metal else None
    rates = VENDOR_RATES if args.frame_rates == "vendor" else None
    return process.run(load_rig(args.rig), task=args.task, seed=args.seed, metal=metal, rates=rates)


def _fault(args: argparse.Namespace) -> int:
    from robot_bridge.rig import load_rig
    from robot_bridge.twin.control import TwinControl
    from robot_bridge.twin.faults import SERVER_KINDS, Fault, FaultKind
    from robot_bridge.twin.server_faults import harm_server
    from simplevla.errors import ConfigError

    rig = load_rig(args.rig)
    if rig.twin is None:
        raise ConfigError(f"rig {rig.name!r} is not a twin's", "faults are injected on the twin alone")
    with TwinControl(rig.twin.control) as control:
        if args.kind in ("clear", "list"):
            found = control.clear_faults() if args.kind == "clear" else control.faults()
        else:
            known = [kind.value for kind in FaultKind]
            if args.kind not in known:
                raise ConfigError(f"unknown fault {args.kind!r}", f"choose one of: {', '.join(known)}")
            kind = FaultKind(args.kind)
            fault = Fault(
                kind=kind, part=args.part, joint=args.joint, amount=args.amount, seconds=args.seconds
            )
            fault.check(rig.load_embodiment())
            if kind in SERVER_KINDS:
                harm_server(fault, args.server)
                print(f"done: {fault}")
                return 0
            found = control.inject(fault)
    print("; ".join(str(fault) for fault in found.faults) or "nothing is wrong")
    return 0


def _fit(args: argparse.Namespace) -> int:
    from robot_bridge.rig import load_rig
    from robot_bridge.twin.fit import as_metal, fit_recording, save_metal

    found = fit_recording(args.log, load_rig(args.rig).load_embodiment())
    for name, fit in found.items():
        print(
            f"{name}: dead time {fit.delay_s * 1e3:.1f} ms; {fit.residual_rad * 1e3:.2f} mrad left of "
            f"a lag of {fit.travel_rad * 1e3:.2f} mrad (RMS)"
        )
        for i in range(len(fit.moved)):
            note = "" if fit.moved[i] else "  (did not move: as the others)"
            print(
                f"  joint {i + 1}: {fit.frequencies_rad_s[i]:.1f} rad/s, "
                f"damping {fit.dampings[i]:.2f}{note}"
            )
    save_metal(as_metal(found), args.out, f"Found by: simplevla twin fit {args.log.name}")
    print(f"written: {args.out}")
    return 0


def _configure_estop(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _ESTOP_EPILOG
    parser.add_argument(
        "--rig", default="twin", help="name of a rig in config/rig, or a path to a .yaml file"
    )
    parser.add_argument("--namespace", default="", help="ROS namespace of the stack (default: none)")
    parser.add_argument("--now", action="store_true", help="stop at once, without waiting for a key")


def _estop(args: argparse.Namespace) -> int:
    from robot_bridge.bringup import environment
    from robot_bridge.estop import run_estop
    from robot_bridge.rig import load_rig

    rig = load_rig(args.rig)
    os.environ.update(environment(Settings(rig=args.rig), rig))
    return run_estop(rig, args.namespace, now=args.now)


def _configure_recording(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _RECORDING_EPILOG
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    recover = steps.add_parser("recover", help="make recordings of what interrupted ones have left behind")
    recover.add_argument(
        "path", type=Path, metavar="PATH", help="a run's folder, or an interrupted recording in it"
    )
    show = steps.add_parser("show", help="say what a recording holds")
    show.add_argument("path", type=Path, metavar="PATH", help="folder of a recording")


def _recording(args: argparse.Namespace) -> int:
    if args.step == "show":
        return _show_recording(args.path)
    from robot_bridge.recovery import interrupted_recordings, recover

    failures = 0
    for interrupted in interrupted_recordings(args.path):
        try:
            found = recover(interrupted)
        except RecordError as error:
            failures += 1
            print(f"simplevla recording: {error}", file=sys.stderr)
        else:
            print(f"{found.path}: {sum(found.counts.values())} messages, {found.duration_s:.1f} s")
    return 1 if failures else 0


def _show_recording(path: Path) -> int:
    from robot_bridge.recording import read_recording

    recording = read_recording(path, images=False)
    for key, value in sorted(recording.metadata.items()):
        print(f"{key:30} {value}")
    for topic, count in sorted(recording.counts.items()):
        dropped = recording.dropped.get(topic, 0)
        print(f"{topic:30} {count}{f', {dropped} dropped' if dropped else ''}")
    return 0


UP = Command("start twin or robot, policy server and bridge, until Ctrl-C", _configure_up, _up)
TRIAL = Command("make judged, recorded trials of a policy, with a report", _configure_trial, _trial)
TWIN = Command("run the simulated robot that stands in for the metal", _configure_twin, _twin)
ESTOP = Command("stop the arms by a key, whatever else runs or hangs", _configure_estop, _estop)
RECORDING = Command("recover interrupted recordings, show what one holds", _configure_recording, _recording)
