"""The prompt embedding as the papers write it. Any floating dtype; the gradients are autograd's.

This is the specification: every backend is tested against it in float64.
"""

import torch
from torch import Tensor

from .. import random
from ..declaration import accept
from .arguments import EmbeddingArguments
from .validation import canonical_arguments, check_ids


@accept(canonical_arguments)
def prompt_embedding(arguments: EmbeddingArguments) -> Tensor:
    """Compute the prompt embedding in plain PyTorch, with arguments and errors of ``fastprefix.prompt_embedding``."""
    return embed(arguments)


def embed(a: EmbeddingArguments) -> Tensor:
    """Compute the formula on canonical arguments."""
    check_ids(a.input_ids, a.weight.shape[0])
    e = a.weight[a.input_ids]  # [B, N, d]
    if a.w1 is not None and a.b1 is not None and a.w2 is not None and a.b2 is not None:
        h = _drop(a, e @ a.w1 + a.b1)  # [B, N, r]
        e = e + a.offset_scale * (torch.relu(h) @ a.w2 + a.b2)
    if a.low_rank_a is not None and a.low_rank_b is not None:
        e = e + a.offset_scale * (a.low_rank_a @ a.low_rank_b)[: e.shape[1]]
    if a.prompt is None:
        return e
    return torch.cat([a.prompt.expand(e.shape[0], -1, -1), e], dim=1)


def _drop(a: EmbeddingArguments, h: Tensor) -> Tensor:
    if a.dropout_seed is None:
        return h
    return h * random.draw_factor(a.dropout_seed, a.dropout_p, h.shape).to(h.dtype)
