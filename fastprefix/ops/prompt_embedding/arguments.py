"""Declare the canonical form of the arguments of ``prompt_embedding``, which every backend receives.

``B`` is the batch size, ``N`` the number of tokens, ``S`` the prompt positions before the tokens, ``V`` the vocabulary
size, ``d`` the model width, ``r`` the bottleneck or rank, ``T`` the positions that have an offset, ``P`` the vectors of
the packed store of prompts, and ``K`` the entries of the bank of offsets. The tensors of ``ffn`` and of ``low_rank``
are either all given or all None, and at most one offset is given. The second shape of an offset applies with
``entries``.
"""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..declaration import Declaration, Rule


class EmbeddingArguments(NamedTuple):
    """The canonical arguments. ``csrc/prompt_embedding/arguments.h`` declares the same list in C++."""

    input_ids: Annotated[Tensor, Rule("[B, N]", dtype="integer")]
    weight: Annotated[Tensor, Rule("[V, d]", gradient="every backend")]
    prompt: Annotated[Tensor | None, Rule("[P, d]", gradient="every backend")]  # without spans P = S
    # ffn
    w1: Annotated[Tensor | None, Rule("[d, r]", "[K, d, r]", "every backend", label="ffn[0] (w1)")]
    b1: Annotated[Tensor | None, Rule("[r]", "[K, r]", "every backend", label="ffn[1] (b1)")]
    w2: Annotated[Tensor | None, Rule("[r, d]", "[K, r, d]", "every backend", label="ffn[2] (w2)")]
    b2: Annotated[Tensor | None, Rule("[d]", "[K, d]", "every backend", label="ffn[3] (b2)")]
    # low_rank; T >= N
    low_rank_a: Annotated[Tensor | None, Rule("[T, r]", "[K, T, r]", "every backend", label="low_rank[0] (a)")]
    low_rank_b: Annotated[Tensor | None, Rule("[r, d]", "[K, r, d]", "every backend", label="low_rank[1] (b)")]
    position_offset: Annotated[Tensor | None, Rule("[T, d]", "[K, T, d]", "every backend")]  # T >= N
    prompt_spans: Annotated[Tensor | None, Rule("[B, 2]", dtype="integer")]
    entries: Annotated[Tensor | None, Rule("[B]", dtype="integer", label="index")]
    dropout_seed: Annotated[Tensor | None, Rule("[1]", dtype="integer")]
    offset_scale: float
    dropout_p: float
    prompt_length: int  # S, both with and without spans

    @property
    def bank_size(self) -> int:
        """K, the number of entries of the bank. Defined only for calls with ``entries``."""
        banks = (self.w1, self.low_rank_a, self.position_offset)
        return next(bank.shape[0] for bank in banks if bank is not None)

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums: float64 for float64 inputs, float32 for all other dtypes."""
        return torch.float64 if self.weight.dtype is torch.float64 else torch.float32


DECLARATION = Declaration(EmbeddingArguments)
DIFFERENTIABLE = DECLARATION.differentiable
"""The arguments that can have a gradient, in order."""
BANKS = ("w1", "b1", "w2", "b2", "low_rank_a", "low_rank_b", "position_offset")
"""The arguments that have a leading dimension K with ``entries``."""
