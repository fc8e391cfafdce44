"""Hand-eye calibration: where the camera is, how well that is known, and whether it may be believed.

``eye-to-hand``: the camera stands still and the board is on the gripper; the camera's pose is in the arm's
base. ``eye-in-hand``: the camera rides on the gripper and the board stands still; it is in the gripper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from calibration.board import Board
from calibration.camera import CameraModel
from calibration.corners import Corners, gather
from calibration.diagnosis import explain, require_determined, require_scale, require_still, require_zeros
from calibration.faults import MixedUnitsError, RescaledBoardError, SampleFormatError, TooFewPosesError
from calibration.geometry import Array, exp_rotation, inverse, shifted, transform
from calibration.lens import lens_step
from calibration.observability import Noise, RigGeometry
from calibration.refinement import Estimate, JointMotion, Model, Motion, PoseMotion, Seen, Setup
from calibration.robust import Agreement, agree
from calibration.samples import View
from simplevla.kinematics import Chain

LEAST_VIEWS = 6

_ELLIPSOID = 0.95
_LENS_STEPS, _LENS_DONE = 4, 0.05
_AGREE_M, _AGREE_RAD = 0.02, float(np.deg2rad(3))  # poses and joints of one sample: nearer is one arm


@dataclass(frozen=True)
class HandEyeOptions:
    """How to calibrate.

    Attributes:
        noise: what is expected; how large the arm's noise really is, is found from the data.
        joint_offsets: whether to look for constant offsets of the joints between the first and the last.
        intrinsics: whether to refine the lens (focal length, centre, k1, k2) together with the poses.
        seed: of the groups of views that starting values are drawn from.
    """

    noise: Noise = field(default_factory=Noise)
    joint_offsets: bool = False
    intrinsics: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class HandEye:
    """A calibration that passed every test of its data.

    A covariance is of a change (6,): translation, then rotation vector, both in the frame in which the
    pose is given; m and rad. How large the noise is was found from the same few views, so covariances are
    wider than at known noise: their 95 % ellipsoid, taken by chi-squared, is the one of Hotelling's F.

    Attributes:
        camera_pose: (4, 4) camera in base (eye-to-hand) or in gripper (eye-in-hand), m.
        board_pose: (4, 4) board in gripper (eye-to-hand) or in base (eye-in-hand), m.
        covariance: (6, 6) of the camera's pose.
        board_covariance: (6, 6) of the pose of the board, at its middle.
        joint_offsets_rad: (n,) to be added to readings; zero for the first and the last joint, and where
            they were not looked for. joint_offset_std_rad: (n,).
        names: of the views, in the order of the arrays below; outliers: of those left out.
        rms_px: corners against the board in each view, the arm aside: what the pictures leave.
        held_out_px, held_out_m: corners of views that were left out of the fit, predicted from the arm
            alone: root mean square, in pixels and at the board's distance.
        arm_noise: how large the arm's noise is, rad a joint, or m where only poses are known.
        pixel_noise_px: the corners' noise.
        board_scale: the board's size as the arm's motion sees it, relative to its description, and its
            standard deviation.
    """

    setup: Setup
    camera: CameraModel
    camera_pose: Array
    board_pose: Array
    covariance: Array
    board_covariance: Array
    joint_offsets_rad: Array
    joint_offset_std_rad: Array
    names: tuple[str, ...]
    outliers: tuple[str, ...]
    rms_px: float
    held_out_px: float
    held_out_m: float
    arm_noise: float
    pixel_noise_px: float
    board_scale: tuple[float, float]

    @property
    def translation_std_m(self) -> float:
        """Expected length of the camera's translation error, root mean square."""
        return float(np.sqrt(np.trace(self.covariance[:3, :3])))

    @property
    def rotation_std_rad(self) -> float:
        """Expected angle of the camera's rotation error, root mean square."""
        return float(np.sqrt(np.trace(self.covariance[3:, 3:])))

    def figures(self) -> dict[str, float]:
        """Return the figures by which the calibration is judged."""
        return {
            "views": float(len(self.names)),
            "outliers": float(len(self.outliers)),
            "rms_px": self.rms_px,
            "held_out_px": self.held_out_px,
            "held_out_mm": 1e3 * self.held_out_m,
            "translation_std_mm": 1e3 * self.translation_std_m,
            "rotation_std_deg": float(np.rad2deg(self.rotation_std_rad)),
            "board_scale_percent": 100 * (self.board_scale[0] - 1),
        }

    def geometry(self, board: Board, chain: Chain | None = None) -> RigGeometry:
        """Return what was found as the ground of a plan for further poses."""
        return RigGeometry(self.setup, self.camera, board, self.camera_pose, self.board_pose, chain)


def calibrate_hand_eye(
    views: Sequence[View],
    *,
    board: Board,
    camera: CameraModel,
    setup: Setup,
    chain: Chain | None = None,
    options: HandEyeOptions | None = None,
) -> HandEye:
    """Return where the camera is.

    Args:
        views: of one camera and one arm, by time.
        board: what was shown.
        camera: its intrinsics.
        setup: where the camera is.
        chain: of the arm; with it joint positions are used, and their noise is weighed joint by joint.
        options: how to calibrate.

    Raises:
        TooFewPosesError: fewer than ``LEAST_VIEWS`` usable views.
        DegenerateMotionError: the poses leave something undetermined; carries poses that cure it.
        MirroredBoardError, WrongBoardError, RescaledBoardError: the board is not the one described.
        CameraMovedError, BoardMovedError: something moved in between.
        SwappedArmsError, MixedUnitsError, WrongSetupError: the samples are of something else.
        InconsistentDataError: the data do not fit, and none of the above explains it.
    """
    options = options or HandEyeOptions()
    if len(views) < LEAST_VIEWS:
        raise TooFewPosesError(
            f"{len(views)} usable views of the board, at least {LEAST_VIEWS} are needed",
            "take 12 to 20 views with the board turned about at least two axes",
        )
    motion = _motion(views, chain, options.noise)
    corners, seen = gather([view.detection for view in views], board, camera)
    model = Model(setup, motion, Seen(seen, {"corners": corners.around(seen)[1]}))
    rng = np.random.default_rng(options.seed)
    found = agree(model, rng, pictures=corners)
    stamps = np.array([view.stamp_ns for view in views])
    if not found.consistent:
        raise explain(model, found, board, stamps)
    if options.intrinsics:
        model, found, corners, seen = _with_lens(views, board, model, found, corners, rng)
        camera = corners.camera
    require_determined(model, found, _geometry(model, found.estimate, board, camera, motion), options.noise)
    with_offsets = replace(model, find_offsets=True)
    if options.joint_offsets and len(motion.free_offsets()):
        model, found = with_offsets, agree(with_offsets, rng, pictures=corners)
        if options.intrinsics:
            model, found, corners, seen = _with_lens(views, board, model, found, corners, rng)
    try:
        scale = require_scale(model, found, board)
    except RescaledBoardError:
        require_zeros(model, with_offsets, found, rng)
        raise
    require_still(model, found, stamps)
    return _result(views, model, found, corners, seen, board, scale)


def _with_lens(
    views: Sequence[View],
    board: Board,
    model: Model,
    found: Agreement,
    corners: Corners,
    rng: np.random.Generator,
) -> tuple[Model, Agreement, Corners, Array]:
    """Return model, agreement, corners and poses seen with the lens that fits best."""
    nominal = corners.camera
    detections = [view.detection for view in views]
    for _ in range(_LENS_STEPS):
        step = lens_step(model, found, corners, nominal)
        corners, seen = gather(detections, board, step.camera)
        model = replace(model, seen=Seen(seen, {"corners": corners.around(seen)[1]}))
        found = agree(model, rng, pictures=corners)
        if step.size < _LENS_DONE:
            break
    covariance = lens_step(model, found, corners, nominal).covariance
    return model, replace(found, estimate=replace(found.estimate, covariance=covariance)), corners, seen


def _motion(views: Sequence[View], chain: Chain | None, noise: Noise) -> Motion:
    """Return the arm's motion: from joints where every view has them and a chain is known, else from poses.

    Raises:
        SampleFormatError: some views have only joints, others only poses, or joints without a chain.
        MixedUnitsError: joints and poses of one sample do not belong together.
    """
    joints = [view.joints_rad for view in views if view.joints_rad is not None]
    poses = [view.base_gripper for view in views if view.base_gripper is not None]
    if chain is not None and len(joints) == len(views):
        if any(len(q) != len(chain.joint_names) for q in joints):
            raise SampleFormatError(
                f"a sample has {len(joints[0])} joints, the arm {len(chain.joint_names)}",
                "give the joints of one arm, without its gripper",
            )
        motion = JointMotion(chain, np.array(joints), noise.joint_rad)
        if len(poses) == len(views):
            _require_one_arm(motion.poses(np.zeros(len(joints[0]))), np.array(poses))
        return motion
    if len(poses) == len(views):
        return PoseMotion(np.array(poses), noise.position_m, noise.rotation_rad)
    raise SampleFormatError(
        "joints can only be used with the arm's model, and T_base_gripper is not in every sample",
        "name the embodiment and the arm, or give T_base_gripper in every sample",
    )


def _require_one_arm(from_joints: Array, given: Array) -> None:
    apart = inverse(from_joints) @ given
    middle = apart[len(apart) // 2]  # a tool frame of one's own is a constant between the two
    shift = np.linalg.norm(apart[:, :3, 3] - middle[:3, 3], axis=1)
    turn = np.arccos(np.clip((np.trace(inverse(middle) @ apart, axis1=1, axis2=2) - 2) / 2, -1, 1))
    if np.median(shift) > _AGREE_M or np.median(turn) > _AGREE_RAD:
        raise MixedUnitsError(
            f"joints and T_base_gripper of one sample are {1e3 * np.median(shift):.0f} mm and "
            f"{np.rad2deg(np.median(turn)):.0f} deg apart",
            "give joints in rad and T_base_gripper in m, both of one arm",
        )


def _geometry(
    model: Model, estimate: Estimate, board: Board, camera: CameraModel, motion: Motion
) -> RigGeometry:
    chain = motion.chain if isinstance(motion, JointMotion) else None
    origin = inverse(_centre(board))
    return RigGeometry(model.setup, camera, board, estimate.camera, estimate.board @ origin, chain)


def _result(
    views: Sequence[View],
    model: Model,
    found: Agreement,
    corners: Corners,
    seen: Array,
    board: Board,
    scale: tuple[float, float],
) -> HandEye:
    estimate, free = found.estimate, model.free()
    offset_std = np.zeros(len(estimate.offsets_rad))
    held_out_px, held_out_m = _held_out(model, found, corners)
    kept = corners.of(np.flatnonzero(found.inliers))
    pixels = kept.errors_px(seen[found.inliers])
    names = tuple(view.name for view in views)
    covariance = estimate.covariance * _widened(6 * len(kept.noise_px) - 12 - len(free))
    offset_std[free] = np.sqrt(np.diag(covariance)[12:])
    return HandEye(
        setup=model.setup,
        camera=corners.camera,
        camera_pose=estimate.camera,
        board_pose=estimate.board @ inverse(_centre(board)),
        covariance=covariance[:6, :6],
        board_covariance=covariance[6:12, 6:12],
        joint_offsets_rad=estimate.offsets_rad,
        joint_offset_std_rad=offset_std,
        names=names,
        outliers=tuple(name for name, good in zip(names, found.inliers, strict=True) if not good),
        rms_px=float(np.sqrt(np.sum(pixels**2) / max(kept.weights.sum(), 1))),
        held_out_px=held_out_px,
        held_out_m=held_out_m,
        arm_noise=float(estimate.scales[next(iter(model.arm.parts()))] * model.arm.deviations()[0]),
        pixel_noise_px=float(np.sqrt(np.mean(kept.noise_px**2))),
        board_scale=scale,
    )


def _widened(freedom: int) -> float:
    """Return the factor on a covariance of six, of noise that was estimated with so much freedom."""
    from scipy.stats import chi2, f

    return float(6 * f.ppf(_ELLIPSOID, 6, max(freedom, 1)) / chi2.ppf(_ELLIPSOID, 6))


def _held_out(model: Model, found: Agreement, corners: Corners) -> tuple[float, float]:
    """Return how far off the corners of a view are that was left out of the fit, px and m, RMS.

    One step from the whole fit to the fit without a view is exact where the model is linear, and the
    steps are far smaller than where it is not.
    """
    estimate, keep = found.estimate, np.flatnonzero(found.inliers)
    _, predicted = model.predict(estimate.camera, estimate.board, estimate.offsets_rad)
    weighted = np.swapaxes(estimate.columns, 1, 2) @ estimate.inverses
    information = np.linalg.inv(estimate.covariance)
    without = information - weighted[keep] @ estimate.columns[keep]
    gradient = weighted[keep] @ estimate.residuals[keep][..., None]
    change = estimate.columns[keep] @ np.linalg.solve(without, -gradient)
    moved = predicted[keep] @ transform(exp_rotation(change[:, 3:, 0]), change[:, :3, 0])
    kept = corners.of(keep)
    squares = np.sum(kept.errors_px(moved) ** 2, axis=2)
    total = kept.weights.sum()
    metres = squares / kept.pixels_per_metre(moved)[:, None] ** 2
    return float(np.sqrt(squares.sum() / total)), float(np.sqrt(metres.sum() / total))


def _centre(board: Board) -> Array:
    return shifted([*(0.5 * side for side in board.size_m), 0.0])
