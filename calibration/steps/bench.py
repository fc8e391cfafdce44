"""What every live step works with, and how a board is shown to the cameras."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.camera import CameraModel
from calibration.cell import Cell, Shot
from calibration.detection import BoardDetector, Detection
from calibration.guide import Guide
from calibration.observability import RigGeometry, plan_poses
from calibration.preview import Preview
from calibration.samples import View, line_of, save_samples
from calibration.settings import Settings
from calibration.viewing import Viewing, plate_points
from simplevla.embodiment import Arm, Camera, Embodiment
from simplevla.errors import ConfigError, UnavailableError
from simplevla.kinematics import arm_chain
from simplevla.session_record import to_matrix

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bench:
    """The cell, who prepares it, and what is asked of a calibration.

    Attributes:
        cell: open, its arms enabled.
        guide: prepares the cell.
        settings: what is asked.
        placed: the robot with cameras and bases about where they are, for planning.
        folder: gets the recorded samples.
        preview: shows what the cameras see.
        say: tells the person one line.
        lenses: {camera: its lens as measured}; the others' lenses are what the cameras say themselves.
    """

    cell: Cell
    guide: Guide
    settings: Settings
    placed: Embodiment
    folder: Path
    preview: Preview
    say: Callable[[str], None]
    lenses: Mapping[str, CameraModel] = field(default_factory=dict)

    def lens(self, camera: str) -> CameraModel:
        """Return the lens of a camera, for pictures as calibration streams them.

        Raises:
            ConfigError: it was measured in pictures of another size.
        """
        told = self.cell.lens(camera)
        measured = self.lenses.get(camera, told)
        if (measured.width, measured.height) != (told.width, told.height):
            raise ConfigError(
                f"the lens of {camera} was measured at {measured.width}x{measured.height}, "
                f"and the stream is {told.width}x{told.height}",
                "measure it in pictures of this size: simplevla calibrate intrinsics",
            )
        return measured

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """The cameras, about where they are."""
        return self.placed.cameras


@dataclass(frozen=True, eq=False)
class ShownPose:
    """What was seen while an arm stood still.

    Attributes:
        view: what the solvers take; its joints are what the arm reported.
        wanted: (D,) what had been sent.
        measured: (D,) what was reported.
        centre_px: (2,) middle of the corners.
    """

    view: View
    wanted: Array
    measured: Array
    centre_px: Array


def hold_board(bench: Bench, arm: Arm) -> None:
    """Have the board put into the gripper of ``arm``, the arms at home, and keep it clear from now on.

    Raises:
        UnavailableError: nobody puts it there, or the arms do not get home.
    """
    bench.cell.home()
    bench.guide.mount(arm.name)
    bench.cell.carry({arm.name: plate_points(bench.settings)})


def put_board_down(bench: Bench) -> None:
    """Let nothing be carried any more, the arms at home."""
    bench.cell.home()
    bench.cell.carry({})


def show_board(bench: Bench, arm: Arm, camera: Camera, count: int) -> list[ShownPose]:
    """Move ``arm`` through ``count`` planned poses and return what ``camera`` saw; the arm ends at home.

    What was seen is also written as a folder of samples (docs/calibration.md), so that everything can
    be computed again without the robot.

    Raises:
        UnavailableError: the arms do not move, or the camera sends nothing.
        CalibrationError: there are no poses that show the board.
    """
    cell, settings = bench.cell, bench.settings
    lens = bench.lens(camera.name)
    viewing = Viewing(bench.placed, arm, camera.pose_in_world(), settings)
    home = np.array(arm.home_rad)
    route = _reachable(bench, viewing, camera, lens, count)
    detector = BoardDetector(settings.board)
    shown: list[ShownPose] = []
    pictures: dict[str, NDArray[np.uint8]] = {}
    for number, joints in enumerate(route, start=1):
        wanted = viewing.whole(joints)
        try:
            cell.move(wanted)
        except UnavailableError as error:
            logger.warning("pose %d of %s is left out: %s", number, arm.name, error)
            cell.home()
            continue
        if np.array_equal(joints, home):
            continue  # on the way only
        cell.settle()
        measured = cell.averaged()
        shots = _shots(cell, camera.name, settings.pictures)
        found = averaged([detector.find(shot.image) for shot in shots])
        text = f"{arm.name} {number}/{len(route)}, {0 if found is None else len(found.ids)} corners"
        bench.preview.show(camera.name, shots[-1].image, found, text)
        if found is None:
            logger.info("%s: no board at pose %d", camera.name, number)
            continue
        name = f"{arm.name}_{camera.name}_{number:02d}"
        joints_seen = measured[viewing.part][:-1]
        view = View(
            detection=found,
            joints_rad=joints_seen,
            base_gripper=None,
            stamp_ns=shots[-1].stamp_ns,
            name=name,
            arm=arm.name,
            camera=camera.name,
        )
        shown.append(ShownPose(view, wanted, measured, found.corners_px.mean(axis=0)))
        pictures[name] = shots[-1].image
    cell.home()
    _record(bench, f"{arm.name}_{camera.name}", shown, pictures, lens)
    return shown


def _reachable(
    bench: Bench, viewing: Viewing, camera: Camera, lens: CameraModel, count: int
) -> list[Array]:
    """Return a route through ``count`` planned poses, or as many as can be reached, home in between."""
    home = np.array(viewing.arm.home_rad)
    best: list[Array] = []
    for wanted in (count, count + count // 2, 2 * count):
        route = viewing.route(home, plan(bench, viewing, camera, lens, wanted))
        shown = np.cumsum([not np.array_equal(joints, home) for joints in route])
        best = max(best, route[: int(np.searchsorted(shown, count)) + 1], key=len)
        if len(shown) and shown[-1] >= count:
            break
    return best


def plan(bench: Bench, viewing: Viewing, camera: Camera, lens: CameraModel, count: int) -> list[Array]:
    """Return ``count`` joint positions (n,) that show the board well and differ enough.

    Raises:
        CalibrationError: there are none.
    """
    base = to_matrix(viewing.arm.base)
    rig = RigGeometry(
        setup="eye-to-hand",
        camera=lens,
        board=bench.settings.board,
        chain=arm_chain(viewing.arm),
        camera_pose=np.linalg.inv(base) @ camera.pose_in_world(),
        board_pose=to_matrix(bench.settings.mount),
    )
    planned = plan_poses(
        rig,
        lower=viewing.lower,
        upper=viewing.upper,
        count=count,
        rng=np.random.default_rng(bench.settings.seed),
        allowed=viewing.allowed,
    )
    return [np.asarray(pose.joints_rad, dtype=np.float64) for pose in planned]


def averaged(found: Sequence[Detection | None]) -> Detection | None:
    """Return the corners that all pictures of a still board show, averaged; None if one shows none."""
    whole = [each for each in found if each is not None]
    if not whole or len(whole) < len(found):
        return None
    ids = np.array(sorted(set.intersection(*(set(each.ids.tolist()) for each in whole))), dtype=np.int64)
    if not len(ids):
        return None
    corners = np.mean([each.corners_px[np.searchsorted(each.ids, ids)] for each in whole], axis=0)
    return Detection(ids, corners)


def _shots(cell: Cell, camera: str, count: int) -> list[Shot]:
    shots = [cell.look(camera)]
    while len(shots) < count:
        shots.append(cell.look(camera, shots[-1].stamp_ns))
    return shots


def _record(
    bench: Bench,
    name: str,
    shown: Sequence[ShownPose],
    pictures: dict[str, NDArray[np.uint8]],
    lens: CameraModel,
) -> None:
    """Write what was seen in the offline format, to be computed again; the pictures are for looking at."""
    lines = [line_of(each.view) for each in shown]
    named = {f"{key}.png": picture for key, picture in pictures.items()}
    save_samples(bench.folder / name, bench.settings.board, lines, camera=lens, pictures=named)
