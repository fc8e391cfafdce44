"""The same under Ray: processes that learn together, act and simulate, and one of them killed.

One session for the module: what takes the time is starting processes that import torch and verl.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from sim_training.grpo import algorithm
from sim_training.grpo.actor import LocalActor
from sim_training.grpo.checkpoint import checkpoints
from sim_training.grpo.cluster import RayActor, cluster
from sim_training.grpo.driver import learn, train
from sim_training.grpo.experience import Episode
from sim_training.grpo.settings import GrpoSettings, PlacementSettings, SamplingSettings, UpdateSettings
from sim_training.history import read_history
from simplevla.bundle import Bundle
from simplevla.errors import UnavailableError

pytestmark = pytest.mark.timeout(600)


def make_settings(iterations: int, placement: PlacementSettings, **sampling: Any) -> GrpoSettings:
    return GrpoSettings(
        iterations=iterations,
        sampling=SamplingSettings(**{"groups": 6, "temperature": 1.0, **sampling}),
        update=UpdateSettings(mini_batch=16, micro_batch=8, learning_rate=1e-3),
        placement=placement,
        evaluate_every=0,
        tracking=(),
    )


TWO = PlacementSettings(engine="ray", learners=2)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with cluster(PlacementSettings(engine="ray", learners=2, environment_workers=2)):
        yield


@pytest.mark.usefixtures("session")
def test_a_cluster_of_our_own_listens_on_the_loopback_interface_alone() -> None:
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]


@pytest.mark.usefixtures("session")
def test_two_learners_learn_what_one_does_and_one_goes_on_where_two_were_killed(
    bundle: Bundle, lamps: Any, tmp_path: Path
) -> None:
    varied = bundle.manifest.action_codec().varied
    alone = make_settings(3, PlacementSettings())
    with LocalActor(bundle, lamps.instructions, alone) as actor:
        learn(actor, lamps(), varied, alone, tmp_path / "one")
    one = read_history(tmp_path / "one")

    together = make_settings(2, TWO)
    with RayActor(bundle, lamps.instructions, together) as actor:
        learn(actor, lamps(), varied, together, tmp_path / "two")
        two = read_history(tmp_path / "two")
        assert two[0].sampled == one[0].sampled
        # Two learners shuffle their own halves, so that mini-batches differ, but not what is learned from.
        assert two[0].updated_groups == one[0].updated_groups
        assert two[0].entropy == pytest.approx(one[0].entropy, rel=0.02)
        assert two[1].sampled.successes > 0

        played = lamps().collect(
            [Episode(seed, member) for seed in range(2) for member in range(8)],
            lambda looks: actor.act(looks, key=(0, 9), temperature=1.0),
        )
        batch = algorithm.make_batch(played, varied, multiple=16)
        wanted = actor.log_probs(batch, temperature=1.0)
        victim = actor._learners.workers[1]
        # A lambda travels by value: this module cannot be imported where the learner runs.
        os.kill(ray.get(victim.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        with pytest.raises(UnavailableError, match="died"):
            learn(actor, lamps(), varied, make_settings(3, TWO), tmp_path / "two")

    with LocalActor(bundle, lamps.instructions, alone) as actor:
        actor.load(checkpoints(tmp_path / "two")[-1])
        torch.testing.assert_close(actor.log_probs(batch, temperature=1.0), wanted, atol=1e-5, rtol=1e-4)
        learn(actor, lamps(), varied, alone, tmp_path / "two")
    assert [i.iteration for i in read_history(tmp_path / "two")] == [0, 1, 2]


@pytest.mark.usefixtures("session")
def test_actors_and_simulations_of_their_own_play_what_a_learner_learns_from(
    bundle: Bundle, tmp_path: Path
) -> None:
    placement = PlacementSettings(engine="ray", learners=1, actors=1, environment_workers=1, slots=2)
    settings = make_settings(2, placement, groups=1, group_size=2, horizon=4, dynamic=False)
    weights = train(bundle, "move_can_pot", settings, tmp_path / "grpo")
    history = read_history(tmp_path / "grpo")
    assert [i.sampled.episodes for i in history] == [2, 2]
    assert history[0].regions
    assert history[0].seconds["physics"] > 0
    assert weights.is_file()
