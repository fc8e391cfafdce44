"""The bundle that ships does what its provenance says."""

from sim_training.evaluation import BundleSource, evaluate
from simplevla.bundle import load_bundle
from simplevla.files import share_dir
from simplevla.policy.network import load_network

PATH = share_dir() / "bundles/move_can_pot"


def test_it_is_small_and_says_where_it_comes_from() -> None:
    bundle = load_bundle(PATH)
    network = load_network(bundle)
    assert sum(p.numel() for p in network.parameters()) < 2e6
    assert sum(entry.size for entry in bundle.manifest.files.values()) < 15e6
    provenance = bundle.manifest.provenance
    assert provenance.demonstrations > 0
    assert provenance.seeds["evaluation"] >= 10_000
    assert provenance.evaluation["success"]["trials"] == 100
    assert provenance.evaluation["success"]["rate"] >= 0.6


def test_it_moves_the_can() -> None:
    report = evaluate(BundleSource(PATH), "move_can_pot", episodes=2, seed=30_000)
    assert report.success.successes >= 1
    assert report.strategies == {"grasp": 2}
