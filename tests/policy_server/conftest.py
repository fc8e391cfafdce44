"""A very small policy with random weights, a server of it, and what both need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from policy_server.backends.base import SessionInfo
from policy_server.served_policy import ServedPolicy
from policy_server.server import PolicyServer, ServerOptions
from simplevla.bundle import Bundle, CodecEntry, Manifest, Provenance, write_bundle
from simplevla.embodiment import Embodiment, load_embodiment
from simplevla.observation import Observation

Serving = Callable[..., AbstractContextManager[PolicyServer]]

CHUNK_LENGTH = 3
INSTRUCTION = "move the can next to the pot"


class NumpySession:
    """Logits that depend on every input, computed without any inference library.

    Attributes:
        failure: raised by the next run, once.
        batches: how many observations each run held.
        pause: while it is cleared, a run does not end.
    """

    def __init__(self, slots: int, max_batch: int = 1) -> None:
        self.info = SessionInfo("numpy", np.__version__, "cpu", "fp32", max_batch=max_batch)
        self.failure: Exception | None = None
        self.batches: list[int] = []
        self.pause = threading.Event()
        self.pause.set()
        self._slots = slots

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the logits, or raise the failure that was set."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        self.batches.append(len(inputs["frames"]))
        assert self.pause.wait(30)
        logits = []
        for frames, proprio, ids in zip(
            inputs["frames"], inputs["proprio"], inputs["input_ids"], strict=True
        ):
            mean = np.float32(frames.mean() + proprio.sum() + ids.sum())
            phase = mean + np.arange(self._slots, dtype=np.float32)[:, None]
            logits.append(np.sin(phase + np.arange(256, dtype=np.float32) / 40))
        return np.stack(logits).astype(np.float32)


@pytest.fixture(scope="session")
def embodiment() -> Embodiment:
    single = load_embodiment("piper_single")
    small = msgspec.structs.replace(single.cameras[0], width=64, height=48)
    return msgspec.structs.replace(single, cameras=(small,))


@pytest.fixture(scope="session")
def write_small_bundle(embodiment: Embodiment) -> Callable[[Path, int], Bundle]:
    """Return a function that writes a bundle with weights from a seed."""
    import torch

    from simplevla.policy.config import Decoder, Head, NetworkConfig, NetworkSizes, ResidualEncoder
    from simplevla.policy.network import make_network, weights_of
    from simplevla.policy.processor import proprio_size
    from simplevla.policy.tokenizer import make_tokenizer

    proprio, dimension = proprio_size(embodiment), embodiment.dimension
    config = NetworkConfig(
        sizes=NetworkSizes(
            residual=(ResidualEncoder(stem=4, stages=(4, 8)),),
            image_height=32,
            image_width=32,
            visual_tokens=4,
            decoder=Decoder(hidden=16, layers=1, heads=2, mlp=32),
            head=Head(centres=20, slot_embeddings=True),
            vocabulary=512,
            prompt_tokens=24,
        ),
        frame_height=48,
        frame_width=64,
        n_cameras=1,
        chunk_length=CHUNK_LENGTH,
        dimension=dimension,
        proprio=proprio,
    )
    codec = CodecEntry(
        low=(-0.02,) * (dimension - 1) + (0.0,),
        high=(0.02,) * (dimension - 1) + (0.07,),
        varied=(True,) * (dimension - 2) + (False, True),
    )

    def write(path: Path, seed: int) -> Bundle:
        torch.manual_seed(seed)
        network = make_network(config)
        network.set_proprio_range(np.full(proprio, -3.0), np.full(proprio, 3.0))
        manifest = Manifest(
            name="small",
            created_ns=seed,
            embodiment=embodiment,
            network=msgspec.to_builtins(config),
            cameras=("head",),
            instructions={"move_can_pot": INSTRUCTION},
            action_space="ee_delta",
            chunk_length=CHUNK_LENGTH,
            dt_s=0.1,
            codec=codec,
            proprio_low=(-3.0,) * proprio,
            proprio_high=(3.0,) * proprio,
            provenance=Provenance(commit="none", config={}, seeds={"weights": seed}, demonstrations=0),
        )
        return write_bundle(path, manifest, weights_of(network), make_tokenizer())

    return write


@pytest.fixture(scope="session")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, write_small_bundle: Callable[[Path, int], Bundle]
) -> Bundle:
    return write_small_bundle(tmp_path_factory.mktemp("bundles") / "small", 0)


@pytest.fixture
def session(embodiment: Embodiment) -> NumpySession:
    return NumpySession(CHUNK_LENGTH * embodiment.dimension)


@pytest.fixture
def policy(bundle: Bundle, session: NumpySession) -> ServedPolicy:
    return ServedPolicy.of(bundle, session)


@pytest.fixture
def serving() -> Serving:
    """Return a function that serves a policy inside a block, on a free port unless told otherwise."""
    return _serving


@contextmanager
def _serving(
    policy: ServedPolicy, address: str = "tcp://127.0.0.1:*", **options: Any
) -> Iterator[PolicyServer]:
    with PolicyServer(policy, address, ServerOptions(**options)) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def server(policy: ServedPolicy) -> Iterator[PolicyServer]:
    with _serving(policy) as running:
        yield running


@pytest.fixture(scope="session")
def observe(embodiment: Embodiment) -> Callable[[int], Observation]:
    """Return a function that makes an observation near home, with noise for an image."""
    lower, upper = embodiment.position_limits()

    def make(seed: int = 0) -> Observation:
        rng = np.random.default_rng(seed)
        state = embodiment.home() + 0.02 * rng.uniform(-1, 0, embodiment.dimension)
        return Observation(
            images={"head": rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)},
            state=np.clip(state, lower, upper).astype(np.float32),
            instruction=INSTRUCTION,
            capture_ns=1_000 + seed,
            episode="test",
        )

    return make
