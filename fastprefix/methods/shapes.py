"""Shapes of the model that a method is attached to."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["encoder", "decoder", "cross"]
"""The purpose of an attention layer: self-attention of an encoder or a decoder, or attention to other tokens' keys."""


@dataclass(frozen=True)
class EmbeddingShape:
    """An embedding table ``[V, d]``."""

    vocabulary: int
    width: int


@dataclass(frozen=True)
class VisionShape:
    """A stack of layers over the patches of an image: its width, and how many numbers a patch has."""

    width: int
    layers: int
    patch: int


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer: its heads and their sizes, the width of the hidden states that enter its layer."""

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    width: int
    causal: bool
    role: Role = "encoder"
