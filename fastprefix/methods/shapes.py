"""The shapes of a model that a method needs to create its parameters."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["encoder", "decoder", "cross"]
"""The purpose of an attention layer: self-attention in an encoder or a decoder, or cross-attention."""


@dataclass(frozen=True)
class EmbeddingShape:
    """The vocabulary size V and the width d of an embedding table ``[V, d]``."""

    vocabulary: int
    width: int


@dataclass(frozen=True)
class VisionShape:
    """The width and the number of layers of a vision transformer, and the number of values in a patch."""

    width: int
    layers: int
    patch: int


@dataclass(frozen=True)
class AttentionShape:
    """The heads of an attention layer, their dimensions, and the width of the hidden states that enter the layer."""

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    width: int
    causal: bool
    role: Role = "encoder"
