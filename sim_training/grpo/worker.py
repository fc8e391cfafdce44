"""One process that learns: verl's training worker around our engine, and the copy that acts."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

import sim_training.grpo.platform  # noqa: F401 - before anything of verl that asks for a device
from sim_training.grpo.acting import ActingNetwork, Key, encode_prompts, varied_slots
from sim_training.grpo.algorithm import actor_config, policy_loss
from sim_training.grpo.engine import MODEL_TYPE, VLAModelConfig, batch_log_probs, look
from sim_training.grpo.experience import Answer, Looks
from sim_training.grpo.settings import GrpoSettings
from simplevla.bundle import load_bundle
from simplevla.policy.network import VLANetwork, load_network

# isort: split
from verl.single_controller.base.decorator import (
    Dispatch,
    make_nd_compute_dataproto_dispatch_fn,
    register,
)
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker


class VLAWorker(TrainingWorker):
    """Learns with the other workers of its group, and acts with a copy of the whole network."""

    def __init__(self, bundle: str, instructions: Sequence[str], settings: GrpoSettings) -> None:
        """Build the engine and, where the learners act too, the copy.

        Args:
            bundle: path of the policy to start from.
            instructions: the run's prompts.
        """
        torch.set_num_threads(settings.placement.threads)
        if get_device_name() == "cpu" and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")  # verl would name the CPU's backend twice
        loaded = load_bundle(Path(bundle))
        super().__init__(_worker_config(bundle, instructions, settings))
        with contextlib.redirect_stdout(io.StringIO()):  # verl prints sizes and memory
            self.reset()
        self.set_loss_fn(
            partial(policy_loss, config=actor_config(settings.update, settings.sampling.group_size))
        )
        self._start = loaded
        self._reference: VLANetwork | None = None
        self._acting: ActingNetwork | None = None
        if not settings.placement.actors:
            self._acting = ActingNetwork(
                loaded,
                instructions,
                keep_tokens=not settings.update.train_encoder,
                exploration=settings.sampling.exploration,
                device=get_device_name(),
                precision=settings.update.precision,
            )

    @register(dispatch_mode=Dispatch.ALL_TO_ALL, blocking=False)
    def act(self, looks: Looks, key: Key, temperature: float) -> Answer:
        """Answer looks; see :meth:`ActingNetwork.act`."""
        if self._acting is None:
            raise RuntimeError("this worker does not act: the actors do")
        return self._acting.act(looks, key=key, temperature=temperature)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def reference_log_probs(self, data: TensorDict) -> TensorDict:
        """Return ``ref_log_probs`` (B, T * S) under the policy that training started from."""
        device = get_device_name()
        if self._reference is None:
            self._reference = load_network(self._start).requires_grad_(False).to(device)
        temperature = tu.get_non_tensor_data(data, "temperature", 1.0)
        parts = []
        with torch.inference_mode():
            for part in data.split(self.engine_config.micro_batch_size_per_gpu):
                tensors = {
                    name: value.to(device) for name, value in part.items() if isinstance(value, Tensor)
                }
                output = batch_log_probs(
                    partial(look, self._reference), tensors, self.model_config, temperature
                )
                parts.append(output["log_probs"].cpu())
        return TensorDict({"ref_log_probs": torch.cat(parts)}, batch_size=len(data))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next update."""
        self.engine.set_learning_rate(rate)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def refresh(self) -> dict[str, Any] | None:
        """Bring the copy that acts up to date; return the weights where none is here, from rank 0."""
        if self._acting is not None:
            self._acting.update(self.engine.full_weights())
            return None
        weights = {name: value.cpu() for name, value in self.engine.full_weights() if self.rank == 0}
        return weights or None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save(self, folder: str) -> None:
        """Write weights and optimizer; see :meth:`VLAEngine.save_full`."""
        self.engine.save_full(Path(folder))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load(self, folder: str) -> None:
        """Load weights and optimizer; see :meth:`VLAEngine.load_full`."""
        self.engine.load_full(Path(folder))


def _worker_config(
    bundle: str, instructions: Sequence[str], settings: GrpoSettings
) -> TrainingWorkerConfig:
    update = settings.update
    loaded = load_bundle(Path(bundle))
    input_ids, attention_mask = encode_prompts(loaded, instructions)
    return TrainingWorkerConfig(
        model_type=MODEL_TYPE,
        model_config=VLAModelConfig(
            path=bundle,
            input_ids=input_ids,
            attention_mask=attention_mask,
            slots=varied_slots(loaded),
            train_encoder=update.train_encoder,
            enable_gradient_checkpointing=update.gradient_checkpointing,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            mixed_precision={
                "param_dtype": update.precision,
                "reduce_dtype": "fp32",
                "buffer_dtype": "fp32",
            },
            model_dtype="fp32",
            use_torch_compile=False,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=update.micro_batch,
            infer_micro_batch_size_per_gpu=update.micro_batch,
            param_offload=update.parameter_offload,
            optimizer_offload=update.optimizer_offload,
            use_no_sync_for_gradient_accumulation=update.defer_gradients,
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=update.learning_rate,
            weight_decay=update.weight_decay,
            clip_grad=update.gradient_clip,
            total_training_steps=settings.iterations,
        ),
        checkpoint_config=CheckpointConfig(),
    )
