"""The reference of the prompt embedding, written as in the papers.

It supports any floating-point dtype, and autograd computes its gradients. Every backend is tested against it in
float64.
"""

import torch
from torch import Tensor

from .. import random
from ..declaration import accept
from .arguments import EmbeddingArguments
from .validation import canonical_arguments, check_values


@accept(canonical_arguments)
def prompt_embedding(arguments: EmbeddingArguments) -> Tensor:
    """Compute the prompt embedding in plain PyTorch.

    The arguments and errors are the same as in ``fastprefix.prompt_embedding``, without ``backend``.
    """
    return embed(arguments)


def embed(a: EmbeddingArguments) -> Tensor:
    """Compute the formula on canonical arguments."""
    check_values(a)
    e = a.weight[a.input_ids]  # [B, N, d]
    N = e.shape[1]
    if a.w1 is not None and a.b1 is not None and a.w2 is not None and a.b2 is not None:
        w1, b1, w2, b2 = (_choose(a, bank) for bank in (a.w1, a.b1, a.w2, a.b2))
        if a.entries is not None:
            b1, b2 = b1[:, None], b2[:, None]  # [B, 1, r], [B, 1, d]
        h = _drop(a, e @ w1 + b1)  # [B, N, r]
        e = e + a.offset_scale * (torch.relu(h) @ w2 + b2)
    if a.low_rank_a is not None and a.low_rank_b is not None:
        e = e + a.offset_scale * (_choose(a, a.low_rank_a) @ _choose(a, a.low_rank_b))[..., :N, :]
    if a.position_offset is not None:
        e = e + a.offset_scale * _choose(a, a.position_offset)[..., :N, :]
    if a.prompt is None:
        return e
    return torch.cat([_lay_out_prompt(a, a.prompt), e], dim=1)


def _choose(a: EmbeddingArguments, bank: Tensor) -> Tensor:
    """Return the bank's entry for each row, ``[B, ...]``, with zeros for -1. Without ``entries``, return ``bank``."""
    if a.entries is None:
        return bank
    return torch.cat([bank, bank.new_zeros(1, *bank.shape[1:])])[a.entries]


def _lay_out_prompt(a: EmbeddingArguments, prompt: Tensor) -> Tensor:
    """Return the prompt of each row, ``[B, S, d]``, padded with zeros on the left if it is shorter than S."""
    if a.prompt_spans is None:
        return prompt.expand(a.input_ids.shape[0], -1, -1)
    start, length = a.prompt_spans[:, :1], a.prompt_spans[:, 1:]
    place = torch.arange(a.prompt_length, device=prompt.device) - (a.prompt_length - length)  # index in the span [B, S]
    row = torch.where(place < 0, -1, start + place)
    return torch.cat([prompt, prompt.new_zeros(1, prompt.shape[1])])[row]


def _drop(a: EmbeddingArguments, h: Tensor) -> Tensor:
    if a.dropout_seed is None:
        return h
    return h * random.draw_factor(a.dropout_seed, a.dropout_p, h.shape).to(h.dtype)
