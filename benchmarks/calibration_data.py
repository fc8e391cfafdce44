"""Views of random rigs with a known truth, made without rendering, for trials and tests of the solvers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.calibration_rigs import NOISE_PX, Rig, rigs, the_arm
from calibration.detection import Detection
from calibration.geometry import Array
from calibration.samples import View

ARM, CHAIN = the_arm()


@dataclass(frozen=True, eq=False)
class Data:
    """A rig, where its arm was read to stand, and noise for more."""

    rig: Rig
    readings: Array
    rng: np.random.Generator

    def seen(self, joints: Array) -> list[Detection]:
        """Return what the camera sees at joint positions (N, n)."""
        found = []
        for q in joints:
            corners = self.rig.true_corners_px(CHAIN, q)
            noise = self.rng.normal(0, NOISE_PX, corners.shape)
            found.append(Detection(np.arange(len(corners)), corners + noise))
        return found

    def read(self, joints: Array) -> Array:
        """Return joint positions (N, n) as the arm reports them."""
        return joints + np.deg2rad(0.1) * self.rng.uniform(-1, 1, joints.shape)


def data(setup: str = "eye-to-hand", *, index: int = 0, poses: int = 15) -> Data:
    """Return the rig number ``index``; the same at every call."""
    drawn = rigs(index + 1, poses=poses, setup=setup, seed=7, rendered=False, cache=None)
    rig = list(drawn)[index]
    rng = np.random.default_rng(index)
    return Data(rig, rig.readings("uniform", rng), rng)


def views(
    detections: object, joints: Array | None = None, poses: Array | None = None, *, arm: str = ""
) -> list[View]:
    """Return views one second apart."""
    return [
        View(
            f"view{i}",
            detection,
            None if joints is None else joints[i],
            None if poses is None else poses[i],
            i * 10**9,
            arm=arm,
        )
        for i, detection in enumerate(detections)  # type: ignore[arg-type]
    ]
