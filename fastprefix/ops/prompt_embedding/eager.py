"""The eager backend: forward and backward formulas in PyTorch operations, on any device and floating dtype.

Nothing is kept for the backward pass but the ids and the dropout seed: rows are gathered again. Sums are made in
float32 (float64 for float64). The letters are those of the formulas; ``dy`` is the gradient of the token rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import random
from .arguments import DIFFERENTIABLE, EmbeddingArguments
from .validation import check_ids


def forward(*arguments: Any) -> Tensor:
    """Return the embeddings [B, S + N, d]."""
    a = EmbeddingArguments(*arguments)
    check_ids(a.input_ids, a.weight.shape[0])
    batch, tokens = a.input_ids.shape
    output = a.weight.new_empty(batch, a.prompt_length + tokens, a.weight.shape[1])
    if a.prompt is not None:
        output[:, : a.prompt_length] = a.prompt
    rows = torch.nn.functional.embedding(a.input_ids, a.weight)
    offset = _compute_offset(a, rows)
    output[:, a.prompt_length :] = rows if offset is None else rows.to(a.accumulator) + offset
    return output


def backward(grad_output: Tensor, needs_grad: Sequence[bool], *arguments: Any) -> list[Tensor]:
    """Return the requested gradients in the order of ``DIFFERENTIABLE``."""
    a = EmbeddingArguments(*arguments)
    needs = dict(zip(DIFFERENTIABLE, needs_grad, strict=True))
    dy = grad_output[:, a.prompt_length :].to(a.accumulator)
    gradients: dict[str, Tensor] = {}
    if needs["prompt"]:
        gradients["prompt"] = grad_output[:, : a.prompt_length].to(a.accumulator).sum(0)
    de = dy
    if a.w1 is not None and any(needs[name] for name in ("weight", "w1", "b1", "w2", "b2")):
        de = _differentiate_ffn(gradients, dy, a)
    if a.low_rank_a is not None and (needs["low_rank_a"] or needs["low_rank_b"]):
        _differentiate_low_rank(gradients, dy, a)
    if needs["weight"]:
        gradients["weight"] = torch.ops.aten.embedding_dense_backward(de, a.input_ids, a.weight.shape[0], -1, False)
    results = []
    for name in (name for name in DIFFERENTIABLE if needs[name]):
        tensor: Tensor = getattr(a, name)
        results.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(gradients[name]))
    return results


class _Hidden(NamedTuple):
    """The network on the gathered rows."""

    e: Tensor  # [B, N, d]
    h: Tensor  # before the ReLU, after dropout [B, N, r]
    keep: Tensor | float  # dropout's factor


def _compute_hidden(a: EmbeddingArguments, rows: Tensor) -> _Hidden:
    assert a.w1 is not None
    assert a.b1 is not None
    e = rows.to(a.accumulator)
    h = e @ a.w1.to(a.accumulator) + a.b1
    keep: Tensor | float = 1.0
    if a.dropout_seed is not None:
        keep = random.draw_factor(a.dropout_seed, a.dropout_p, h.shape).to(h.dtype)
    return _Hidden(e, h * keep, keep)


def _compute_offset(a: EmbeddingArguments, rows: Tensor) -> Tensor | None:
    """Compute the offset of the rows, [B, N, d] or [N, d], in the accumulator's dtype."""
    if a.w1 is not None:
        assert a.w2 is not None
        assert a.b2 is not None
        z = torch.relu(_compute_hidden(a, rows).h)
        return a.offset_scale * (z @ a.w2.to(a.accumulator) + a.b2)
    if a.low_rank_a is not None:
        assert a.low_rank_b is not None
        positions = a.low_rank_a[: rows.shape[1]].to(a.accumulator)
        return a.offset_scale * (positions @ a.low_rank_b.to(a.accumulator))
    return None


def _differentiate_ffn(gradients: dict[str, Tensor], dy: Tensor, a: EmbeddingArguments) -> Tensor:
    """Enter the network's gradients; returns de, the gradient of the gathered rows."""
    assert a.w1 is not None
    assert a.w2 is not None
    e, h, keep = _compute_hidden(a, torch.nn.functional.embedding(a.input_ids, a.weight))
    s = a.offset_scale
    dh = s * (dy @ a.w2.to(a.accumulator).T) * (h > 0) * keep
    gradients["b2"] = s * dy.sum((0, 1))
    gradients["w2"] = s * torch.einsum("bnr,bnd->rd", torch.relu(h), dy)
    gradients["b1"] = dh.sum((0, 1))
    gradients["w1"] = torch.einsum("bnd,bnr->dr", e, dh)
    return dy + dh @ a.w1.to(a.accumulator).T


def _differentiate_low_rank(gradients: dict[str, Tensor], dy: Tensor, a: EmbeddingArguments) -> None:
    assert a.low_rank_a is not None
    assert a.low_rank_b is not None
    tokens = dy.shape[1]
    summed = a.offset_scale * dy.sum(0)  # [N, d]: a position's offset is the same in every row of the batch
    gradients["low_rank_a"] = summed.new_zeros(a.low_rank_a.shape)
    gradients["low_rank_a"][:tokens] = summed @ a.low_rank_b.to(a.accumulator).T
    gradients["low_rank_b"] = a.low_rank_a[:tokens].to(a.accumulator).T @ summed
