"""How an arm's joints follow their set points, found from a recorded trial: ``simplevla twin fit``.

Each joint is taken for a second-order system behind a dead time that all joints of an arm share,

    x''(t) = f^2 (u(t - delay) - x(t)) - 2 d f x'(t),

with the frequency f, the damping d, the set points u as they were sent and the positions x as they were
measured. The three are found by least squares over the whole recording; what is written can be given to
``simplevla twin --metal``, whose joints then follow in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import yaml
from numpy.typing import NDArray

from robot_bridge.recording import JointSeries, read_recording
from robot_bridge.twin.arm_on_bus import BUS_TICK_S
from robot_bridge.twin.metal import JointResponse, Metal
from simplevla.embodiment import Embodiment
from simplevla.errors import RecordError
from simplevla.files import write_atomic

Vector = NDArray[np.float64]

_GRID_S = 0.002
_SETTLE_S = 0.5  # at the start, where what was before the recording still shows
_LEAST_TRAVEL_RAD = 0.02
_LEAST_S = 2.0
_PHYSICS_DT_S = 0.004  # of the simulated world: see sim_training.world
# The twin looks at its bus and at its physics so often: half of that is waited on average, in any case.
_TWIN_WAITS_S = (BUS_TICK_S + _PHYSICS_DT_S) / 2
_START = (0.02, 40.0, 1.0)
_BOUNDS = ((0.0, 2.0, 0.1), (0.3, 400.0, 5.0))


@dataclass(frozen=True)
class ArmFit:
    """What was found of one arm.

    Attributes:
        delay_s: dead time from set point to motion.
        frequencies_rad_s, dampings: (6,) of its joints; of those that did not move the others' median.
        moved: (6,) whether a joint moved far enough to tell.
        residual_rad: RMS of what is left, over the joints that moved.
        travel_rad: RMS of the lag that was to be explained.
    """

    delay_s: float
    frequencies_rad_s: Vector
    dampings: Vector
    moved: NDArray[np.bool_]
    residual_rad: float
    travel_rad: float


def fit_recording(path: Path, embodiment: Embodiment) -> dict[str, ArmFit]:
    """Return {arm: what was found} from a trial's recording.

    Args:
        path: the folder of the recording, or the MCAP in it.
        embodiment: the robot that was recorded.

    Raises:
        RecordError: it is missing or damaged, it is another robot's, it is too short, or no joint moves.
    """
    recording = read_recording(path.parent if path.suffix == ".mcap" else path, images=False)
    names = embodiment.names()
    for what, series in (("setpoints", recording.commanded), ("joint states", recording.measured)):
        if list(series.names) != names:
            raise RecordError(
                f"{path}: its {what} are of {', '.join(series.names) or 'nothing'}", "name its rig: --rig"
            )
    found = {}
    for arm, part in embodiment.slices():
        joints = slice(part.start, part.stop - 1)
        fit = fit_arm(recording.commanded, recording.measured, joints, 1 / embodiment.control_rate_hz)
        if fit is not None:
            found[arm.name] = fit
    if not found:
        raise RecordError(
            f"{path}: no joint moves by {_LEAST_TRAVEL_RAD} rad for {_LEAST_S:g} s", "record a longer move"
        )
    return found


def fit_arm(sent: JointSeries, measured: JointSeries, joints: slice, held_s: float) -> ArmFit | None:
    """Return how the joints at ``joints`` follow, or None if too little moved to tell.

    Each setpoint was held for ``held_s``: on average it was half of that old.
    """
    if len(sent.stamp_ns) < 2 or len(measured.stamp_ns) < 2:
        return None
    origin_ns = int(sent.stamp_ns[0])
    at_s = (sent.stamp_ns - origin_ns) / 1e9 + held_s / 2
    seen_s = (measured.stamp_ns - origin_ns) / 1e9
    grid = np.arange(0.0, at_s[-1], _GRID_S)
    judged = (seen_s > _SETTLE_S) & (seen_s < grid[-1] if len(grid) else False)
    if len(grid) == 0 or grid[-1] < _LEAST_S or judged.sum() < 50:
        return None
    wanted = np.stack([np.interp(grid, at_s, column) for column in sent.position[:, joints].T])
    actual = measured.position[judged, joints].T
    moved = np.ptp(wanted, axis=1) > _LEAST_TRAVEL_RAD
    if not moved.any():
        return None
    return _fit(grid, wanted, seen_s[judged], actual, moved)


def _fit(grid: Vector, wanted: Vector, seen_s: Vector, actual: Vector, moved: NDArray[np.bool_]) -> ArmFit:
    from scipy.optimize import least_squares

    rows = np.flatnonzero(moved)

    def residual(p: Vector) -> Vector:
        parts = [
            follow(grid, wanted[row], seen_s, p[0], p[1 + 2 * i], p[2 + 2 * i]) - actual[row]
            for i, row in enumerate(rows)
        ]
        return np.concatenate(parts)

    start = np.array([_START[0], *(_START[1:] * len(rows))])
    low = [_BOUNDS[0][0], *(_BOUNDS[0][1:] * len(rows))]
    high = [_BOUNDS[1][0], *(_BOUNDS[1][1:] * len(rows))]
    best = least_squares(
        residual,
        start,
        bounds=(low, high),
        x_scale=start,
        jac="3-point",
        ftol=1e-12,
        xtol=1e-10,
        gtol=1e-12,
    )
    frequencies, dampings = np.full(len(moved), np.nan), np.full(len(moved), np.nan)
    frequencies[rows], dampings[rows] = best.x[1::2], best.x[2::2]
    frequencies[~moved] = np.median(best.x[1::2])
    dampings[~moved] = np.median(best.x[2::2])
    lag = [np.interp(seen_s, grid, wanted[row]) - actual[row] for row in rows]
    return ArmFit(
        delay_s=float(best.x[0]),
        frequencies_rad_s=frequencies,
        dampings=dampings,
        moved=moved,
        residual_rad=float(np.sqrt(np.mean(best.fun**2))),
        travel_rad=float(np.sqrt(np.mean(np.square(lag)))),
    )


def follow(
    grid: Vector, wanted: Vector, seen_s: Vector, delay_s: float, frequency: float, damping: float
) -> Vector:
    """Return (M,) where a joint is at ``seen_s`` that is told ``wanted`` (N,) at ``grid`` (N,), s.

    It is at rest at the start. The set points are taken for straight between the grid's times.
    """
    from scipy.signal import cont2discrete, lfilter

    system = ([frequency**2], [1.0, 2 * damping * frequency, frequency**2])
    numerator, denominator, _ = cont2discrete(system, grid[1] - grid[0], method="foh")
    start = wanted[0]
    where = start + lfilter(np.ravel(numerator), denominator, wanted - start)
    return np.interp(seen_s - delay_s, grid, where)


def as_metal(found: dict[str, ArmFit]) -> Metal:
    """Return metal whose joints follow as they were found to."""
    return Metal(
        command_delays_s={
            name: round(max(0.0, fit.delay_s - _TWIN_WAITS_S), 5) for name, fit in found.items()
        },
        responses={
            name: JointResponse(frequencies_rad_s=_six(fit.frequencies_rad_s), dampings=_six(fit.dampings))
            for name, fit in found.items()
        },
    )


def save_metal(metal: Metal, path: Path, said: str) -> None:
    """Write what ``metal`` names as YAML, under a line that says where it is from."""
    values = {key: value for key, value in msgspec.to_builtins(metal).items() if value}
    text = f"# {said}\n" + yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    write_atomic(path, text.encode())


def _six(values: Sequence[float] | Vector) -> tuple[float, float, float, float, float, float]:
    a, b, c, d, e, f = (round(float(value), 4) for value in values)
    return a, b, c, d, e, f
