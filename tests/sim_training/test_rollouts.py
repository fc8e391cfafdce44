"""Rollouts: the same episodes as evaluation plays, many at once, and each policy's answer in its place."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sim_training.episode import play, setpoints
from sim_training.grpo.experience import Answer, Episode, Looks
from sim_training.rollout_worker import RolloutSettings
from sim_training.rollouts import Environments
from sim_training.table_clearance import TableClearance
from sim_training.tasks.base import TABLE_TOP_M
from sim_training.world import World
from simplevla.action_codec import ActionCodec
from simplevla.embodiment import Embodiment
from simplevla.errors import UnavailableError
from simplevla.kinematics.action_space import to_joint_targets
from simplevla.policy.config import NetworkConfig, load_sizes
from simplevla.policy.processor import proprio_size
from simplevla.policy.resample import Resample

K = 5


@pytest.fixture(scope="module")
def settings(dual: Embodiment) -> RolloutSettings:
    codec = ActionCodec.fit(
        np.array([[-0.02] * 6 + [0.03], [0.02] * 6 + [0.07]]).repeat(2, axis=0).reshape(2, 14), min_range=0
    )
    network = NetworkConfig(
        sizes=load_sizes("tiny"),
        frame_height=240,
        frame_width=320,
        n_cameras=1,
        chunk_length=K,
        dimension=14,
        proprio=proprio_size(dual),
    )
    return RolloutSettings(
        task="move_can_pot",
        embodiment=dual,
        cameras=("head",),
        network=network,
        action_space="ee_delta",
        codec=codec,
        dt_s=0.1,
        horizon=12,
        workers=1,
        slots=4,
    )


@pytest.fixture(scope="module")
def environments(settings: RolloutSettings) -> Iterator[Environments]:
    with Environments(settings) as running:
        yield running


def chosen(looks: Looks) -> np.ndarray:
    """Return bins that depend on the episode and the turn alone."""
    return np.stack(
        [
            np.random.default_rng([*episode, turn]).integers(64, 192, (K, 14)).astype(np.uint8)
            for episode, turn in zip(looks.episodes, looks.turns, strict=True)
        ]
    )


def act(looks: Looks) -> Answer:
    return Answer(chosen(looks))


def test_an_episode_is_what_play_makes_of_its_actions(
    environments: Environments, settings: RolloutSettings, blind: World, dual: Embodiment
) -> None:
    wanted = [Episode(seed, member) for seed in (3, 8) for member in range(3)]
    for episode, trajectory in zip(wanted, environments.collect(wanted, act), strict=True):
        assert trajectory.episode == episode
        assert trajectory.looks == 3
        assert trajectory.actions == 12  # the last chunk is cut at the horizon
        assert not trajectory.success
        assert trajectory.failure
        blind.reset(episode.seed)
        assert trajectory.region == blind.region
        for turn, bins in enumerate(trajectory.bins):
            assert np.array_equal(trajectory.proprio[turn, :14], blind.positions().astype(np.float32))
            targets = to_joint_targets("ee_delta", settings.codec.decode(bins), blind.positions(), dual)
            play(blind, targets[: 12 - K * turn], 0.1)


def test_a_call_may_give_less_time_than_the_settings(environments: Environments) -> None:
    (short,) = environments.collect([Episode(3)], act, horizon=7)
    (usual,) = environments.collect([Episode(3)], act)
    assert (short.actions, short.looks, usual.actions) == (7, 2, 12)


def test_pictures_have_the_networks_size_and_look_as_evaluations_do(
    environments: Environments, seeing: World
) -> None:
    (trajectory,) = environments.collect([Episode(7)], act)
    assert trajectory.seen.shape == (3, 1, 3, 96, 128)
    assert trajectory.seen.dtype == np.uint8
    seeing.reset(7)
    frame = torch.from_numpy(seeing.render("head"))
    large = Resample((240, 320), (96, 128), 1.0)(frame).numpy() * 255
    assert np.abs(trajectory.seen[0, 0] - large).mean() < 3


def test_what_the_policy_keeps_takes_the_place_of_pictures(environments: Environments) -> None:
    def keeping(looks: Looks) -> Answer:
        return Answer(chosen(looks), looks.turns[:, None].astype(np.float32))

    trajectories = environments.collect([Episode(1), Episode(2)], keeping)
    assert all(t.seen.tolist() == [[0], [1], [2]] for t in trajectories)


def test_the_policy_is_asked_about_slots_that_look_alone(environments: Environments) -> None:
    asked: list[tuple[int, int, int]] = []

    def listening(looks: Looks) -> Answer:
        asked.extend((*map(int, e), int(t)) for e, t in zip(looks.episodes, looks.turns, strict=True))
        return act(looks)

    environments.collect([Episode(4, member) for member in range(5)], listening)
    assert sorted(asked) == [(4, member, turn) for member in range(5) for turn in range(3)]


def test_a_worker_that_dies_is_said_to_have_died(settings: RolloutSettings) -> None:
    with Environments(settings) as running:

        def killing(looks: Looks) -> Answer:
            running._hosts._processes[0].kill()
            running._hosts._processes[0].join()
            return act(looks)

        with pytest.raises(UnavailableError, match="died"):
            running.collect([Episode(0)], killing)


def test_setpoints_of_many_are_those_of_each(dual: Embodiment) -> None:
    rng = np.random.default_rng(0)
    clearance, home = TableClearance(dual), dual.home()
    start, tops = np.tile(home, (3, 1)), np.full(3, TABLE_TOP_M)
    targets = home + rng.normal(0, 0.05, (3, 4, 14))
    targets[1] = home  # rests at once
    together = setpoints(clearance, start, targets, 0.1, tops)
    for row in range(3):
        one = slice(row, row + 1)
        (alone,) = setpoints(clearance, start[one], targets[one], 0.1, tops[one])
        assert np.array_equal(together[row], alone)
    assert len({len(path) for path in together}) > 1
