"""``calibrate session``: all that is due, in order, ending with a record that lets the robot move.

grippers (empty) -> for each arm: board in, cameras by hand-eye, delays by a swing, the arm's own figures
-> the table -> the record. A step that fails ends the session without a record; a check that fails is
written, and the robot may not move.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from calibration.arms_base import base_to_base
from calibration.camera import CameraModel, save_camera
from calibration.cell import Cell
from calibration.findings import Findings
from calibration.guide import Guide, Operator
from calibration.overlay import write_overlay
from calibration.preview import Preview
from calibration.settings import Settings
from calibration.steps.arms import judge_arm, measure_grippers
from calibration.steps.bench import Bench, hold_board, put_board_down, show_board
from calibration.steps.check import check_record
from calibration.steps.checks import one_line
from calibration.steps.hand_eye import find_cameras
from calibration.steps.intrinsics import measure_lens
from calibration.steps.latency import find_delays
from calibration.steps.scene import find_table, write_scene
from calibration.steps.touch import Touches, check_touches, record_touches
from calibration.twin_cell import running_twin
from robot_bridge.rig import Rig
from robot_bridge.twin.metal import Metal
from simplevla.cli import require_choice
from simplevla.embodiment import Arm
from simplevla.errors import ConfigError
from simplevla.session_record import (
    Check,
    SessionRecord,
    calibrated,
    load_session_record,
    save_session_record,
)

STEPS = ("hand-eye", "arms", "latency", "scene")


@dataclass(frozen=True)
class Job:
    """One command on one rig.

    Attributes:
        rig: the rig, which the record is for.
        settings: what is asked of a calibration.
        path: the session record.
        folder: gets samples, preview and logs.
        say: tells the person one line.
        metal: how a twin's metal differs from its embodiment.
        window: whether to show pictures in a window; by default where there is a display.
        lenses: {camera: its lens as measured}.
    """

    rig: Rig
    settings: Settings
    path: Path
    folder: Path
    say: Callable[[str], None]
    metal: Metal | None = None
    window: bool | None = None
    lenses: Mapping[str, CameraModel] = field(default_factory=dict)

    def source(self, command: str) -> str:
        """Return what a record says of its origin."""
        return f"simplevla calibrate {command} on rig {self.rig.name}, data in {self.folder}"


@contextlib.contextmanager
def opened(job: Job, known: SessionRecord | None = None) -> Iterator[Bench]:
    """Yield a bench with the rig's arms enabled and at home; a twin's own process runs meanwhile.

    Args:
        job: what to open.
        known: an earlier record; cameras and bases are planned for as it says.

    Raises:
        SimplevlaError: the rig cannot be opened, or nobody prepares it.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as resources:
        keep = resources.enter_context
        rig, guide = keep(_prepared(job))
        embodiment = rig.load_embodiment()
        streamed = embodiment if rig.is_twin else job.settings.streamed(embodiment)
        preview = keep(Preview(job.folder, window=job.window))
        guide.clear()
        cell = keep(Cell(rig, streamed, job.settings))
        job.say("cameras and arms are there; the arms get power and go home")
        cell.enable()
        cell.home()
        placed = calibrated(streamed, known)
        yield Bench(cell, guide, job.settings, placed, job.folder, preview, job.say, job.lenses)


@contextlib.contextmanager
def _prepared(job: Job) -> Iterator[tuple[Rig, Guide]]:
    """Yield the rig and who prepares it: a person, or a twin that runs inside the block."""
    if not job.rig.is_twin:
        yield job.rig, Operator.at_terminal()
        return
    with running_twin(job.rig, job.settings, job.folder / "twin", metal=job.metal) as twin:
        yield twin.rig, twin.guide


def run_session(job: Job) -> SessionRecord:
    """Do all that is due, write the record and return it.

    Raises:
        CalibrationError: what was seen gives no trustworthy answer; no record is written.
        UnavailableError: the rig does not move or see, or nobody prepares it.
    """
    with opened(job) as bench:
        record = calibrate_all(bench, job)
    write_scene(job.rig.load_embodiment(), record, job.path.with_name(f"{job.path.stem}_scene.yaml"))
    return record


def calibrate_all(bench: Bench, job: Job) -> SessionRecord:
    """Do all that is due on an open bench, write the record and return it; see :func:`run_session`."""
    findings = Findings()
    grippers = measure_grippers(bench)
    for arm in bench.placed.arms:
        bench.say(f"arm {arm.name}: shows the board in {bench.settings.poses} poses, then swings it")
        hold_board(bench, arm)
        shown = find_cameras(bench, findings, arm)
        find_delays(bench, findings, arm, shown)
        judge_arm(bench, findings, arm, shown, grippers[arm.name])
    put_board_down(bench)
    find_table(bench, findings)
    record = findings.record(job.rig, created_ns=time.time_ns(), source=job.source("session"))
    save_session_record(record, job.path)
    return record


def run_check(job: Job, arm: str = "") -> list[Check]:
    """Return whether each camera still stands where the last record says; nothing is written.

    Args:
        job: what to check.
        arm: which arm shows the board; the last one by default.

    Raises:
        ConfigError: there is no such arm.
        RecordError: there is no record.
        CalibrationError: what was seen gives no trustworthy answer.
        UnavailableError: the rig does not move or see, or nobody prepares it.
    """
    record = load_session_record(job.path)
    names = [each.name for each in job.rig.load_embodiment().arms]
    chosen = require_choice("arm", arm or names[-1], names)
    with opened(job, record) as bench:
        return check_record(bench, record, next(each for each in bench.placed.arms if each.name == chosen))


def run_step(
    job: Job, step: str, arm: str = "", *, overlaid: bool = False, touches: Touches | None = None
) -> list[Check]:
    """Measure one part, update the last record with it if there is one, and return the new checks.

    Args:
        job: what to measure.
        step: one of ``STEPS``.
        arm: only this arm; all by default.
        overlaid: with ``scene``: draw the simulator's scene over the live pictures.
        touches: with ``arms``: points that both arms touched, a second opinion on where the bases stand.

    Raises:
        SimplevlaError: as :func:`run_session`, or there is no such step or arm, or not two arms to touch.
    """
    require_choice("step", step, STEPS)
    arms = job.rig.load_embodiment().arms
    if touches is not None and (arm or len(arms) != 2):
        raise ConfigError("touched points are of two arms", "measure both: leave --arm out")
    if arm:
        require_choice("arm", arm, [each.name for each in arms])
    known = load_session_record(job.path) if job.path.exists() else None
    findings = Findings.of(known) if known else Findings()
    with opened(job, known) as bench:
        if step == "scene":
            live = {camera.name: bench.cell.look(camera.name).image for camera in bench.cameras}
            find_table(bench, findings)
        else:
            grippers = measure_grippers(bench) if step == "arms" else {}
            for each in bench.placed.arms:
                if arm in ("", each.name):
                    _measure_arm(bench, findings, each, step, grippers.get(each.name))
            if touches is not None:
                _second_opinion(bench, findings, touches)
    # A part that is new makes the rest no younger; a part alone lets no robot move.
    created_ns = known.created_ns if known else time.time_ns()
    record = findings.record(job.rig, created_ns=created_ns, source=job.source(step))
    if known is None:
        job.say(f"there is no record at {job.path} to update: run a whole session to get one")
    else:
        save_session_record(record, job.path)
    if overlaid and step == "scene":
        for camera, picture in live.items():
            job.say(str(write_overlay(picture, camera, record, job.rig, job.settings, job.folder)))
    return findings.fresh


def _second_opinion(bench: Bench, findings: Findings, touches: Touches) -> None:
    left, right = (arm.name for arm in bench.placed.arms)
    camera = bench.cameras[0].name
    by_camera = base_to_base(findings.solved[camera, left], findings.solved[camera, right])
    check = findings.judged(check_touches(bench.settings, touches, by_camera, left, right))
    bench.say(one_line(check))


def run_touch(job: Job, count: int) -> Path:
    """Have ``count`` points touched by both arms, led by hand; return the file in the job's folder.

    Motors stay as they were found, and nothing moves by itself. Where there is a record, its joint zeros
    are taken off.

    Raises:
        ConfigError: there are not two arms, or nobody can lead them: they are a twin's.
        UnavailableError: the arms say nothing, or nobody answers.
    """
    embodiment = job.rig.load_embodiment()
    if job.rig.is_twin or len(embodiment.arms) != 2:
        raise ConfigError("touching takes a robot with two arms", "give the rig of one")
    person = Operator.at_terminal()
    known = load_session_record(job.path) if job.path.exists() else None
    zeros = {name: np.array(values) for name, values in known.joint_zeros_rad.items()} if known else {}
    with Cell(job.rig, job.settings.streamed(embodiment), job.settings) as cell:
        touches = record_touches(cell, embodiment, zeros, count, person.ask)
    path = job.folder / "touches.yaml"
    job.folder.mkdir(parents=True, exist_ok=True)
    touches.save(path)
    return path


def run_intrinsics(job: Job, arm: str = "") -> list[Check]:
    """Measure every camera's lens from a board that an arm shows; write it to the job's folder; check it.

    Raises:
        SimplevlaError: as :func:`run_session`, or there is no such arm.
    """
    names = [each.name for each in job.rig.load_embodiment().arms]
    chosen = require_choice("arm", arm or names[-1], names)
    checks = []
    with opened(job) as bench:
        holder = next(each for each in bench.placed.arms if each.name == chosen)
        hold_board(bench, holder)
        for camera in bench.cameras:
            shown = show_board(bench, holder, camera, bench.settings.poses)
            told = bench.cell.lens(camera.name)
            found, check = measure_lens(
                [each.view.detection for each in shown], bench.settings, told, camera.name
            )
            save_camera(found, job.folder / f"{camera.name}.yaml")
            bench.say(one_line(check))
            checks.append(check)
        put_board_down(bench)
    return checks


def _measure_arm(bench: Bench, findings: Findings, arm: Arm, step: str, gripper_m: float | None) -> None:
    hold_board(bench, arm)
    if step == "latency":
        poses = bench.settings.check_poses
        shown = [each for camera in bench.cameras for each in show_board(bench, arm, camera, poses)]
        find_delays(bench, findings, arm, shown)
    else:
        shown = find_cameras(bench, findings, arm)
        if step == "arms":
            judge_arm(bench, findings, arm, shown, gripper_m)
    put_board_down(bench)
