"""What every backend gets: the arguments of ``prompt_embedding`` in one canonical form.

``B`` batch, ``N`` tokens, ``S`` soft-prompt length, ``V`` vocabulary, ``d`` model width, ``r`` bottleneck or rank,
``T`` positions that have an offset. ``ffn`` and ``low_rank`` are there whole or not at all, and never both.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """In the order of the operators' schema."""

    input_ids: Tensor  # int32 or int64 [B, N]
    weight: Tensor  # [V, d]
    prompt: Tensor | None  # [S, d]
    w1: Tensor | None  # ffn: [d, r]
    b1: Tensor | None  # [r]
    w2: Tensor | None  # [r, d]
    b2: Tensor | None  # [d]
    low_rank_a: Tensor | None  # low_rank: [T, r], T >= N
    low_rank_b: Tensor | None  # [r, d]
    dropout_seed: Tensor | None  # int64 [1]
    offset_scale: float
    dropout_p: float

    @property
    def prompt_length(self) -> int:
        """S."""
        return 0 if self.prompt is None else self.prompt.shape[0]

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums: float32, and float64 for float64."""
        return torch.float64 if self.weight.dtype is torch.float64 else torch.float32


DIFFERENTIABLE = ("weight", "prompt", "w1", "b1", "w2", "b2", "low_rank_a", "low_rank_b")
"""The arguments that can have a gradient, in order; in ``Arguments`` they follow ``input_ids``."""
