"""How an attempt strays: every token as its own distribution says, and together as far as it shall."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import kstest

from sim_training.grpo.acting import uniform
from sim_training.grpo.experience import Looks
from sim_training.grpo.settings import Exploration, SamplingSettings
from simplevla.config import build
from simplevla.errors import ConfigError

SHAPE = (3, 2)


def looks_of(episodes: int, turns: int) -> Looks:
    """Return looks of the first member of each initial state, attempt by attempt."""
    count = episodes * turns
    return Looks(
        episodes=np.stack([np.repeat(np.arange(episodes), turns), np.zeros(count, np.int64)], axis=1),
        turns=np.tile(np.arange(turns), episodes),
        images=np.zeros((count, 1, 3, 1, 1), np.uint8),
        proprio=np.zeros((count, 1), np.float32),
        prompts=np.zeros(count, np.int64),
    )


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(ndtri(first.astype(np.float64)), ndtri(second.astype(np.float64)))[0, 1])


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.3, 0.4), (1.0, 0.0)])
def test_tokens_share_as_much_as_they_shall_and_each_is_uniform(shares: tuple[float, float]) -> None:
    attempt, chunk = shares
    drawn = uniform(looks_of(3000, 2), (7,), SHAPE, Exploration(attempt=attempt, chunk=chunk))
    drawn = drawn.reshape(3000, 2, *SHAPE)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for turn, action, dimension in ((0, 0, 0), (1, 2, 1)):
        assert kstest(drawn[:, turn, action, dimension], "uniform").pvalue > 1e-3
    assert correlation(drawn[:, 0, 0, 0], drawn[:, 0, 2, 0]) == pytest.approx(attempt + chunk, abs=0.06)
    assert correlation(drawn[:, 0, 0, 0], drawn[:, 1, 0, 0]) == pytest.approx(attempt, abs=0.06)
    assert correlation(drawn[:, 0, 0, 0], drawn[:, 0, 0, 1]) == pytest.approx(0, abs=0.06)


@given(st.integers(0, 5), st.floats(0, 1), st.floats(0, 1))
def test_a_draw_is_a_function_of_its_look_alone(row: int, attempt: float, share: float) -> None:
    exploration = Exploration(attempt=attempt, chunk=share * (1 - attempt))
    looks = looks_of(3, 2)
    one = replace(looks, episodes=looks.episodes[row : row + 1], turns=looks.turns[row : row + 1])
    whole = uniform(looks, (1, 2), SHAPE, exploration)
    np.testing.assert_array_equal(uniform(one, (1, 2), SHAPE, exploration)[0], whole[row])


def test_more_than_all_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match="must not exceed 1"):
        build({"exploration": {"attempt": 0.7, "chunk": 0.5}}, SamplingSettings, source="test")
