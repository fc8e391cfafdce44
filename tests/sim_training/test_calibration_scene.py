"""Pictures of a board are where the camera's equations say, and a real camera's faults are in them."""

import numpy as np
import pytest

from benchmarks.calibration import OURS, measure
from benchmarks.calibration_rigs import rigs, the_arm


@pytest.mark.slow
def test_a_rendered_rig_is_calibrated(tmp_path):
    """The whole way: render, find corners, calibrate; a second time from what was kept."""
    first = next(iter(rigs(1, poses=10, setup="eye-to-hand", seed=1, rendered=True, cache=tmp_path)))
    again = next(iter(rigs(1, poses=10, setup="eye-to-hand", seed=1, rendered=True, cache=tmp_path)))
    errors = first.corner_errors_px(the_arm()[1])
    assert len(errors) > 150
    assert np.abs(errors.mean(0)).max() < 0.06
    assert errors.std() < 0.25
    assert (again.corner_errors_px(the_arm()[1]) == errors).all()
    outcome = measure([first], seed=1)[0]
    assert np.linalg.norm(outcome.errors["uniform"][OURS][:3]) < 2e-3
    assert outcome.distances["uniform"] < 30
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 10
