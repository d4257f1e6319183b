"""What a method has to know of the model it attaches to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EmbeddingShape:
    """An embedding table ``[V, d]``."""

    vocabulary: int
    width: int


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer: its heads and their sizes, the width of the hidden states that enter its layer."""

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    width: int
    causal: bool
