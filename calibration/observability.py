"""Which poses tell most about the camera: chosen before they are taken.

The covariance that a set of views will have does not depend on what they show, only on where they are
(:mod:`calibration.refinement`). So poses are drawn at random, those that the camera cannot see or the
robot may not take are dropped, and those are kept that make the expected error smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibration.board import Board
from calibration.camera import CameraModel
from calibration.corners import Corners
from calibration.geometry import Array, exp_rotation, inverse, shifted
from calibration.refinement import JointMotion, Model, Motion, PoseMotion, Seen, Setup
from simplevla.kinematics import Chain

WANTED_M, WANTED_RAD = 0.5e-3, float(np.deg2rad(0.05))

_EDGE = 0.04  # of the picture's width that the board keeps from its edges
_MOST_TILT_RAD = float(np.deg2rad(55))
_SMALLEST, _LARGEST = 0.18, 0.85  # the board's longer side in the picture, as a part of its width
_FIRST_DRAW, _DRAWS, _NEIGHBOURS = 40_000, 12, 4_000
_SPREAD_RAD = 0.35
_TOLD_RAD = float(np.deg2rad(3))  # two poses nearer than this in every joint are one
_ROUNDS, _NARROWING, _TRIED = 4, 0.6, 150  # of improving each pose by small changes
_APART_RAD = (
    0.15  # in some joint, between poses that are improved: what a joint gets wrong, it repeats nearby
)
_FORESEEN, _FORESEEN_RAD = 0.06, float(np.deg2rad(15))  # the shift as a part of the distance
# Until poses determine everything, what is known beforehand keeps the sums finite: metres and turns.
_KNOWN_BEFORE = 1.0
_REACHES = (1.0, 0.5, 0.25)  # of free views, until some can be foreseen
_FIELD, _TURN_RAD = 0.55, 0.9  # of free views: how far off the middle, and turned, at most


@dataclass(frozen=True)
class Noise:
    """How far measurements are off: standard deviations.

    Attributes:
        pixel_px: of a corner's coordinate.
        joint_rad: of each joint's reading.
        position_m, rotation_rad: of a gripper's pose, where no joints are known.
    """

    pixel_px: float = 0.08
    joint_rad: float = float(np.deg2rad(0.1))
    position_m: float = 0.5e-3
    rotation_rad: float = float(np.deg2rad(0.1))


@dataclass(frozen=True, eq=False)
class RigGeometry:
    """Where things are, as far as is known: within centimetres and degrees is enough to plan.

    Attributes:
        camera_pose: (4, 4) camera in base (eye-to-hand) or in gripper (eye-in-hand), m.
        board_pose: (4, 4) board in gripper (eye-to-hand) or in base (eye-in-hand), m.
        covariance: (12, 12) of both, the board's at its middle; with it, poses are left out whose view
            cannot be foretold.
    """

    setup: Setup
    camera: CameraModel
    board: Board
    camera_pose: Array
    board_pose: Array
    chain: Chain | None = None
    covariance: Array | None = None


@dataclass(frozen=True, eq=False)
class PlannedPose:
    """A pose to take, and what will be known of the camera once it and all before it are taken.

    Attributes:
        joints_rad: (n,), None where no chain is known.
        base_gripper: (4, 4) the gripper's pose there, m.
        translation_std_m, rotation_std_rad: expected length of the camera's error, root mean square.
    """

    joints_rad: Array | None
    base_gripper: Array
    translation_std_m: float
    rotation_std_rad: float


def plan_poses(
    rig: RigGeometry,
    *,
    lower: ArrayLike,
    upper: ArrayLike,
    count: int,
    rng: np.random.Generator,
    already: Sequence[ArrayLike] = (),
    allowed: Callable[[Array], bool] = lambda _: True,
    noise: Noise | None = None,
    candidates: int = 400,
) -> list[PlannedPose]:
    """Return up to ``count`` poses that show the board whole and tell most about the camera, best first.

    Args:
        rig: where things are, with a chain.
        lower, upper: (n,) joint limits, rad.
        count: how many are wanted; fewer come back where fewer are found.
        rng: decides which poses are drawn.
        already: joint positions (n,) that were taken before.
        allowed: whether the robot may stand at (n,) joint positions; asked for a few hundred.
        noise: what is expected.
        candidates: how many poses to choose from.

    Raises:
        ValueError: the rig has no chain.
    """
    noise = noise or Noise()
    low, high = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    joints = visible_joints(rig, lower=low, upper=high, rng=rng, allowed=allowed, wanted=candidates)
    if rig.chain is None or not len(joints):
        return []
    before = np.asarray(already, dtype=np.float64).reshape(-1, len(low))
    gains = information(
        rig, JointMotion(rig.chain, np.concatenate([before, joints]), noise.joint_rad), noise
    )
    begun = gains[: len(before)].sum(0)
    chosen = joints[_choose(begun, gains[len(before) :], count)]
    chosen = _improved(rig, begun, chosen, low, high, rng, allowed, noise)
    order, covariances = _ordered(
        begun, information(rig, JointMotion(rig.chain, chosen, noise.joint_rad), noise)
    )
    return [
        PlannedPose(chosen[i], rig.chain.forward(chosen[i]), *_lengths(covariance))
        for i, covariance in zip(order, covariances, strict=True)
    ]


def plan_grippers(
    rig: RigGeometry,
    *,
    count: int,
    rng: np.random.Generator,
    already: Array,
    noise: Noise | None = None,
    candidates: int = 400,
) -> list[PlannedPose]:
    """Return gripper poses where no chain is known: views from around those ``already`` (N, 4, 4) taken."""
    noise = noise or Noise()
    centre = _centre(rig.board)
    board = rig.board_pose @ centre
    moving = already if rig.setup == "eye-to-hand" else inverse(already)
    seen = inverse(rig.camera_pose) @ moving @ board
    distance = float(np.clip(np.median(seen[:, 2, 3]), 0.1, 3.0))
    field = _FIELD * np.array([rig.camera.width / rig.camera.fx, rig.camera.height / rig.camera.fy]) / 2
    for reach in _REACHES:
        views = seen[rng.integers(len(seen), size=4 * candidates)].copy()
        turns = _TURN_RAD * rng.uniform(-1, 1, (len(views), 3)) * rng.uniform(0.1, 1, (len(views), 1))
        views[:, :3, :3] = exp_rotation(reach * turns) @ views[:, :3, :3]
        depth = distance * rng.uniform(0.75, 1.25, (len(views), 1))
        across = field * rng.uniform(-1, 1, (len(views), 2)) * depth
        views[:, :3, 3] += reach * (np.concatenate([across, depth], axis=1) - views[:, :3, 3])
        views = views[_visible(rig, views)][:candidates]
        if len(views) >= count:
            break
    grippers = rig.camera_pose @ views @ inverse(board)
    if rig.setup == "eye-in-hand":
        grippers = inverse(grippers)
    if not len(grippers):
        return []
    motion = PoseMotion(np.concatenate([already, grippers]), noise.position_m, noise.rotation_rad)
    gains = information(rig, motion, noise)
    begun, gains = gains[: len(already)].sum(0), gains[len(already) :]
    chosen = _choose(begun, gains, count)
    order, covariances = _ordered(begun, gains[chosen])
    return [
        PlannedPose(None, grippers[chosen[i]], *_lengths(covariance))
        for i, covariance in zip(order, covariances, strict=True)
    ]


def information(rig: RigGeometry, motion: Motion, noise: Noise) -> Array:
    """Return (N, 12, 12) what each view tells about the changes of camera and board."""
    count = len(motion.poses(np.zeros(len(motion.deviations()))))
    model = Model(rig.setup, motion, Seen(np.tile(np.eye(4), (count, 1, 1)), {}))
    board = rig.board_pose @ _centre(rig.board)
    gripper, predicted = model.predict(rig.camera_pose, board, np.zeros(len(motion.deviations())))
    points = rig.board.corners_m() - _centre(rig.board)[:3, 3]
    corners = Corners(
        rig.camera,
        points,
        np.zeros((count, len(points), 2)),
        np.ones((count, len(points))),
        np.full(count, noise.pixel_px),
    )
    root = corners.around(predicted)[1]
    arm = model.noise_slopes(board, gripper) * motion.deviations()
    total = root @ np.swapaxes(root, 1, 2) + arm @ np.swapaxes(arm, 1, 2)
    columns = model.pose_slopes(rig.camera_pose, board, predicted)
    return np.swapaxes(columns, 1, 2) @ np.linalg.solve(total, columns)


def _choose(begun: Array, gains: Array, count: int) -> list[int]:
    """Return which views to take.

    One after the other the best is added; then each is exchanged for a better one while there is one
    (Fedorov's exchange).
    """
    total = begun + np.diag([_KNOWN_BEFORE] * 12)
    count = min(count, len(gains))
    chosen: list[int] = []
    for _ in range(count):
        best = _best(total, gains, chosen)
        chosen.append(best)
        total = total + gains[best]
    for k in range(count):
        without = total - gains[chosen[k]]
        best = _best(without, gains, chosen[:k] + chosen[k + 1 :])
        chosen[k], total = best, without + gains[best]
    return chosen


def _improved(
    rig: RigGeometry,
    begun: Array,
    chosen: Array,
    lower: Array,
    upper: Array,
    rng: np.random.Generator,
    allowed: Callable[[Array], bool],
    noise: Noise,
) -> Array:
    """Return the poses (N, n), each moved in ever smaller steps to where all together tell more."""
    assert rig.chain is not None
    board = rig.board_pose @ _centre(rig.board)
    poses = chosen.copy()
    gains = information(rig, JointMotion(rig.chain, poses, noise.joint_rad), noise)
    total = begun + np.diag([_KNOWN_BEFORE] * 12) + gains.sum(0)
    for turn in range(_ROUNDS):
        for k in range(len(poses)):
            step = _SPREAD_RAD * _NARROWING**turn * rng.standard_normal((_TRIED, len(lower)))
            near = np.clip(poses[k] + step, lower, upper)
            gripper = _forward(rig.chain, near)
            moving = gripper if rig.setup == "eye-to-hand" else inverse(gripper)
            others = np.delete(poses, k, axis=0)
            apart = np.abs(near[:, None] - others).max(axis=2).min(axis=1, initial=np.inf)
            near = near[_visible(rig, inverse(rig.camera_pose) @ moving @ board) & (apart > _APART_RAD)]
            if not len(near):
                continue
            told = information(rig, JointMotion(rig.chain, near, noise.joint_rad), noise)
            without = total - gains[k]
            costs = _costs(without, told)
            for i in np.argsort(costs):
                if costs[i] >= _costs(without, gains[k : k + 1])[0]:
                    break
                if allowed(near[i]):
                    poses[k], gains[k], total = near[i], told[i], without + told[i]
                    break
    return poses


def _ordered(begun: Array, gains: Array) -> tuple[list[int], list[Array]]:
    """Return the order in which views help most, and the (12, 12) covariance after each of them."""
    total = begun + np.diag([_KNOWN_BEFORE] * 12)
    ordered: list[int] = []
    covariances: list[Array] = []
    for _ in range(len(gains)):
        best = _best(total, gains, ordered)
        ordered.append(best)
        total = total + gains[best]
        covariances.append(np.linalg.inv(total))
    return ordered, covariances


def _best(total: Array, gains: Array, taken: Sequence[int]) -> int:
    cost = _costs(total, gains)
    cost[list(taken)] = np.inf
    return int(np.argmin(cost))


def _costs(total: Array, gains: Array) -> Array:
    """Return (N,) the expected error, in units of what is wanted, after adding each of ``gains``."""
    spread = np.linalg.inv(total + gains)
    cost = np.trace(spread[:, :3, :3], axis1=1, axis2=2) / WANTED_M**2
    return np.asarray(cost + np.trace(spread[:, 3:6, 3:6], axis1=1, axis2=2) / WANTED_RAD**2)


def _lengths(covariance: Array) -> tuple[float, float]:
    return (
        float(np.sqrt(np.trace(covariance[:3, :3]))),
        float(np.sqrt(np.trace(covariance[3:6, 3:6]))),
    )


def visible_joints(
    rig: RigGeometry,
    *,
    lower: Array,
    upper: Array,
    rng: np.random.Generator,
    allowed: Callable[[Array], bool],
    wanted: int,
) -> Array:
    """Return up to ``wanted`` random joint positions, (N, n), that are allowed and show the board.

    The first draw is from everywhere, the later ones are around what was found. See :func:`plan_poses`.
    """
    if rig.chain is None:
        raise ValueError("planning joint positions needs a chain")
    board = rig.board_pose @ _centre(rig.board)
    found = np.empty((0, len(lower)))
    for draw in range(_DRAWS):
        if draw == 0 or not len(found):
            joints = rng.uniform(lower, upper, (_FIRST_DRAW, len(lower)))
        else:
            near = found[rng.integers(len(found), size=_NEIGHBOURS)]
            joints = np.clip(near + _SPREAD_RAD * rng.standard_normal(near.shape), lower, upper)
        gripper = _forward(rig.chain, joints)
        moving = gripper if rig.setup == "eye-to-hand" else inverse(gripper)
        joints = joints[_visible(rig, inverse(rig.camera_pose) @ moving @ board)]
        joints = joints[: max(2 * (wanted - len(found)), 0)]
        fresh = [q for q in joints if allowed(q)]
        found = _apart(np.concatenate([found, np.array(fresh).reshape(-1, len(lower))]))
        if len(found) >= wanted:
            break
    return found[:wanted]


def _visible(rig: RigGeometry, poses: Array) -> NDArray[np.bool_]:
    """Return (N,) whether a board with its centre at ``poses`` (N, 4, 4) is seen whole and well."""
    width, height = rig.board.size_m
    rim = 0.5 * np.array(
        [[-width, -height, 0], [width, -height, 0], [width, height, 0], [-width, height, 0]]
    )
    points = rim @ np.swapaxes(poses[:, :3, :3], 1, 2) + poses[:, None, :3, 3]
    depth = points[..., 2]
    camera, edge = rig.camera, _EDGE * rig.camera.width
    ahead = (depth > 0.05).all(axis=1)
    safe = np.maximum(depth, 0.05)
    x = camera.fx * points[..., 0] / safe + camera.cx
    y = camera.fy * points[..., 1] / safe + camera.cy
    inside = ((x > edge) & (x < camera.width - edge) & (y > edge) & (y < camera.height - edge)).all(axis=1)
    view = poses[:, :3, 3] / np.linalg.norm(poses[:, :3, 3], axis=1, keepdims=True)
    facing = np.sum(view * poses[:, :3, 2], axis=1) > np.cos(_MOST_TILT_RAD)
    side = camera.fx * max(width, height) / np.maximum(poses[:, 2, 3], 0.05) / camera.width
    return ahead & inside & facing & (side > _SMALLEST) & (side < _LARGEST) & _foreseen(rig, poses)


def _foreseen(rig: RigGeometry, poses: Array) -> NDArray[np.bool_]:
    """Return (N,) whether what is known of camera and board tells where the board will be seen."""
    if rig.covariance is None:
        return np.ones(len(poses), bool)
    model = Model(rig.setup, PoseMotion(poses, 1.0, 1.0), Seen(poses, {}))
    slopes = model.pose_slopes(rig.camera_pose, rig.board_pose, poses)
    spread = slopes @ rig.covariance[:12, :12] @ np.swapaxes(slopes, 1, 2)
    shift = np.sqrt(np.trace(spread[:, :3, :3], axis1=1, axis2=2))
    turn = np.sqrt(np.trace(spread[:, 3:, 3:], axis1=1, axis2=2))
    return (shift < _FORESEEN * poses[:, 2, 3]) & (turn < _FORESEEN_RAD)


def _forward(chain: Chain, joints: Array) -> Array:
    """Return (N, 4, 4) the tool's poses at (N, n) joint positions."""
    pose = np.broadcast_to(np.eye(4), (len(joints), 4, 4))
    for k in range(joints.shape[1]):
        sine = np.where(chain.prismatic[k], joints[:, k], np.sin(joints[:, k]))[:, None, None]
        cosine = np.where(chain.prismatic[k], 0.0, np.cos(joints[:, k]))[:, None, None]
        pose = pose @ (chain.constant[k] + sine * chain.sine[k] + cosine * chain.cosine[k])
    return pose @ chain.tail


def _apart(joints: Array) -> Array:
    """Return the joint positions without those that another one nearly repeats."""
    if len(joints) < 2:
        return joints
    cells = np.round(joints / _TOLD_RAD).astype(np.int64)
    _, first = np.unique(cells, axis=0, return_index=True)
    return joints[np.sort(first)]


def _centre(board: Board) -> Array:
    return shifted([*(0.5 * side for side in board.size_m), 0.0])
