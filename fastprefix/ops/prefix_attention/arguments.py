"""What every backend gets: the arguments of ``prefix_attention`` in one canonical form.

``B`` batch, ``N`` queries, ``M`` keys, ``P`` prefix keys, ``Hq``/``Hkv`` query and key-value heads, ``D``/``Dv`` head
sizes. ``1|X`` is a dimension that is either 1 (and then broadcast, never expanded) or X.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """In the order of the operators' schema."""

    query: Tensor  # [B, Hq, N, D]
    key: Tensor  # [B, Hkv, M, D]
    value: Tensor  # [B, Hkv, M, Dv]
    prefix_key: Tensor  # [1|B, Hkv, P, D]
    prefix_value: Tensor  # [1|B, Hkv, P, Dv]
    prefix_gate: Tensor | None  # [1|B, 1|Hkv, 1|P], or a gate for each query: [1|B, 1|Hq, 1|N, 1|P]
    output_gate: Tensor | None  # [1|B, 1|Hq]; there: two softmaxes, not there: one
    attn_mask: Tensor | None  # bool or float [1|B, 1|Hq, 1|N, 1|M]
    prefix_bias: Tensor | None  # [1|B, 1|Hq, 1|N, 1|P]
    sinks: Tensor | None  # [Hq]
    query_segments: Tensor | None  # int32 or int64 [1|B, N]
    key_segments: Tensor | None  # int32 or int64 [1|B, M]
    dropout_seed: Tensor | None  # int64 [1]
    is_causal: bool
    window_size: int | None
    softcap: float | None
    scale: float
    dropout_p: float

    @property
    def groups(self) -> int:
        """Query heads for each key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums and scores: float32, and float64 for float64."""
        return torch.float64 if self.query.dtype is torch.float64 else torch.float32

    @property
    def normalizers_shape(self) -> tuple[int, ...]:
        """Of what the forward pass leaves to a backend's own backward pass: of each softmax and each row, the largest
        score ``m`` and ``l``, the sum of ``e^(s - m)``; where a row sees nothing, ``l`` is 0 and ``m`` any number.

        With an output gate the first softmax is the tokens', the second the prefix's. Not the log-sum-exp,
        ``m + log l``: rounded to one number, it would cost all probabilities of a row their last digits.
        """
        return (1 if self.output_gate is None else 2, 2, *self.query.shape[:3])


DIFFERENTIABLE = (
    "query",
    "key",
    "value",
    "prefix_key",
    "prefix_value",
    "prefix_gate",
    "output_gate",
    "attn_mask",
    "prefix_bias",
    "sinks",
)
"""The arguments that can have a gradient, in order; they are the first of ``Arguments``."""
