"""Where one base stands from the other by points that both arms touched: a second opinion to the cameras'.

Nobody moves an arm to a point as well as a hand does: the motors stay as they are, a person leads each arm
there, and only the joints are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import yaml
from numpy.typing import NDArray

from calibration.arms_base import BasePose, agreement, base_to_base_by_touch
from calibration.settings import Settings
from simplevla.config import Config
from simplevla.embodiment import Embodiment, Vec3
from simplevla.files import write_atomic
from simplevla.kinematics import arm_chain
from simplevla.session_record import Check

Array = NDArray[np.float64]

LEAST_POINTS = 3

_TOUCH_STD_M = 0.001  # how well a person brings two tools to one point


class Touches(Config):
    """Points that the tools of two arms both touched, in order: (x, y, z) in each arm's base frame, m."""

    left: tuple[Vec3, ...]
    right: tuple[Vec3, ...]

    def __post_init__(self) -> None:
        if len(self.left) != len(self.right) or len(self.left) < LEAST_POINTS:
            raise ValueError("left and right must name the same points, three or more")

    def save(self, path: Path) -> None:
        """Write them as YAML, whole or not at all."""
        write_atomic(path, yaml.safe_dump(msgspec.to_builtins(self), sort_keys=False).encode())


class Standing(Protocol):
    """Arms whose joints can be read; a :class:`~calibration.cell.Cell` is one."""

    def averaged(self) -> Array:
        """Return (D,) where all arms are, rad and m."""


def record_touches(
    arms: Standing,
    embodiment: Embodiment,
    zeros_rad: Mapping[str, Array],
    count: int,
    ask: Callable[[str], None],
) -> Touches:
    """Have ``count`` points touched with the tool of each arm, and return where each arm says they are.

    Args:
        arms: read after each question.
        embodiment: two arms, the left one first.
        zeros_rad: {arm: (n,) what each joint reports where it truly is at zero}.
        count: how many points.
        ask: returns when a person has done what it says.

    Raises:
        UnavailableError: nobody answers.
    """
    points: tuple[list[Vec3], list[Vec3]] = ([], [])
    for number in range(1, count + 1):
        for (arm, part), found in zip(embodiment.slices(), points, strict=True):
            ask(
                f"Lead the {arm.name} arm by hand until point {number} of {count} is exactly between its "
                "closed fingertips, hold it still, then Enter: "
            )
            joints = arms.averaged()[part][:-1] - zeros_rad.get(arm.name, np.zeros(len(arm.joints)))
            x, y, z = arm_chain(arm).forward(joints)[:3, 3].tolist()
            found.append((x, y, z))
    return Touches(left=tuple(points[0]), right=tuple(points[1]))


def check_touches(
    settings: Settings, touches: Touches, by_camera: BasePose, left: str, right: str
) -> Check:
    """Return whether touching and the camera agree on where the right base stands in the left one.

    Raises:
        CalibrationError: the points lie in a line, or do not fit each other.
    """
    by_touch = base_to_base_by_touch(np.array(touches.left), np.array(touches.right), std_m=_TOUCH_STD_M)
    agreed = agreement(by_camera, by_touch)
    return settings.judge(
        f"touch {left} {right}",
        {
            "apart_mm": 1e3 * agreed.distance_m,
            "turned_deg": float(np.degrees(agreed.angle_rad)),
            "chi2": agreed.chi2,
        },
    )
