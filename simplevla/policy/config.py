"""The sizes of a vision-language-action network, checked."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from msgspec import Meta

from simplevla.config import Config, build, load_yaml
from simplevla.errors import ConfigError
from simplevla.files import share_dir

Count = Annotated[int, Meta(ge=1)]


class VisionTransformer(Config, frozen=True, kw_only=True):
    """A SigLIP or DINOv2 (with registers) encoder.

    Only the blocks the policy reads are built: OpenVLA takes the features before the last block,
    so a 27-block SigLIP is ``layers: 26``; the final norm is left out for the same reason.
    """

    kind: Literal["siglip", "dinov2"]
    hidden: Count
    layers: Count
    heads: Count
    mlp: Count
    patch: Count

    @property
    def features(self) -> int:
        """Channels of one patch."""
        return self.hidden

    @property
    def stride(self) -> int:
        """Pixels between two patches."""
        return self.patch


class ResidualEncoder(Config, frozen=True, kw_only=True):
    """A small convolutional encoder (ResNet with basic blocks), for learning on a CPU.

    Attributes:
        stem: channels of the first convolution (stride 2, followed by a pooling of stride 2).
        stages: channels of each stage; every stage but the first halves the resolution.
        depth: blocks of each stage.
    """

    stem: Count
    stages: Annotated[tuple[Count, ...], Meta(min_length=1)]
    depth: Count = 1

    @property
    def features(self) -> int:
        """Channels of one cell of the last stage."""
        return self.stages[-1]

    @property
    def stride(self) -> int:
        """Pixels between two cells of the last stage."""
        return int(4 * 2 ** (len(self.stages) - 1))


class Decoder(Config, frozen=True, kw_only=True):
    """A Llama decoder, read bidirectionally."""

    hidden: Count
    layers: Count
    heads: Count
    mlp: Count


class Head(Config, frozen=True, kw_only=True):
    """How the hidden state becomes 256 logits.

    Attributes:
        centres: 0 for a plain linear layer; else the number of radial basis functions that the
            logits are a linear combination of, which makes them smooth over the bins: each labelled
            bin then teaches its neighbours too.
        slot_embeddings: learned embeddings for the action slots; OpenVLA-OFT has none (its
            placeholders are zero and told apart by rotary position alone).
        prefix: the slots of actions that are already committed take those as their input, so that an
            answer can continue from what is being executed; see ``simplevla.policy.prefix``.
    """

    centres: Annotated[int, Meta(ge=0, le=256)] = 0
    slot_embeddings: bool = False
    prefix: bool = False


class NetworkSizes(Config, frozen=True, kw_only=True):
    """What a network's YAML file says: everything that does not follow from robot and task.

    Attributes:
        transformers, residual: the encoders; their features are concatenated patch by patch, so
            their grids must agree.
        image_height, image_width: pixels after crop and resize.
        crop_area: fraction of the frame's area kept by the centred crop.
        visual_tokens: 0 to give the decoder every patch, as OpenVLA does; else the number of tokens
            that a linear layer over all patches makes of a picture.
        visual_features: length of such a token.
        prompt_tokens: L, the fixed length of the prompt.
    """

    transformers: tuple[VisionTransformer, ...] = ()
    residual: tuple[ResidualEncoder, ...] = ()
    image_height: Count
    image_width: Count
    crop_area: Annotated[float, Meta(gt=0, le=1)] = 0.9
    visual_tokens: Annotated[int, Meta(ge=0, le=1024)] = 0
    visual_features: Count = 32
    decoder: Decoder
    head: Head = Head()
    vocabulary: Count
    prompt_tokens: Annotated[int, Meta(ge=16, le=512)]

    def __post_init__(self) -> None:
        if not self.encoders:
            raise ValueError("name at least one encoder under transformers or residual")
        for transformer in self.transformers:
            if transformer.hidden % transformer.heads:
                raise ValueError(f"{transformer.kind}: hidden must be a multiple of heads")
            if self.image_height != self.image_width:
                raise ValueError("vision transformers take square images")
            if self.image_height % transformer.patch:
                raise ValueError(f"the image must be a whole number of patches of {transformer.patch}")
        if self.decoder.hidden % (2 * self.decoder.heads):
            raise ValueError("decoder: hidden must be a multiple of twice the heads")
        grids = {encoder_grid(encoder, self.image_height, self.image_width) for encoder in self.encoders}
        if len(grids) != 1:
            raise ValueError(f"the encoders' grids differ: {sorted(grids)}")

    @property
    def encoders(self) -> tuple[VisionTransformer | ResidualEncoder, ...]:
        """Every encoder, in the order in which features are concatenated."""
        return (*self.transformers, *self.residual)


class NetworkConfig(Config, frozen=True, kw_only=True):
    """A whole network: its sizes, and the robot and task that it is wired for.

    Attributes:
        frame_height, frame_width: pixels of the raw frames that come in.
        n_cameras: frames in one observation.
        chunk_length, dimension: K and D; there are K * D action slots.
        proprio: P, the length of the proprioception vector.
    """

    sizes: NetworkSizes
    frame_height: Count
    frame_width: Count
    n_cameras: Count
    chunk_length: Count
    dimension: Count
    proprio: Count

    @property
    def slots(self) -> int:
        """K * D, the number of action slots."""
        return self.chunk_length * self.dimension


def load_sizes(name: str) -> NetworkSizes:
    """Return the sizes in ``config/policy/<name>.yaml``.

    Raises:
        ConfigError: there is no such file, or it breaks the schema.
    """
    folder = share_dir() / "config/policy"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"unknown network {name!r}", f"choose one of: {', '.join(known)}")
    return load_yaml(folder / f"{name}.yaml", NetworkSizes)


def network_config(data: dict[str, Any], *, source: str) -> NetworkConfig:
    """Return a manifest's ``network`` as a config; ConfigError, naming ``source``, if it is none."""
    return build(data, NetworkConfig, source=source)


def encoder_grid(encoder: VisionTransformer | ResidualEncoder, height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of an encoder's features for an image of that size."""
    return math.ceil(height / encoder.stride), math.ceil(width / encoder.stride)
