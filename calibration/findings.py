"""What a session has found so far, and the record that it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calibration.camera import CameraModel
from calibration.hand_eye import HandEye
from robot_bridge.rig import Rig
from simplevla.embodiment import Embodiment, Pose
from simplevla.session_record import Check, Lens, SessionRecord, to_matrix, to_pose

Array = NDArray[np.float64]


@dataclass
class Findings:
    """Grows step by step; attributes are those of a session record.

    Attributes:
        fresh: the checks that were made anew.
        solved: {(camera, arm): what was solved in this session}.
    """

    checks: list[Check] = field(default_factory=list)
    camera_in_world: dict[str, Pose] = field(default_factory=dict)
    base_in_world: dict[str, Pose] = field(default_factory=dict)
    board_in_tool: dict[str, Pose] = field(default_factory=dict)
    covariances: dict[str, tuple[float, ...]] = field(default_factory=dict)
    lenses: dict[str, Lens] = field(default_factory=dict)
    joint_zeros_rad: dict[str, tuple[float, ...]] = field(default_factory=dict)
    delays_s: dict[str, float] = field(default_factory=dict)
    table_top_m: float | None = None
    fresh: list[Check] = field(default_factory=list)
    solved: dict[tuple[str, str], HandEye] = field(default_factory=dict)

    def record(self, rig: Rig, *, created_ns: int, source: str) -> SessionRecord:
        """Return the session record of what was found on ``rig``."""
        return SessionRecord(
            created_ns=created_ns,
            embodiment=rig.embodiment,
            serials=dict(rig.cameras),
            checks=tuple(self.checks),
            camera_in_world=dict(self.camera_in_world),
            base_in_world=dict(self.base_in_world),
            board_in_tool=dict(self.board_in_tool),
            covariances=dict(self.covariances),
            lenses=dict(self.lenses),
            joint_zeros_rad=dict(self.joint_zeros_rad),
            delays_s=dict(self.delays_s),
            table_top_m=self.table_top_m,
            source=source,
        )

    @classmethod
    def of(cls, record: SessionRecord) -> Findings:
        """Return what ``record`` holds, to be measured again in part."""
        return cls(
            checks=list(record.checks),
            camera_in_world=dict(record.camera_in_world),
            base_in_world=dict(record.base_in_world),
            board_in_tool=dict(record.board_in_tool),
            covariances=dict(record.covariances),
            lenses=dict(record.lenses),
            joint_zeros_rad=dict(record.joint_zeros_rad),
            delays_s=dict(record.delays_s),
            table_top_m=record.table_top_m,
        )

    def judged(self, check: Check) -> Check:
        """Keep ``check``, in the place of an older one of the same name, and return it."""
        self.checks = [*(each for each in self.checks if each.name != check.name), check]
        self.fresh.append(check)
        return check

    def base(self, embodiment: Embodiment, arm: str) -> Array:
        """Return the (4, 4) pose of an arm's base in the world, as found or else as the embodiment says."""
        nominal = next(each.base for each in embodiment.arms if each.name == arm)
        return to_matrix(self.base_in_world.get(arm, nominal))

    def place_camera(self, camera: str, in_base: Array, covariance: Array, base: Array) -> None:
        """Keep a camera's pose and covariance, given in the frame of a base that stands at ``base``."""
        self.camera_in_world[camera] = to_pose(base @ in_base)
        self.covariances[f"camera {camera}"] = turned(covariance, base)


def turned(covariance: Array, frame: Array) -> tuple[float, ...]:
    """Return a (6, 6) covariance along the axes of ``frame`` (4, 4) as 36 values along its parent's."""
    turn = np.kron(np.eye(2), frame[:3, :3])
    return tuple((turn @ covariance @ turn.T).ravel().tolist())


def lens_of(model: CameraModel) -> Lens:
    """Return the lens in the record's words, whose pixels count from the corner of the first one."""
    return Lens(
        width=model.width,
        height=model.height,
        fx=model.fx,
        fy=model.fy,
        cx=model.cx + 0.5,
        cy=model.cy + 0.5,
        distortion=model.distortion,
    )


def model_of(lens: Lens, width: int, height: int) -> CameraModel:
    """Return a record's lens as OpenCV counts, for pictures of another size of the same shape.

    Raises:
        RecordError: the shapes differ.
    """
    scaled = lens.scaled(width, height)
    return CameraModel(
        width=width,
        height=height,
        fx=scaled.fx,
        fy=scaled.fy,
        cx=scaled.cx - 0.5,
        cy=scaled.cy - 0.5,
        distortion=scaled.distortion,
    )
