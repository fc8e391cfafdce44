"""The network: image encoders, a projector and a Llama decoder that fills all action slots at once.

OpenVLA-OFT's shape (Kim et al. 2025) in its discrete-token form, assembled from transformers
classes. The sequence is ``[BOS] + visual tokens + [proprioception] + prompt + K * D placeholders +
[EOS]``, attention is bidirectional over all that is not padding, and the logits of slot i are read
one position before it (the next-token shift is kept).

Preprocessing is a part of the graph: raw uint8 frames and raw proprioception go in.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from simplevla.action_codec import BINS
from simplevla.bundle import Bundle
from simplevla.config import build
from simplevla.errors import BundleError, ConfigError
from simplevla.policy.config import (
    NetworkConfig,
    ResidualEncoder,
    VisionTransformer,
    encoder_grid,
    network_config,
)
from simplevla.policy.prefix import PrefixEmbedding, bumps
from simplevla.policy.resample import Resample

_REGISTERS = 4
# OpenVLA's statistics of the two encoders; a convolutional one takes the symmetric pair.
_DINOV2_MEAN, _DINOV2_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)
_SYMMETRIC_MEAN, _SYMMETRIC_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_EPSILON = 1e-8
_PREFIX_CENTRES = 40  # where the head has no bumps of its own


class VLAConfig(PretrainedConfig):
    """A :class:`NetworkConfig` in the form that transformers and trainers built on it expect."""

    model_type = "simplevla"

    def __init__(self, network: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = network


class VLANetwork(PreTrainedModel):
    """Frames, prompt and proprioception in, the logits of every action slot out.

    Attributes:
        proprio_low, proprio_high: (P,) range that proprioception is normalised with.
    """

    config_class = VLAConfig
    main_input_name = "frames"
    proprio_low: Tensor
    proprio_high: Tensor

    def __init__(self, config: VLAConfig) -> None:
        super().__init__(config)
        self.network = build(config.network, NetworkConfig, source="network")
        sizes, hidden = self.network.sizes, self.network.sizes.decoder.hidden
        self.resample = Resample(
            (self.network.frame_height, self.network.frame_width),
            (sizes.image_height, sizes.image_width),
            sizes.crop_area,
        )
        self.encoders = nn.ModuleList([_encoder(encoder, sizes.image_height) for encoder in sizes.encoders])
        features = sum(encoder.features for encoder in sizes.encoders)
        if sizes.visual_tokens:
            rows, columns = encoder_grid(sizes.encoders[0], sizes.image_height, sizes.image_width)
            self.mixer: MixedTokens | None = MixedTokens(
                features, rows * columns, sizes.visual_tokens, sizes.visual_features
            )
            features = sizes.visual_features
        else:
            self.mixer = None
        self.projector = Projector(features, hidden)
        self.proprio_projector = ProprioProjector(self.network.proprio, hidden)
        self.register_buffer("proprio_low", torch.full((self.network.proprio,), -1.0))
        self.register_buffer("proprio_high", torch.full((self.network.proprio,), 1.0))
        self.decoder = LlamaModel(
            LlamaConfig(
                vocab_size=sizes.vocabulary,
                hidden_size=hidden,
                intermediate_size=sizes.decoder.mlp,
                num_hidden_layers=sizes.decoder.layers,
                num_attention_heads=sizes.decoder.heads,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
        self.slots = (
            nn.Parameter(0.02 * torch.randn(self.network.slots, hidden))
            if sizes.head.slot_embeddings
            else None
        )
        self.head: nn.Linear | SmoothHead = (
            SmoothHead(hidden, sizes.head.centres)
            if sizes.head.centres
            else nn.Linear(hidden, BINS, bias=False)
        )
        self.prefix = (
            PrefixEmbedding(hidden, sizes.head.centres or _PREFIX_CENTRES) if sizes.head.prefix else None
        )
        self.post_init()

    def forward(
        self,
        frames: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        proprio: Tensor,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return (B, K * D, 256) float32 logits.

        Args:
            frames: (B, n_cameras, H, W, 3) uint8 RGB.
            input_ids: (B, L) int64: the start token, then padding, then the prompt up to the end.
            attention_mask: (B, L) int64, 1 where ``input_ids`` is no padding.
            proprio: (B, P) float32, raw.
            prefix: (B, K * D) int64 bins of actions that are committed, -1 where a slot is free; for
                networks whose head has a prefix. None leaves every slot free.
        """
        return self.act(self.resample(frames), input_ids, attention_mask, proprio, prefix)

    def act(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        proprio: Tensor,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return :meth:`forward`'s logits for images that were resampled before.

        Args:
            images: (B, n_cameras, 3, image_height, image_width) float32 in 0..1.
        """
        return self.decode(self.visual_tokens(images), input_ids, attention_mask, proprio, prefix)

    def visual_tokens(self, images: Tensor) -> Tensor:
        """Return (B, n_cameras * tokens, features) of resampled images, before the projector."""
        batch, cameras = images.shape[:2]
        flat = images.flatten(0, 1)
        patches = torch.cat([encoder(flat) for encoder in self.encoders], dim=-1)
        tokens = patches if self.mixer is None else self.mixer(patches)
        return tokens.reshape(batch, cameras * tokens.shape[1], tokens.shape[2])

    def decode(
        self,
        tokens: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        proprio: Tensor,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return the logits, given :meth:`visual_tokens`.

        Raises:
            ConfigError: there is a prefix, and the network was built without one.
        """
        batch = proprio.shape[0]
        visual = self.projector(tokens)
        unit = 2 * (proprio - self.proprio_low) / (self.proprio_high - self.proprio_low + _EPSILON) - 1
        body = self.proprio_projector(unit.clamp(-1, 1))[:, None]
        text = self.decoder.embed_tokens(input_ids)
        if self.slots is None:
            slots = torch.zeros(
                batch, self.network.slots, text.shape[-1], dtype=text.dtype, device=text.device
            )
        else:
            slots = self.slots[None].expand(batch, -1, -1)
        if prefix is not None:
            if self.prefix is None:
                raise ConfigError("this network takes no prefix", "train one with head: {prefix: true}")
            slots = slots + self.prefix(prefix)
        # Llama's end token has id 2, as in the tokenizers that this project writes.
        end = self.decoder.embed_tokens(torch.full_like(input_ids[:, :1], 2))
        sequence = torch.cat([text[:, :1], visual, body, text[:, 1:], slots, end], dim=1)
        extra = visual.shape[1] + 1
        valid = torch.cat(
            [
                attention_mask[:, :1],
                torch.ones_like(attention_mask[:, :1]).expand(-1, extra),
                attention_mask[:, 1:],
                torch.ones_like(attention_mask[:, :1]).expand(-1, self.network.slots + 1),
            ],
            dim=1,
        )
        hidden = self.decoder(
            inputs_embeds=sequence,
            attention_mask=_additive_mask(valid, sequence.dtype),
            # Padding takes no position, so that its amount changes nothing.
            position_ids=(valid.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        first = extra + input_ids.shape[1] - 1
        logits: Tensor = self.head(hidden[:, first : first + self.network.slots])
        return logits.float()

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return every parameter behind :meth:`visual_tokens`."""
        seeing = {
            id(p) for part in (self.encoders, self.mixer) if part is not None for p in part.parameters()
        }
        return [p for p in self.parameters() if id(p) not in seeing]

    def set_proprio_range(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        """Set the (P,) range of proprioception."""
        self.proprio_low.copy_(torch.as_tensor(low, dtype=torch.float32))
        self.proprio_high.copy_(torch.as_tensor(high, dtype=torch.float32))

    def _init_weights(self, module: nn.Module) -> None:
        """Leave every weight as its own class drew it: the parts are initialised where they are made."""


class MixedTokens(nn.Module):
    """A few tokens, each of which looks at the whole picture through one linear layer.

    Where something is follows from which cells see it, so that this learns places fast, and a decoder
    of a few tokens is quick. It knows only the one grid it was made for.
    """

    def __init__(self, features: int, cells: int, tokens: int, token_features: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.mix = nn.Linear(features * cells, tokens * token_features)

    def forward(self, patches: Tensor) -> Tensor:
        """Return (B, tokens, token_features) of ``patches`` (B, cells, features)."""
        mixed = functional.gelu(self.mix(patches.flatten(1)))
        return mixed.reshape(len(patches), self.tokens, -1)


class Projector(nn.Module):
    """From visual features to the decoder's width: OpenVLA's three layers."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, hidden)
        self.fc3 = nn.Linear(hidden, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (..., hidden) of ``tokens`` (..., features)."""
        wide = functional.gelu(self.fc1(tokens))
        out: Tensor = self.fc3(functional.gelu(self.fc2(wide)))
        return out


class ProprioProjector(nn.Module):
    """From normalised proprioception to one token: OpenVLA-OFT's two layers."""

    def __init__(self, proprio: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprio, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, proprio: Tensor) -> Tensor:
        """Return (B, hidden) of ``proprio`` (B, P)."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(proprio)))
        return out


class SmoothHead(nn.Module):
    """Logits that are a learned combination of fixed bumps over the bins, hence smooth over them."""

    basis: Tensor

    def __init__(self, hidden: int, centres: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, centres)
        self.register_buffer("basis", bumps(centres), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (..., 256) of ``hidden`` (..., hidden)."""
        weights: Tensor = self.linear(hidden)
        return weights @ self.basis.T

    def fold(self) -> nn.Linear:
        """Return the plain linear layer of equal outputs."""
        plain = nn.Linear(self.linear.in_features, BINS)
        with torch.no_grad():
            plain.weight.copy_(self.basis @ self.linear.weight)
            plain.bias.copy_(self.basis @ self.linear.bias)
        return plain


def make_network(config: NetworkConfig) -> VLANetwork:
    """Return a network with fresh weights from torch's generator."""
    return VLANetwork(VLAConfig(network=msgspec.to_builtins(config)))


def load_network(bundle: Bundle) -> VLANetwork:
    """Return a bundle's network in eval mode.

    Raises:
        BundleError: its weights do not fit its configuration, or its statistics contradict the manifest.
    """
    remedy = "train the bundle again"
    try:
        config = network_config(bundle.manifest.network, source=f"{bundle.path}: network")
        network = make_network(config)
        network.load_state_dict({k: torch.from_numpy(v) for k, v in bundle.weights().items()})
    except (ConfigError, RuntimeError) as error:
        raise BundleError(f"{bundle.path}: {str(error).splitlines()[0]}", remedy) from error
    for name in ("proprio_low", "proprio_high"):
        said = torch.tensor(getattr(bundle.manifest, name), dtype=torch.float32)
        held = getattr(network, name)
        if said.shape != held.shape or not torch.allclose(said, held):
            raise BundleError(f"{bundle.path}: {name} differs between manifest and weights", remedy)
    return network.eval()


def weights_of(network: VLANetwork) -> dict[str, NDArray[Any]]:
    """Return the tensors that a bundle stores."""
    return {k: v.detach().cpu().contiguous().numpy() for k, v in network.state_dict().items()}


class _Encoder(nn.Module):
    """Normalises an image, runs an encoder and returns its patches."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: PreTrainedModel, prefix: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.model = model
        self.prefix = prefix
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, cells, features) of ``images`` (B, 3, h, w) in 0..1."""
        features: Tensor = self.model((images - self.mean) / self.std).last_hidden_state
        if features.ndim == 4:
            return features.flatten(2).transpose(1, 2)
        return features[:, self.prefix :]


def _encoder(config: VisionTransformer | ResidualEncoder, image_size: int) -> _Encoder:
    if isinstance(config, ResidualEncoder):
        residual = ResNetModel(
            ResNetConfig(
                embedding_size=config.stem,
                hidden_sizes=list(config.stages),
                depths=[config.depth] * len(config.stages),
                layer_type="basic",
            )
        )
        return _Encoder(residual, 0, _SYMMETRIC_MEAN, _SYMMETRIC_STD)
    common = {
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "patch_size": config.patch,
        "image_size": image_size,
    }
    if config.kind == "siglip":
        siglip = SiglipVisionModel(
            SiglipVisionConfig(
                **common, intermediate_size=config.mlp, hidden_act="gelu", vision_use_head=False
            )
        )
        siglip.post_layernorm = nn.Identity()
        return _Encoder(siglip, 0, _SYMMETRIC_MEAN, _SYMMETRIC_STD)
    if config.mlp % config.hidden:
        raise ConfigError("dinov2: mlp must be a multiple of hidden", "correct the network's file")
    dinov2 = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            **common, mlp_ratio=config.mlp // config.hidden, num_register_tokens=_REGISTERS
        )
    )
    dinov2.layernorm = nn.Identity()
    return _Encoder(dinov2, 1 + _REGISTERS, _DINOV2_MEAN, _DINOV2_STD)


def _additive_mask(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, 1, S, S): 0 where a key may be attended to, the lowest number where it is padding."""
    keys = (1 - valid[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
    return keys.expand(-1, 1, valid.shape[1], -1)
