"""Starting values: OpenCV's solvers, on all views and on many small groups of them.

OpenCV's solvers have no defence against a view that is wrong. Groups of four are drawn, and whatever fits
most views well is the start, so that up to a third of the views may be wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import ArrayLike

from calibration.geometry import Array, inverse, log_rotation, transform
from calibration.refinement import Model, Setup, fit

HAND_EYE = {
    "Tsai": cv2.CALIB_HAND_EYE_TSAI,
    "Park": cv2.CALIB_HAND_EYE_PARK,
    "Horaud": cv2.CALIB_HAND_EYE_HORAUD,
    "Andreff": cv2.CALIB_HAND_EYE_ANDREFF,
    "Daniilidis": cv2.CALIB_HAND_EYE_DANIILIDIS,
}
ROBOT_WORLD = {"Shah": cv2.CALIB_ROBOT_WORLD_HAND_EYE_SHAH, "Li": cv2.CALIB_ROBOT_WORLD_HAND_EYE_LI}

_GROUP = 4
_GROUPS = 60
_KEPT = 3
_CUT = 30.0  # what a view that does not fit costs: beyond any chi-squared value of 6 degrees of freedom
_FAR_M = 20.0


def opencv_hand_eye(setup: Setup, gripper: Array, seen: Array, method: str) -> Array | None:
    """Return the camera's pose (4, 4) by one of OpenCV's methods; None where it finds none.

    Args:
        setup: where the camera is.
        gripper: (N, 4, 4) gripper in base.
        seen: (N, 4, 4) board in camera.
        method: a key of ``HAND_EYE`` or ``ROBOT_WORLD``.
    """
    moving = gripper if setup == "eye-in-hand" else inverse(gripper)
    with contextlib.suppress(cv2.error), _quiet():
        if method in HAND_EYE:
            return _checked(*cv2.calibrateHandEye(*_split(moving), *_split(seen), method=HAND_EYE[method]))
        found = cv2.calibrateRobotWorldHandEye(
            *_split(seen), *_split(inverse(moving)), method=ROBOT_WORLD[method]
        )
        return inverse(_checked(*found[2:]))
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep OpenCV from printing what is told by returning nothing."""
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(before)


def start(model: Model, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return (4, 4) camera and (4, 4) board from which :func:`~calibration.refinement.fit` can go on."""
    gripper = model.arm.poses(np.zeros(len(model.arm.deviations())))
    candidates = []
    for camera in _cameras(model.setup, gripper, model.seen.poses, rng):
        board = _middle_board(model.setup, camera, gripper, model.seen.poses)
        candidates.append((_misfit(model, camera, board), camera, board))
    if not candidates:
        return np.eye(4), _middle_board(model.setup, np.eye(4), gripper, model.seen.poses)
    candidates.sort(key=lambda c: c[0])
    return min((_polished(model, *c[1:]) for c in candidates[:_KEPT]), key=lambda c: c[0])[1:]


def _cameras(setup: Setup, gripper: Array, seen: Array, rng: np.random.Generator) -> Iterator[Array]:
    everything = np.arange(len(gripper))
    groups = [(everything, name) for name in (*HAND_EYE, *ROBOT_WORLD)]
    if len(gripper) > _GROUP:
        groups += [(rng.choice(len(gripper), _GROUP, replace=False), "Park") for _ in range(_GROUPS)]
    for group, method in groups:
        camera = opencv_hand_eye(setup, gripper[group], seen[group], method)
        if camera is not None:
            yield camera


def _middle_board(setup: Setup, camera: Array, gripper: Array, seen: Array) -> Array:
    """Return the board's pose that most views nearly agree on: the one nearest to all the others."""
    moving = gripper if setup == "eye-to-hand" else inverse(gripper)
    boards = inverse(moving) @ camera @ seen
    turn = log_rotation(np.swapaxes(boards[:, None, :3, :3], 2, 3) @ boards[None, :, :3, :3])
    shift = boards[:, None, :3, 3] - boards[None, :, :3, 3]
    apart = np.minimum(np.linalg.norm(shift, axis=2), 1.0) + np.linalg.norm(turn, axis=2)
    middle: Array = boards[np.argmin(np.median(apart, axis=1))]
    return middle


def _misfit(model: Model, camera: Array, board: Array) -> float:
    none = np.zeros(len(model.arm.deviations()))
    gripper, predicted = model.predict(camera, board, none)
    residuals = model.differences(predicted)
    arm = model.noise_slopes(board, gripper) * model.arm.deviations()
    total = sum(root @ np.swapaxes(root, 1, 2) for root in (*model.seen.roots.values(), arm))
    solved = np.linalg.solve(np.asarray(total), residuals[..., None])[..., 0]
    return float(np.sqrt(np.sum(residuals * solved, axis=1)).clip(max=_CUT).sum())


def _polished(model: Model, camera: Array, board: Array) -> tuple[float, Array, Array]:
    """Return the misfit, camera and board after a fit to the half of the views that fit best."""
    none = np.zeros(len(model.arm.deviations()))
    for _ in range(3):
        _, predicted = model.predict(camera, board, none)
        residuals = model.differences(predicted)
        size = np.linalg.norm(residuals[:, :3], axis=1) + 0.3 * np.linalg.norm(residuals[:, 3:], axis=1)
        order = np.argsort(size)[: max(_GROUP, (2 * len(size)) // 3)]
        found = fit(model.subset(order), camera, board)
        camera, board = found.camera, found.board
    return _misfit(model, camera, board), camera, board


def _split(poses: Array) -> tuple[list[Array], list[Array]]:
    return list(poses[:, :3, :3].copy()), list(poses[:, :3, 3:].copy())


def _checked(rotation: ArrayLike, shift: ArrayLike) -> Array:
    pose = transform(rotation, np.ravel(shift))
    if not np.isfinite(pose).all() or np.abs(pose[:3, 3]).max() > _FAR_M:
        raise cv2.error("no solution")
    u, _, vt = np.linalg.svd(pose[:3, :3])
    if np.linalg.det(u @ vt) < 0:
        raise cv2.error("no rotation")
    return transform(u @ vt, pose[:3, 3])
