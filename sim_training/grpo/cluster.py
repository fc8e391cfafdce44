"""Learners, actors and environments as processes under Ray, on this host or on many."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray._private import ray_constants
from torch import Tensor

import sim_training.grpo.platform  # noqa: F401 - before anything of verl that asks for a device
from sim_training.grpo.acting import ActingNetwork, Key
from sim_training.grpo.actor import inference_data, read_figures, read_log_probs, update_data
from sim_training.grpo.experience import Answer, Looks
from sim_training.grpo.settings import GrpoSettings, PlacementSettings
from sim_training.grpo.worker import VLAWorker
from sim_training.rollout_worker import Command, News, RolloutSettings, Worker
from simplevla.bundle import Bundle, load_bundle
from simplevla.errors import UnavailableError

# isort: split
from verl import DataProto
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

log = logging.getLogger(__name__)

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS")


@contextmanager
def cluster(placement: PlacementSettings) -> Iterator[None]:
    """Connect to the cluster of ``placement``, or start one on the loopback interface of this host.

    A session that is connected already is used, and left.

    Raises:
        UnavailableError: there is no such cluster, or none can be started.
    """
    if ray.is_initialized():
        yield
        return
    try:
        _connect(placement)
    except Exception as error:  # ray.init raises bare exceptions
        raise UnavailableError(
            f"Ray does not start: {str(error).splitlines()[0]}",
            "check placement.ray_address; on a busy machine set RAY_raylet_start_wait_time_s=300",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _connect(placement: PlacementSettings) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if placement.ray_address:
        ray.init(address=placement.ray_address, **quiet)
    else:
        # Logical processors: a small machine has fewer than there are processes, which take turns.
        wanted = 1 + placement.learners + placement.actors + placement.environment_workers
        with _loopback():
            ray.init(num_cpus=max(wanted, os.cpu_count() or 1), include_dashboard=False, **quiet)


class RayActor:
    """Learners that share the network (FSDP2), and who acts: they themselves, or processes of their own."""

    def __init__(self, bundle: Bundle, instructions: Sequence[str], settings: GrpoSettings) -> None:
        """Start the processes.

        Raises:
            UnavailableError: one of them does not start.
        """
        placement = settings.placement
        self._settings = settings
        self._actors: list[Any] = []
        self._pool = RayResourcePool(
            [placement.learners // placement.nodes] * placement.nodes,
            use_gpu=placement.gpu,
            max_colocate_count=1,
        )
        with _deaths_told():
            self._learners = RayWorkerGroup(
                resource_pool=self._pool,
                ray_cls_with_init=RayClassWithInitArgs(
                    ray.remote(VLAWorker), str(bundle.path), tuple(instructions), settings
                ),
                device_name="cuda" if placement.gpu else "cpu",
                worker_env={name: str(placement.threads) for name in _THREADS},
            )
            acting = ray.remote(num_cpus=1, num_gpus=1 if placement.gpu else 0)(_Acting)
            self._actors = [
                acting.remote(str(bundle.path), tuple(instructions), settings)
                for _ in range(placement.actors)
            ]
            self._refresh()

    def __enter__(self) -> RayActor:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._learners.workers, *self._actors]:
            ray.kill(worker)
        for group in self._pool.get_placement_groups():
            ray.util.remove_placement_group(group)

    def act(self, looks: Looks, *, key: Key, temperature: float) -> Answer:
        """Answer looks, each process its share of them."""
        crew = self._actors or self._learners.workers
        parts = [part for part in _split(looks, len(crew)) if len(part)]
        with _deaths_told():
            answers: list[Answer] = ray.get(
                [
                    worker.act.remote(part, key, temperature)
                    for worker, part in zip(crew, parts, strict=False)
                ]
            )
        kept = [answer.kept for answer in answers if answer.kept is not None]
        bins = np.concatenate([answer.bins for answer in answers])
        return Answer(bins, np.concatenate(kept) if kept else None)

    def log_probs(self, batch: DataProto, *, temperature: float) -> Tensor:
        """Return the batch's log-probabilities."""
        with _deaths_told():
            return read_log_probs(self._learners.infer_batch(inference_data(batch, temperature)).get())

    def reference_log_probs(self, batch: DataProto, *, temperature: float) -> Tensor:
        """Return the batch's log-probabilities under the policy at the start."""
        with _deaths_told():
            answer = self._learners.reference_log_probs(inference_data(batch, temperature)).get()
        reference: Tensor = answer["ref_log_probs"]
        return reference

    def update(
        self, batch: DataProto, *, temperature: float, learning_rate: float, seed: int
    ) -> dict[str, float]:
        """Learn from the batch, and let those who act know."""
        with _deaths_told():
            self._learners.set_learning_rate(learning_rate)
            data = update_data(batch, self._settings, temperature, seed)
            figures = read_figures(self._learners.train_mini_batch(data).get())
            self._refresh()
        return figures

    def save(self, folder: Path) -> None:
        """Write weights and optimizer; on several hosts, ``folder`` must be on a disk that they share."""
        with _deaths_told():
            self._learners.save(str(folder.resolve()))

    def load(self, folder: Path) -> None:
        """Go on from ``folder``, written by any number of learners."""
        with _deaths_told():
            self._learners.load(str(folder.resolve()))
            self._refresh()

    def _refresh(self) -> None:
        """Give the weights to those who act: from the first learner straight to the actors."""
        weights = self._learners.execute_all_async("refresh")
        ray.get([actor.update.remote(weights[0]) for actor in self._actors] + weights[1:])
        if not self._actors:
            ray.get(weights)


class _Acting:
    """A process that only acts."""

    def __init__(self, bundle: str, instructions: Sequence[str], settings: GrpoSettings) -> None:
        import torch

        torch.set_num_threads(settings.placement.threads)
        self._network = ActingNetwork(
            load_bundle(Path(bundle)),
            instructions,
            keep_tokens=not settings.update.train_encoder,
            exploration=settings.sampling.exploration,
            device="cuda" if settings.placement.gpu else "cpu",
            precision=settings.update.precision,
        )

    def act(self, looks: Looks, key: Key, temperature: float) -> Answer:
        """Answer looks."""
        return self._network.act(looks, key=key, temperature=temperature)

    def update(self, weights: dict[str, Tensor]) -> None:
        """Take over weights."""
        self._network.update(weights.items())


class RayHosts:
    """The processes of :class:`sim_training.rollouts.Environments`, under Ray: a group of their own."""

    def __init__(self, settings: RolloutSettings) -> None:
        """Start them and draw a first picture in each.

        Raises:
            UnavailableError: one of them does not start.
        """
        environment = {"env_vars": dict.fromkeys(_THREADS, "1")}
        simulating = ray.remote(num_cpus=1, runtime_env=environment)(_Simulating)
        self._hosts = [simulating.remote(settings) for _ in range(settings.workers)]
        self._due: dict[Any, int] = {}
        with _deaths_told():
            ray.get([host.warm.remote() for host in self._hosts])

    def __len__(self) -> int:
        return len(self._hosts)

    def send(self, host: int, command: Command) -> None:
        """Hand a command to a process."""
        self._due[self._hosts[host].advance.remote(command)] = host

    def receive(self) -> list[tuple[int, News]]:
        """Return what has been answered, once something has."""
        with _deaths_told():
            ready, _ = ray.wait(list(self._due), num_returns=1)
            return [(self._due.pop(answer), ray.get(answer)) for answer in ready]

    def close(self) -> None:
        """End the processes."""
        for host in self._hosts:
            ray.kill(host)


class _Simulating:
    """A process that simulates."""

    def __init__(self, settings: RolloutSettings) -> None:
        self._worker = Worker(settings)

    def warm(self) -> None:
        """Draw a first picture, which is the slow one."""
        self._worker.warm()

    def advance(self, command: Command) -> News:
        """Carry out a command."""
        return self._worker.advance(command)


def _split(looks: Looks, parts: int) -> list[Looks]:
    """Return the looks in as many nearly equal parts, the last of which may be empty."""
    return [
        Looks(
            looks.episodes[rows],
            looks.turns[rows],
            looks.images[rows],
            looks.proprio[rows],
            looks.prompts[rows],
        )
        for rows in np.array_split(np.arange(len(looks)), parts)
    ]


@contextmanager
def _loopback() -> Iterator[None]:
    """Make a cluster that starts listen on the loopback interface: Ray does so where clusters are off.

    Ray (2.60) reads that from the environment when it is imported, and takes every other way to say
    127.0.0.1 for the host's outer address.
    """
    usual = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


@contextmanager
def _deaths_told() -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise UnavailableError(
            f"a process under Ray died: {str(error).splitlines()[0]}",
            "start again: training goes on from the last checkpoint",
        ) from error
