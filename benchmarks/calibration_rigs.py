"""Random rigs with a known truth, photographed by SAPIEN: what :mod:`benchmarks.calibration` calibrates."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from calibration.board import DEFAULT_BOARD, board_picture, plate_size_m
from calibration.camera import CameraModel
from calibration.detection import BoardDetector, Detection
from calibration.geometry import Array, exp_rotation, inverse, moved, shifted, transform
from calibration.observability import RigGeometry, plan_poses, visible_joints
from calibration.refinement import Setup
from simplevla.embodiment import Arm, load_embodiment
from simplevla.files import write_atomic
from simplevla.kinematics import Chain, arm_chain

BOARD = DEFAULT_BOARD
WIDTH, HEIGHT, FOCAL_PX = 640, 480, 605.0
JOINT_NOISE_DEG = 0.1
NOISE_PX = 0.1  # of corners where no pictures are rendered; those of rendered ones are three times better

_KNOWN_M, _KNOWN_RAD = 0.01, 0.02  # how well a rig is known when its poses are planned
_LOWEST_M = 0.05  # gripper above the arm's base plate
_TEXELS = 60
_ROOM_M = (0.0, -0.35, 0.75)  # the arm's base in the room

NoiseKind = Literal["uniform", "gaussian"]


@dataclass(frozen=True, eq=False)
class Rig:
    """One rig and what its camera saw.

    Attributes:
        camera_pose, board_pose: (4, 4) the truth, see :class:`calibration.hand_eye.HandEye`.
        joints_rad: (N, n) where the arm stood.
        detections: the corners that were found in each picture.
    """

    setup: Setup
    camera: CameraModel
    camera_pose: Array
    board_pose: Array
    joints_rad: Array
    detections: tuple[Detection, ...]

    def readings(self, kind: NoiseKind, rng: np.random.Generator) -> Array:
        """Return (N, n) joint positions as read: off by up to 0.1 deg, or by 0.1 deg as a deviation."""
        size = self.joints_rad.shape
        noise = rng.uniform(-1, 1, size) if kind == "uniform" else rng.standard_normal(size)
        return self.joints_rad + np.deg2rad(JOINT_NOISE_DEG) * noise

    def corner_errors_px(self, chain: Chain) -> Array:
        """Return (M, 2) found minus true corners of all pictures."""
        errors = []
        for q, detection in zip(self.joints_rad, self.detections, strict=True):
            errors.append(detection.corners_px - self.true_corners_px(chain, q)[detection.ids])
        return np.concatenate(errors)

    def true_corners_px(self, chain: Chain, joints_rad: Array) -> Array:
        """Return (K, 2) where the corners are in a picture taken at ``joints_rad`` (n,)."""
        pose = board_in_camera(self.setup, chain.forward(joints_rad), self.camera_pose, self.board_pose)
        return self.camera.project(BOARD.corners_m() @ pose[:3, :3].T + pose[:3, 3])


@lru_cache(maxsize=1)
def the_arm() -> tuple[Arm, Chain]:
    """Return the arm of all rigs: a Piper."""
    arm = load_embodiment("piper_single").arms[0]
    return arm, arm_chain(arm)


def board_in_camera(setup: Setup, gripper: Array, camera_pose: Array, board_pose: Array) -> Array:
    """Return (4, 4) the board in the camera."""
    moving = gripper if setup == "eye-to-hand" else inverse(gripper)
    return inverse(camera_pose) @ moving @ board_pose


def rigs(
    count: int,
    *,
    poses: int,
    setup: Setup,
    seed: int,
    rendered: bool,
    cache: Path | None,
    planned: bool = True,
) -> Iterator[Rig]:
    """Yield ``count`` random rigs.

    Args:
        count: how many.
        poses: views of each.
        setup: where the camera is.
        seed: decides all of them.
        rendered: whether pictures are rendered and corners found in them; else the true corners with
            ``NOISE_PX`` of noise are taken.
        cache: folder in which what was found in rendered pictures is kept; remove it when the detector
            changes.
        planned: whether poses are planned as on a robot, or drawn at random where the board is seen.
    """
    from contextlib import ExitStack

    with ExitStack() as stack:
        studio = None
        for index in range(count):
            rng = np.random.default_rng([seed, index, len(setup)])
            rig = _draw(rng, setup, poses, planned=planned)
            if not rendered:
                yield _seen_without_rendering(rig, rng)
                continue
            shown = zlib.crc32(rig.joints_rad.tobytes())
            kept = None if cache is None else cache / f"{setup}_{seed}_{index}_{shown:08x}.msgpack"
            if kept is not None and kept.exists():
                yield _with_corners(rig, msgspec.msgpack.decode(kept.read_bytes()))
                continue
            if studio is None:
                studio = stack.enter_context(_studio())
            found = _photograph(studio, rig, rng, None if cache is None or index else cache / "pictures")
            if kept is not None:
                write_atomic(kept, msgspec.msgpack.encode(found))
            yield _with_corners(rig, found)


def _draw(rng: np.random.Generator, setup: Setup, poses: int, *, planned: bool = True) -> Rig:
    """Return a rig whose pictures are still to be taken."""
    arm, chain = the_arm()
    lower = np.array([joint.lower_rad for joint in arm.joints])
    upper = np.array([joint.upper_rad for joint in arm.joints])
    centre = shifted([0.5 * side for side in BOARD.size_m] + [0.0])
    while True:
        camera_pose, middle = _eye_to_hand(rng) if setup == "eye-to-hand" else _eye_in_hand(rng)
        board_pose = middle @ inverse(centre)
        camera = CameraModel(
            width=WIDTH,
            height=HEIGHT,
            fx=FOCAL_PX * (1 + rng.uniform(-0.01, 0.01)),
            fy=FOCAL_PX * (1 + rng.uniform(-0.01, 0.01)),
            cx=WIDTH / 2 - 0.5 + rng.uniform(-8, 8),
            cy=HEIGHT / 2 - 0.5 + rng.uniform(-8, 8),
            distortion=(
                rng.uniform(-0.1, 0.1),
                rng.uniform(-0.1, 0.1),
                *rng.uniform(-0.002, 0.002, 2).tolist(),
                0.0,
            ),
        )
        roughly = moved(
            camera_pose,
            np.concatenate([rng.normal(0, _KNOWN_M, 3), rng.normal(0, _KNOWN_RAD, 3)]),
        )
        geometry = RigGeometry(setup, camera, BOARD, roughly, board_pose, chain)
        ask: dict[str, Any] = {"lower": lower, "upper": upper, "rng": rng, "allowed": _above_the_table}
        if planned:
            plan = plan_poses(geometry, count=poses, **ask)
            joints = np.array([pose.joints_rad for pose in plan])
        else:
            joints = visible_joints(geometry, wanted=poses, **ask)
        if len(joints) == poses:
            return Rig(setup, camera, camera_pose, board_pose, rng.permutation(joints), ())


def _above_the_table(joints_rad: Array) -> bool:
    return bool(the_arm()[1].forward(joints_rad)[2, 3] > _LOWEST_M)


def _eye_to_hand(rng: np.random.Generator) -> tuple[Array, Array]:
    """Return a camera 0.45 to 0.65 m from the middle of the workspace, and the board in the gripper."""
    azimuth, elevation, distance = rng.uniform(-0.8, 0.8), rng.uniform(0.1, 0.9), rng.uniform(0.45, 0.65)
    target = np.array([0.3, 0.0, 0.25])
    direction = np.array(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    )
    camera = _looking(target + distance * direction, target, rng.uniform(-0.3, 0.3))
    turn = exp_rotation(np.array([0, -np.pi / 2, 0])) @ exp_rotation(rng.uniform(-0.3, 0.3, 3))
    return camera, transform(turn, rng.uniform(-0.03, 0.03, 3))


def _eye_in_hand(rng: np.random.Generator) -> tuple[Array, Array]:
    """Return a camera above the gripper that looks along it, and a board on the table."""
    ahead = exp_rotation(np.array([0, np.pi / 2, 0])) @ exp_rotation(np.array([0, 0, -np.pi / 2]))
    camera = transform(
        ahead @ exp_rotation(rng.uniform(-0.3, 0.3, 3)),
        np.array([-0.1, 0, 0.08]) + rng.uniform(-0.02, 0.02, 3),
    )
    flat = exp_rotation(np.array([np.pi, 0, 0])) @ exp_rotation(np.array([0, 0, rng.uniform(-3, 3)]))
    return camera, transform(flat, np.array([0.38, rng.uniform(-0.1, 0.1), 0.0]))


def _looking(position: Array, target: Array, roll: float) -> Array:
    ahead = (target - position) / np.linalg.norm(target - position)
    right = np.cross(ahead, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    turn = np.stack([right, np.cross(ahead, right), ahead], axis=1)
    return transform(turn @ exp_rotation(np.array([0, 0, roll])), position)


def _seen_without_rendering(rig: Rig, rng: np.random.Generator) -> Rig:
    _, chain = the_arm()
    ids = np.arange(len(BOARD.corners_m()))
    detections = []
    for q in rig.joints_rad:
        corners = rig.true_corners_px(chain, q)
        detections.append(Detection(ids, corners + rng.normal(0, NOISE_PX, corners.shape)))
    return _with(rig, detections)


Found = list[tuple[list[int], list[list[float]]]]


def _with_corners(rig: Rig, found: Found) -> Rig:
    """Return the rig with the corners; views in which too few were found are left out."""
    return _with(
        rig, [Detection(np.array(ids, np.int64), np.array(px).reshape(-1, 2)) for ids, px in found]
    )


def _with(rig: Rig, detections: list[Detection]) -> Rig:
    keep = [i for i, detection in enumerate(detections) if len(detection.ids)]
    return Rig(
        rig.setup,
        rig.camera,
        rig.camera_pose,
        rig.board_pose,
        rig.joints_rad[keep],
        tuple(detections[i] for i in keep),
    )


def _studio():  # type: ignore[no-untyped-def]  # its module needs the extra "sim"
    from msgspec.structs import replace

    from sim_training.calibration_scene import Studio

    camera = load_embodiment("piper_single").cameras[0]
    pinhole = replace(
        camera, width=WIDTH, height=HEIGHT, fx=FOCAL_PX, fy=FOCAL_PX, cx=WIDTH / 2, cy=HEIGHT / 2
    )
    return Studio(pinhole, board_picture(BOARD, pixels_per_square=_TEXELS), plate_size_m(BOARD), seed=1)


def _photograph(studio, rig: Rig, rng: np.random.Generator, keep: Path | None) -> Found:  # type: ignore[no-untyped-def]
    """Return the corners found in one picture at each of the rig's poses; keep the pictures if asked."""
    import cv2

    from sim_training.calibration_scene import Optics

    _, chain = the_arm()
    detector = BoardDetector(BOARD)
    room = shifted(_ROOM_M)
    margin = shifted([-0.5 * BOARD.square_m, -0.5 * BOARD.square_m, 0.0])
    camera = rig.camera
    found: Found = []
    for number, q in enumerate(rig.joints_rad):
        gripper = chain.forward(q)
        eye = rig.camera_pose if rig.setup == "eye-to-hand" else gripper @ rig.camera_pose
        board = gripper @ rig.board_pose if rig.setup == "eye-to-hand" else rig.board_pose
        optics = Optics(
            pinhole=(camera.fx, camera.fy, camera.cx, camera.cy),
            distortion=camera.distortion,
            blur_px=rng.uniform(0.0, 1.0),
            exposure=float(np.exp(rng.uniform(np.log(0.6), np.log(1.4)))),
            noise=rng.uniform(1.0, 4.0),
        )
        picture = studio.picture(room @ eye, room @ board @ margin, optics, rng)
        if keep is not None:
            done, data = cv2.imencode(".png", picture[..., ::-1])
            write_atomic(keep / f"{rig.setup}_{number}.png", data.tobytes() if done else b"")
        detection = detector.find(picture)
        found.append(
            ([], []) if detection is None else (detection.ids.tolist(), detection.corners_px.tolist())
        )
    return found
