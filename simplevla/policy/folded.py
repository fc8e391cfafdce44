"""The network as it is compiled: the same answers from fewer and larger operations.

Training wants parts that can be named, frozen and replaced; a compiler wants all that is known
beforehand to be done beforehand. A trained network becomes two graphs of static shapes and batch 1:

- :class:`PromptGraph` computes what depends on the instruction alone (embeddings of prompt and action
  slots, attention mask, rotary angles); it runs once for each new instruction;
- :class:`StepGraph` computes the logits from frames, proprioception and those constants.

Attention is bidirectional and every token's position is given, so that the order of the tokens is
free: constants lie together at the end. The last layer answers for the action slots alone. The smooth
head becomes one linear layer; a convolution takes in the norm behind it; queries, keys and values are
one product, with the attention's scale in it; the resampling of a frame skips the pixel rows that an
output row does not see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetShortCut

from simplevla.policy.network import SmoothHead, VLANetwork
from simplevla.policy.resample import Resample

CONSTANT_NAMES = ("constants", "mask", "cosine", "sine")
_HIDDEN = (
    -3e4
)  # what is added where a token is not seen: nothing is left of it, and half precision holds it
_BLOCK_ROWS = 12  # about so many output rows to one block of the resampling


@dataclass(frozen=True)
class Folding:
    """What is folded beyond the decoder's products; all of it, but for measuring what each part brings.

    Attributes:
        blocks: resample in blocks of rows instead of by one large product.
        slots_only: let the last layer answer for the action slots alone.
    """

    blocks: bool = True
    slots_only: bool = True


class PromptGraph(nn.Module):
    """What depends on the instruction alone."""

    tail: Tensor

    def __init__(self, network: VLANetwork) -> None:
        """Take what is needed of ``network``, which stays as it is."""
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(network.decoder.embed_tokens.weight.detach().float())
        self.rotary = network.decoder.rotary_emb
        config = network.network
        slots = (
            torch.zeros(config.slots, config.sizes.decoder.hidden)
            if network.slots is None
            else network.slots.detach()
        )
        end = network.decoder.embed_tokens.weight[2:3].detach()
        self.register_buffer("tail", torch.cat([slots, end])[None].float())
        self._looks = visual_token_count(network) + 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what :class:`StepGraph` takes: embeddings, mask, cosines and sines.

        Args:
            input_ids: (1, L) int64: the start token, then padding, then the prompt up to the end.
            attention_mask: (1, L) int64, 1 where ``input_ids`` is no padding.

        Returns:
            All float32: (1, C, hidden) constant tokens (prompt, slots, end), (1, 1, 1, S) additive mask,
            and (1, 1, S, head size) cosines and sines of all S tokens' positions.
        """
        constants = torch.cat([self.embed(input_ids), self.tail], dim=1)
        one = torch.ones_like(attention_mask[:, :1])
        looks, tail = one.expand(-1, self._looks), one.expand(-1, self.tail.shape[1])
        start, words = attention_mask[:, :1], attention_mask[:, 1:]
        valid = torch.cat([start, looks, words, tail], dim=1)
        positions = (valid.cumsum(dim=1) - 1).clamp(min=0)
        seen = self._constants_last(valid)[:, None, None, :].float()
        cosine, sine = self.rotary(constants, self._constants_last(positions))
        return constants, (1 - seen) * _HIDDEN, cosine[:, None], sine[:, None]

    def _constants_last(self, row: Tensor) -> Tensor:
        """Move the start token from before the picture's tokens to behind them."""
        end = self._looks + 1
        return torch.cat([row[:, 1:end], row[:, :1], row[:, end:]], dim=1)


class StepGraph(nn.Module):
    """From frames and proprioception to logits, given a :class:`PromptGraph`'s constants."""

    proprio_low: Tensor
    proprio_scale: Tensor

    def __init__(
        self, network: VLANetwork, dtype: torch.dtype = torch.float32, folding: Folding | None = None
    ) -> None:
        """Fold ``network``, whose own parts are used and change their type with ``dtype``."""
        super().__init__()
        folding = folding or Folding()
        config = network.network
        self._sees = network.visual_tokens
        _fuse_norms(network.encoders)
        self.eyes = nn.ModuleList([network.encoders, *([network.mixer] if network.mixer else [])])
        self.resample = BlockResample(network.resample) if folding.blocks else network.resample
        self.projector, self.proprio_projector = network.projector, network.proprio_projector
        self.layers = nn.ModuleList([_Layer(layer) for layer in network.decoder.layers])
        self.norm = _Norm(network.decoder.norm)
        self.head = network.head.fold() if isinstance(network.head, SmoothHead) else network.head
        self.prefix = (
            nn.Embedding.from_pretrained(network.prefix.table()) if network.prefix is not None else None
        )
        self.to(dtype)
        self.dtype = dtype
        # In half precision the ranges of millimetres and radians would lose digits.
        low, high = network.proprio_low.float(), network.proprio_high.float()
        self.register_buffer("proprio_low", low.clone())
        self.register_buffer("proprio_scale", 2 / (high - low + 1e-8))
        self._prompt_tokens, self._slots = config.sizes.prompt_tokens, config.slots
        self._slots_only = folding.slots_only

    def forward(
        self,
        frames: Tensor,
        proprio: Tensor,
        constants: Tensor,
        mask: Tensor,
        cosine: Tensor,
        sine: Tensor,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return (1, K * D, 256) float32 logits.

        Args:
            frames: (1, n_cameras, H, W, 3) uint8 RGB.
            proprio: (1, P) float32, raw.
            constants, mask, cosine, sine: what the prompt graph answers.
            prefix: (1, K * D) int64 bins of committed actions, -1 where a slot is free; for networks
                whose head has a prefix.
        """
        constants, mask, cosine, sine = (x.to(self.dtype) for x in (constants, mask, cosine, sine))
        visual = self.projector(self._sees(self.resample(frames)))
        unit = (proprio - self.proprio_low) * self.proprio_scale - 1
        body = self.proprio_projector(unit.clamp(-1, 1).to(self.dtype))[:, None]
        if self.prefix is not None and prefix is not None:
            words, end = self._prompt_tokens, self._prompt_tokens + self._slots
            slots = constants[:, words:end] + self.prefix(prefix + 1)
            constants = torch.cat([constants[:, :words], slots, constants[:, end:]], dim=1)
        tokens = torch.cat([visual, body, constants], dim=1)
        # The logits of a slot are read one position before it.
        first = visual.shape[1] + self._prompt_tokens
        asked = slice(first, first + self._slots)
        *layers, last = self.layers
        for layer in layers:
            tokens = layer(tokens, mask, cosine, sine)
        if self._slots_only:
            answers = last(tokens, mask, cosine, sine, asked)
        else:
            answers = last(tokens, mask, cosine, sine)[:, asked]
        logits: Tensor = self.head(self.norm(answers))
        return logits.float()


def visual_token_count(network: VLANetwork) -> int:
    """Return how many tokens all of an observation's pictures make."""
    sizes, config = network.network.sizes, network.network
    with torch.no_grad():
        images = torch.zeros(1, config.n_cameras, 3, sizes.image_height, sizes.image_width)
        weight = network.projector.fc1.weight
        return int(network.visual_tokens(images.to(weight.dtype).to(weight.device)).shape[1])


class BlockResample(nn.Module):
    """:class:`~simplevla.policy.resample.Resample`, its rows in blocks.

    An output row sees a few neighbouring pixel rows, so that a block of output rows needs a window of
    the frame alone. Rows come first: they lie together in a frame, whose colours need not be moved then.
    """

    blocks: Tensor
    columns: Tensor

    def __init__(self, dense: Resample) -> None:
        """Cut the matrices of ``dense``, with the scale to 0..1 in them."""
        super().__init__()
        rows = dense.rows.detach() * (1 / 255)
        targets, sources = rows.shape
        size = max(n for n in range(1, min(_BLOCK_ROWS, targets) + 1) if targets % n == 0)
        used = [torch.nonzero(block.abs().sum(dim=0)).flatten() for block in rows.split(size)]
        width = max(int(seen[-1] - seen[0]) + 1 for seen in used)
        self._starts = [min(int(seen[0]), sources - width) for seen in used]
        self._width = width
        cut = [
            block[:, start : start + width]
            for block, start in zip(rows.split(size), self._starts, strict=True)
        ]
        self.register_buffer("blocks", torch.stack(cut))
        self.register_buffer("columns", dense.columns.detach().clone())

    def forward(self, frames: Tensor) -> Tensor:
        """Return (B, n, 3, h, w) in 0..1 of ``frames`` (B, n, H, W, 3) uint8."""
        batch, cameras, height, width, colours = frames.shape
        lines = frames.to(self.columns.dtype).reshape(batch * cameras, height, width * colours)
        windows = torch.stack([lines[:, start : start + self._width] for start in self._starts], dim=1)
        rows = (self.blocks @ windows).reshape(batch * cameras, -1, width, colours)
        images = rows.permute(0, 3, 1, 2) @ self.columns
        return images.reshape(batch, cameras, *images.shape[1:])


class _Layer(nn.Module):
    """One layer of Llama's decoder, for one sequence."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._size = int(attention.head_dim)
        self._heads = attention.q_proj.out_features // self._size
        query = attention.q_proj.weight.detach() / math.sqrt(self._size)
        key, value = attention.k_proj.weight.detach(), attention.v_proj.weight.detach()
        self.all_three = _linear(torch.cat([query, key, value]))
        self.out = attention.o_proj
        self.gate, self.up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.before, self.after = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)

    def forward(
        self, tokens: Tensor, mask: Tensor, cosine: Tensor, sine: Tensor, asked: slice | None = None
    ) -> Tensor:
        """Return (1, S, hidden) of ``tokens`` (1, S, hidden), or the ``asked`` ones of them alone."""
        normed = self.before(tokens)
        if asked is None:
            parts = self._by_head(functional.linear(normed, self.all_three.weight), 3)
            turned = _turned(parts[:2], cosine, sine)
            query, key, value = turned[0], turned[1], parts[2]
        else:
            hidden = self._heads * self._size
            weights = self.all_three.weight
            key, value = self._by_head(functional.linear(normed, weights[hidden:]), 2)
            key = _turned(key, cosine[0], sine[0])
            query = self._by_head(functional.linear(normed[:, asked], weights[:hidden]), 1)[0]
            query = _turned(query, cosine[0, :, asked], sine[0, :, asked])
            tokens = tokens[:, asked]
        attention = torch.softmax(query @ key.transpose(-1, -2) + mask[0], dim=-1)
        mixed = (attention @ value).transpose(0, 1).reshape(1, -1, self._heads * self._size)
        tokens = tokens + self.out(mixed)
        normed = self.after(tokens)
        out: Tensor = tokens + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return out

    def _by_head(self, projected: Tensor, count: int) -> Tensor:
        """Return (count, heads, S, head size) of ``projected`` (1, S, count * heads * head size)."""
        return projected.reshape(-1, count, self._heads, self._size).permute(1, 2, 0, 3)


class _Norm(nn.Module):
    """Llama's norm, written in the operations that runtimes recognise and fuse."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self._epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        unit = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self._epsilon)
        return unit.to(hidden.dtype) * self.weight


def _turned(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return rotary embeddings of ``heads`` (..., S, head size)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine


def _fuse_norms(encoders: nn.Module) -> None:
    """Fuse every batch norm into the convolution before it, in place."""
    for module in encoders.modules():
        if isinstance(module, ResNetConvLayer | ResNetShortCut) and isinstance(
            module.normalization, nn.BatchNorm2d
        ):
            convolution = fuse_conv_bn_eval(module.convolution.eval(), module.normalization.eval())
            module.convolution, module.normalization = convolution, nn.Identity()


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
