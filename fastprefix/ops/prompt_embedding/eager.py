"""The eager backend: forward and backward formulas in PyTorch operations, for any device and floating-point dtype.

The forward pass saves no intermediate results. The backward pass gathers the embeddings again. Sums are computed in
float32, or float64 for float64 inputs. Variable names follow the formulas, and ``dy`` is the upstream gradient of the
token embeddings. The entries of a bank are read on the host. Each entry is then applied to all of its rows together,
and no entry is copied per row.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import random
from .arguments import BANKS, DIFFERENTIABLE, EmbeddingArguments
from .layout import allocate_gradient
from .validation import check_values


def forward(*arguments: Any) -> Tensor:
    """Return the embeddings [B, S + N, d]."""
    a = EmbeddingArguments(*arguments)
    check_values(a)
    batch, tokens = a.input_ids.shape
    output = a.weight.new_empty(batch, a.prompt_length + tokens, a.weight.shape[1])
    if a.prompt is not None:
        output[:, : a.prompt_length] = a.prompt if a.prompt_spans is None else _gather_prompts(a)
    if a.entries is None:
        output[:, a.prompt_length :] = _embed_tokens(a)
    for part in _split_by_entry(a):
        rows = _embed_tokens(part.arguments, part.members)
        output[part.members, a.prompt_length :] = rows.to(output.dtype)
    return output


def backward(grad_output: Tensor, needs_grad: Sequence[bool], *arguments: Any) -> list[Tensor]:
    """Return the requested gradients in the order of ``DIFFERENTIABLE``."""
    a = EmbeddingArguments(*arguments)
    needs = dict(zip(DIFFERENTIABLE, needs_grad, strict=True))
    dy = grad_output[:, a.prompt_length :].to(a.accumulator)
    gradients: dict[str, Tensor] = {}
    if needs["prompt"]:
        front = grad_output[:, : a.prompt_length].to(a.accumulator)
        gradients["prompt"] = front.sum(0) if a.prompt_spans is None else _scatter_prompts(front, a)
    if a.entries is None:
        de = _differentiate_offset(gradients, dy, a, needs)
    else:
        de = dy.clone() if needs["weight"] else dy
        gradients |= {name: torch.zeros_like(getattr(a, name)) for name in BANKS if needs[name]}
        for part in _split_by_entry(a):
            of_entry: dict[str, Tensor] = {}
            rows = _differentiate_offset(of_entry, dy[part.members], part.arguments, needs, part.members)
            if needs["weight"]:
                de[part.members] = rows
            for name in of_entry.keys() & gradients.keys():
                gradients[name][part.entry] = of_entry[name].to(a.weight.dtype)
    if needs["weight"]:
        gradients["weight"] = torch.ops.aten.embedding_dense_backward(de, a.input_ids, a.weight.shape[0], -1, False)
    return [allocate_gradient(getattr(a, name)).copy_(gradients[name]) for name in DIFFERENTIABLE if needs[name]]


class _Part(NamedTuple):
    """The rows of the batch that use one entry of a bank."""

    entry: int  # -1: no offset
    members: Tensor  # the indices of the rows
    arguments: EmbeddingArguments  # a call without an index for these rows


def _split_by_entry(a: EmbeddingArguments) -> Iterator[_Part]:
    """Yield the parts of a call with an index in the order of the entries, and nothing without an index."""
    entries = [] if a.entries is None else a.entries.tolist()
    banks = {name: bank for name in BANKS if (bank := getattr(a, name)) is not None}
    for entry in sorted(set(entries)):
        members = torch.tensor([row for row, used in enumerate(entries) if used == entry], device=a.weight.device)
        chosen: dict[str, Any] = {name: None if entry < 0 else bank[entry] for name, bank in banks.items()}
        yield _Part(entry, members, a._replace(input_ids=a.input_ids[members], entries=None, **chosen))


def _locate_prompts(a: EmbeddingArguments) -> tuple[Tensor, Tensor]:
    """Return the store row of each prompt position [B, S], and a mask [B, S] that is False where there is none."""
    assert a.prompt_spans is not None
    start, length = a.prompt_spans[:, :1], a.prompt_spans[:, 1:]
    place = torch.arange(a.prompt_length, device=start.device) - (a.prompt_length - length)
    return torch.where(place < 0, 0, start + place), place >= 0


def _gather_prompts(a: EmbeddingArguments) -> Tensor:
    """Return the embeddings of the prompt positions, [B, S, d]."""
    assert a.prompt is not None
    row, there = _locate_prompts(a)
    if a.prompt.shape[0] == 0:
        return a.prompt.new_zeros(*row.shape, a.prompt.shape[1])
    return torch.where(there[..., None], torch.nn.functional.embedding(row, a.prompt), 0)


def _scatter_prompts(front: Tensor, a: EmbeddingArguments) -> Tensor:
    """Sum the gradients of the prompt positions into the gradient of the store, [P, d]."""
    assert a.prompt is not None
    row, there = _locate_prompts(a)
    nowhere = a.prompt.shape[0]
    row = torch.where(there, row, nowhere)
    summed: Tensor = torch.ops.aten.embedding_dense_backward(front, row, nowhere + 1, nowhere, False)
    return summed[:nowhere]


def _embed_tokens(a: EmbeddingArguments, members: Tensor | None = None) -> Tensor:
    """Return the token embeddings [B, N, d]. ``members`` lists the indices of the rows, or is None for all rows."""
    rows = torch.nn.functional.embedding(a.input_ids, a.weight)
    offset = _compute_offset(a, rows, members)
    return rows if offset is None else rows.to(a.accumulator) + offset


class _Hidden(NamedTuple):
    """The hidden layer of the network for the gathered embeddings."""

    e: Tensor  # gathered embeddings [B, N, d]
    h: Tensor  # hidden units before the ReLU and after dropout [B, N, r]
    keep: Tensor | float  # dropout factors [B, N, r], or 1


def _compute_hidden(a: EmbeddingArguments, rows: Tensor, members: Tensor | None) -> _Hidden:
    assert a.w1 is not None
    assert a.b1 is not None
    e = rows.to(a.accumulator)
    h = e @ a.w1.to(a.accumulator) + a.b1
    keep: Tensor | float = 1.0
    if a.dropout_seed is not None:
        keep = random.draw_factor(a.dropout_seed, a.dropout_p, h.shape, members).to(h.dtype)
    return _Hidden(e, h * keep, keep)


def _compute_offset(a: EmbeddingArguments, rows: Tensor, members: Tensor | None) -> Tensor | None:
    """Compute the offset of the tokens, [B, N, d] or [N, d], in the accumulator's dtype, or None without an offset."""
    if a.w1 is not None:
        assert a.w2 is not None
        assert a.b2 is not None
        z = torch.relu(_compute_hidden(a, rows, members).h)
        return a.offset_scale * (z @ a.w2.to(a.accumulator) + a.b2)
    if a.low_rank_a is not None:
        assert a.low_rank_b is not None
        positions = a.low_rank_a[: rows.shape[1]].to(a.accumulator)
        return a.offset_scale * (positions @ a.low_rank_b.to(a.accumulator))
    if a.position_offset is not None:
        return a.offset_scale * a.position_offset[: rows.shape[1]].to(a.accumulator)
    return None


def _differentiate_offset(
    gradients: dict[str, Tensor],
    dy: Tensor,
    a: EmbeddingArguments,
    needs: dict[str, bool],
    members: Tensor | None = None,
) -> Tensor:
    """Add the offset's gradients to ``gradients``, and return de, the gradient of the gathered embeddings."""
    if a.w1 is not None and any(needs[name] for name in ("weight", "w1", "b1", "w2", "b2")):
        return _differentiate_ffn(gradients, dy, a, members)
    if a.low_rank_a is not None and (needs["low_rank_a"] or needs["low_rank_b"]):
        _differentiate_low_rank(gradients, dy, a)
    if a.position_offset is not None and needs["position_offset"]:
        gradients["position_offset"] = dy.new_zeros(a.position_offset.shape)
        gradients["position_offset"][: dy.shape[1]] = _sum_positions(dy, a)
    return dy


def _differentiate_ffn(
    gradients: dict[str, Tensor], dy: Tensor, a: EmbeddingArguments, members: Tensor | None
) -> Tensor:
    """Add the network's gradients to ``gradients``, and return de, the gradient of the gathered embeddings."""
    assert a.w1 is not None
    assert a.w2 is not None
    e, h, keep = _compute_hidden(a, torch.nn.functional.embedding(a.input_ids, a.weight), members)
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
    summed = _sum_positions(dy, a)
    gradients["low_rank_a"] = summed.new_zeros(a.low_rank_a.shape)
    gradients["low_rank_a"][:tokens] = summed @ a.low_rank_b.to(a.accumulator).T
    gradients["low_rank_b"] = a.low_rank_a[:tokens].to(a.accumulator).T @ summed


def _sum_positions(dy: Tensor, a: EmbeddingArguments) -> Tensor:
    """Return the gradient of each position's offset, [N, d], summed over the rows, which share the offset."""
    return a.offset_scale * dy.sum(0)
