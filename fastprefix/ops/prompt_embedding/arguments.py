"""Declare what every backend gets: the arguments of ``prompt_embedding`` in one canonical form.

``B`` batch, ``N`` tokens, ``S`` soft-prompt length, ``V`` vocabulary, ``d`` model width, ``r`` bottleneck or rank,
``T`` positions that have an offset. ``ffn`` and ``low_rank`` are there whole or not at all, and never both.
"""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..declaration import Declaration, Rule


class EmbeddingArguments(NamedTuple):
    """The declaration. C++ has the same list in ``csrc/prompt_embedding/arguments.h``."""

    input_ids: Annotated[Tensor, Rule("[B, N]", dtype="integer")]
    weight: Annotated[Tensor, Rule("[V, d]", gradient="every backend")]
    prompt: Annotated[Tensor | None, Rule("[S, d]", gradient="every backend")]
    # ffn
    w1: Annotated[Tensor | None, Rule("[d, r]", gradient="every backend", label="ffn[0] (w1)")]
    b1: Annotated[Tensor | None, Rule("[r]", gradient="every backend", label="ffn[1] (b1)")]
    w2: Annotated[Tensor | None, Rule("[r, d]", gradient="every backend", label="ffn[2] (w2)")]
    b2: Annotated[Tensor | None, Rule("[d]", gradient="every backend", label="ffn[3] (b2)")]
    # low_rank; T >= N
    low_rank_a: Annotated[Tensor | None, Rule("[T, r]", gradient="every backend", label="low_rank[0] (a)")]
    low_rank_b: Annotated[Tensor | None, Rule("[r, d]", gradient="every backend", label="low_rank[1] (b)")]
    dropout_seed: Annotated[Tensor | None, Rule("[1]", dtype="integer")]
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


DECLARATION = Declaration(EmbeddingArguments)
DIFFERENTIABLE = DECLARATION.differentiable
"""The arguments that can have a gradient, in order."""
