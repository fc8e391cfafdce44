"""The bundles that ship do what their provenance says."""

import pytest

from sim_training.evaluation import BundleSource, evaluate
from simplevla.bundle import load_bundle
from simplevla.files import share_dir
from simplevla.policy.network import load_network

BUNDLES = share_dir() / "bundles"
STRATEGIES = {"move_can_pot": "grasp", "click_bell": "touch"}


def test_each_is_named_for_its_task() -> None:
    assert {path.name for path in BUNDLES.iterdir()} == set(STRATEGIES)
    for task in STRATEGIES:
        assert task in load_bundle(BUNDLES / task).manifest.instructions


@pytest.mark.parametrize(("task", "trials", "rate"), [("move_can_pot", 100, 0.6), ("click_bell", 200, 0.8)])
def test_it_is_small_and_says_where_it_comes_from(task: str, trials: int, rate: float) -> None:
    bundle = load_bundle(BUNDLES / task)
    network = load_network(bundle)
    assert sum(p.numel() for p in network.parameters()) < 2e6
    assert sum(entry.size for entry in bundle.manifest.files.values()) < 15e6
    provenance = bundle.manifest.provenance
    assert provenance.demonstrations > 0
    assert provenance.seeds["evaluation"] >= 10_000
    assert provenance.evaluation["success"]["trials"] == trials
    assert provenance.evaluation["success"]["rate"] >= rate


@pytest.mark.parametrize("task", sorted(STRATEGIES))
def test_it_does_its_task(task: str) -> None:
    report = evaluate(BundleSource(BUNDLES / task), task, episodes=4, seed=30_000)
    assert report.success.successes >= 2
    assert report.strategies == {STRATEGIES[task]: report.success.successes}
