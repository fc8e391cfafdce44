"""Our estimator beside the reference solvers of the package ``kinhec``, on sequences that it generates.

``kinhec`` gives poses of arm and camera with a noise of its own making, AX = XB (where the sensor is on the
flange) and AX = YB (that, and where the base is); our estimator gets the same poses, and finds the sizes of
the noise by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from calibration.geometry import Array, inverse
from calibration.refinement import Model, PoseMotion, Seen, Setup
from calibration.robust import agree

OURS = "simplevla"

_SHIFT_M, _DEPTH_M, _TURN_RAD = 1e-3, 3e-3, 2e-3
_ARM_M, _ARM_RAD = 3e-4, 5e-4


def compare(*, tier: str = "small", most: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Return one row for each sequence of the noise track and each solver.

    Args:
        tier: of kinhec's plans.
        most: how many sequences to draw from the plan.
        seed: which ones, and of the groups of views that our starting values are drawn from.
    """
    from kinhec import benchmark
    from kinhec.generator import GenerationError, generate_sequence
    from kinhec.io import Sequence
    from kinhec.plans import build_plan, load_tier

    plan = build_plan(load_tier(tier), ["noise"])["noise"]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(plan))
    rows: list[dict[str, Any]] = []
    used = 0
    for index in order:
        if used == most:
            break
        try:
            record = generate_sequence(plan[index])
        except GenerationError:
            continue
        used += 1
        sequence = Sequence(record.manifest, record.robot_table, record.camera_table)
        setup: Setup = "eye-in-hand" if sequence.eye_in_hand else "eye-to-hand"
        benchmark.SOLVERS[OURS] = lambda data, rng, setup=setup: solve(data[0], data[1], setup, rng)
        names = [name for name in benchmark.SOLVERS if name != "andreff_scale"]
        rows += benchmark.evaluate_sequence(sequence, names, rng=np.random.default_rng(seed + used))
    return rows


def solve(a: Array, b: Array, setup: Setup, rng: np.random.Generator) -> dict[str, Array]:
    """Return X and Y of A X = Y B.

    Args:
        a: (N, 4, 4) flange in base.
        b: (N, 4, 4) camera in target (eye-in-hand), or marker in camera (eye-to-hand).
        setup: which of the two.
        rng: of the starting values.
    """
    seen = inverse(b) if setup == "eye-in-hand" else b
    turned = np.swapaxes(seen[:, :3, :3], 1, 2)  # the camera's axes in the target's frame
    shift, depth, turn = np.zeros((len(a), 6, 2)), np.zeros((len(a), 6, 1)), np.zeros((len(a), 6, 3))
    shift[:, :3] = _SHIFT_M * turned[:, :, :2]
    depth[:, :3] = _DEPTH_M * turned[:, :, 2:]
    turn[:, 3:] = _TURN_RAD * np.eye(3)
    motion = PoseMotion(a, _ARM_M, _ARM_RAD)
    model = Model(setup, motion, Seen(seen, {"shift": shift, "depth": depth, "turn": turn}))
    found = agree(model, rng, scaled=("shift", "depth", "turn", *motion.parts())).estimate
    if setup == "eye-in-hand":
        return {"X": found.camera, "Y": found.board}
    return {"X": found.board, "Y": found.camera}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the medians of each solver, and how many times our error its error is.

    The levels of noise differ by a factor of fifty, so that medians over all of them say little; the last
    columns are means of the logarithm of (its error / ours), sequence by sequence, and its standard error.
    """
    columns = ("X_trans_err_mm", "X_rot_err_deg", "Y_trans_err_mm", "Y_rot_err_deg")
    ours = {row["sequence_id"]: row for row in rows if row["solver"] == OURS}
    figures: dict[str, tuple[list[float], list[tuple[float, float]]]] = {}
    for name in sorted({row["solver"] for row in rows}):
        own = [row for row in rows if row["solver"] == name and row["ok"]]
        medians = [_middle([row.get(column, np.nan) for row in own]) for column in columns]
        ratios = [
            _mean_ratio([(row.get(column, np.nan), ours[row["sequence_id"]][column]) for row in own])
            for column in columns
        ]
        figures[name] = (medians, ratios)
    heads = ("X mm", "X deg", "Y mm", "Y deg")
    lines = [f"{'kinhec, noise track':20}" + "".join(f"{h:>9}" for h in heads) + "   times our error"]
    for name in sorted(figures, key=lambda n: figures[n][1][0][0]):
        medians, ratios = figures[name]
        cells = "".join(f"{v:9.3f}" if np.isfinite(v) else f"{'-':>9}" for v in medians)
        times = "".join(
            f"{v:7.2f}x +-{100 * s:3.0f}%" if np.isfinite(v) else f"{'-':>14}" for v, s in ratios
        )
        lines.append(f"{name:20}{cells}  {times}")
    return "\n".join([*lines, f"{len(ours)} sequences"])


def _middle(values: list[float]) -> float:
    good = [v for v in values if np.isfinite(v)]
    return float(np.median(good)) if good else float("nan")


def _mean_ratio(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the geometric mean of first over second, and the standard error of its logarithm."""
    logs = [np.log(a / b) for a, b in pairs if np.isfinite(a) and np.isfinite(b) and a > 0 and b > 0]
    if not logs:
        return float("nan"), float("nan")
    return float(np.exp(np.mean(logs))), float(np.std(logs) / np.sqrt(len(logs)))
