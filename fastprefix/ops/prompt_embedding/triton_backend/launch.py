"""From canonical arguments to kernel launches: which kernels a call needs, on what grid, with which tiles.

What is small, and a plain sum or product, is left to PyTorch: the prompt's gradient, DePT's backward pass, the sum of
the parts, the scatter to the table's gradient. All sums are in a fixed order.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import random
from ...targets import Target, divide_up, target_of
from ..arguments import DIFFERENTIABLE, EmbeddingArguments
from ..validation import check_ids
from . import tiles

_PARTS = 32  # of the tokens, in the sums of the backward pass


def forward(*arguments: Any, target: Target | None = None) -> Tensor:
    """Return the embeddings [B, S + N, d]."""
    a = EmbeddingArguments(*arguments)
    target = target or target_of(a.weight.device)
    check_ids(a.input_ids, a.weight.shape[0])
    B, N = a.input_ids.shape
    S, d = a.prompt_length, a.weight.shape[1]
    output = torch.empty((B, S + N, d), dtype=a.weight.dtype, device=a.weight.device)
    if output.numel() == 0:
        return output
    prompt = None if S == 0 else _make_dense(a.prompt)
    table = (*_describe_ids(a), *_describe_table(a), prompt)
    if a.low_rank_a is not None:
        tile = tiles.low_rank(a.low_rank_a.shape[1], a.weight.element_size())
        rows = min(B, 8)
        programs = divide_up(N, tile.BT) * divide_up(B, rows) + divide_up(B * S, tile.BT)
        factors = (_make_dense(a.low_rank_a), _make_dense(a.low_rank_b))
        sizes = (B, N, S, d, a.low_rank_a.shape[1], a.offset_scale, rows)
        _launch(target, "low rank", (programs,), (*table, *factors, output, *sizes), tile)
        return output
    r = 1 if a.w1 is None else a.w1.shape[1]
    tile = tiles.forward(r, a.weight.element_size())
    programs = divide_up(B * N, tile.BT) + divide_up(B * S, tile.BT)
    network = tuple(_make_dense(x) for x in (a.w1, a.b1, a.w2, a.b2))
    handed = (*table, *network, a.dropout_seed, output, B, N, S, d, r, a.offset_scale, *_describe_dropout(a))
    _launch(target, "forward", (programs,), handed, tile)
    return output


def backward(
    grad_output: Tensor, needs_grad: Sequence[bool], *arguments: Any, target: Target | None = None
) -> list[Tensor]:
    """Return the requested gradients in the order of ``DIFFERENTIABLE``."""
    a = EmbeddingArguments(*arguments)
    target = target or target_of(a.weight.device)
    needs = {name for name, needed in zip(DIFFERENTIABLE, needs_grad, strict=True) if needed}
    S = a.prompt_length
    gradients: dict[str, Tensor] = {}
    if "prompt" in needs:
        gradients["prompt"] = grad_output[:, :S].sum(0, dtype=torch.float32)
    dh = None
    if a.w1 is not None and needs & {"weight", "w1", "b1", "w2", "b2"}:
        dh = _differentiate_network(gradients, grad_output, a, needs, target)
    if needs & {"low_rank_a", "low_rank_b"}:
        _differentiate_low_rank(gradients, grad_output[:, S:], a)
    if "weight" in needs:
        de = grad_output[:, S:].float()
        if dh is not None and a.w1 is not None:
            de = de + (dh @ a.w1.float().T).view(de.shape)
        gradients["weight"] = torch.ops.aten.embedding_dense_backward(de, a.input_ids, a.weight.shape[0], -1, False)
    results = []
    for name in (name for name in DIFFERENTIABLE if name in needs):
        tensor: Tensor = getattr(a, name)
        results.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(gradients[name]))
    return results


def _differentiate_network(
    gradients: dict[str, Tensor], grad_output: Tensor, a: EmbeddingArguments, needs: set[str], target: Target
) -> Tensor:
    """Enter the network's gradients; returns dh [B * N, r]."""
    assert a.w1 is not None
    B, N = a.input_ids.shape
    (d, r), S, s = a.w1.shape, a.prompt_length, a.offset_scale
    tile = tiles.hidden(r, a.weight.element_size())
    blocks = divide_up(B * N, tile.BT)
    each = max(1, divide_up(blocks, _PARTS))
    parts = divide_up(blocks, each)

    def allocate_floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=a.weight.device)

    z, dh = allocate_floats(B * N, r), allocate_floats(B * N, r)
    dw1 = allocate_floats(parts, d, r) if "w1" in needs else None
    dw2 = allocate_floats(parts, d, r) if "w2" in needs else None
    db2 = allocate_floats(parts, d) if "b2" in needs else None
    if B * N * d > 0:
        rows = (*_describe_ids(a), *_describe_table(a), grad_output, *grad_output.stride())
        network = tuple(_make_dense(x) for x in (a.w1, a.b1, a.w2))
        arguments = (*rows, *network, a.dropout_seed, z, dh, B, N, S, d, r, s, *_describe_dropout(a))
        _launch(target, "hidden", (blocks, divide_up(r, tile.RP)), arguments, tile)
        if needs & {"w1", "w2", "b2"}:
            tile = tiles.weights(r, a.weight.element_size())  # of as many tokens
            grid = (divide_up(d, tile.BD), parts, divide_up(r, tile.RP))
            arguments = (*rows, z, dh, dw1, dw2, db2, B, N, S, d, r, each)
            _launch(target, "weights", grid, arguments, tile)
    if "b1" in needs:
        gradients["b1"] = dh.sum(0)
    if dw1 is not None:
        gradients["w1"] = dw1.sum(0)
    if dw2 is not None:
        gradients["w2"] = s * dw2.sum(0).T
    if db2 is not None:
        gradients["b2"] = s * db2.sum(0)
    return dh


def _differentiate_low_rank(gradients: dict[str, Tensor], dy: Tensor, a: EmbeddingArguments) -> None:
    assert a.low_rank_a is not None
    assert a.low_rank_b is not None
    N = dy.shape[1]
    summed = a.offset_scale * dy.sum(0, dtype=torch.float32)  # [N, d]: all rows of the batch share a position's offset
    gradients["low_rank_a"] = summed.new_zeros(a.low_rank_a.shape)
    gradients["low_rank_a"][:N] = summed @ a.low_rank_b.float().T
    gradients["low_rank_b"] = a.low_rank_a[:N].float().T @ summed


def _make_dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _describe_ids(a: EmbeddingArguments) -> tuple[Any, ...]:
    return (a.input_ids, *a.input_ids.stride())


def _describe_table(a: EmbeddingArguments) -> tuple[Any, ...]:
    return (a.weight, *a.weight.stride())


def _describe_dropout(a: EmbeddingArguments) -> tuple[int, float]:
    return random.find_threshold(a.dropout_p), 0.0 if a.dropout_p == 1.0 else 1.0 / (1.0 - a.dropout_p)


@functools.cache
def _load_kernels() -> dict[str, Any]:
    """Import the kernels, and Triton with them."""
    from . import kernels

    return {
        "forward": kernels.prompt_embedding_fwd_kernel,
        "low rank": kernels.prompt_embedding_low_rank_fwd_kernel,
        "hidden": kernels.prompt_embedding_bwd_hidden_kernel,
        "weights": kernels.prompt_embedding_bwd_weights_kernel,
    }


def _launch(
    target: Target, name: str, grid: tuple[int, ...], arguments: tuple[Any, ...], tile: tiles.EmbeddingTile
) -> None:
    target.launch(_load_kernels()[name], grid, arguments, {"BT": tile.BT, "BD": tile.BD, "RP": tile.RP}, tile)
