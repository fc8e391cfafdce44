"""The estimator: camera pose and board pose that explain all pictures and all arm positions together.

Every view says where the board stands in the camera, twice: through its corners, and through the arm.
With ``X`` the camera's pose, ``W`` the board's, and ``M`` the arm's (base to gripper if the camera stands
beside the arm, gripper to base if it rides on it), the arm predicts ``C = X^-1 M W``.

Both are noisy. A joint that is read 0.1 deg wrong moves a board 0.5 m away by 0.9 mm, ten times what the
corners leave open, and it moves it along a direction that the arm's posture decides. Each view therefore
has its own covariance ``S = pixels + arm``, the second being ``T T^t`` with ``T`` what one standard
deviation of each joint does to the board in the picture. Minimising ``sum e^t S^-1 e`` is the same as
minimising the reprojection error over poses and over one small correction of each joint in each view,
with the corrections eliminated in closed form: the maximum-likelihood estimate for Gaussian noise, and
its covariance is the inverse of its curvature.

``e`` (6,) leads from the predicted to the seen pose, in the frame of the board's centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from calibration.geometry import Array, hat, inverse, log_rotation, moved
from simplevla.kinematics import Chain

Setup = Literal["eye-to-hand", "eye-in-hand"]

_ROUNDS = 30
_CONVERGED = 1e-10  # relative gain of the cost below which a round is the last
_SCALE_PRIOR = 1.2  # standard deviation of the logarithm of a noise level's scale: a factor of 3.3
_SCALE_BOUND = 4.0  # largest logarithm of a scale: a factor of 55
_HELD_PRIOR_M, _STANDING_PRIOR_M = 0.3, 3.0  # what rides on the gripper is near it, what stands is in reach


class Motion(Protocol):
    """What the arm says of its gripper in each view, and what its noise does to that."""

    def poses(self, offsets_rad: Array) -> Array:
        """Return (N, 4, 4) gripper in base, with ``offsets_rad`` (n,) added to each joint."""

    def slopes(self) -> Array:
        """Return (N, 6, n) twist of the gripper in the base frame for one unit of each source of noise."""

    def deviations(self) -> Array:
        """Return (n,) the standard deviation of each source of noise."""

    def parts(self) -> dict[str, slice]:
        """Return the sources in groups, each of which is as noisy as expected or so many times more."""

    def free_offsets(self) -> NDArray[np.int64]:
        """Return which sources are joints whose constant offset the data can show."""

    def of(self, keep: NDArray[Any]) -> Motion:
        """Return the motion of some views alone."""


@dataclass(frozen=True, eq=False)
class JointMotion:
    """Joint positions, (N, n) rad; each reading is off by ``deviation_rad``.

    The first joint's offset turns the whole base and the last one's the whole gripper: they are what
    "base" and "gripper" mean, so only those between can be found.
    """

    chain: Chain
    joints_rad: Array
    deviation_rad: float

    def poses(self, offsets_rad: Array) -> Array:
        """See :class:`Motion`."""
        if not offsets_rad.any():
            return self._nominal
        return np.array([self.chain.forward(q + offsets_rad) for q in self.joints_rad])

    def slopes(self) -> Array:
        """See :class:`Motion`."""
        return self._slopes

    def deviations(self) -> Array:
        """See :class:`Motion`."""
        return np.full(self.joints_rad.shape[1], self.deviation_rad)

    def parts(self) -> dict[str, slice]:
        """See :class:`Motion`."""
        return {"joints": slice(None)}

    def free_offsets(self) -> NDArray[np.int64]:
        """See :class:`Motion`."""
        return np.arange(1, self.joints_rad.shape[1] - 1)

    def of(self, keep: NDArray[Any]) -> JointMotion:
        """See :class:`Motion`."""
        return replace(self, joints_rad=self.joints_rad[keep])

    @cached_property
    def _nominal(self) -> Array:
        return np.array([self.chain.forward(q) for q in self.joints_rad])

    @cached_property
    def _slopes(self) -> Array:
        return np.array([self.chain.jacobian(q) for q in self.joints_rad])


@dataclass(frozen=True, eq=False)
class PoseMotion:
    """Gripper poses, (N, 4, 4) in the base; each is off by these deviations in the gripper's frame."""

    base_gripper: Array
    deviation_m: float
    deviation_rad: float

    def poses(self, _offsets_rad: Array) -> Array:
        """See :class:`Motion`."""
        return self.base_gripper

    def slopes(self) -> Array:
        """See :class:`Motion`."""
        slopes = np.zeros((len(self.base_gripper), 6, 6))
        slopes[:, :3, :3] = slopes[:, 3:, 3:] = self.base_gripper[:, :3, :3]
        return slopes

    def deviations(self) -> Array:
        """See :class:`Motion`."""
        return np.repeat([self.deviation_m, self.deviation_rad], 3)

    def parts(self) -> dict[str, slice]:
        """See :class:`Motion`."""
        return {"position": slice(0, 3), "rotation": slice(3, 6)}

    def free_offsets(self) -> NDArray[np.int64]:
        """See :class:`Motion`."""
        return np.arange(0)

    def of(self, keep: NDArray[Any]) -> PoseMotion:
        """See :class:`Motion`."""
        return replace(self, base_gripper=self.base_gripper[keep])


@dataclass(frozen=True, eq=False)
class Seen:
    """Where the board was seen in each view, and how well.

    Attributes:
        poses: (N, 4, 4) board's centre in the camera.
        roots: {source of noise: (N, 6, k)} its covariance is ``root root^t``, frame of the board's centre.
    """

    poses: Array
    roots: dict[str, Array]


class Pictures(Protocol):
    """Corners in pictures, asked again where the estimate stands; see :mod:`calibration.corners`."""

    def around(self, poses: Array) -> tuple[Array, Array]:
        """Return (N, 6) the changes of ``poses`` (N, 4, 4) that fit best, and (N, 6, 6) roots."""

    def of(self, keep: NDArray[Any]) -> Pictures:
        """Return the corners of some views alone."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """What was found, and what remains.

    Attributes:
        camera: (4, 4) pose X; board: (4, 4) pose W of the board's centre.
        offsets_rad: (n,) joint offsets, zero where they are not looked for.
        covariance: (P, P) of [camera's change (6), board's change (6), free offsets].
        residuals: (N, 6) e; inverses: (N, 6, 6) S^-1; columns: (N, 6, P) what parameters do to e.
        distances: (N,) e^t S^-1 e, chi-squared with 6 degrees of freedom where the view is good.
        scales: {source of noise: how many times the assumed deviation fits the data}.
    """

    camera: Array
    board: Array
    offsets_rad: Array
    covariance: Array
    residuals: Array
    inverses: Array
    columns: Array
    distances: Array
    scales: dict[str, float]


@dataclass(frozen=True, eq=False)
class Model:
    """The unknowns and the data.

    Attributes:
        find_offsets: whether joint offsets are unknowns, with ``offset_prior_rad`` about zero.
    """

    setup: Setup
    arm: Motion
    seen: Seen
    find_offsets: bool = False
    offset_prior_rad: float = float(np.deg2rad(2.0))

    def predict(self, camera: Array, board: Array, offsets_rad: Array) -> tuple[Array, Array]:
        """Return (N, 4, 4) gripper poses and (N, 4, 4) poses of the board's centre in the camera."""
        gripper = self.arm.poses(offsets_rad)
        moving = gripper if self.setup == "eye-to-hand" else inverse(gripper)
        return gripper, inverse(camera) @ moving @ board

    def differences(self, predicted: Array) -> Array:
        """Return (N, 6) e from predicted to seen poses."""
        turn = np.swapaxes(predicted[:, :3, :3], 1, 2)
        shift = turn @ (self.seen.poses[:, :3, 3] - predicted[:, :3, 3])[..., None]
        return np.concatenate([shift[..., 0], log_rotation(turn @ self.seen.poses[:, :3, :3])], axis=1)

    def noise_slopes(self, board: Array, gripper: Array) -> Array:
        """Return (N, 6, n) what one unit of each of the arm's sources does to the predicted pose."""
        slopes = self.arm.slopes()
        linear, angular = slopes[:, :3], slopes[:, 3:]
        if self.setup == "eye-to-hand":
            turn = np.swapaxes(gripper[:, :3, :3] @ board[:3, :3], 1, 2)
            lever, sign = gripper[:, :3, :3] @ board[:3, 3], 1.0
        else:
            turn = np.broadcast_to(board[:3, :3].T, (len(gripper), 3, 3))
            lever, sign = board[:3, 3] - gripper[:, :3, 3], -1.0
        moves = turn @ (linear - hat(lever) @ angular)
        return sign * np.concatenate([moves, turn @ angular], axis=1)

    def pose_slopes(self, camera: Array, board: Array, predicted: Array) -> Array:
        """Return (N, 6, 12) what changes of camera and board do to the predicted pose."""
        count = len(predicted)
        to_board = np.swapaxes(predicted[:, :3, :3], 1, 2)
        from_base = to_board @ camera[:3, :3].T
        lever = to_board @ hat(predicted[:, :3, 3]) @ camera[:3, :3].T
        slopes = np.zeros((count, 6, 12))
        slopes[:, :3, :3], slopes[:, :3, 3:6], slopes[:, 3:, 3:6] = -from_base, lever, -from_base
        slopes[:, :3, 6:9] = slopes[:, 3:, 9:12] = board[:3, :3].T
        return slopes

    def prior(self) -> Array:
        """Return (P,) the information that is there before any data."""
        held, standing = _HELD_PRIOR_M**-2, _STANDING_PRIOR_M**-2
        camera, board = (standing, held) if self.setup == "eye-to-hand" else (held, standing)
        turn = np.pi**-2
        offsets = [self.offset_prior_rad**-2] * (len(self.free()) if self.find_offsets else 0)
        return np.array([camera] * 3 + [turn] * 3 + [board] * 3 + [turn] * 3 + offsets)

    def free(self) -> NDArray[np.int64]:
        """Return which joints' offsets are unknowns."""
        return self.arm.free_offsets() if self.find_offsets else np.arange(0)

    def subset(self, keep: NDArray[Any]) -> Model:
        """Return the model of some views alone; ``keep`` (N,) of bool or indices."""
        roots = {name: root[keep] for name, root in self.seen.roots.items()}
        return replace(self, arm=self.arm.of(keep), seen=Seen(self.seen.poses[keep], roots))


def fit(
    model: Model,
    camera: Array,
    board: Array,
    *,
    weights: Array | None = None,
    scales: dict[str, float] | None = None,
    offsets_rad: Array | None = None,
    pictures: Pictures | None = None,
) -> Estimate:
    """Return the estimate that is reached from a start by Levenberg-Marquardt.

    Args:
        model: unknowns and data.
        camera, board: (4, 4) start of X and of W.
        weights: (N,) weight of each view; 1 by default, 0 leaves a view out.
        scales: {source of noise: how many times the assumed deviation}; 1 by default.
        offsets_rad: (n,) start of the joint offsets.
        pictures: the corners themselves; with them every view is linearised where it is predicted to be,
            so that the minimum is that of the reprojection error, and not of poses fitted to it before.
    """
    count = len(model.seen.poses)
    weight = np.ones(count) if weights is None else weights
    scales = dict.fromkeys(sources(model), 1.0) | (scales or {})
    start = np.zeros(len(model.arm.deviations())) if offsets_rad is None else offsets_rad
    state = (camera, board, start)
    prior = model.prior()
    now = _linearise(model, state, scales, pictures)
    cost, damping = _cost(now, weight, prior, state[2][model.free()]), 1e-6
    for _ in range(_ROUNDS):
        information, gradient = _normal(now, weight, prior, state[2][model.free()])
        damped = information + damping * np.diag(np.diag(information))
        step = np.asarray(np.linalg.solve(damped, gradient), np.float64)
        trial = _stepped(model, state, step)
        there = _linearise(model, trial, scales, pictures)
        trial_cost = _cost(there, weight, prior, trial[2][model.free()])
        if trial_cost > cost:
            damping = max(10 * damping, 1e-4)
            if damping > 1e8:
                break
            continue
        gain = cost - trial_cost
        state, now, cost, damping = trial, there, trial_cost, damping / 10
        if gain < _CONVERGED * (1 + cost):
            break
    return _estimate(model, state, now, weight, scales)


def evaluate(
    model: Model,
    camera: Array,
    board: Array,
    *,
    scales: dict[str, float] | None = None,
    offsets_rad: Array | None = None,
) -> Estimate:
    """Return what the data say of an estimate that is given; see :func:`fit`. All views count."""
    scales = dict.fromkeys(sources(model), 1.0) | (scales or {})
    offsets = np.zeros(len(model.arm.deviations())) if offsets_rad is None else offsets_rad
    state = (camera, board, offsets)
    now = _linearise(model, state, scales, None)
    return _estimate(model, state, now, np.ones(len(model.seen.poses)), scales)


def sources(model: Model) -> list[str]:
    """Return the names of the sources of noise, the arm's last."""
    return [*model.seen.roots, *model.arm.parts()]


def arm_scale(model: Model, scales: dict[str, float]) -> float:
    """Return how many times the expected the arm's noise is, root mean square over its parts."""
    return float(np.sqrt(np.mean([scales[name] ** 2 for name in model.arm.parts()])))


def noise_scales(
    model: Model, estimate: Estimate, weights: Array, *, of: Sequence[str], pictures: Pictures | None = None
) -> dict[str, float]:
    """Return how many times the assumed deviations fit the residuals best, for the sources ``of``.

    Restricted maximum likelihood (Patterson and Thompson 1971), which allows for the parameters that
    the same residuals gave, with a wide log-normal prior about 1.
    """
    roots = _roots(model, (estimate.camera, estimate.board, estimate.offsets_rad), pictures)
    keep = weights > 0
    blocks = {name: root[keep] @ np.swapaxes(root[keep], 1, 2) for name, root in roots.items()}
    residuals, columns = estimate.residuals[keep], estimate.columns[keep]
    prior = np.diag(model.prior())
    fixed = sum((estimate.scales[n] ** 2 * blocks[n] for n in blocks if n not in of), np.zeros((1, 6, 6)))

    def unlikeliness(logs: Array) -> float:
        total = fixed + sum(np.exp(2 * x) * blocks[name] for x, name in zip(logs, of, strict=True))
        inverses = np.linalg.inv(total)
        weighted = np.swapaxes(columns, 1, 2) @ inverses
        information = prior + (weighted @ columns).sum(0)
        gradient = (weighted @ residuals[..., None]).sum(0)[:, 0]
        square = float(np.einsum("ni,nij,nj->", residuals, inverses, residuals))
        square -= float(gradient @ np.linalg.solve(information, gradient))
        volume = np.linalg.slogdet(total)[1].sum() + np.linalg.slogdet(information)[1]
        return 0.5 * (square + float(volume) + float(logs @ logs) / _SCALE_PRIOR**2)

    start = np.log([estimate.scales[name] for name in of])
    bounds = [(-_SCALE_BOUND, _SCALE_BOUND)] * len(of)
    found = minimize(unlikeliness, start, method="L-BFGS-B", bounds=bounds)
    return estimate.scales | dict(zip(of, np.exp(found.x).tolist(), strict=True))


State = tuple[Array, Array, Array]
Linear = tuple[Array, Array, Array]


def _estimate(model: Model, state: State, now: Linear, weight: Array, scales: dict[str, float]) -> Estimate:
    information, _ = _normal(now, weight, model.prior(), state[2][model.free()])
    residuals, inverses, columns = now
    distances = np.einsum("ni,nij,nj->n", residuals, inverses, residuals)
    covariance = np.asarray(np.linalg.inv(information), np.float64)
    return Estimate(*state, covariance, residuals, inverses, columns, distances, scales)


def _linearise(model: Model, state: State, scales: dict[str, float], pictures: Pictures | None) -> Linear:
    """Return e (N, 6), S^-1 (N, 6, 6) and the columns (N, 6, P) at ``state``."""
    camera, board, offsets = state
    gripper, predicted = model.predict(camera, board, offsets)
    arm = model.noise_slopes(board, gripper)
    columns = model.pose_slopes(camera, board, predicted)
    if model.find_offsets:
        columns = np.concatenate([columns, arm[:, :, model.free()]], axis=2)
    if pictures is None:
        residuals, roots = model.differences(predicted), dict(model.seen.roots)
    else:
        residuals, corner_roots = pictures.around(predicted)
        roots = {"corners": corner_roots}
    roots |= _arm_roots(model, arm)
    total = sum(scales[name] ** 2 * root @ np.swapaxes(root, 1, 2) for name, root in roots.items())
    return residuals, np.linalg.inv(np.asarray(total)), columns


def _roots(model: Model, state: State, pictures: Pictures | None) -> dict[str, Array]:
    camera, board, offsets = state
    gripper, predicted = model.predict(camera, board, offsets)
    roots = dict(model.seen.roots) if pictures is None else {"corners": pictures.around(predicted)[1]}
    return roots | _arm_roots(model, model.noise_slopes(board, gripper))


def _arm_roots(model: Model, slopes: Array) -> dict[str, Array]:
    deviations = model.arm.deviations()
    return {name: slopes[:, :, part] * deviations[part] for name, part in model.arm.parts().items()}


def _normal(now: Linear, weight: Array, prior: Array, offsets: Array) -> tuple[Array, Array]:
    """Return the information (P, P) and the gradient (P,)."""
    residuals, inverses, columns = now
    weighted = weight[:, None, None] * np.swapaxes(columns, 1, 2) @ inverses
    gradient = (weighted @ residuals[..., None]).sum(0)[:, 0]
    gradient[12:] -= prior[12:] * offsets
    return np.diag(prior) + (weighted @ columns).sum(0), gradient


def _cost(now: Linear, weight: Array, prior: Array, offsets: Array) -> float:
    residuals, inverses, _ = now
    square = np.einsum("n,ni,nij,nj->", weight, residuals, inverses, residuals)
    return float(square + prior[12:] @ offsets**2)


def _stepped(model: Model, state: State, step: Array) -> State:
    camera, board, offsets = state
    offsets = offsets.copy()
    offsets[model.free()] += step[12:]
    return moved(camera, step[:6]), moved(board, step[6:12]), offsets
