"""Where the other arm stands: through the camera, by touching, and whether the two agree."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import least_squares

from benchmarks.calibration_data import CHAIN, data, views
from benchmarks.calibration_rigs import BOARD
from calibration.arms_base import (
    BasePose,
    agreement,
    base_to_base,
    base_to_base_by_touch,
    combine,
    require_arms_not_swapped,
)
from calibration.faults import (
    DegenerateMotionError,
    InconsistentDataError,
    SwappedArmsError,
    TooFewPosesError,
)
from calibration.geometry import difference, exp_rotation, inverse, moved, transform
from calibration.hand_eye import calibrate_hand_eye
from calibration.settings import load_settings
from calibration.steps.touch import Touches, check_touches, record_touches
from simplevla.config import load_yaml
from simplevla.embodiment import load_embodiment
from simplevla.kinematics import arm_chain
from simplevla.session_record import to_matrix

NOMINAL = transform(exp_rotation(np.array([0.0, 0.0, 0.05])), np.array([0.02, -0.6, 0.0]))
POINTS = np.random.default_rng(0).uniform([0.2, -0.4, 0.0], [0.5, -0.1, 0.2], (8, 3))


@pytest.fixture(scope="module")
def left():
    given = data()
    return calibrate_hand_eye(
        views(given.rig.detections, given.readings),
        board=BOARD,
        camera=given.rig.camera,
        setup="eye-to-hand",
        chain=CHAIN,
    )


@pytest.fixture(scope="module")
def right(left):
    return replace(left, camera_pose=inverse(NOMINAL) @ left.camera_pose, covariance=2 * left.covariance)


def in_right(points):
    return (points - NOMINAL[:3, 3]) @ NOMINAL[:3, :3]


def test_the_covariance_is_that_of_the_change_it_is_for(left, right):
    rng = np.random.default_rng(1)
    found = base_to_base(left, right)
    assert np.allclose(found.pose, NOMINAL)
    draws = []
    for _ in range(4000):
        one = moved(left.camera_pose, rng.multivariate_normal(np.zeros(6), left.covariance))
        two = moved(right.camera_pose, rng.multivariate_normal(np.zeros(6), right.covariance))
        draws.append(difference(one @ inverse(two), NOMINAL))
    sampled = np.cov(np.array(draws).T)
    assert np.allclose(np.sqrt(np.diag(found.covariance)), np.sqrt(np.diag(sampled)), rtol=0.06)
    assert np.trace(np.linalg.solve(sampled, found.covariance)) == pytest.approx(6, rel=0.1)


def test_touching_finds_it_and_knows_how_well():
    chi2 = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        noise = rng.normal(0, 1e-3, (2, *POINTS.shape))
        found = base_to_base_by_touch(POINTS + noise[0], in_right(POINTS) + noise[1], std_m=1e-3)
        error = difference(found.pose, NOMINAL)
        chi2.append(error @ np.linalg.solve(found.covariance, error))
    assert np.mean(chi2) == pytest.approx(6, rel=0.15)


def test_two_ways_agree_or_do_not(left, right):
    by_camera = base_to_base(left, right)
    rng = np.random.default_rng(2)
    right_points = in_right(POINTS) + rng.normal(0, 1e-3, POINTS.shape)
    by_touch = base_to_base_by_touch(POINTS, right_points, std_m=1e-3)
    assert agreement(by_camera, by_touch).agree
    both = combine(by_camera, by_touch)
    assert np.trace(both.covariance) < min(np.trace(by_camera.covariance), np.trace(by_touch.covariance))
    off = BasePose(moved(by_touch.pose, np.array([0.01, 0, 0, 0, 0, 0])), by_touch.covariance)
    told = agreement(by_camera, off)
    assert not told.agree
    assert told.distance_m > 0.007


def test_points_that_a_person_has_both_arms_touch_agree_with_the_camera(tmp_path):
    robot = load_embodiment("piper_dual")
    zeros = {"right": np.array([0.0, 0.01, -0.02, 0.0, 0.01, 0.0])}
    between = inverse(to_matrix(robot.arms[0].base)) @ to_matrix(robot.arms[1].base)
    off = moved(between, np.array([0.004, 0.003, 0.0, 0.0, 0.0, 0.01]))
    middle = 0.5 * off[:3, 3] + [0.3, 0.0, 0.15]
    points = middle + np.random.default_rng(3).uniform(-0.1, 0.1, (6, 3))

    class Led:
        """Arms that a person leads: left first, then right, to the same points."""

        def __init__(self):
            self.positions, self.asked = robot.home(), []

        def ask(self, question):
            self.asked.append(question)
            arm, part = list(robot.slices())[(len(self.asked) + 1) % 2]
            point = points[(len(self.asked) - 1) // 2]
            if arm.name == "right":
                point = (point - off[:3, 3]) @ off[:3, :3]
            joints = reached(arm_chain(arm), point) + zeros.get(arm.name, 0.0)
            self.positions[part] = [*joints, 0.0]

        def averaged(self):
            return self.positions

    arms = Led()
    touches = record_touches(arms, robot, zeros, 6, arms.ask)
    assert len(arms.asked) == 12
    touches.save(tmp_path / "touches.yaml")
    assert load_yaml(tmp_path / "touches.yaml", Touches) == touches
    covariance = np.diag([1e-3] * 3 + [2e-3] * 3) ** 2
    settings = load_settings()
    good = check_touches(settings, touches, BasePose(off, covariance), "left", "right")
    assert good.passed
    assert good.figures["apart_mm"] < 0.01
    wrong = moved(off, np.array([0.008, 0, 0, 0, 0, 0]))
    assert not check_touches(settings, touches, BasePose(wrong, covariance), "left", "right").passed


def reached(chain, point):
    """Return joints (n,) at which the tool is at ``point`` (3,)."""
    bent = np.array([np.arctan2(point[1], point[0]), 1.2, -1.2, 0.0, 0.3, 0.0])
    found = least_squares(lambda q: chain.forward(q)[:3, 3] - point, bent)
    assert np.abs(found.fun).max() < 1e-6
    return found.x


def test_points_that_tell_too_little_or_do_not_fit_are_named():
    with pytest.raises(TooFewPosesError):
        base_to_base_by_touch(POINTS[:2], in_right(POINTS[:2]), std_m=1e-3)
    line = np.linspace([0.2, 0, 0], [0.5, 0.1, 0.1], 6)
    with pytest.raises(DegenerateMotionError):
        base_to_base_by_touch(line, in_right(line), std_m=1e-3)
    with pytest.raises(InconsistentDataError):
        base_to_base_by_touch(POINTS, in_right(POINTS[::-1]), std_m=1e-3)


def test_swapped_arms_are_named():
    covariance = 1e-6 * np.eye(6)
    require_arms_not_swapped(BasePose(NOMINAL, covariance), NOMINAL)
    with pytest.raises(SwappedArmsError):
        require_arms_not_swapped(BasePose(inverse(NOMINAL), covariance), NOMINAL)
