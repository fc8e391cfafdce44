"""The session record: what calibration found before a session, and whether the robot may move.

One JSON file a rig, written whole or not at all. What was there before goes to a folder beside it, so
that drift can be seen over sessions. Calibration writes it; bring-up and the simulator read it.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from simplevla.embodiment import Camera, Embodiment, Pose, Vec3
from simplevla.errors import RecordError
from simplevla.files import write_atomic

SCHEMA = 2
_REMEDY = "run: simplevla calibrate session"
_HISTORY = re.compile(r"\d{19}\.json")


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One check with its figures; ``limits`` are the thresholds it was held against, by figure."""

    name: str
    passed: bool
    figures: dict[str, float] = {}
    limits: dict[str, float] = {}


class Lens(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A camera's measured intrinsics: pinhole in pixels of ``width`` x ``height``, plumb-bob distortion.

    ``cx`` and ``cy`` count as the embodiment's do: the first pixel covers 0 to 1.
    """

    width: Annotated[int, Meta(ge=16, le=8192)]
    height: Annotated[int, Meta(ge=16, le=8192)]
    fx: Annotated[float, Meta(gt=0)]
    fy: Annotated[float, Meta(gt=0)]
    cx: float
    cy: float
    distortion: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)

    def scaled(self, width: int, height: int) -> Lens:
        """Return the same lens for pictures of another size with the same field of view.

        Raises:
            RecordError: the new size has another shape.
        """
        if width * self.height != height * self.width:
            raise RecordError(
                f"the lens was measured at {self.width}x{self.height}, which does not scale to "
                f"{width}x{height}",
                "calibrate with pictures of the same shape",
            )
        k = width / self.width
        return Lens(
            width=width,
            height=height,
            fx=k * self.fx,
            fy=k * self.fy,
            cx=k * self.cx,
            cy=k * self.cy,
            distortion=self.distortion,
        )


class SessionRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is true of one rig from this calibration to the next.

    Attributes:
        created_ns: when, ns of the system clock.
        serials: {device name in the rig: serial number}.
        camera_in_world: {camera: pose of its optical frame in the world frame}.
        base_in_world: {arm: pose of its base in the world frame}.
        board_in_tool: {arm: pose of the board in its tool frame while it was held}; worth something
            as long as the board stays clamped.
        covariances: {"camera head", "base right": 36 values, row by row, of the pose's 6x6 covariance:
            x, y, z in m, then a rotation vector in rad, both along the world's axes}.
        lenses: {camera: measured intrinsics}.
        joint_zeros_rad: {arm: what each joint reports where it truly is at zero}.
        delays_s: {name: seconds}: ``<camera>_stamp`` (how much later than the exposure a picture is
            stamped, on the clock of the joint feedback), ``<camera>_delivery`` (from exposure to the
            host), ``<arm>_command`` (from a setpoint to the same position in the joint feedback).
        table_top_m: height of the table's top in the world frame, m; None if not measured.
        source: which command made it, of which data.
    """

    created_ns: int
    embodiment: str
    serials: dict[str, str]
    checks: tuple[Check, ...]
    camera_in_world: dict[str, Pose] = {}
    base_in_world: dict[str, Pose] = {}
    board_in_tool: dict[str, Pose] = {}
    covariances: dict[str, Annotated[tuple[float, ...], Meta(min_length=36, max_length=36)]] = {}
    lenses: dict[str, Lens] = {}
    joint_zeros_rad: dict[str, tuple[float, ...]] = {}
    delays_s: dict[str, float] = {}
    table_top_m: float | None = None
    source: str = ""
    schema: int = SCHEMA

    @property
    def passed(self) -> bool:
        """Whether there was at least one check and every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def stamp_offset_s(self, camera: str) -> float:
        """Return how much later than its exposure a picture of ``camera`` is stamped, s."""
        return self.delays_s.get(f"{camera}_stamp", 0.0)

    def delivery_s(self, embodiment: Embodiment) -> float:
        """Return how long the slowest camera's pictures take to the host, s; 0 if not measured."""
        names = (camera.name for camera in embodiment.cameras)
        return max((self.delays_s.get(f"{name}_delivery", 0.0) for name in names), default=0.0)

    def command_delay_s(self, embodiment: Embodiment) -> float:
        """Return how long the slowest arm takes from a setpoint to its position, s; 0 if not measured."""
        return max((self.delays_s.get(f"{arm.name}_command", 0.0) for arm in embodiment.arms), default=0.0)


def save_session_record(record: SessionRecord, path: Path) -> None:
    """Write ``record`` as JSON, whole or not at all, and a copy into the history beside it."""
    data = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
    write_atomic(history_folder(path) / f"{record.created_ns:019d}.json", data)
    write_atomic(path, data)


def load_session_record(path: Path) -> SessionRecord:
    """Return the record at ``path``.

    Raises:
        RecordError: it is missing, unreadable, of another schema, or holds a number that is none.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"session record {path} cannot be read: {error.strerror}", _REMEDY) from error
    try:
        schema = msgspec.json.decode(data, type=_Versioned).schema
        if schema != SCHEMA:
            raise RecordError(f"session record {path} has schema {schema}, not {SCHEMA}", _REMEDY)
        return msgspec.json.decode(data, type=SessionRecord)
    except msgspec.DecodeError as error:
        raise RecordError(f"session record {path} is not valid: {error}", _REMEDY) from error


def history_folder(path: Path) -> Path:
    """Return the folder with all records that were ever written to ``path``."""
    return path.parent / f"{path.stem}_history"


def load_history(path: Path) -> list[SessionRecord]:
    """Return all records that were written to ``path`` and can still be read, the oldest first."""
    folder = history_folder(path)
    files = sorted(file for file in folder.glob("*.json") if _HISTORY.fullmatch(file.name))
    records = []
    for file in files:
        try:
            records.append(load_session_record(file))
        except RecordError:  # of an older schema: its figures do not compare
            continue
    return records


def require_valid(
    record: SessionRecord, *, embodiment: str, serials: dict[str, str], now_ns: int, max_age_s: float
) -> None:
    """Check that ``record`` lets this rig move now.

    Raises:
        RecordError: a check failed, the record is stale or from the future, or it is for another
            embodiment or other serial numbers.
    """
    age_s = (now_ns - record.created_ns) / 1e9
    if not record.passed:
        failed = ", ".join(check.name for check in record.checks if not check.passed)
        raise RecordError(f"the last calibration did not pass: {failed or 'no check was made'}", _REMEDY)
    if not 0 <= age_s <= max_age_s:
        raise RecordError(f"the last calibration is {age_s / 3600:.1f} h old", _REMEDY)
    if record.embodiment != embodiment:
        raise RecordError(f"the last calibration is for {record.embodiment!r}, not {embodiment!r}", _REMEDY)
    if record.serials != serials:
        raise RecordError(
            f"the last calibration is for the devices {record.serials}, not {serials}", _REMEDY
        )


def calibrated(embodiment: Embodiment, record: SessionRecord | None) -> Embodiment:
    """Return ``embodiment`` with cameras and bases where ``record`` says they are.

    For a simulator that shall see what the real cameras see, and for clearance between arms. A
    simulated camera has a pinhole: of a measured lens only focal lengths and centre are taken.

    Raises:
        RecordError: a lens was measured in pictures of another shape.
    """
    if record is None:
        return embodiment
    arms = tuple(
        msgspec.structs.replace(arm, base=record.base_in_world.get(arm.name, arm.base))
        for arm in embodiment.arms
    )
    cameras = tuple(_placed(camera, record) for camera in embodiment.cameras)
    return msgspec.structs.replace(embodiment, arms=arms, cameras=cameras)


def simulated(embodiment: Embodiment, record: SessionRecord | None, table_top_m: float) -> Embodiment:
    """Return :func:`calibrated`, as a simulator is to build it whose table stands at ``table_top_m``.

    What was found moves up or down with the table.

    Raises:
        RecordError: a lens was measured in pictures of another shape.
    """
    placed = calibrated(embodiment, record)
    if record is None or record.table_top_m is None:
        return placed
    lift_m = table_top_m - record.table_top_m
    arms = tuple(
        msgspec.structs.replace(
            arm, base=msgspec.structs.replace(arm.base, xyz_m=_lifted(arm.base.xyz_m, lift_m))
        )
        for arm in placed.arms
    )
    cameras = tuple(
        msgspec.structs.replace(
            camera,
            position_m=_lifted(camera.position_m, lift_m),
            look_at_m=_lifted(camera.look_at_m, lift_m),
        )
        for camera in placed.cameras
    )
    return msgspec.structs.replace(placed, arms=arms, cameras=cameras)


def to_matrix(pose: Pose) -> NDArray[np.float64]:
    """Return a pose as a (4, 4) transform, m."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", pose.rpy_rad).as_matrix()
    matrix[:3, 3] = pose.xyz_m
    return matrix


def to_pose(matrix: ArrayLike) -> Pose:
    """Return a (4, 4) transform as a pose."""
    values = np.asarray(matrix, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # at a pitch of 90 deg one of many answers will do
        rpy = Rotation.from_matrix(values[:3, :3]).as_euler("xyz")
    return Pose(
        xyz_m=(float(values[0, 3]), float(values[1, 3]), float(values[2, 3])),
        rpy_rad=(float(rpy[0]), float(rpy[1]), float(rpy[2])),
    )


def _lifted(xyz_m: Vec3, lift_m: float) -> Vec3:
    x, y, z = xyz_m
    return x, y, z + lift_m


class _Versioned(msgspec.Struct):
    """What is read first, so that another schema is named as such."""

    schema: int


def _placed(camera: Camera, record: SessionRecord) -> Camera:
    lens = record.lenses.get(camera.name)
    if lens is not None:
        lens = lens.scaled(camera.width, camera.height)
        camera = msgspec.structs.replace(camera, fx=lens.fx, fy=lens.fy, cx=lens.cx, cy=lens.cy)
    pose = record.camera_in_world.get(camera.name)
    return camera if pose is None else camera.at(to_matrix(pose))
