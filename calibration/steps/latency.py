"""How late cameras and arms are: an arm swings the board, and everything that saw it is compared."""

from __future__ import annotations

import io
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.cell import Shot, Turn
from calibration.detection import BoardDetector
from calibration.findings import Findings
from calibration.latency import Delay, NoCommonMotionError, delay_between, principal, swing
from calibration.settings import Settings
from calibration.steps.bench import Bench, ShownPose
from calibration.steps.checks import one_line
from calibration.viewing import Viewing
from simplevla.embodiment import Arm, Camera
from simplevla.errors import ConfigError, UnavailableError
from simplevla.files import write_atomic
from simplevla.session_record import Check

Array = NDArray[np.float64]

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_AFTER_S = 0.5  # of stillness that is recorded beyond the swing, before it and after it
_FIELDS = ("sent_ns", "sent", "measured_ns", "measured", "stamp_ns", "arrival_ns", "seen_px")


@dataclass(frozen=True, eq=False)
class Swing:
    """What was recorded of one swing; times in ns of the system clock.

    Attributes:
        sent_ns, sent: (N,) when and where to the joint was sent.
        measured_ns, measured: (M,) when and where it reported to be.
        stamp_ns, arrival_ns: (P,) of the pictures that show the board.
        seen_px: (P, 2) where the board's middle was in them.
    """

    sent_ns: Array
    sent: Array
    measured_ns: Array
    measured: Array
    stamp_ns: Array
    arrival_ns: Array
    seen_px: Array

    def save(self, path: Path) -> None:
        """Write it as an .npz file, whole or not at all."""
        data = io.BytesIO()
        np.savez(data, **{name: getattr(self, name) for name in _FIELDS})
        write_atomic(path, data.getvalue())


def load_swing(path: Path) -> Swing:
    """Return what :meth:`Swing.save` wrote.

    Raises:
        ConfigError: the file is missing, or is none of ours.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            values = {name: np.asarray(data[name], dtype=np.float64) for name in _FIELDS}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} is no recorded swing: {error}", "give a file that latency wrote"
        ) from error
    for group in (_FIELDS[:2], _FIELDS[2:4], _FIELDS[4:]):
        if len({len(values[name]) for name in group}) != 1:
            raise ConfigError(f"{path}: {', '.join(group)} have different lengths", "record it again")
    if not all(np.isfinite(value).all() for value in values.values()):
        raise ConfigError(f"{path} holds values that are not finite", "record it again")
    return Swing(**values)


@dataclass(frozen=True)
class Delays:
    """What a swing says of one camera and one arm; see :class:`~simplevla.session_record.SessionRecord`."""

    stamp: Delay
    command: Delay
    delivery_s: float


def read_delays(recorded: Swing) -> Delays:
    """Return the delays that a swing shows.

    Raises:
        NoCommonMotionError: its signals do not show one motion.
    """
    # A setpoint is held until the next is sent: on average it is half of that time old.
    held_ns = recorded.sent_ns + np.median(np.diff(recorded.sent_ns)) / 2
    command = delay_between(held_ns, recorded.sent, recorded.measured_ns, recorded.measured)
    along = principal(recorded.seen_px) if len(recorded.seen_px) else np.zeros(0)
    stamp = delay_between(recorded.measured_ns, recorded.measured, recorded.stamp_ns, along)
    waited_s = float(np.median(recorded.arrival_ns - recorded.stamp_ns)) / 1e9
    return Delays(stamp, command, waited_s + stamp.seconds)


def find_delays(bench: Bench, findings: Findings, arm: Arm, shown: list[ShownPose]) -> None:
    """Swing ``arm``, which holds the board, before each camera; the arm ends at home.

    A swing that shows no one motion, as on a machine that is too busy to keep time, is made again; if
    that does not help the check fails.

    Raises:
        CalibrationError: no pose leaves room for the swing.
        UnavailableError: the arms do not move.
    """
    for camera in bench.cameras:
        name = f"latency {camera.name} {arm.name}"
        delays = _swung(bench, arm, camera, shown)
        if delays is None:
            bench.say(one_line(findings.judged(Check(name=name, passed=False))))
            continue
        # With several arms the last one's word on a camera's clock stands.
        findings.delays_s[f"{camera.name}_stamp"] = delays.stamp.seconds
        findings.delays_s[f"{camera.name}_delivery"] = delays.delivery_s
        findings.delays_s[f"{arm.name}_command"] = delays.command.seconds
        bench.say(one_line(findings.judged(judge(bench.settings, name, delays))))


def _swung(bench: Bench, arm: Arm, camera: Camera, shown: list[ShownPose]) -> Delays | None:
    """Return the delays of the first swing that shows one motion; None if none of a few does."""
    for _ in range(_ATTEMPTS):
        recorded = record_swing(bench, arm, camera, shown)
        recorded.save(bench.folder / f"swing_{arm.name}_{camera.name}.npz")
        try:
            return read_delays(recorded)
        except NoCommonMotionError as error:
            logger.warning("%s", error)
    return None


def judge(settings: Settings, name: str, delays: Delays) -> Check:
    """Return the check of the delays against the limits of their kind."""
    return settings.judge(
        name,
        {
            "stamp_ms": 1e3 * abs(delays.stamp.seconds),
            "delivery_ms": 1e3 * delays.delivery_s,
            "command_ms": 1e3 * delays.command.seconds,
            "stamp_std_ms": 1e3 * delays.stamp.std_s,
            "command_std_ms": 1e3 * delays.command.std_s,
        },
    )


def record_swing(bench: Bench, arm: Arm, camera: Camera, shown: list[ShownPose]) -> Swing:
    """Swing one joint of ``arm`` where ``camera`` sees the board best, and return what was recorded.

    Raises:
        NoCommonMotionError: no pose leaves room for the swing.
        UnavailableError: the arms do not move, or the camera sends nothing.
    """
    cell, motion = bench.cell, bench.settings.latency
    viewing = Viewing(bench.placed, arm, camera.pose_in_world(), bench.settings)
    joint = [each.name for each in arm.joints].index(motion.joint)
    index = viewing.part.start + joint
    centre = _middle(viewing, camera, joint, motion.amplitude_rad, shown)
    cell.move(centre)
    cell.settle()
    dt_s = 1 / bench.placed.control_rate_hz
    targets = swing(
        centre,
        index,
        amplitude=motion.amplitude_rad,
        period_s=motion.period_s,
        cycles=motion.cycles,
        dt_s=dt_s,
    )
    began_ns = time.time_ns()
    time.sleep(_AFTER_S)
    ends_s = cell.start(targets, dt_s) + _AFTER_S
    shots = [cell.look(camera.name)]
    while time.monotonic() < ends_s:
        shots.append(cell.look(camera.name, shots[-1].stamp_ns))
    turns = cell.turns(began_ns)
    cell.home()
    order = [each.name for each in bench.placed.arms].index(arm.name)
    return _swing_of(turns, order, index, shots, BoardDetector(bench.settings.board))


def _middle(
    viewing: Viewing, camera: Camera, joint: int, amplitude_rad: float, shown: list[ShownPose]
) -> Array:
    """Return (D,) the pose nearest to the picture's middle about which the joint can swing."""
    middle = np.array([camera.width, camera.height]) / 2
    mine = [each for each in shown if each.view.arm == viewing.arm.name and each.view.camera == camera.name]
    mine.sort(key=lambda each: float(np.linalg.norm(each.centre_px - middle)))
    reach = np.zeros(len(viewing.lower))
    reach[joint] = amplitude_rad
    for each in mine:
        joints = each.wanted[viewing.part][:-1]
        inside = ((joints - reach >= viewing.lower) & (joints + reach <= viewing.upper)).all()
        if inside and viewing.way_clear(joints - reach, joints + reach):
            return each.wanted
    raise NoCommonMotionError(
        "no pose that showed the board leaves room for the swing", "swing less, or with another joint"
    )


def _swing_of(
    turns: list[Turn], order: int, index: int, shots: list[Shot], detector: BoardDetector
) -> Swing:
    sent = [(turn.stamp_ns, turn.sent[index]) for turn in turns if turn.sent is not None]
    measured = {turn.measured_ns[order]: turn.measured[index] for turn in turns}
    seen = []
    for shot in shots:
        found = detector.find(shot.image)
        if found is not None:
            seen.append((shot, found))
    most = max((len(found.ids) for _, found in seen), default=0)
    whole = [(shot, found) for shot, found in seen if len(found.ids) == most]
    if not sent or not whole:
        raise UnavailableError("the swing was not recorded", "see the log: the arms or the camera stopped")
    times = np.array(sorted(measured), dtype=np.float64)
    return Swing(
        sent_ns=np.array([stamp for stamp, _ in sent], dtype=np.float64),
        sent=np.array([value for _, value in sent]),
        measured_ns=times,
        measured=np.array([measured[int(stamp)] for stamp in sorted(measured)]),
        stamp_ns=np.array([shot.stamp_ns for shot, _ in whole], dtype=np.float64),
        arrival_ns=np.array([shot.arrival_ns for shot, _ in whole], dtype=np.float64),
        seen_px=np.array([found.corners_px.mean(axis=0) for _, found in whole]),
    )
