"""verl's FSDP2 engine with a vision-language-action network in it, on GPUs or on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import sim_training.grpo.platform  # noqa: F401 - before anything of verl that asks for a device
from sim_training.grpo.acting import lower_precision
from sim_training.grpo.algorithm import token_log_probs
from sim_training.sft import freeze_statistics
from simplevla.bundle import load_bundle
from simplevla.errors import ConfigError
from simplevla.policy.network import VLAConfig, VLANetwork

# isort: split
from torch.distributed.fsdp import register_fsdp_forward_method
from verl.base_config import BaseConfig
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

MODEL_TYPE = "vla"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
_LAYERS = ["LlamaDecoderLayer", "SiglipEncoderLayer", "Dinov2WithRegistersLayer"]


@dataclass
class VLAModelConfig(BaseConfig):
    """What the engine builds its network from, in the place of verl's HFModelConfig.

    Attributes:
        path: a policy bundle.
        input_ids, attention_mask: (prompts, L) of the run's prompts.
        slots: (S,) which of the K * D action slots count.
        train_encoder: whether batches hold images and the encoder learns; else they hold visual tokens.
    """

    _mutable_fields: ClassVar[set[str]] = {"model_type"}

    path: str = ""
    input_ids: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    attention_mask: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    slots: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    train_encoder: bool = False
    model_type: str = MODEL_TYPE
    enable_gradient_checkpointing: bool = False
    # The rest is read by verl's engine and means: none of this.
    use_remove_padding: bool = False
    use_fused_kernels: bool = False
    enable_activation_offload: bool = False
    trust_remote_code: bool = False
    lora_rank: int = 0
    lora: dict[str, Any] = field(default_factory=dict)
    tiled_mlp: dict[str, Any] = field(default_factory=dict)

    def get_processor(self) -> None:
        """Return that checkpoints hold no tokenizer: the bundle has it."""


class LearningNetwork(VLANetwork):
    """The network as the trainer runs it: one call from what a batch holds to logits."""

    def look(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor, proprio: Tensor) -> Tensor:
        """Return (B, K * D, 256) logits.

        Args:
            seen: (B, n_cameras, 3, h, w) uint8 images, or (B, tokens, features) visual tokens.
            proprio: (B, P) int32, the bits of float32: FSDP rounds every float that it passes to the
                precision of the weights, which would be a millimetre of the robot's pose.
        """
        return look(self, seen, input_ids, attention_mask, proprio.view(torch.float32))

    def train(self, mode: bool = True) -> LearningNetwork:
        """Set training mode for all but batch normalisation, which uses what serving will use."""
        super().train(mode)
        freeze_statistics(self)
        return self


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cuda", "cpu"])
class VLAEngine(FSDPEngine):
    """Learns from batches of trajectories (:func:`sim_training.grpo.algorithm.make_batch`)."""

    module: LearningNetwork

    def _build_module(self) -> LearningNetwork:
        config = self.model_config
        bundle = load_bundle(Path(config.path))
        # Only the first rank needs the weights: verl sends them to the others.
        with torch.device("cpu" if self.rank == 0 else "meta"):
            network = LearningNetwork(VLAConfig(network=bundle.manifest.network))
        if self.rank == 0:
            network.load_state_dict({name: torch.from_numpy(v) for name, v in bundle.weights().items()})
        names = {type(module).__name__ for module in network.modules()}
        if "BatchNorm2d" in names and config.train_encoder and self._param_dtype() != "fp32":
            raise ConfigError(
                "batch normalisation cannot learn in bf16",
                "set update.precision: fp32, or train no encoder",
            )
        network._no_split_modules = [name for name in _LAYERS if name in names]
        if not config.train_encoder:
            network.requires_grad_(False)
            for parameter in network.policy_parameters():
                parameter.requires_grad_(True)
        if config.enable_gradient_checkpointing:
            for part in (network.decoder, *(encoder.model for encoder in network.encoders)):
                if part.supports_gradient_checkpointing:
                    part.gradient_checkpointing_enable({"use_reentrant": False})
        return network

    def _param_dtype(self) -> str:
        return str(self.engine_config.mixed_precision["param_dtype"])

    def _build_fsdp_module(self, module: LearningNetwork) -> nn.Module:
        module = super()._build_fsdp_module(module)
        register_fsdp_forward_method(module, "look")
        return module

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> Any:
        """Run a mini-batch; see verl's engine. Empty rows are not counted as trajectories."""
        rows = (data["loss_mask"].sum(dim=1) > 0).sum().to(get_device_id())
        torch.distributed.all_reduce(rows, group=self.get_data_parallel_group())
        tu.assign_non_tensor(data, global_batch_size=max(int(rows), 1))
        return super().forward_backward_batch(data, loss_function, forward_only)

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute what a micro-batch's looks give, and its loss. Padding is not computed."""
        del forward_only
        device = get_device_id()
        data = {name: value.to(device) for name, value in micro_batch.items() if isinstance(value, Tensor)}
        temperature = tu.get_non_tensor_data(micro_batch, "temperature", 1.0)
        data["proprio"] = data["proprio"].view(torch.int32)
        with lower_precision(device, self._autocast_dtype):
            output = batch_log_probs(self.module.look, data, self.model_config, temperature)
        if loss_function is None:
            return torch.ones(()), {"model_output": output, "loss": 0.0, "metrics": {}}
        loss, metrics = loss_function(
            output,
            data,
            **{
                name: tu.get_non_tensor_data(micro_batch, name, None)
                for name in ("dp_size", "batch_num_tokens", "global_batch_size")
            },
        )
        return loss, {"model_output": output, "loss": float(loss.detach()), "metrics": metrics}

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the network whole, on every rank; all ranks must iterate together."""
        for name, value in self.module.state_dict().items():
            yield name, _whole(value)

    def save_full(self, folder: Path) -> None:
        """Write weights and optimizer whole, as safetensors that any number of workers can load.

        The first rank alone holds them whole, in the host's memory; the others help to gather.
        """
        first = torch.distributed.get_rank() == 0
        weights = {name: value.cpu().contiguous() for name, value in self.full_weights() if first}
        if first:
            save_file(weights, folder / WEIGHTS)
        del weights
        moments = {}
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                whole = _whole(torch.as_tensor(value))
                if first:
                    moments[f"{name}/{key}"] = whole.cpu().contiguous()
        if first:
            save_file(moments, folder / OPTIMIZER)
        torch.distributed.barrier()

    def load_full(self, folder: Path) -> None:
        """Load what :meth:`save_full` wrote, with this or another number of workers.

        Raises:
            ConfigError: it is damaged, or of another network.
        """
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as stream, torch.no_grad():
                state = self.module.state_dict()
                if set(stream.keys()) != set(state):
                    raise ValueError("it is of another network")
                for name, value in state.items():
                    value.copy_(_like(stream.get_tensor(name), value))
            with safe_open(folder / OPTIMIZER, framework="pt") as stream:
                keys = set(stream.keys())
                for name, parameter in self.module.named_parameters():
                    moments = {key: f"{name}/{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
                    if moments["step"] in keys:
                        self.optimizer.state[parameter] = {
                            key: stream.get_tensor(path)
                            if key == "step"
                            else _like(stream.get_tensor(path), parameter)
                            for key, path in moments.items()
                        }
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"the checkpoint {folder} cannot be continued: {str(error).splitlines()[0]}",
                "remove it, or train into another folder",
            ) from error
        torch.distributed.barrier()


def look(
    network: VLANetwork, seen: Tensor, input_ids: Tensor, attention_mask: Tensor, proprio: Tensor
) -> Tensor:
    """Return (B, K * D, 256) logits of images or of visual tokens; see :meth:`LearningNetwork.look`."""
    tokens = network.visual_tokens(seen.float() / 255) if seen.dtype == torch.uint8 else seen
    return network.decode(tokens, input_ids, attention_mask, proprio)


def batch_log_probs(
    look: Callable[..., Tensor], data: dict[str, Tensor], config: VLAModelConfig, temperature: float
) -> dict[str, Tensor]:
    """Return ``log_probs`` and ``entropy`` (B, T * S) of a batch; what is padding is 0 and not computed.

    Args:
        look: a network's :meth:`LearningNetwork.look`.
        data: ``seen``, ``proprio``, ``prompts``, ``bins`` and ``look_mask`` of a batch, on one device.
    """
    mask = data["look_mask"]
    row, turn = mask.nonzero(as_tuple=True)
    if not len(row):
        # Every rank must compute, or the others would wait for it; the loss mask lets nothing of it count.
        row = turn = torch.zeros(1, dtype=torch.int64, device=mask.device)
    prompt = data["prompts"][row].cpu()
    logits = look(
        data["seen"][row, turn],
        config.input_ids[prompt].to(mask.device),
        config.attention_mask[prompt].to(mask.device),
        data["proprio"][row, turn],
    )
    (batch, looks), tokens = mask.shape, len(config.slots)
    taken, entropy = token_log_probs(
        logits[:, config.slots.to(mask.device)],
        data["bins"].view(batch, looks, tokens)[row, turn],
        temperature,
    )
    return {
        name: value.new_zeros(batch, looks, tokens).index_put((row, turn), value).flatten(1)
        for name, value in (("log_probs", taken), ("entropy", entropy))
    }


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(full: Tensor, shard: Tensor) -> Tensor:
    """Return ``full`` sharded as ``shard`` is; every rank has it whole, so that nothing is sent."""
    shard = shard.detach()
    if not isinstance(shard, DTensor):
        return full.to(shard.device, shard.dtype)
    full = full.to(shard.device, shard.dtype)
    return distribute_tensor(full, shard.device_mesh, shard.placements, src_data_rank=None)
