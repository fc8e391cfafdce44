"""The engine in this process: it computes what the plain network says, and goes on from what it saved."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from verl import DataProto

from sim_training.grpo import algorithm
from sim_training.grpo.acting import ActingNetwork, sample
from sim_training.grpo.actor import LocalActor
from sim_training.grpo.experience import Episode, Looks, Trajectory
from sim_training.grpo.settings import GrpoSettings, PolicyLoss, UpdateSettings
from simplevla.bundle import Bundle
from simplevla.errors import ConfigError
from simplevla.policy.network import load_network

TEMPERATURE = 1.3
INSTRUCTIONS = ("move the can next to the pot",)
VARIED = np.array([True, True, False, False, False, False, False])  # the bundle's
Play = Callable[..., list[Trajectory]]
Opened = Callable[..., AbstractContextManager[LocalActor]]


@pytest.fixture
def opened(bundle: Bundle, lamps: Any) -> Opened:
    """Return what opens an actor with settings of the update."""

    @contextmanager
    def open_with(other: Bundle | None = None, **update: Any) -> Iterator[LocalActor]:
        settings = {"mini_batch": 32, "micro_batch": 8, "learning_rate": 1e-3, **update}
        with LocalActor(
            other or bundle,
            lamps.instructions,
            GrpoSettings(iterations=9, update=UpdateSettings(**settings)),
        ) as actor:
            yield actor

    return open_with


@pytest.fixture
def play(lamps: Any) -> Play:
    """Return what plays groups of eight with an actor."""

    def go(actor: LocalActor, groups: int = 3, iteration: int = 0, width: int = 32) -> list[Trajectory]:
        episodes = [Episode(10 * iteration + s, member) for s in range(groups) for member in range(8)]
        played: list[Trajectory] = lamps(width=width).collect(
            episodes, lambda looks: actor.act(looks, key=(0, iteration), temperature=TEMPERATURE)
        )
        return played

    return go


def batch_of(actor: LocalActor, trajectories: list[Trajectory], multiple: int = 32) -> DataProto:
    batch = algorithm.make_batch(trajectories, VARIED, multiple=multiple)
    batch.batch["old_log_probs"] = actor.log_probs(batch, temperature=TEMPERATURE)
    algorithm.add_advantages(batch, normalise=True)
    return batch


def update(actor: LocalActor, batch: DataProto, rate: float = 1e-3) -> dict[str, float]:
    return actor.update(batch, temperature=TEMPERATURE, learning_rate=rate, seed=1)


def make_looks(count: int) -> Looks:
    rng = np.random.default_rng(0)
    return Looks(
        episodes=np.stack([np.arange(count), np.zeros(count, np.int64)], axis=1),
        turns=np.zeros(count, np.int64),
        images=rng.integers(0, 256, (count, 1, 3, 24, 32), dtype=np.uint8),
        proprio=rng.random((count, 10), dtype=np.float32),
        prompts=np.zeros(count, np.int64),
    )


def part_of(looks: Looks, rows: slice) -> Looks:
    names = ("episodes", "turns", "images", "proprio", "prompts")
    return Looks(*(getattr(looks, name)[rows] for name in names))


@pytest.mark.parametrize("train_encoder", [False, True])
def test_log_probabilities_are_those_of_the_plain_network(
    opened: Opened, play: Play, bundle: Bundle, train_encoder: bool
) -> None:
    network, plain = load_network(bundle), ActingNetwork(bundle, INSTRUCTIONS, keep_tokens=False)
    with opened(train_encoder=train_encoder) as actor:
        trajectories = play(actor)
        batch = algorithm.make_batch(trajectories, VARIED, multiple=32)
        found = actor.log_probs(batch, temperature=TEMPERATURE)
    assert trajectories[0].seen.dtype == (np.uint8 if train_encoder else np.float32)
    one = trajectories[5]
    seen = torch.from_numpy(one.seen)
    ids, mask = (t.expand(one.looks, -1) for t in (plain.input_ids, plain.attention_mask))
    with torch.no_grad():
        tokens = network.visual_tokens(seen / 255) if train_encoder else seen
        logits = network.decode(tokens, ids, mask, torch.from_numpy(one.proprio))
    wanted = (
        (logits / TEMPERATURE)
        .log_softmax(-1)
        .gather(-1, torch.from_numpy(one.bins).long().flatten(1)[..., None])
    )
    wanted = wanted.view(one.looks, 2, 7)[:, :, VARIED].flatten()
    torch.testing.assert_close(found[5, : len(wanted)], wanted, atol=1e-5, rtol=1e-5)
    assert not found[5, len(wanted) :].any()


@pytest.mark.parametrize("train_encoder", [False, True])
def test_low_precision_and_recomputed_activations_learn_nearly_the_same(
    opened: Opened, play: Play, transformer_bundle: Bundle, train_encoder: bool
) -> None:
    frugal = {"precision": "bf16", "gradient_checkpointing": True, "defer_gradients": False}
    figures = []
    for settings in ({}, frugal):
        with opened(transformer_bundle, train_encoder=train_encoder, **settings) as actor:
            played = play(actor, width=24)
            if not figures:
                first = played
            assert played[0].seen.dtype == first[0].seen.dtype
            figures.append(update(actor, batch_of(actor, first)))
    assert figures[1]["entropy"] == pytest.approx(figures[0]["entropy"], rel=0.01)
    assert figures[1]["gradient_norm"] == pytest.approx(figures[0]["gradient_norm"], rel=0.1)


def test_batch_normalisation_does_not_learn_in_low_precision(opened: Opened) -> None:
    with pytest.raises(ConfigError, match="bf16"), opened(precision="bf16", train_encoder=True):
        pass


def test_bins_are_drawn_as_often_as_the_policy_says() -> None:
    logits = torch.zeros(1, 1, 256)
    logits[..., 10], logits[..., 200] = 8.0, 7.0
    expected = (logits[0, 0] / 2).softmax(-1)
    drawn = torch.linspace(0, 1, 20_001)[:-1].view(1, -1)
    bins = sample(logits.expand(1, 20_000, 256), 2.0, drawn)
    shares = torch.bincount(bins[0], minlength=256) / 20_000
    torch.testing.assert_close(shares, expected, atol=1e-3, rtol=0)


def test_an_answer_depends_on_its_look_alone_and_is_greedy_at_temperature_zero(bundle: Bundle) -> None:
    acting = ActingNetwork(bundle, INSTRUCTIONS, keep_tokens=True)
    looks = make_looks(5)
    last = part_of(looks, slice(4, 5))
    together = acting.act(looks, key=(1, 2), temperature=1.0)
    np.testing.assert_array_equal(acting.act(last, key=(1, 2), temperature=1.0).bins[0], together.bins[4])
    assert (acting.act(looks, key=(1, 3), temperature=1.0).bins != together.bins).any()
    greedy = acting.act(looks, key=(1, 2), temperature=0)
    np.testing.assert_array_equal(greedy.bins, acting.act(looks, key=(9,), temperature=0).bins)
    assert together.kept is not None
    nothing = acting.act(part_of(looks, slice(0, 0)), key=(1,), temperature=1.0)
    assert nothing.bins.shape == (0, 2, 7)


def test_an_update_does_not_depend_on_how_it_is_cut_into_micro_batches_or_filled_up(
    opened: Opened, play: Play
) -> None:
    figures = []
    for micro, multiple in ((4, 32), (32, 32), (8, 24)):
        with opened(micro_batch=micro, mini_batch=multiple) as actor:
            batch = batch_of(actor, play(actor), multiple)
            figures.append(update(actor, batch))
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=1e-3, abs=1e-6)


def test_what_acts_is_what_has_learned(opened: Opened, play: Play) -> None:
    with opened() as actor:
        batch = batch_of(actor, play(actor))
        looks = make_looks(4)
        before = actor.act(looks, key=(0,), temperature=1.0).bins
        update(actor, batch, rate=1e-2)
        assert (actor.act(looks, key=(0,), temperature=1.0).bins != before).any()


@pytest.mark.parametrize("train_encoder", [False, True])
def test_the_encoder_learns_only_if_it_shall(
    opened: Opened, play: Play, bundle: Bundle, tmp_path: Path, train_encoder: bool
) -> None:
    from safetensors.numpy import load_file

    with opened(train_encoder=train_encoder) as actor:
        update(actor, batch_of(actor, play(actor)))
        actor.save(tmp_path)
    before, after = bundle.weights(), load_file(tmp_path / "weights.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert any(name.startswith("decoder") for name in changed)
    assert any(name.startswith("encoders") for name in changed) is train_encoder
    assert not any("running" in name for name in changed)  # statistics are what serving will use


def test_it_goes_on_from_what_it_saved_as_if_nothing_had_been(
    opened: Opened, play: Play, tmp_path: Path
) -> None:
    with opened() as actor:
        update(actor, batch_of(actor, play(actor)))
        actor.save(tmp_path)
        batch = batch_of(actor, play(actor, iteration=1))
        wanted = update(actor, batch)
    with opened() as actor:
        actor.load(tmp_path)
        assert torch.equal(batch_of(actor, play(actor, iteration=1)).batch["bins"], batch.batch["bins"])
        assert update(actor, batch) == wanted


def test_a_checkpoint_that_is_damaged_or_of_another_network_is_refused(
    opened: Opened, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    save_file({"other": np.zeros(3)}, tmp_path / "weights.safetensors")
    with opened() as actor:
        with pytest.raises(ConfigError, match="another network"):
            actor.load(tmp_path)
        (tmp_path / "weights.safetensors").write_bytes(b"nonsense")
        with pytest.raises(ConfigError, match="cannot be continued"):
            actor.load(tmp_path)


@pytest.mark.parametrize("loss", get_args(PolicyLoss))
def test_every_loss_makes_what_succeeded_likelier_than_what_failed(
    opened: Opened, play: Play, loss: str
) -> None:
    with opened(policy_loss=loss) as actor:
        batch = batch_of(actor, play(actor))
        update(actor, batch)
        moved = actor.log_probs(batch, temperature=TEMPERATURE) - batch.batch["old_log_probs"]
    assert float((moved * batch.batch["advantages"]).sum()) > 0


def test_the_divergence_from_the_start_holds_the_policy_back(opened: Opened, play: Play) -> None:
    distances = []
    for kl in (0.0, 10.0):
        with opened(kl=kl, mini_batch=8, micro_batch=8, epochs=3) as actor:
            batch = batch_of(actor, play(actor), 8)
            reference = actor.reference_log_probs(batch, temperature=TEMPERATURE)
            torch.testing.assert_close(reference, batch.batch["old_log_probs"], atol=1e-5, rtol=1e-4)
            if kl:
                batch.batch["ref_log_probs"] = reference
            update(actor, batch)
            moved = actor.log_probs(batch, temperature=TEMPERATURE) - reference
            distances.append(float((moved**2 * batch.batch["loss_mask"]).sum()))
    assert distances[1] < distances[0] / 2
