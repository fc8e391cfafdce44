"""How well the camera is found, beside OpenCV's methods, on pictures with a known truth.

Random rigs, 15 poses each, planned as `simplevla calibrate` plans them; the board is photographed by
SAPIEN with a distorting lens, blur, varying exposure and sensor noise, and the joints are read off by
0.1 deg, several times anew for each rig. All methods get the same corners, the same intrinsics (the true
ones) and the same readings. The Cramer-Rao bound beside them is what no unbiased estimator can go below
in these poses, on average, with Gaussian noise of this size in joints and corners.

    python -m benchmarks.calibration                      # 50 rigs, 750 pictures
    python -m benchmarks.calibration --rigs 5             # a short look
    python -m benchmarks.calibration --synthetic          # true corners with 0.1 px of noise, no pictures
    python -m benchmarks.calibration --random-poses       # poses drawn at random instead of planned
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from benchmarks.calibration_rigs import BOARD, JOINT_NOISE_DEG, NOISE_PX, NoiseKind, Rig, rigs, the_arm
from calibration.detection import Detection, board_pose, mirrored
from calibration.faults import DegenerateMotionError
from calibration.geometry import Array, difference, inverse, log_rotation, transform
from calibration.hand_eye import HandEye, HandEyeOptions, calibrate_hand_eye
from calibration.observability import Noise, RigGeometry, information
from calibration.refinement import JointMotion, Setup
from calibration.samples import View
from calibration.starts import HAND_EYE, ROBOT_WORLD, opencv_hand_eye
from simplevla.cli import whole_number
from simplevla.errors import CalibrationError, SimplevlaError
from simplevla.kinematics import Chain

OURS, PLAIN = "simplevla", "Tsai, plain"
JUDGED = (*HAND_EYE, PLAIN)  # the best of these is what the ratio is to

_CHI2_95 = 12.59  # of 6 degrees of freedom
_OUTLIER_SHARE = 0.2
_ROUNDS = 3
_SWING_RAD = 0.25
_SHIFT, _TURN = slice(0, 3), slice(3, 6)
_DRAWS = 400


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one rig gave with one reading of its joints.

    Attributes:
        errors: {kind of joint noise: {method: (6,) error of the camera's pose, not a number if it failed}}.
        distances: {kind: our error in units of the covariance that we state, squared; not a number if
            we refused to state any}.
        bounds: {kind: (6, 6) the Cramer-Rao bound of the covariance}.
        with_outliers: {kind: {method: (6,) error with a fifth of the views wrong}}.
        named: whether degenerate motion was named; cured: whether the proposed poses cured it; of a
            rig's first reading, else neither is.
        first: whether it is that.
    """

    errors: dict[str, dict[str, Array]]
    distances: dict[str, float]
    bounds: dict[str, Array]
    with_outliers: dict[str, dict[str, Array]]
    named: bool
    cured: bool
    first: bool
    pixel_errors: Array


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rigs", type=whole_number(2, 10_000), default=50, help="(default: 50)")
    parser.add_argument(
        "--readings", type=whole_number(1, 100), default=4, help="of the joints of each rig (default: 4)"
    )
    parser.add_argument("--poses", type=whole_number(8, 200), default=15, help="of each (default: 15)")
    parser.add_argument("--setup", choices=get_args(Setup), default="eye-to-hand")
    parser.add_argument("--seed", type=whole_number(0, 2**31), default=0, help="(default: 0)")
    parser.add_argument("--synthetic", action="store_true", help="render nothing")
    parser.add_argument(
        "--random-poses", action="store_true", help="draw poses that show the board, plan none"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder that keeps the corners found, so that a second run renders nothing",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the errors (.png)")
    parser.add_argument(
        "--kinhec",
        type=whole_number(0, 1000),
        default=40,
        help="sequences of kinhec, 0 for none (default: 40)",
    )
    args = parser.parse_args()
    try:
        drawn = rigs(
            args.rigs,
            poses=args.poses,
            setup=args.setup,
            seed=args.seed,
            rendered=not args.synthetic,
            cache=args.cache,
            planned=not args.random_poses,
        )
        outcomes = measure(_counted(drawn, args.rigs), seed=args.seed, readings=args.readings)
    except SimplevlaError as error:
        print(f"calibration: {error}", file=sys.stderr)
        return 2
    seen = (
        f"true corners with {NOISE_PX:g} px of noise" if args.synthetic else "pictures rendered by SAPIEN"
    )
    how = "random" if args.random_poses else "planned"
    print(
        f"{args.setup}, {args.rigs} rigs x {args.poses} {how} poses, each read {args.readings} times, "
        f"{seen}, 640x480, seed {args.seed}"
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(report(outcomes))
    if args.plot is not None:
        plot(outcomes, args.plot)
    if args.kinhec:
        print(_peers(args.kinhec, args.seed))
    return 0


def measure(
    drawn: Iterable[Rig],
    *,
    seed: int,
    kinds: Sequence[NoiseKind] = get_args(NoiseKind),
    readings: int = 1,
) -> list[Outcome]:
    """Return what each rig gives with each of ``kinds`` of joint noise, one outcome a reading."""
    _, chain = the_arm()
    return [
        _outcome(rig, chain, np.random.default_rng([seed, index, 1 + reading]), kinds, first=not reading)
        for index, rig in enumerate(drawn)
        for reading in range(readings)
    ]


def report(outcomes: list[Outcome]) -> str:
    """Return tables and the figures that are asked for."""
    lines: list[str] = []
    pixels = np.concatenate([outcome.pixel_errors for outcome in outcomes if outcome.first])
    lines.append(
        f"corners found: mean off by ({pixels[:, 0].mean():+.3f}, {pixels[:, 1].mean():+.3f}) px, "
        f"deviation {pixels.std():.3f} px, {len(pixels)} corners"
    )
    for kind in get_args(NoiseKind):
        words = "up to 0.1 deg, uniform" if kind == "uniform" else "standard deviation 0.1 deg, Gaussian"
        lines += ["", f"joint noise: {words}", _table(outcomes, kind)]
        ours = _lengths([o.errors[kind][OURS] for o in outcomes])[0]
        wrong = _lengths([o.with_outliers[kind][OURS] for o in outcomes])[0]
        best = min(JUDGED, key=lambda name: _median([o.errors[kind][name] for o in outcomes]))
        theirs = _median([o.with_outliers[kind][best] for o in outcomes])
        stated = np.array([o.distances[kind] for o in outcomes])
        stated = stated[np.isfinite(stated)]
        inside = int((stated < _CHI2_95).sum())
        middle, spoilt = float(np.nanmedian(ours)), float(np.nanmedian(wrong))
        ratio = _median([o.errors[kind][best] for o in outcomes]) / middle
        bounds = np.array([o.bounds[kind] for o in outcomes])
        bound_m, bound_rad = (
            np.sqrt(np.trace(bounds[:, part, part], axis1=1, axis2=2).mean()) for part in (_SHIFT, _TURN)
        )
        theirs_now = _median([o.errors[kind][best] for o in outcomes])
        at_bound = _median([error for bound in bounds for error in _drawn(bound)])
        rms_mm, rms_deg = (
            float(np.sqrt(np.nanmean(values**2)))
            for values in _lengths([o.errors[kind][OURS] for o in outcomes])
        )
        lines += [
            f"Cramer-Rao bound, root mean square: {1e3 * bound_m:.3f} mm, {np.rad2deg(bound_rad):.4f} deg; "
            f"ours: {rms_mm:.3f} mm, {rms_deg:.4f} deg",
            f"an estimator at the bound would have a median of {at_bound:.3f} mm, of which {best} has "
            f"{theirs_now / at_bound:.2f}x",
            f"best of OpenCV's five and a plain Tsai: {best}, {ratio:.2f}x our translation error",
            f"true errors inside our 95 % ellipsoid: {inside} of {len(stated)} "
            f"({inside / len(stated):.1%}); mean squared distance {stated.mean():.2f} (6 is honest)",
            f"with a fifth of the views wrong: ours {middle:.3f} -> {spoilt:.3f} mm "
            f"({spoilt / middle - 1:+.0%}), {best} -> {theirs:.1f} mm",
        ]
    named, cured = sum(o.named for o in outcomes), sum(o.cured for o in outcomes)
    lines.append(
        f"\nturned about one axis alone (true corners with noise): named in {named} of "
        f"{sum(o.first for o in outcomes)}, "
        f"cured by the proposed poses in {cured}"
    )
    return "\n".join(lines)


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Draw each method's translation errors."""
    from matplotlib.figure import Figure

    names = list(outcomes[0].errors["uniform"])
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), get_args(NoiseKind), strict=True):
        values = [_lengths([o.errors[kind][name] for o in outcomes])[0] for name in names]
        kept = [v[np.isfinite(v)] for v in values]
        boxes = axes.boxplot(kept, tick_labels=names, showfliers=False, patch_artist=True)
        for name, box in zip(names, boxes["boxes"], strict=True):
            box.set_facecolor("#e07b39" if name == OURS else "#c9d3df")
        axes.axhline(0.5, color="0.5", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_title(f"joint noise 0.1 deg, {kind}")
        axes.tick_params(axis="x", rotation=60)
    figure.axes[0].set_ylabel("camera's translation error, mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _outcome(
    rig: Rig, chain: Chain, rng: np.random.Generator, kinds: Sequence[NoiseKind], *, first: bool
) -> Outcome:
    errors, distances, bounds, with_outliers = {}, {}, {}, {}
    for kind in kinds:
        joints = rig.readings(kind, rng)
        errors[kind], found = _all(rig, joints, chain)
        error = errors[kind][OURS]
        distances[kind] = (
            float("nan") if found is None else float(error @ np.linalg.solve(found.covariance, error))
        )
        bounds[kind] = _bound(rig, chain, kind)
        wrong = joints.copy()
        bad = rng.choice(len(joints), round(_OUTLIER_SHARE * len(joints)), replace=False)
        wrong[bad] += rng.normal(0, 0.3, wrong[bad].shape)
        with_outliers[kind], _ = _all(rig, wrong, chain)
    named, cured = _degenerate(rig, chain, rng) if first else (False, False)
    pixel_errors = rig.corner_errors_px(chain)
    return Outcome(errors, distances, bounds, with_outliers, named, cured, first, pixel_errors)


def _drawn(covariance: Array) -> Array:
    """Return (N, 6) errors of an estimator with a (6, 6) covariance; the same at every call."""
    return np.random.default_rng(0).multivariate_normal(np.zeros(6), covariance, size=_DRAWS)


def _bound(rig: Rig, chain: Chain, kind: NoiseKind) -> Array:
    """Return (6, 6) the least covariance of the camera's error, m and rad.

    The corners are taken to be as noisy as those of this rig were, and all of them to be seen.
    """
    joint_rad = float(np.deg2rad(JOINT_NOISE_DEG)) / (np.sqrt(3) if kind == "uniform" else 1)
    noise = Noise(pixel_px=float(rig.corner_errors_px(chain).std()), joint_rad=joint_rad)
    geometry = RigGeometry(rig.setup, rig.camera, BOARD, rig.camera_pose, rig.board_pose, chain)
    told = information(geometry, JointMotion(chain, rig.joints_rad, joint_rad), noise)
    return np.asarray(np.linalg.inv(told.sum(axis=0))[:6, :6], np.float64)


def _all(rig: Rig, joints: Array, chain: Chain) -> tuple[dict[str, Array], HandEye | None]:
    """Return the errors of all methods, and our result."""
    gripper = np.array([chain.forward(q) for q in joints])
    seen = np.array([board_pose(d, BOARD, rig.camera) for d in rig.detections])
    try:
        found = _ours(rig, joints, rig.detections, chain)
    except CalibrationError:
        found = None
    cameras: dict[str, Array | None] = {OURS: None if found is None else found.camera_pose}
    cameras |= {name: opencv_hand_eye(rig.setup, gripper, seen, name) for name in HAND_EYE}
    cameras[PLAIN] = plain_tsai(rig.setup, gripper, seen)
    cameras |= {name: opencv_hand_eye(rig.setup, gripper, seen, name) for name in ROBOT_WORLD}
    failed = np.full(6, np.nan)
    return (
        {n: failed if c is None else difference(c, rig.camera_pose) for n, c in cameras.items()},
        found,
    )


def _ours(rig: Rig, joints: Array, detections: Iterable[Detection], chain: Chain) -> HandEye:
    views = [
        View(f"view {i}", detection, q, stamp_ns=i)
        for i, (detection, q) in enumerate(zip(detections, joints, strict=True))
    ]
    return calibrate_hand_eye(
        views, board=BOARD, camera=rig.camera, setup=rig.setup, chain=chain, options=HandEyeOptions()
    )


def plain_tsai(setup: Setup, gripper: Array, seen: Array) -> Array:
    """Return the camera's pose (4, 4) by Tsai and Lenz 1989, from each view and the next, unweighted."""
    moving = gripper if setup == "eye-in-hand" else inverse(gripper)
    a = inverse(moving[:-1]) @ moving[1:]
    b = seen[:-1] @ inverse(seen[1:])
    first, second = _half_turns(a), _half_turns(b)
    rows = np.concatenate([_cross_matrix(p + q) for p, q in zip(first, second, strict=True)])
    half = np.linalg.lstsq(rows, (second - first).ravel(), rcond=None)[0]
    axis = 2 * half / np.sqrt(1 + half @ half)
    square = axis @ axis
    turn = (1 - square / 2) * np.eye(3) + 0.5 * (
        np.outer(axis, axis) + np.sqrt(max(4 - square, 0)) * _cross_matrix(axis)
    )
    rows = (a[:, :3, :3] - np.eye(3)).reshape(-1, 3)
    shift = np.linalg.lstsq(rows, (b[:, :3, 3] @ turn.T - a[:, :3, 3]).ravel(), rcond=None)[0]
    return transform(turn, shift)


def _half_turns(motions: Array) -> Array:
    """Return (N, 3) Tsai's vectors 2 sin(angle / 2) axis."""
    vectors = log_rotation(motions[:, :3, :3])
    angle = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return 2 * np.sin(angle / 2) * vectors / angle


def _cross_matrix(v: Array) -> Array:
    return np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])


def _degenerate(rig: Rig, chain: Chain, rng: np.random.Generator) -> tuple[bool, bool]:
    """Return whether motion about the first joint alone is named, and whether the proposals cure it."""
    joints = np.empty((0, rig.joints_rad.shape[1]))
    for start in rig.joints_rad:
        swung = np.repeat(start[None], 24, axis=0)
        swung[:, 0] += np.linspace(-_SWING_RAD, _SWING_RAD, len(swung))
        swung = np.array([q for q in swung if _in_picture(rig, rig.true_corners_px(chain, q))])
        if len(swung) >= len(joints) + 1:
            joints = swung
    named = False
    for _ in range(_ROUNDS):
        detections = [_noisy(rig, chain, q, rng) for q in joints]
        readings = joints + np.deg2rad(JOINT_NOISE_DEG) * rng.uniform(-1, 1, joints.shape)
        try:
            _ours(rig, readings, detections, chain)
        except DegenerateMotionError as error:
            named = True
            proposed = [p.joints_rad for p in error.proposals if p.joints_rad is not None]
            shown = [q for q in proposed if _shown(rig, chain, q)]
            if not shown:
                return named, False
            joints = np.concatenate([joints, np.array(shown)])
        except CalibrationError:
            return named, False
        else:
            return named, named
    return named, False


def _noisy(rig: Rig, chain: Chain, q: Array, rng: np.random.Generator) -> Detection:
    corners = rig.true_corners_px(chain, q)
    return Detection(np.arange(len(corners)), corners + rng.normal(0, NOISE_PX, corners.shape))


def _shown(rig: Rig, chain: Chain, q: Array) -> bool:
    """Return whether the whole board is seen, and from the front."""
    corners = rig.true_corners_px(chain, q)
    return _in_picture(rig, corners) and not mirrored(Detection(np.arange(len(corners)), corners), BOARD)


def _in_picture(rig: Rig, corners_px: Array) -> bool:
    return bool(((corners_px > 5) & (corners_px < [rig.camera.width - 5, rig.camera.height - 5])).all())


def _lengths(errors: list[Array]) -> tuple[Array, Array]:
    """Return (R,) translation errors, mm, and (R,) rotation errors, deg."""
    stacked = np.array(errors)
    return (
        1e3 * np.linalg.norm(stacked[:, :3], axis=1),
        np.rad2deg(np.linalg.norm(stacked[:, 3:], axis=1)),
    )


def _median(errors: list[Array]) -> float:
    return float(np.nanmedian(_lengths(errors)[0]))


def _table(outcomes: list[Outcome], kind: str) -> str:
    ours = _median([o.errors[kind][OURS] for o in outcomes])
    lines = [
        f"{'camera pose':14}{'mm p50':>9}{'mm p90':>9}{'deg p50':>9}{'deg p90':>9}{'ratio':>8}{'failed':>8}"
    ]
    for name in outcomes[0].errors[kind]:
        shift, turn = _lengths([o.errors[kind][name] for o in outcomes])
        (s50, s90), (t50, t90) = (np.nanpercentile(v, [50, 90]) for v in (shift, turn))
        failed = int(np.isnan(shift).sum())
        lines.append(f"{name:14}{s50:9.3f}{s90:9.3f}{t50:9.4f}{t90:9.4f}{s50 / ours:7.2f}x{failed:8d}")
    return "\n".join(lines)


def _counted(drawn: Iterable[Rig], count: int) -> Iterable[Rig]:
    for number, rig in enumerate(drawn, start=1):
        if sys.stderr.isatty():
            print(f"\rrig {number} of {count}", end="", file=sys.stderr, flush=True)
        yield rig


def _peers(count: int, seed: int) -> str:
    from benchmarks import calibration_peers

    try:
        import kinhec  # noqa: F401
    except ImportError:
        return 'kinhec is not installed -> pip install "simplevla[benchmark]"'
    return "\n" + calibration_peers.table(calibration_peers.compare(most=count, seed=seed))


if __name__ == "__main__":
    sys.exit(main())
