"""The lens, refined together with the camera's and the board's pose.

Each view says something of the lens by what no pose of the board explains, and by where it makes the board
appear against where the arm says it is. One step solves for the intrinsics with all poses free (variable
projection, Golub and Pereyra 1973); the poses are then fitted again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.camera import INTRINSICS, CameraModel
from calibration.corners import Corners
from calibration.geometry import Array
from calibration.refinement import Model
from calibration.robust import Agreement

REFINED = ("fx", "fy", "cx", "cy", "k1", "k2")

_KNOWN = (
    0.02,
    0.02,
    0.02,
    0.02,
    0.2,
    0.5,
)  # deviations before any data; the first four of the focal length


@dataclass(frozen=True, eq=False)
class LensStep:
    """One step towards the lens that fits best.

    Attributes:
        camera: the lens after it.
        covariance: (P, P) of the model's parameters, the lens being unknown as well.
        size: of the step, in standard deviations of what is known after it.
    """

    camera: CameraModel
    covariance: Array
    size: float


def lens_step(model: Model, found: Agreement, corners: Corners, nominal: CameraModel) -> LensStep:
    """Return the step from ``corners.camera`` to the lens that fits best, all poses free.

    Args:
        model: unknowns and data.
        found: what was found with ``corners.camera``.
        corners: of all views.
        nominal: the lens as it was given, which the answer is drawn to, weakly.
    """
    estimate, keep = found.estimate, np.flatnonzero(found.inliers)
    _, predicted = model.predict(estimate.camera, estimate.board, estimate.offsets_rad)
    columns, own, gradient = corners.of(keep).lens_slopes(predicted[keep], REFINED)
    known = np.array(_KNOWN) * np.array([nominal.fx] * 4 + [1.0, 1.0])
    weighted = np.swapaxes(columns, 1, 2) @ estimate.inverses[keep]
    shared = (weighted @ estimate.columns[keep]).sum(0)
    about_lens = own + (weighted @ columns).sum(0) + np.diag(known**-2)
    gradient = gradient + (weighted @ estimate.residuals[keep][..., None]).sum(0)[:, 0]
    indices = [INTRINSICS.index(name) for name in REFINED]
    gradient += (nominal.values()[indices] - corners.camera.values()[indices]) / known**2
    information = about_lens - shared @ estimate.covariance @ shared.T
    step = np.linalg.solve(information, gradient)
    values = corners.camera.values()
    values[indices] += step
    joint = np.block([[np.linalg.inv(estimate.covariance), shared.T], [shared, about_lens]])
    count = len(estimate.covariance)
    return LensStep(
        CameraModel.of_values(values, nominal.width, nominal.height),
        np.asarray(np.linalg.inv(joint)[:count, :count], np.float64),
        float(np.sqrt(step @ information @ step)),
    )
