"""The action codec: 256 bins of OpenVLA's kind, with this project's statistics."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from simplevla.action_codec import BINS, ActionCodec, bin_centres

LOW, HIGH = np.array([-0.03, 0.0, 2.0]), np.array([0.05, 0.07, 2.0])
CODEC = ActionCodec(LOW, HIGH, np.array([True, True, False]))
ACTIONS = arrays(np.float64, (4, 3), elements=st.floats(-10, 10))


def test_centres_are_openvlas() -> None:
    centres = bin_centres()
    edges = np.linspace(-1, 1, 256)
    assert centres.shape == (BINS,)
    np.testing.assert_allclose(centres[:255], (edges[:-1] + edges[1:]) / 2)
    # The last two bins decode to the same value, +0.996 (OpenVLA's ids 31745 and 31744).
    assert centres[254] == centres[255] == pytest.approx(0.99608, abs=1e-5)


@given(ACTIONS)
def test_a_value_in_range_comes_back_within_half_a_bin(actions: np.ndarray) -> None:
    inside = np.clip(actions, LOW, HIGH)
    error = np.abs(CODEC.decode(CODEC.encode(inside)) - inside)
    assert (error <= CODEC.resolution() / 2 + 1e-7).all()


@given(ACTIONS)
def test_a_value_out_of_range_is_clipped_to_the_outermost_bin(actions: np.ndarray) -> None:
    bins = CODEC.encode(actions)
    np.testing.assert_array_equal(bins, CODEC.encode(np.clip(actions, LOW, HIGH)))
    assert bins.min() >= 0
    assert bins.max() <= BINS - 2


@given(arrays(np.int64, (5, 3), elements=st.integers(0, BINS - 1)))
def test_encoding_undoes_decoding(bins: np.ndarray) -> None:
    expected = np.where(CODEC.varied, np.minimum(bins, BINS - 2), CODEC.encode(CODEC.decode(bins)))
    np.testing.assert_array_equal(CODEC.encode(CODEC.decode(bins)), expected)


@given(arrays(np.int64, (5, 3), elements=st.integers(0, BINS - 1)))
def test_what_never_varied_is_constant(bins: np.ndarray) -> None:
    np.testing.assert_allclose(CODEC.decode(bins)[:, 2], 2.0, atol=1e-7)


@pytest.mark.parametrize("bins", [[[0, 0, -1]], [[0, 256, 0]]])
def test_a_bin_that_does_not_exist_is_refused(bins: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="bins must be in"):
        CODEC.decode(bins)


def test_fit_spreads_the_range_and_finds_what_does_not_vary() -> None:
    actions = np.array([[0.0, 1.0, 5.0], [1.0, 1.0 + 1e-6, 5.0]])
    codec = ActionCodec.fit(actions, min_range=1e-3, margin=0.1)
    assert codec.varied.tolist() == [True, False, False]
    np.testing.assert_allclose([codec.low[0], codec.high[0]], [-0.1, 1.1])


def test_the_dictionary_form_loses_nothing() -> None:
    again = ActionCodec.from_dict(CODEC.to_dict())
    np.testing.assert_array_equal(again.low, CODEC.low)
    np.testing.assert_array_equal(again.varied, CODEC.varied)


@pytest.mark.parametrize(
    ("low", "high"), [([0.0, 0.0], [1.0]), ([1.0], [0.0]), ([0.0], [0.0]), ([np.nan], [1.0])]
)
def test_statistics_that_contradict_themselves_are_refused(low: list[float], high: list[float]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - which sentence depends on the case
        ActionCodec(np.array(low), np.array(high), np.ones(len(low), dtype=bool))
