"""The policy that acts and learns, wherever it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import sim_training.grpo.platform  # noqa: F401 - before anything of verl that asks for a device
from sim_training.grpo.acting import Key
from sim_training.grpo.experience import Answer, Looks
from sim_training.grpo.settings import GrpoSettings
from sim_training.grpo.worker import VLAWorker
from simplevla.bundle import Bundle

# isort: split
from verl import DataProto
from verl.utils import tensordict_utils as tu


class Actor(Protocol):
    """What the training loop asks of the policy. A context manager."""

    def act(self, looks: Looks, *, key: Key, temperature: float) -> Answer:
        """Answer looks; see :meth:`.acting.ActingNetwork.act`."""
        ...

    def log_probs(self, batch: DataProto, *, temperature: float) -> Tensor:
        """Return (B, T * S) float32 log-probabilities of the batch's bins under the policy of now."""
        ...

    def reference_log_probs(self, batch: DataProto, *, temperature: float) -> Tensor:
        """Return the same under the policy that training started from."""
        ...

    def update(
        self, batch: DataProto, *, temperature: float, learning_rate: float, seed: int
    ) -> dict[str, float]:
        """Learn from the batch.

        Args:
            batch: with ``old_log_probs`` and ``advantages``; its rows a multiple of ``mini_batch``.
            seed: of the order in which trajectories are taken.

        Returns:
            Means over tokens: loss, ratio, entropy, clip, gradient_norm.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into ``folder``, as safetensors."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what :meth:`save` wrote."""
        ...


@contextmanager
def open_actor(bundle: Bundle, instructions: Sequence[str], settings: GrpoSettings) -> Iterator[Actor]:
    """Yield the actor that ``settings.placement`` asks for."""
    if settings.placement.engine == "ray":
        from sim_training.grpo.cluster import RayActor

        with RayActor(bundle, instructions, settings) as remote:
            yield remote
    else:
        with LocalActor(bundle, instructions, settings) as actor:
            yield actor


class LocalActor:
    """Acts and learns in this process: the same engine and worker as on many GPUs, one of them."""

    def __init__(self, bundle: Bundle, instructions: Sequence[str], settings: GrpoSettings) -> None:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
            )
        # verl's workers learn from their environment who they are.
        os.environ.update(
            WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
        self._settings = settings
        try:
            self._worker = VLAWorker(str(bundle.path), tuple(instructions), settings)
        except BaseException:
            torch.distributed.destroy_process_group()
            raise

    def __enter__(self) -> LocalActor:
        return self

    def __exit__(self, *_: object) -> None:
        torch.distributed.destroy_process_group()

    def act(self, looks: Looks, *, key: Key, temperature: float) -> Answer:
        """Answer looks."""
        answer: Answer = self._worker.act(looks, key, temperature)
        return answer

    def log_probs(self, batch: DataProto, *, temperature: float) -> Tensor:
        """Return the batch's log-probabilities."""
        return read_log_probs(self._worker.infer_batch(inference_data(batch, temperature)))

    def reference_log_probs(self, batch: DataProto, *, temperature: float) -> Tensor:
        """Return the batch's log-probabilities under the policy at the start."""
        answer = self._worker.reference_log_probs(inference_data(batch, temperature))
        reference: Tensor = answer["ref_log_probs"]
        return reference

    def update(
        self, batch: DataProto, *, temperature: float, learning_rate: float, seed: int
    ) -> dict[str, float]:
        """Learn from the batch, and act accordingly from now on."""
        self._worker.set_learning_rate(learning_rate)
        data = update_data(batch, self._settings, temperature, seed)
        figures = read_figures(self._worker.train_mini_batch(data))
        self._worker.refresh()
        return figures

    def save(self, folder: Path) -> None:
        """Write weights and optimizer."""
        self._worker.save(str(folder))

    def load(self, folder: Path) -> None:
        """Go on from ``folder``."""
        self._worker.load(str(folder))
        self._worker.refresh()


def inference_data(batch: DataProto, temperature: float) -> Any:
    """Return what verl's ``infer_batch`` takes."""
    data = batch.select(
        batch_keys=["seen", "proprio", "prompts", "bins", "look_mask", "loss_mask"],
        non_tensor_batch_keys=[],
    ).to_tensordict()
    tu.assign_non_tensor(data, temperature=temperature, compute_loss=False)
    return data


def update_data(batch: DataProto, settings: GrpoSettings, temperature: float, seed: int) -> Any:
    """Return what verl's ``train_mini_batch`` takes."""
    data = batch.select(non_tensor_batch_keys=[]).to_tensordict()
    tu.assign_non_tensor(
        data,
        temperature=temperature,
        mini_batch_size=settings.update.mini_batch,
        epochs=settings.update.epochs,
        seed=seed,
        dataloader_kwargs={"shuffle": True},
    )
    return data


def read_log_probs(answer: Any) -> Tensor:
    """Return (B, T * S) log-probabilities from the answer of ``infer_batch``."""
    values: Tensor = tu.get(answer, "log_probs")
    return values.to_padded_tensor(0.0) if values.is_nested else values


def read_figures(answer: Any) -> dict[str, float]:
    """Return means over tokens from the answer of ``train_mini_batch``."""
    metrics = {
        name: np.concatenate([np.ravel(v) for v in values])
        for name, values in tu.get(answer, "metrics").items()
    }
    tokens = max(float(metrics["tokens"].sum()), 1.0)
    return {
        **{name: float(metrics[name].sum()) / tokens for name in ("ratio", "entropy", "clip")},
        "loss": float(metrics["loss"].mean()),
        "gradient_norm": float(metrics["grad_norm"].mean()),
    }
