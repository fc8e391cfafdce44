"""The corners of all views together: where each view's board must be, and how well that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.board import Board
from calibration.camera import INTRINSICS, CameraModel
from calibration.detection import Detection, board_pose
from calibration.faults import InconsistentDataError
from calibration.geometry import Array, exp_rotation, hat, shifted, transform

_PRIOR_VIEWS = 20.0  # degrees of freedom that the common noise counts for in each view's own
_LEAST_NOISE_PX = 0.02
_OUTLIER_DEVIATIONS = 4.5
_STEPS = 6


@dataclass(frozen=True, eq=False)
class Corners:
    """Corners of N views, at most K each, ready for :mod:`calibration.refinement`.

    Attributes:
        points: (K, 3) corners about the board's centre, m.
        pixels: (N, K, 2) where they were seen.
        weights: (N, K) 1 for a corner that counts, 0 for one that was not seen or is an outlier.
        noise_px: (N,) standard deviation of a corner's coordinate in each view.
    """

    camera: CameraModel
    points: Array
    pixels: Array
    weights: Array
    noise_px: Array

    def around(self, poses: Array) -> tuple[Array, Array]:
        """Return (N, 6) the changes of ``poses`` (N, 4, 4) that fit best to first order, and their roots.

        ``root root^t`` of (N, 6, 6) roots is the covariance of the change that the corners' noise makes.
        """
        residuals, slopes = self._slopes(poses)
        weighted = np.swapaxes(slopes, 1, 2) * self._row_weights()[:, None, :]
        information = weighted @ slopes
        solved = np.linalg.solve(information, weighted @ residuals[..., None])
        changes = np.asarray(solved[..., 0], np.float64)
        # A = L L^t gives A^-1 = L^-t L^-1, of which L^-t is a root.
        roots = np.swapaxes(np.linalg.inv(np.linalg.cholesky(information)), 1, 2)
        return changes, roots * self.noise_px[:, None, None]

    def lens_slopes(self, poses: Array, names: Sequence[str]) -> tuple[Array, Array, Array]:
        """Return what a change of intrinsics does, at ``poses`` (N, 4, 4), for P intrinsics by name.

        Returns:
            (N, 6, P) the change of the pose that fits best in each view; and of what no pose explains,
            (P, P) the information about the intrinsics and (P,) its gradient.
        """
        residuals, slopes = self._slopes(poses)
        turned = self.points @ np.swapaxes(poses[:, :3, :3], 1, 2) + poses[:, None, :3, 3]
        _, _, by_lens = self.camera.project_with_slopes(turned.reshape(-1, 3))
        columns = [INTRINSICS.index(name) for name in names]
        lens = by_lens[..., columns].reshape(len(poses), -1, len(columns))
        weight = self._row_weights() / self.noise_px[:, None] ** 2
        weighted = np.swapaxes(slopes, 1, 2) * weight[:, None, :]
        information = weighted @ slopes
        by_pose = np.linalg.solve(information, weighted @ lens)
        left = residuals[..., None] - slopes @ np.linalg.solve(information, weighted @ residuals[..., None])
        lens_weighted = np.swapaxes(lens, 1, 2) * weight[:, None, :]
        own = (lens_weighted @ (lens - slopes @ by_pose)).sum(0)
        return np.asarray(by_pose, np.float64), own, (lens_weighted @ left).sum(0)[:, 0]

    def of(self, keep: NDArray[Any]) -> Corners:
        """Return the corners of some views alone; ``keep`` (N,) of bool or indices."""
        return replace(
            self, pixels=self.pixels[keep], weights=self.weights[keep], noise_px=self.noise_px[keep]
        )

    def errors_px(self, poses: Array) -> Array:
        """Return (N, K, 2) seen minus predicted pixels at ``poses``; zero where a corner does not count."""
        residuals, _ = self._slopes(poses)
        return residuals.reshape(self.pixels.shape) * self.weights[..., None]

    def fitted(self, poses: Array) -> Array:
        """Return (N, 4, 4) the poses that fit each view's corners alone, near ``poses``."""
        for _ in range(_STEPS):
            changes, _ = self.around(poses)
            poses = poses @ transform(exp_rotation(changes[:, 3:]), changes[:, :3])
        return poses

    def pixels_per_metre(self, poses: Array) -> Array:
        """Return (N,) how many pixels a metre across the view takes at the board's distance."""
        return 0.5 * (self.camera.fx + self.camera.fy) / poses[:, 2, 3]

    def _row_weights(self) -> Array:
        return np.repeat(self.weights, 2, axis=1)

    def _slopes(self, poses: Array) -> tuple[Array, Array]:
        """Return (N, 2K) seen minus predicted pixels, and (N, 2K, 6) their slopes by the board's change."""
        turned = self.points @ np.swapaxes(poses[:, :3, :3], 1, 2)
        in_camera = (turned + poses[:, None, :3, 3]).reshape(-1, 3)
        pixels, by_point, _ = self.camera.project_with_slopes(in_camera)
        count, corners = self.weights.shape
        by_point = by_point.reshape(count, corners, 2, 3) @ poses[:, None, :3, :3]
        slopes = np.concatenate([by_point, -by_point @ hat(self.points)], axis=3)
        residuals = self.pixels - pixels.reshape(count, corners, 2)
        return residuals.reshape(count, -1), slopes.reshape(count, 2 * corners, 6)


def gather(detections: Sequence[Detection], board: Board, camera: CameraModel) -> tuple[Corners, Array]:
    """Return the corners of all views and (N, 4, 4) the poses of the board's centre that fit each best.

    Corners that lie far off in their own view are left out, and each view gets its own noise: that of
    its residuals, drawn towards what is common to all.

    Raises:
        BoardNotFoundError, MirroredBoardError: a view has no usable corners.
        InconsistentDataError: pictures and board do not fit at all.
    """
    centre = shifted([*(0.5 * side for side in board.size_m), 0.0])
    points = board.corners_m() - centre[:3, 3]
    pixels = np.zeros((len(detections), len(points), 2))
    weights = np.zeros((len(detections), len(points)))
    poses = []
    for i, detection in enumerate(detections):
        pixels[i, detection.ids] = detection.corners_px
        weights[i, detection.ids] = 1.0
        poses.append(board_pose(detection, board, camera) @ centre)
    corners = Corners(camera, points, pixels, weights, np.ones(len(detections)))
    fitted = np.array(poses)
    for _ in range(2):
        fitted = corners.fitted(fitted)
        squares = np.sum(corners.errors_px(fitted) ** 2, axis=2)
        freedom = np.maximum(2 * corners.weights.sum(1) - 6, 1)
        common = max(float(np.median(squares.sum(1) / freedom)), _LEAST_NOISE_PX**2)
        # The squared length of a good residual exceeds 2 ln(1/p) variances with probability p.
        own = (_PRIOR_VIEWS * common + squares.sum(1)) / (_PRIOR_VIEWS + freedom)
        off = squares > _OUTLIER_DEVIATIONS**2 * np.minimum(own, 4 * common)[:, None]
        kept = np.where(off, 0.0, corners.weights)
        enough = kept.sum(1) >= np.maximum(6, 0.6 * corners.weights.sum(1))
        corners = Corners(
            camera, points, pixels, np.where(enough[:, None], kept, corners.weights), np.sqrt(own)
        )
    if not np.isfinite(fitted).all() or (fitted[:, 2, 3] <= 0).any():
        raise InconsistentDataError(
            "the corners of a view fit no board in front of the camera",
            "check board.yaml, camera.yaml and the order in which corners are numbered",
        )
    return corners, fitted
