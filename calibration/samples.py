"""The offline format: a folder of pictures or corners with the arm's positions, from anywhere.

    board.yaml      the board, see :class:`calibration.board.Board`
    camera.yaml     optional: intrinsics, see :class:`calibration.camera.CameraModel`
    samples.jsonl   one JSON object a line, see :class:`Line`
    *.png, *.jpg    the pictures that samples.jsonl names

Everything is checked where it enters; a message names the file, the line and what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import cv2
import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from calibration.board import Board, load_board, save_board
from calibration.camera import CameraModel, load_camera, save_camera
from calibration.detection import BoardDetector, Detection
from calibration.faults import (
    BoardNotFoundError,
    MirroredBoardError,
    MixedUnitsError,
    SampleFormatError,
    WrongBoardError,
)
from calibration.geometry import Array, require_rigid
from simplevla.files import write_atomic

_MOST_LINES = 10_000
_MOST_BYTES = 1 << 26
_MOST_PICTURE_PX = 64_000_000
_FULL_TURN_RAD = 2 * np.pi
_FAR_M = 5.0  # farther from its base than any arm of this size reaches: millimetres

Row = tuple[float, float, float, float]


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One line of samples.jsonl.

    Attributes:
        image: file name of the picture, inside the folder; or
        corners: [[id, x px, y px], ...], ids row by row from the board's top left inner corner.
        joints: joint positions, rad.
        T_base_gripper: 4x4 pose of the gripper in the arm's base, row by row, m.
        stamp_ns: when the picture was taken.
        camera, arm: names, where there are several.
    """

    image: str | None = None
    corners: list[tuple[int, float, float]] | None = None
    joints: Annotated[list[float], Meta(min_length=1, max_length=16)] | None = None
    T_base_gripper: tuple[Row, Row, Row, Row] | None = None
    stamp_ns: Annotated[int, Meta(ge=0)] = 0
    camera: str = ""
    arm: str = ""


@dataclass(frozen=True, eq=False)
class View:
    """One sample, ready for a solver.

    Attributes:
        name: what to call it: its picture, or its line.
        joints_rad: (n,) or None; base_gripper: (4, 4) or None; one of them is there.
    """

    name: str
    detection: Detection
    joints_rad: Array | None = None
    base_gripper: Array | None = None
    stamp_ns: int = 0
    camera: str = ""
    arm: str = ""


@dataclass(frozen=True, eq=False)
class SampleSet:
    """A folder of samples.

    Attributes:
        views: the samples in which the board was found, by time.
        unseen: names of those in which it was not, each with the reason.
        size: (width, height) of the pictures, None where only corners are given.
    """

    board: Board
    camera: CameraModel | None
    views: tuple[View, ...]
    unseen: tuple[str, ...]
    size: tuple[int, int] | None


def load_samples(folder: Path) -> SampleSet:
    """Return the samples in ``folder``; finds the corners where only pictures are given.

    Raises:
        ConfigError: board.yaml or camera.yaml is missing or broken.
        SampleFormatError: samples.jsonl or a picture is missing or broken.
        MixedUnitsError: joints are in degrees, or poses in millimetres.
        WrongBoardError, MirroredBoardError: another board, or a mirrored one, is in most pictures.
    """
    board = load_board(folder / "board.yaml")
    camera_file = folder / "camera.yaml"
    camera = load_camera(camera_file) if camera_file.exists() else None
    detector = BoardDetector(board)
    views: list[View] = []
    unseen: list[str] = []
    faults: list[WrongBoardError | MirroredBoardError] = []
    sizes = {} if camera is None else {(camera.width, camera.height): "camera.yaml"}
    for number, line in enumerate(_lines(folder / "samples.jsonl"), start=1):
        where = f"{folder / 'samples.jsonl'}, line {number}"
        name = line.image or f"line {number}"
        base_gripper, joints = _gripper(line, where), _joints(line, where)
        if base_gripper is None and joints is None:
            raise SampleFormatError(f"{where}: neither joints nor T_base_gripper", "give one of them")
        if line.corners is not None:
            detection = _corners(line.corners, board, where)
        elif line.image is not None:
            picture = _picture(folder, line.image, where)
            sizes.setdefault((picture.shape[1], picture.shape[0]), name)
            try:
                detection = detector.detect(picture)
            except BoardNotFoundError as error:
                unseen.append(f"{name}: {error.message}")
                continue
            except (WrongBoardError, MirroredBoardError) as error:
                faults.append(error)
                unseen.append(f"{name}: {error.message}")
                continue
        else:
            raise SampleFormatError(f"{where}: neither image nor corners", "give one of them")
        views.append(View(name, detection, joints, base_gripper, line.stamp_ns, line.camera, line.arm))
    if len(faults) > len(views):
        raise faults[0]
    if len(sizes) > 1:
        listed = ", ".join(f"{w}x{h} ({name})" for (w, h), name in sizes.items())
        raise SampleFormatError(
            f"{folder}: pictures and camera.yaml differ in size: {listed}", "take all with one camera"
        )
    views.sort(key=lambda view: view.stamp_ns)
    return SampleSet(board, camera, tuple(views), tuple(unseen), next(iter(sizes), None))


def save_samples(
    folder: Path,
    board: Board,
    lines: Sequence[Line],
    *,
    camera: CameraModel | None = None,
    pictures: Mapping[str, NDArray[np.uint8]] | None = None,
) -> None:
    """Write a folder that :func:`load_samples` reads; samples.jsonl last, so that it is whole or not there.

    Args:
        folder: where; made if it is not there.
        board, camera: what board.yaml and camera.yaml say.
        lines: the samples.
        pictures: {file name: (H, W, 3) uint8 RGB}, written as PNG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_board(board, folder / "board.yaml")
    if camera is not None:
        save_camera(camera, folder / "camera.yaml")
    for name, picture in (pictures or {}).items():
        done, data = cv2.imencode(".png", picture[..., ::-1] if picture.ndim == 3 else picture)
        if not done:
            raise SampleFormatError(f"{name} cannot be written as PNG", "give (H, W, 3) uint8")
        write_atomic(folder / name, data.tobytes())
    encoder = msgspec.json.Encoder()
    write_atomic(folder / "samples.jsonl", b"".join(encoder.encode(line) + b"\n" for line in lines))


def line_of(view: View, *, image: str | None = None) -> Line:
    """Return ``view`` as a line: with its corners, or naming its picture."""
    corners = [
        (int(number), float(x), float(y))
        for number, (x, y) in zip(view.detection.ids, view.detection.corners_px, strict=True)
    ]
    pose = None if view.base_gripper is None else tuple(tuple(row) for row in view.base_gripper.tolist())
    return Line(
        image=image,
        corners=None if image else corners,
        joints=None if view.joints_rad is None else view.joints_rad.tolist(),
        T_base_gripper=pose,  # type: ignore[arg-type]
        stamp_ns=view.stamp_ns,
        camera=view.camera,
        arm=view.arm,
    )


def _lines(path: Path) -> list[Line]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise SampleFormatError(f"{path} is larger than {_MOST_BYTES >> 20} MiB", "split it")
        texts = [text for text in path.read_bytes().split(b"\n") if text.strip()]
    except OSError as error:
        raise SampleFormatError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    if not 0 < len(texts) <= _MOST_LINES:
        raise SampleFormatError(f"{path} has {len(texts)} lines", f"give 1 to {_MOST_LINES}")
    decoder = msgspec.json.Decoder(Line)
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(decoder.decode(text))
        except msgspec.DecodeError as error:
            raise SampleFormatError(f"{path}, line {number}: {error}", "correct the line") from error
    return lines


def _joints(line: Line, where: str) -> Array | None:
    if line.joints is None:
        return None
    joints = np.array(line.joints)
    if not np.isfinite(joints).all():
        raise SampleFormatError(f"{where}: joints are not finite", "correct the line")
    if np.abs(joints).max() > _FULL_TURN_RAD:
        raise MixedUnitsError(
            f"{where}: a joint stands at {np.abs(joints).max():.4g}, more than a full turn in rad",
            "give joints in rad, not in degrees",
        )
    return joints


def _gripper(line: Line, where: str) -> Array | None:
    if line.T_base_gripper is None:
        return None
    try:
        pose = require_rigid(line.T_base_gripper)
    except ValueError as error:
        raise SampleFormatError(
            f"{where}: T_base_gripper is no rigid transform: {error}", "correct it"
        ) from error
    if np.abs(pose[:3, 3]).max() > _FAR_M:
        raise MixedUnitsError(
            f"{where}: the gripper is {np.linalg.norm(pose[:3, 3]):.4g} m from the base",
            "give T_base_gripper in m, not in mm",
        )
    return pose


def _corners(corners: list[tuple[int, float, float]], board: Board, where: str) -> Detection:
    ids = np.array([corner[0] for corner in corners], np.int64)
    pixels = np.array([corner[1:] for corner in corners], np.float64).reshape(-1, 2)
    last = (board.squares_x - 1) * (board.squares_y - 1) - 1
    if len(set(ids.tolist())) != len(ids) or not np.isfinite(pixels).all():
        raise SampleFormatError(f"{where}: a corner is given twice or is not finite", "correct the line")
    if len(ids) and (ids.min() < 0 or ids.max() > last):
        raise WrongBoardError(
            f"{where}: corner {int(ids.max())}, but the board has the corners 0 to {last}",
            "describe in board.yaml the board that was shown",
        )
    order = np.argsort(ids)
    return Detection(ids[order], pixels[order])


def _picture(folder: Path, name: str, where: str) -> NDArray[np.uint8]:
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        raise SampleFormatError(f"{where}: {name!r} is not inside the folder", "name a file of the folder")
    try:
        data = np.frombuffer((folder / inside).read_bytes(), np.uint8)
    except OSError as error:
        raise SampleFormatError(f"{where}: {name} cannot be read: {error.strerror}", "check it") from error
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if picture is None or picture.shape[0] * picture.shape[1] > _MOST_PICTURE_PX:
        raise SampleFormatError(f"{where}: {name} is no picture, or too large", "give PNG or JPEG files")
    return np.asarray(picture[..., ::-1], np.uint8)
