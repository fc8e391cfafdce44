"""What is wrong with data that do not fit, and whether data that fit may be believed.

A fault is named only when the data fit well once it is assumed and undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from calibration.board import Board
from calibration.faults import (
    BoardMovedError,
    CameraMovedError,
    DegenerateMotionError,
    InconsistentDataError,
    MixedUnitsError,
    RescaledBoardError,
    SwappedArmsError,
    WrongSetupError,
)
from calibration.geometry import Array, difference, inverse, log_rotation
from calibration.observability import Noise, PlannedPose, RigGeometry, plan_grippers, plan_poses
from calibration.refinement import JointMotion, Model, PoseMotion, Seen, Setup, arm_scale
from calibration.robust import LEAST_INLIERS, Agreement, agree
from calibration.starts import opencv_hand_eye
from simplevla.errors import CalibrationError

_STILL_M, _STILL_RAD = 0.004, float(np.deg2rad(0.7))
_UNDETERMINED_M, _UNDETERMINED_RAD = 0.01, float(np.deg2rad(1.5))
_SCALE_DEVIATIONS, _LEAST_SCALE, _SCALE_SURE = 5.0, 0.005, 0.004
_STEP_CHI2 = 45.0  # of 6 degrees of freedom, and the best of some twenty places to look
_LEAST_SIDE, _LEAST_LARGE_SIDE, _MOSTLY = 3, 5, 0.75
_LARGE_NOISE = 2.5  # times the expected: something else may be behind it
_NOISE_M, _NOISE_RAD = 2e-3, float(np.deg2rad(0.4))
_PROPOSALS = 4
_NEAR_RAD = 0.3  # of proposed joint positions to those taken: what is seen there can be foretold
_STRAY = 6.0  # times farther off than most: a view of the other side
_SEED = 0


def explain(model: Model, found: Agreement, board: Board, stamps: NDArray[np.int64]) -> CalibrationError:
    """Return the error that says why the data do not fit."""
    standing = _standing_arm(model)
    if standing is not None:
        return standing
    order = np.argsort(stamps, kind="stable")
    step = _block_that_moved(model, order, range(_LEAST_SIDE, len(order) - _LEAST_SIDE + 1))
    if step is not None:
        return step
    for error, changed in _suspicions(model, board):
        again = agree(changed, np.random.default_rng(_SEED))
        if again.consistent and _determined(again):
            return error
    good = int(found.inliers.sum())
    return InconsistentDataError(
        f"arm and camera do not agree: {good} of {len(found.inliers)} views fit one camera pose, "
        f"{LEAST_INLIERS:.0%} must",
        "check that the arm stood still for each picture, that samples carry this arm's positions at the "
        "time of the picture, that its model is right, and that neither board nor camera was loose",
    )


def require_determined(model: Model, found: Agreement, rig: RigGeometry, noise: Noise) -> None:
    """Raise DegenerateMotionError if the poses leave a part of the camera's pose undetermined."""
    if _determined(found):
        return
    covariance = found.estimate.covariance[:6, :6]
    gripper = model.arm.poses(np.zeros(len(model.arm.deviations())))
    turns = log_rotation(gripper[0, :3, :3].T @ gripper[:, :3, :3])
    spread = np.linalg.svd(turns - turns.mean(0), compute_uv=False) / np.sqrt(len(turns))
    if spread[0] < np.deg2rad(3):
        motion = "the gripper hardly turned"
    elif spread[1] < np.deg2rad(3):
        motion = "the gripper turned about one axis alone"
    else:
        motion = "the gripper's turns are too small or too alike"
    shift_std, turn_std = (
        np.sqrt(np.linalg.eigvalsh(c)[-1]) for c in (covariance[:3, :3], covariance[3:, 3:])
    )
    proposals = _cure(model, replace(rig, covariance=found.estimate.covariance), noise, gripper)
    raise DegenerateMotionError(
        f"{motion}: along one direction the camera's position is known to {1e3 * shift_std:.0f} mm "
        f"and {np.rad2deg(turn_std):.1f} deg only",
        f"add views with the board turned about other axes; {len(proposals)} such poses are proposed"
        if proposals
        else "add views with the board turned by 20 to 40 deg about at least two axes",
        proposals,
    )


def require_scale(model: Model, found: Agreement, board: Board) -> tuple[float, float]:
    """Return the board's size relative to its description, with its standard deviation.

    Raises:
        RescaledBoardError: it is not 1.
    """
    estimate, keep = found.estimate, found.inliers
    _, predicted = model.predict(estimate.camera, estimate.board, estimate.offsets_rad)
    # A board that is (1 + s) times as large looks as one that is nearer by that factor.
    column = np.zeros((len(predicted), 6, 1))
    column[:, :3] = np.swapaxes(predicted[:, :3, :3], 1, 2) @ -predicted[:, :3, 3, None]
    shift, information = _extra(found, column, keep)
    known = float(information[0, 0])
    if known <= 0:
        return 1.0, float("inf")  # the motion says nothing of the board's size
    scale, deviation = 1 + float(shift[0]), known**-0.5
    off = abs(scale - 1)
    if off > max(_LEAST_SCALE, _SCALE_DEVIATIONS * deviation):
        raise _rescaled(board, scale, deviation)
    return scale, deviation


def require_zeros(model: Model, with_offsets: Model, found: Agreement, rng: np.random.Generator) -> None:
    """Raise if what looks like a board of another size is joints whose zeros are off.

    Raises:
        InconsistentDataError: with joint offsets, as many views fit, with half the noise.
    """
    if model.find_offsets or not len(with_offsets.free()):
        return
    again = agree(with_offsets, rng)
    much_better = arm_scale(model, again.estimate.scales) < 0.6 * arm_scale(model, found.estimate.scales)
    if again.consistent and again.inliers.sum() >= found.inliers.sum() and much_better:
        offsets = ", ".join(f"{x:.2f}" for x in np.rad2deg(again.estimate.offsets_rad))
        raise InconsistentDataError(
            f"the joints' zeros seem to be off, by about {offsets} deg",
            "look for joint offsets as well, or set the arm's zeros anew",
        )


def require_still(model: Model, found: Agreement, stamps: NDArray[np.int64]) -> None:
    """Raise CameraMovedError or BoardMovedError if one moved once while the samples were taken."""
    order = np.argsort(stamps, kind="stable")
    gain, k, first, step = _best_step(found, order[found.inliers[order]], found.inliers)
    if gain > _STEP_CHI2:
        kept = order[found.inliers[order]]
        raise _moved(first == 0, model, int(kept[k]), step, len(kept) - k)
    noisy = arm_scale(model, found.estimate.scales) > _LARGE_NOISE
    if (~found.inliers).sum() >= _LEAST_SIDE or noisy:
        places = _moments(found.inliers[order])
        if noisy:  # else scattered outliers would be taken for a step where they happen to lie
            places.append(_best_step(found, order, np.ones(len(order), bool))[1])
        moved = _block_that_moved(model, order, places)
        if moved is not None:
            raise moved


def _best_step(
    found: Agreement, order: NDArray[np.int64], keep: NDArray[np.bool_]
) -> tuple[float, int, int, Array]:
    """Return where one step of camera or board would gain most.

    Returns:
        The gain, chi-squared with 6 degrees of freedom; how many of ``order`` are before the step; 0 for
        the camera or 6 for the board; and the step (6,).
    """
    best = (0.0, len(order) // 2, 0, np.zeros(6))
    for first in (0, 6):  # the camera's columns, then the board's
        for k in range(_LEAST_SIDE, len(order) - _LEAST_SIDE + 1):
            late = np.zeros(len(keep), bool)
            late[order[k:]] = True
            column = np.where(late[:, None, None], found.estimate.columns[:, :, first : first + 6], 0.0)
            step, information = _extra(found, column, keep)
            gain = float(step @ information @ step)
            if gain > best[0]:
                best = (gain, k, first, step)
    return best


def _determined(found: Agreement) -> bool:
    covariance = found.estimate.covariance
    shift = np.sqrt(np.linalg.eigvalsh(covariance[:3, :3])[-1])
    turn = np.sqrt(np.linalg.eigvalsh(covariance[3:6, 3:6])[-1])
    return bool(shift < _UNDETERMINED_M and turn < _UNDETERMINED_RAD)


def _cure(model: Model, rig: RigGeometry, noise: Noise, gripper: Array) -> list[PlannedPose]:
    rng = np.random.default_rng(_SEED)
    if isinstance(model.arm, JointMotion):
        joints = model.arm.joints_rad
        lower, upper = joints.min(0) - _NEAR_RAD, joints.max(0) + _NEAR_RAD
        planned = plan_poses(
            rig, lower=lower, upper=upper, count=_PROPOSALS, rng=rng, already=list(joints), noise=noise
        )
        if planned:
            return planned
    return plan_grippers(rig, count=_PROPOSALS, rng=rng, already=gripper, noise=noise)


def _extra(found: Agreement, column: Array, keep: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return the value of parameters added to the model, and their information, all others free.

    Args:
        found: the fit without them.
        column: (N, 6, k) what they do to the predicted poses.
        keep: (N,) the views that count.
    """
    estimate = found.estimate
    weighted = np.swapaxes(column[keep], 1, 2) @ estimate.inverses[keep]
    own = (weighted @ column[keep]).sum(0)
    shared = (weighted @ estimate.columns[keep]).sum(0)
    gradient = (weighted @ estimate.residuals[keep][..., None]).sum(0)[:, 0]
    information = own - shared @ estimate.covariance @ shared.T
    information += 1e-9 * np.eye(len(own)) * max(float(np.trace(own)), 1.0)
    return np.linalg.solve(information, gradient), information


def _standing_arm(model: Model) -> CalibrationError | None:
    """Return an error if the arm stands still while the board moves."""
    gripper = model.arm.poses(np.zeros(len(model.arm.deviations())))
    if _amplitude(gripper) > 1 or _amplitude(model.seen.poses) < 4:
        return None
    return SwappedArmsError(
        "the arm's positions hardly change while the board moves through the pictures",
        "give the positions of the arm that the samples show; the other arm's seem to be there",
    )


def _amplitude(poses: Array) -> float:
    """Return how much poses differ, in units below which nothing has moved."""
    steps = difference(poses, poses[:1])
    return float(
        max(
            np.median(np.linalg.norm(steps[:, :3], axis=1)) / _STILL_M,
            np.median(np.linalg.norm(steps[:, 3:], axis=1)) / _STILL_RAD,
        )
    )


def _block_that_moved(
    model: Model, order: NDArray[np.int64], places: Iterable[int]
) -> CalibrationError | None:
    """Return an error if the views before one of ``places`` fit one pose, and those after it another."""
    gripper = model.arm.poses(np.zeros(len(model.arm.deviations())))
    best: tuple[float, CalibrationError] | None = None
    for k in sorted(set(places)):
        early, late = order[:k], order[k:]
        large, small = (early, late) if len(early) >= len(late) else (late, early)
        if len(large) < _LEAST_LARGE_SIDE or len(small) < _LEAST_SIDE:
            continue
        most = agree(model.subset(large), np.random.default_rng(_SEED))
        if not (most.consistent and most.inliers.mean() > _MOSTLY and _determined(most)):
            continue
        arm = gripper[small]
        moving = arm if model.setup == "eye-to-hand" else inverse(arm)
        cameras = moving @ most.estimate.board @ inverse(model.seen.poses[small])
        boards = inverse(moving) @ most.estimate.camera @ model.seen.poses[small]
        for is_camera, poses, before in (
            (True, cameras, most.estimate.camera),
            (False, boards, most.estimate.board),
        ):
            apart, middle = _scatter(poses)
            scatter = float(np.median(apart))
            step = difference(middle, before)
            noise = max(arm_scale(model, most.estimate.scales), 0.3)
            if scatter > 2.5 * noise or _size(step) < 2.5 * max(scatter, 0.5 * noise):
                continue
            strays = (~most.inliers).sum() + (apart > _STRAY * max(scatter, noise)).sum()
            figure = scatter / noise + 2 * float(strays)
            if best is None or figure < best[0]:
                step = step if large is early else -step
                best = (figure, _moved(is_camera, model, int(order[k]), step, len(late)))
    return best and best[1]


def _moments(good: NDArray[np.bool_]) -> list[int]:
    """Return places to split the views in time, the likeliest first: where good ones and bad ones part."""
    count = len(good)
    places = range(_LEAST_SIDE, count - _LEAST_SIDE + 1)
    bad = ~good
    misfit = [min(bad[:k].sum() + good[k:].sum(), good[:k].sum() + bad[k:].sum()) for k in places]
    order = np.argsort(misfit, kind="stable")[:3]
    return [places[i] for i in order if misfit[i] <= 0.2 * count]


def _scatter(poses: Array) -> tuple[Array, Array]:
    """Return how far (N,) poses lie from the one in their middle, see :func:`_size`, and that one."""
    apart = np.array([[_size(difference(p, q)) for q in poses] for p in poses])
    middle = int(np.argmin(np.median(apart, axis=1)))
    return apart[middle], poses[middle]


def _size(step: Array) -> float:
    """Return how large a step (6,) is in units of what a joint noise of 0.1 deg makes of one pose."""
    return float(max(np.linalg.norm(step[:3]) / _NOISE_M, np.linalg.norm(step[3:]) / _NOISE_RAD))


def _moved(camera: bool, model: Model, view: int, step: Array, after: int) -> CalibrationError:
    shift, turn = 1e3 * np.linalg.norm(step[:3]), np.rad2deg(np.linalg.norm(step[3:]))
    thing = "camera" if camera else "board"
    slipped = "in the gripper " if camera == (model.setup == "eye-in-hand") else ""
    message = (
        f"the {thing} moved {slipped}by about {shift:.1f} mm and {turn:.2f} deg before view {view + 1} by "
        f"time; {after} views are from after that"
    )
    remedy = f"fix the {thing} and take all views again"
    return CameraMovedError(message, remedy) if camera else BoardMovedError(message, remedy)


def _rescaled(board: Board, scale: float, deviation: float) -> RescaledBoardError:
    square_mm = 1e3 * board.square_m
    return RescaledBoardError(
        f"the squares measure {scale * square_mm:.2f} +- {deviation * square_mm:.2f} mm by the arm's "
        f"motion, {square_mm:.2f} mm by the board's description",
        "measure the printed squares and correct board.yaml, or print at 100 %; if they are right, the "
        "camera's focal length is not",
    )


def _suspicions(model: Model, board: Board) -> Iterator[tuple[CalibrationError, Model]]:
    """Yield faults with the model in which each is undone."""
    none = np.zeros(len(model.arm.deviations()))
    if isinstance(model.arm, JointMotion):
        yield (
            MixedUnitsError("the joints fit as degrees", "give joints in rad"),
            replace(model, arm=replace(model.arm, joints_rad=np.deg2rad(model.arm.joints_rad))),
        )
    else:
        assert isinstance(model.arm, PoseMotion)
        pose = model.arm.base_gripper
        for unit, factor in (("mm", 1e-3), ("cm", 1e-2)):
            smaller = pose.copy()
            smaller[:, :3, 3] *= factor
            yield (
                MixedUnitsError(f"T_base_gripper fits as {unit}", "give T_base_gripper in m"),
                replace(model, arm=replace(model.arm, base_gripper=smaller)),
            )
        yield (
            WrongSetupError(
                "the poses fit as those of the base in the gripper", "give T_base_gripper, not its inverse"
            ),
            replace(model, arm=replace(model.arm, base_gripper=inverse(pose))),
        )
    other: Setup = "eye-in-hand" if model.setup == "eye-to-hand" else "eye-to-hand"
    yield (
        WrongSetupError(f"the data fit {other}, not {model.setup}", f"name the setup {other}"),
        replace(model, setup=other),
    )
    scale = _scale_by_translations(model, model.arm.poses(none))
    if scale is not None:
        seen = model.seen.poses.copy()
        seen[:, :3, 3] *= scale
        yield (
            _rescaled(board, scale, 0.01 * scale),
            replace(model, seen=Seen(seen, {n: _stretched(r, scale) for n, r in model.seen.roots.items()})),
        )


def _stretched(root: Array, scale: float) -> Array:
    out = root.copy()
    out[:, :3] *= scale
    return out


def _scale_by_translations(model: Model, gripper: Array) -> float | None:
    """Return the board's scale at which the motions of arm and board agree, or None.

    The rotations do not depend on it; given them, (R_A - 1) t = s R t_B - t_A is linear in t and s, of
    which the factor that most pairs of views bear out is taken (Andreff et al. 2001).
    """
    camera = opencv_hand_eye(model.setup, gripper, model.seen.poses, "Park")
    if camera is None:
        return None
    moving = gripper if model.setup == "eye-in-hand" else inverse(gripper)
    first, second = np.triu_indices(len(moving), 1)
    a = inverse(moving[first]) @ moving[second]
    b = model.seen.poses[first] @ inverse(model.seen.poses[second])
    turned = camera[:3, :3] @ b[:, :3, 3, None]
    rows = np.concatenate([a[:, :3, :3] - np.eye(3), -turned], axis=2).reshape(-1, 4)
    solution = np.linalg.lstsq(rows, -a[:, :3, 3].reshape(-1), rcond=None)[0]
    return float(solution[3]) if 1e-4 < solution[3] < 1e4 else None
