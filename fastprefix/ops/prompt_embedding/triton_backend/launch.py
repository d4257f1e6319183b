"""Choose the kernels, grids and tiles of a call and launch them.

PyTorch computes small plain sums and products: the gradient of a prompt without spans, DePT's backward pass without an
index, the sum of the parts, and the scatter to the table's gradient. All sums have a fixed order.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import random
from ...targets import Target, divide_up, target_of
from ..arguments import DECLARATION, DIFFERENTIABLE, EmbeddingArguments
from ..layout import allocate_gradient
from ..validation import check_values
from . import tiles

_PARTS = 32  # the most parts into which the backward pass splits its sums over tokens


def forward(*arguments: Any, target: Target | None = None) -> Tensor:
    """Return the embeddings [B, S + N, d]."""
    a = EmbeddingArguments(*arguments)
    target = target or target_of(a.weight.device)
    check_values(a)
    B, N = a.input_ids.shape
    S, d = a.prompt_length, a.weight.shape[1]
    output = torch.empty((B, S + N, d), dtype=a.weight.dtype, device=a.weight.device)
    if output.numel() == 0:
        return output
    prompt = None if S == 0 else _make_dense(a.prompt)
    table = (*_describe_ids(a), *_describe_table(a), prompt, _make_dense(a.prompt_spans), _make_dense(a.entries))
    positions = a.position_offset if a.low_rank_a is None else a.low_rank_a
    if positions is not None:
        r = 1 if a.low_rank_a is None else positions.shape[-1]
        tile = tiles.low_rank(r, a.weight.element_size())
        rows = min(B, 8) if a.entries is None else 1
        programs = divide_up(N, tile.BT) * divide_up(B, rows) + divide_up(B * S, tile.BT)
        factors = (_make_dense(positions), _make_dense(a.low_rank_b))
        sizes = (B, N, S, positions.shape[-2], d, r, a.offset_scale, rows)
        _launch(target, "low rank", (programs,), (*table, *factors, output, *sizes), tile)
        return output
    r = 1 if a.w1 is None else a.w1.shape[-1]
    tile = tiles.forward(r, a.weight.element_size())
    programs = _count_token_blocks(a, tile) + divide_up(B * S, tile.BT)
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
    needs = DECLARATION.name_needs(needs_grad)
    S = a.prompt_length
    gradients: dict[str, Tensor] = {}
    if "prompt" in needs:
        gradients["prompt"] = _differentiate_prompt(grad_output, a, target)
    dh = None
    if a.w1 is not None and needs & {"weight", "w1", "b1", "w2", "b2"}:
        dh = _differentiate_network(gradients, grad_output, a, needs, target)
    if needs & {"low_rank_a", "low_rank_b"}:
        if a.entries is None:
            _differentiate_low_rank(gradients, grad_output[:, S:], a)
        else:
            _differentiate_low_rank_bank(gradients, grad_output, a, needs, target)
    if "position_offset" in needs:
        gradients["position_offset"] = _differentiate_positions(grad_output, a, target)
    if "weight" in needs:
        de = grad_output[:, S:].float()
        if dh is not None and a.w1 is not None:
            de = de + _apply_w1(dh, a).view(de.shape)
        gradients["weight"] = torch.ops.aten.embedding_dense_backward(de, a.input_ids, a.weight.shape[0], -1, False)
    return [allocate_gradient(getattr(a, name)).copy_(gradients[name]) for name in DIFFERENTIABLE if name in needs]


def _differentiate_prompt(grad_output: Tensor, a: EmbeddingArguments, target: Target) -> Tensor:
    """Return the gradient of the prompt, or with spans the gradient of the store."""
    if a.prompt_spans is None:
        return grad_output[:, : a.prompt_length].sum(0, dtype=torch.float32)
    assert a.prompt is not None
    return _sum_spans(grad_output, a.prompt_spans, a.prompt_length, 1.0, allocate_gradient(a.prompt), target)


def _differentiate_network(
    gradients: dict[str, Tensor], grad_output: Tensor, a: EmbeddingArguments, needs: set[str], target: Target
) -> Tensor:
    """Add the network's gradients to ``gradients``, and return dh [B * N, r].

    dh is uninitialized in rows of the batch without an offset.
    """
    assert a.w1 is not None
    assert a.b1 is not None
    B, N = a.input_ids.shape
    r = a.w1.shape[-1]
    z, dh = (_allocate_floats(a, B * N, r) for _ in range(2))
    _launch_hidden(grad_output, a, z, dh, target)
    if "b1" in needs and a.entries is None:
        gradients["b1"] = dh.sum(0)
    elif "b1" in needs:
        of_rows = dh.view(B, N, r).sum(1, keepdim=True)
        gradients["b1"] = _sum_spans(of_rows, _list_spans(a, 1, 1), 1, 1.0, allocate_gradient(a.b1), target)
    dw1, dw2, db2 = _sum_weights(grad_output, a, z, dh, needs & {"w1", "w2", "b2"}, target)
    if dw1 is not None:
        gradients["w1"] = dw1
    if dw2 is not None:
        gradients["w2"] = a.offset_scale * dw2.mT
    if db2 is not None:
        gradients["b2"] = a.offset_scale * db2
    return dh


def _launch_hidden(grad_output: Tensor, a: EmbeddingArguments, z: Tensor | None, dh: Tensor, target: Target) -> None:
    """Fill z and dh, [B * N, r]. For DePT's pair, ``low_rank_b`` replaces w2, and only dh is filled."""
    w2 = a.low_rank_b if a.w1 is None else a.w2
    assert w2 is not None
    r, d = w2.shape[-2:]
    tile = tiles.hidden(r, a.weight.element_size())
    grid = (_count_token_blocks(a, tile), divide_up(r, tile.RP))
    if 0 in grid or d == 0:
        return
    network = tuple(_make_dense(x) for x in (a.entries, a.w1, a.b1, w2))
    sizes = (*a.input_ids.shape, a.prompt_length, d, r, a.offset_scale, *_describe_dropout(a))
    arguments = (*_describe_rows(a, grad_output), *network, a.dropout_seed, z, dh, *sizes)
    _launch(target, "hidden", grid, arguments, tile)


def _sum_weights(
    grad_output: Tensor, a: EmbeddingArguments, z: Tensor, dh: Tensor | None, needs: set[str], target: Target
) -> tuple[Tensor | None, ...]:
    """Return dw1 [d, r], dw2 [d, r] and db2 [d], or None for each gradient that is not needed.

    With an index they have a leading dimension K. dw2 and db2 do not include the offset scale. z is the hidden layer
    after the ReLU, [B * N, r], or for DePT's pair the rows of ``low_rank_a``.
    """
    if not needs:
        return None, None, None
    B, N = a.input_ids.shape
    d, r = a.weight.shape[1], z.shape[1]
    tile = tiles.weights(r, a.weight.element_size(), bank=a.entries is not None)
    bank = () if a.entries is None else (a.bank_size,)
    entries = bank[0] if bank else 1
    blocks = divide_up(B * N if a.entries is None else N, tile.BT)
    each = max(1, divide_up(blocks, max(1, _PARTS // max(1, entries))))
    parts = divide_up(blocks, each)
    dw1 = _allocate_floats(a, *bank, parts, d, r) if "w1" in needs else None
    dw2 = _allocate_floats(a, *bank, parts, d, r) if "w2" in needs else None
    db2 = _allocate_floats(a, *bank, parts, d) if "b2" in needs else None
    grid = (divide_up(d, tile.BD) * entries, parts, divide_up(r, tile.RP))
    if 0 not in grid:
        sizes = (B, N, a.prompt_length, d, r, each)
        arguments = (*_describe_rows(a, grad_output), _make_dense(a.entries), z, dh, dw1, dw2, db2, *sizes)
        _launch(target, "weights", grid, arguments, tile)
    return tuple(None if x is None else x.sum(len(bank)) for x in (dw1, dw2, db2))


def _differentiate_low_rank(gradients: dict[str, Tensor], dy: Tensor, a: EmbeddingArguments) -> None:
    assert a.low_rank_a is not None
    assert a.low_rank_b is not None
    N = dy.shape[1]
    summed = a.offset_scale * dy.sum(0, dtype=torch.float32)  # [N, d]: all rows share the offset of a position
    gradients["low_rank_a"] = summed.new_zeros(a.low_rank_a.shape)
    gradients["low_rank_a"][:N] = summed @ a.low_rank_b.float().T
    gradients["low_rank_b"] = a.low_rank_a[:N].float().T @ summed


def _differentiate_low_rank_bank(
    gradients: dict[str, Tensor], grad_output: Tensor, a: EmbeddingArguments, needs: set[str], target: Target
) -> None:
    """Add the gradients of a bank of DePT's pairs, computed as for a network whose hidden layer is ``low_rank_a``."""
    assert a.low_rank_a is not None
    assert a.low_rank_b is not None
    assert a.entries is not None
    B, N = a.input_ids.shape
    K, T, r = a.low_rank_a.shape
    if "low_rank_a" in needs:
        da, sums = _allocate_floats(a, B * N, r), allocate_gradient(a.low_rank_a)
        _launch_hidden(grad_output, a, None, da, target)
        _sum_spans(da.view(B, N, r), _list_spans(a, T, N), N, 1.0, sums.view(K * T, r), target)
        gradients["low_rank_a"] = sums
    if "low_rank_b" in needs:
        # The gathered rows have r columns, which is small compared to d. An empty bank has no entry to choose.
        choices = a.entries.clamp(min=0) if K > 0 else a.entries[:0]
        hidden = a.low_rank_a[:, :N].index_select(0, choices).view(-1, r)
        _, db, _ = _sum_weights(grad_output, a, hidden, None, {"w2"}, target)
        assert db is not None
        gradients["low_rank_b"] = a.offset_scale * db.mT


def _differentiate_positions(grad_output: Tensor, a: EmbeddingArguments, target: Target) -> Tensor:
    """Return the gradient of the dense offset, which is 0 at positions from N on."""
    assert a.position_offset is not None
    N, S = a.input_ids.shape[1], a.prompt_length
    *_, T, d = a.position_offset.shape
    if a.entries is None:
        summed = grad_output.new_zeros((T, d), dtype=torch.float32)
        summed[:N] = a.offset_scale * grad_output[:, S:].sum(0, dtype=torch.float32)
        return summed
    sums = allocate_gradient(a.position_offset)
    _sum_spans(grad_output, _list_spans(a, T, N), S + N, a.offset_scale, sums.view(-1, d), target)
    return sums


def _list_spans(a: EmbeddingArguments, positions: int, used: int) -> Tensor:
    """Return the span of each row in a bank [K * positions, ...]: the first ``used`` positions of the row's entry."""
    assert a.entries is not None
    entry = a.entries.long()
    return torch.stack([entry * positions, (entry >= 0) * used], 1)


def _sum_spans(rows: Tensor, spans: Tensor, last: int, scale: float, sums: Tensor, target: Target) -> Tensor:
    """Fill ``sums`` [P, width] with scaled sums over all copies of a store's vectors in ``rows`` [B, length, width].

    The copies of a row's span end right before position ``last``. Vectors without a copy get 0.
    """
    B, length, width = rows.shape
    P = sums.shape[0]
    tile = tiles.spans()
    grid = (divide_up(P, tile.BT), divide_up(width, tile.BD))
    if 0 not in grid:
        sizes = (B, P, length, last, width, scale)
        _launch(target, "spans", grid, (rows.contiguous(), spans.contiguous(), sums, *sizes), tile)
    return sums


def _apply_w1(dh: Tensor, a: EmbeddingArguments) -> Tensor:
    """Return dh w1^T, [B * N, d] or [B, N, d]."""
    assert a.w1 is not None
    if a.entries is None:
        return dh @ a.w1.float().T
    B, N = a.input_ids.shape
    d, r = a.w1.shape[-2:]
    if a.w1.shape[0] == 0:
        return dh.new_zeros(B, N, d)
    chosen = a.w1.index_select(0, a.entries.clamp(min=0)).float()  # [B, d, r]; the result [B, N, d] is allocated anyway
    return torch.bmm(dh.view(B, N, r), chosen.mT).masked_fill_((a.entries < 0)[:, None, None], 0.0)


def _count_token_blocks(a: EmbeddingArguments, tile: tiles.EmbeddingTile) -> int:
    """Return the number of blocks of tokens. With an index, no block spans two rows of the batch."""
    B, N = a.input_ids.shape
    return divide_up(B * N, tile.BT) if a.entries is None else B * divide_up(N, tile.BT)


def _allocate_floats(a: EmbeddingArguments, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=a.weight.device)


def _make_dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _describe_ids(a: EmbeddingArguments) -> tuple[Any, ...]:
    return (a.input_ids, *a.input_ids.stride())


def _describe_table(a: EmbeddingArguments) -> tuple[Any, ...]:
    return (a.weight, *a.weight.stride())


def _describe_rows(a: EmbeddingArguments, grad_output: Tensor) -> tuple[Any, ...]:
    return (*_describe_ids(a), *_describe_table(a), grad_output, *grad_output.stride())


def _describe_dropout(a: EmbeddingArguments) -> tuple[int, float]:
    return random.find_threshold(a.dropout_p), 0.0 if a.dropout_p == 1.0 else 1.0 / (1.0 - a.dropout_p)


@functools.cache
def _load_kernels() -> dict[str, Any]:
    """Import Triton and the kernels."""
    from . import kernels

    return {
        "forward": kernels.prompt_embedding_fwd_kernel,
        "low rank": kernels.prompt_embedding_low_rank_fwd_kernel,
        "hidden": kernels.prompt_embedding_bwd_hidden_kernel,
        "weights": kernels.prompt_embedding_bwd_weights_kernel,
        "spans": kernels.prompt_embedding_bwd_spans_kernel,
    }


def _launch(
    target: Target, name: str, grid: tuple[int, ...], arguments: tuple[Any, ...], tile: tiles.EmbeddingTile
) -> None:
    constants = {"BT": tile.BT, "BD": tile.BD} | ({"RP": tile.RP} if tile.RP else {})
    target.launch(_load_kernels()[name], grid, arguments, constants, tile)
