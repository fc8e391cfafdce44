"""Another bundle without a pause: no request is lost, and nothing that is not whole ever answers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from policy_server.backends.torch_reference import TorchSession
from policy_server.client import PolicyChangedError, PolicyClient
from policy_server.hot_swap import HotSwap, SwapError, promote, prove, require_swappable
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer
from simplevla.bundle import Bundle, load_bundle
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.errors import EmbodimentError
from simplevla.observation import Observation

pytestmark = pytest.mark.by_the_clock

Observe = Callable[..., Observation]
Serving = Callable[..., AbstractContextManager[PolicyServer]]


@pytest.fixture
def bundles(tmp_path: Path, write_small_bundle: Callable[[Path, int], Bundle]) -> tuple[Bundle, Bundle]:
    return write_small_bundle(tmp_path / "a", 1), write_small_bundle(tmp_path / "b", 2)


def opened(bundle: Bundle) -> ServedPolicy:
    return ServedPolicy.of(bundle, TorchSession(bundle))


def link_to(link: Path, bundle: Path) -> None:
    """Point ``link`` at ``bundle``, in one step."""
    fresh = link.with_suffix(".new")
    fresh.symlink_to(bundle)
    os.replace(fresh, link)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, "it never happened"
        time.sleep(0.01)


def test_under_load_no_request_is_lost_and_each_answer_is_of_one_whole_bundle(
    bundles: tuple[Bundle, Bundle],
    tmp_path: Path,
    embodiment: Embodiment,
    observe: Observe,
    serving: Serving,
) -> None:
    policies = {bundle.id: opened(bundle) for bundle in bundles}
    link = tmp_path / "served"
    link_to(link, bundles[0].path)
    results: list[str] = []
    done = threading.Event()
    trouble: list[object] = []
    seen: set[str] = set()

    def ask(seed: int, address: str) -> None:
        try:
            with PolicyClient(address, embodiment=embodiment, timeout_s=30, follow=True) as client:
                want = {key: each.answer(observe(seed))[0].actions for key, each in policies.items()}
                while not done.is_set():
                    chunk = client.act(observe(seed)).chunk
                    seen.add(chunk.policy_id)
                    if not np.allclose(chunk.actions, want[chunk.policy_id], atol=1e-5):
                        trouble.append(f"{seed} was answered by neither bundle")
        except BaseException as error:
            trouble.append(error)

    with (
        serving(policies[bundles[0].id]) as server,
        HotSwap(server, link, opened, results.append) as swap,
    ):
        threads = [threading.Thread(target=ask, args=(seed, server.address)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(1, 4):
            wanted = bundles[turn % 2]
            link_to(link, wanted.path)
            swap.ask()
            wait_for(lambda: len(results) == turn)  # noqa: B023 - called at once
            before = server.status().answered
            wait_for(lambda: server.status().answered > before + 3)  # noqa: B023
        done.set()
        for thread in threads:
            thread.join(60)
        status = server.status()
    assert trouble == []
    assert results == ["promoted"] * 3
    assert (status.swaps, status.refused) == (3, 0)
    assert seen == {bundle.id for bundle in bundles}


def test_a_tampered_bundle_is_refused_and_the_old_one_serves_on(
    bundles: tuple[Bundle, Bundle],
    tmp_path: Path,
    embodiment: Embodiment,
    observe: Observe,
    serving: Serving,
) -> None:
    old, new = bundles
    results: list[str] = []
    link = tmp_path / "served"
    link_to(link, old.path)
    with (
        serving(opened(old)) as server,
        HotSwap(server, link, opened, results.append) as swap,
        PolicyClient(server.address, embodiment=embodiment, timeout_s=30) as client,
    ):
        weights = new.path / "weights.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        for broken in (new.path, tmp_path / "missing"):
            link_to(link, broken)
            results.clear()
            swap.ask()
            wait_for(lambda: results == ["refused"])
            assert client.act(observe()).chunk.policy_id == old.id
        assert server.status().swaps == 0


def test_a_policy_that_fails_its_first_answers_gives_way_to_the_one_before(
    bundle: Bundle, policy: ServedPolicy, embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    class Failing:
        info = policy.session.info

        def run(self, _: Any) -> Any:
            raise RuntimeError("the engine broke")

    broken = ServedPolicy("b" * 64, policy.manifest, policy.processor, Failing())
    with (
        serving(policy) as server,
        PolicyClient(server.address, embodiment=embodiment, timeout_s=30) as client,
    ):
        want = client.act(observe()).chunk.actions
        server.swap(broken)
        assert server.policy_id == "b" * 64
        np.testing.assert_array_equal(client.act(observe()).chunk.actions, want)
        assert server.policy_id == bundle.id
        assert server.status().refused == 0


def test_a_client_is_told_unless_it_follows(
    bundles: tuple[Bundle, Bundle], embodiment: Embodiment, observe: Observe, serving: Serving
) -> None:
    old, new = bundles
    with (
        serving(opened(old)) as server,
        PolicyClient(server.address, embodiment=embodiment, timeout_s=30) as told,
        PolicyClient(server.address, embodiment=embodiment, timeout_s=30, follow=True) as follows,
    ):
        promote(server, new, opened(new))
        assert follows.act(observe()).chunk.policy_id == new.id
        with pytest.raises(PolicyChangedError):
            told.act(observe())
        assert told.act(observe()).chunk.policy_id == new.id
        assert told.info.policy_id == follows.info.policy_id == new.id


def test_a_policy_must_prove_itself(bundle: Bundle, policy: ServedPolicy) -> None:
    prove(bundle, policy)

    class Moody:
        info = policy.session.info
        calls = 0

        def run(self, inputs: Any) -> Any:
            self.calls += 1
            return policy.session.run({**inputs, "proprio": inputs["proprio"] + self.calls})

    with pytest.raises(SwapError, match="differently"):
        prove(bundle, ServedPolicy(policy.policy_id, policy.manifest, policy.processor, Moody()))


def test_clients_must_be_able_to_go_on(policy: ServedPolicy) -> None:
    manifest = policy.manifest
    with pytest.raises(EmbodimentError):
        require_swappable(
            manifest, msgspec.structs.replace(manifest, embodiment=load_embodiment("piper_dual"))
        )
    more = msgspec.structs.replace(manifest, cameras=("head", "left_wrist"))
    with pytest.raises(EmbodimentError, match="left_wrist"):
        require_swappable(manifest, more)
    require_swappable(more, manifest)


def test_a_served_bundle_is_swapped_on_a_signal(
    bundles: tuple[Bundle, Bundle], tmp_path: Path, embodiment: Embodiment, observe: Observe
) -> None:
    old, new = bundles
    link = tmp_path / "served"
    link_to(link, old.path)
    arguments = ["--backend", "torch", "--address", "tcp://127.0.0.1:*"]
    process = subprocess.Popen(
        [sys.executable, "-m", "simplevla", "serve", str(link), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert old.id[:12] in ready
        address = ready.split(" on ")[1].split()[0]
        with PolicyClient(address, embodiment=embodiment, timeout_s=30, follow=True) as client:
            assert client.act(observe()).chunk.policy_id == old.id
            link_to(link, new.path)
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: client.act(observe()).chunk.policy_id == new.id)
            assert client.health().refused == 0
    finally:
        process.terminate()
        assert process.wait(60) == 0
    shutil.rmtree(old.path)
    assert load_bundle(link).id == new.id
