"""Choose the kernels, grids and tiles of a call and launch them.

PyTorch computes DePT's backward pass without an index and the scatter to the table's gradient. All sums have a fixed
order.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import random
from ...replay import Replays
from ...targets import Target, divide_up, find_target
from ..arguments import DECLARATION, DIFFERENTIABLE, EmbeddingArguments
from ..layout import allocate_gradient
from ..validation import check_values
from . import tiles

_ROWS = 8  # the most rows of the batch for which a program of the low-rank forward pass uses an offset
_WAVES = 4  # its programs per multiprocessor, below which fewer rows share an offset


class _Parts(NamedTuple):
    """The float32 parts of the network's gradients, ``[K, parts, ...]`` with an index and ``[parts, ...]`` without."""

    w1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    number: int  # of parts


class _HiddenResults(NamedTuple):
    """The results of the backward kernel of the hidden layer, for all tokens."""

    z: Tensor | None  # the hidden layer after the ReLU and a column of ones, in the table's dtype, [B * N, RS]
    dh: Tensor | None  # the gradient of h, in the same form
    exact: Tensor | None  # the gradient of h, float32 [B * N, r]
    db1: Tensor | None  # its sums over blocks of tokens, float32 [blocks, r]


_TENSORS = DECLARATION.tensors
_REPLAYS = Replays()


def forward(*arguments: Any, target: Target | None = None) -> Tensor:
    """Return the embeddings [B, S + N, d]."""
    a = EmbeddingArguments(*arguments)
    check_values(a)
    output: Tensor = _run(_forward, a, target)
    return output


def backward(
    grad_output: Tensor, needs_grad: Sequence[bool], *arguments: Any, target: Target | None = None
) -> list[Tensor]:
    """Return the requested gradients in the order of ``DIFFERENTIABLE``."""
    gradients: list[Tensor] = _run(_backward, EmbeddingArguments(*arguments), target, (grad_output,), tuple(needs_grad))
    return gradients


def _run(
    function: Callable[..., Any],
    a: EmbeddingArguments,
    target: Target | None,
    tensors: tuple[Tensor, ...] = (),
    *options: Hashable,
) -> Any:
    """Return ``function(a, target, *tensors, *options)``, or the same by repeating an earlier call of the same kind."""
    return _REPLAYS.run_function(function, a, _TENSORS, target or find_target(a.weight.device), tensors, options)


def _forward(a: EmbeddingArguments, target: Target) -> Tensor:
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
        columns = divide_up(d, tile.BD)
        rows = _choose_rows(B, divide_up(N, tile.BT) * columns, target) if a.entries is None else 1
        programs = (divide_up(N, tile.BT) * divide_up(B, rows) + divide_up(B * S, tile.BT)) * columns
        factors = (_make_dense(positions), _make_dense(a.low_rank_b))
        sizes = (B, N, S, positions.shape[-2], d, a.offset_scale, rows)
        _launch(target, "low rank", (programs,), (*table, *factors, output, *sizes), tile, R=r)
        return output
    r = 1 if a.w1 is None else a.w1.shape[-1]
    tile = (
        tiles.copy(d, a.weight.element_size())
        if a.w1 is None
        else tiles.forward(r, a.weight.element_size(), target.architecture)
    )
    columns = divide_up(d, tile.BD)
    programs = _count_token_blocks(a, tile) * (columns if a.w1 is None else 1) + divide_up(B * S, tile.BT) * columns
    network = tuple(_make_dense(x) for x in (a.w1, a.b1, a.w2, a.b2))
    handed = (*table, *network, a.dropout_seed, output, B, N, S, d, a.offset_scale, *_describe_dropout(a))
    _launch(target, "forward", (programs,), handed, tile, R=r, AHEAD=_loads_ahead(a, tile))
    return output


def _backward(a: EmbeddingArguments, target: Target, grad_output: Tensor, needs_grad: tuple[bool, ...]) -> list[Tensor]:
    needs = DECLARATION.name_needs(needs_grad)
    S = a.prompt_length
    gradients: dict[str, Tensor] = {}
    if "prompt" in needs and a.prompt_spans is not None:
        gradients["prompt"] = _sum_spans(
            grad_output, a.prompt_spans, S, 1.0, allocate_gradient(_require(a.prompt)), target
        )
    parts = _Parts(None, None, None, 0)
    hidden = _HiddenResults(None, None, None, None)
    if a.w1 is not None and needs & {"weight", "w1", "b1", "w2", "b2"}:
        hidden = _differentiate_hidden(grad_output, a, needs, target)
        parts = _sum_weights(grad_output, a, hidden.z, hidden.dh, needs & {"w1", "w2", "b2"}, target)
    _finish_sums(gradients, grad_output, a, needs, hidden.db1, parts, target)
    if needs & {"low_rank_a", "low_rank_b"}:
        if a.entries is None:
            _differentiate_low_rank(gradients, grad_output[:, S:], a)
        else:
            _differentiate_low_rank_bank(gradients, grad_output, a, needs, target)
    if "position_offset" in needs:
        gradients["position_offset"] = _differentiate_positions(grad_output, a, target)
    if "weight" in needs:
        de = grad_output[:, S:].float()
        if hidden.exact is not None:
            de = de + _apply_w1(hidden.exact, a).view(de.shape)
        gradients["weight"] = torch.ops.aten.embedding_dense_backward(de, a.input_ids, a.weight.shape[0], -1, False)
    return [gradients[name].to(a.weight.dtype).contiguous() for name in DIFFERENTIABLE if name in needs]


def _differentiate_hidden(
    grad_output: Tensor, a: EmbeddingArguments, needs: set[str], target: Target
) -> _HiddenResults:
    """Compute what the gradients of the network need. Rows of the batch without an offset are uninitialized."""
    r = _require(a.w1).shape[-1]
    tile = tiles.hidden(r, a.weight.element_size(), target.architecture)
    tokens, padded = a.input_ids.numel(), _pad(r)
    hidden = _HiddenResults(
        z=a.weight.new_empty(tokens, padded) if "w2" in needs or ("b2" in needs and padded > r) else None,
        dh=a.weight.new_empty(tokens, padded) if "w1" in needs else None,
        exact=_allocate_floats(a, tokens, r) if "weight" in needs else None,
        db1=_allocate_floats(a, _count_token_blocks(a, tile), r) if "b1" in needs else None,
    )
    if any(x is not None for x in hidden):
        _launch_hidden(grad_output, a, hidden, target)
    return hidden


def _launch_hidden(grad_output: Tensor, a: EmbeddingArguments, hidden: _HiddenResults, target: Target) -> None:
    """Fill the results of the hidden layer. For DePT, ``low_rank_b`` replaces w2, without z and db1."""
    w2 = _require(a.low_rank_b if a.w1 is None else a.w2)
    r, d = w2.shape[-2:]
    tile = tiles.hidden(r, a.weight.element_size(), target.architecture)
    grid = (_count_token_blocks(a, tile), divide_up(r, tile.RP))
    if 0 in grid:
        return
    network = tuple(_make_dense(x) for x in (a.entries, a.w1, a.b1, w2))
    sizes = (*a.input_ids.shape, a.prompt_length, d, a.offset_scale, *_describe_dropout(a))
    arguments = (*_describe_inputs(a, grad_output), *network, a.dropout_seed, *hidden, *sizes)
    _launch(target, "hidden", grid, arguments, tile, R=r, RS=_pad(r), AHEAD=_loads_ahead(a, tile))


def _sum_weights(
    grad_output: Tensor, a: EmbeddingArguments, z: Tensor | None, dh: Tensor | None, needs: set[str], target: Target
) -> _Parts:
    """Return parts of dw1 [d, r], dw2 [r, d] and db2 [d], or None for each gradient that is not needed.

    dw2 and db2 do not include the offset scale. ``z`` and ``dh`` are as in ``_HiddenResults``, or for DePT's pair ``z``
    has the rows of ``low_rank_a``.
    """
    if not needs:
        return _Parts(None, None, None, 0)
    B, N = a.input_ids.shape
    r, d = _require(a.low_rank_b if a.w1 is None else a.w2).shape[-2:]
    tile = tiles.weights(r, a.weight.element_size(), target.architecture, bank=a.entries is not None)
    bank = () if a.entries is None else (a.bank_size,)
    columns, ranks = divide_up(d, tile.BD) * (bank[0] if bank else 1), divide_up(r, tile.RP)
    blocks = divide_up(B * N if a.entries is None else N, tile.BT)
    each = max(1, divide_up(blocks, max(1, tile.resident * target.processors // max(1, columns * ranks))))
    parts = divide_up(blocks, each)
    sums = _Parts(
        w1=_allocate_floats(a, *bank, parts, d, r) if "w1" in needs else None,
        w2=_allocate_floats(a, *bank, parts, r, d) if "w2" in needs else None,
        b2=_allocate_floats(a, *bank, parts, d) if "b2" in needs else None,
        number=parts,
    )
    grid = (columns, parts, ranks)
    if 0 not in grid:
        sizes = (B, N, a.prompt_length, d, each)
        arguments = (*_describe_inputs(a, grad_output), _make_dense(a.entries), z, dh, *sums[:3], *sizes)
        _launch(target, "weights", grid, arguments, tile, R=r, RS=_pad(r))
    return sums


def _finish_sums(
    gradients: dict[str, Tensor],
    grad_output: Tensor,
    a: EmbeddingArguments,
    needs: set[str],
    db1: Tensor | None,
    parts: _Parts,
    target: Target,
) -> None:
    """Add the gradients of a prompt without spans and of the network to ``gradients``."""
    if a.entries is not None and db1 is not None:
        B = a.input_ids.shape[0]
        of_rows = db1.view(B, db1.shape[0] // max(1, B), db1.shape[1]).sum(1, keepdim=True)
        gradients["b1"] = _sum_spans(of_rows, _list_spans(a, 1, 1), 1, 1.0, allocate_gradient(_require(a.b1)), target)
        db1 = None
    prompt = allocate_gradient(_require(a.prompt)) if "prompt" in needs and a.prompt_spans is None else None
    sums = {"prompt": prompt}
    for name, of in (("w1", parts.w1), ("w2", parts.w2), ("b2", parts.b2), ("b1", db1)):
        sums[name] = None if of is None else allocate_gradient(getattr(a, name))
    _launch_sums(grad_output, a, db1, parts, sums, target)
    gradients |= {name: x for name, x in sums.items() if x is not None}


def _launch_sums(
    grad_output: Tensor,
    a: EmbeddingArguments,
    db1: Tensor | None,
    parts: _Parts,
    sums: dict[str, Tensor | None],
    target: Target,
) -> None:
    """Fill the gradients in ``sums``, which has the keys prompt, w1, w2, b2 and b1."""
    B, S, d = grad_output.shape[0], a.prompt_length, a.weight.shape[1]
    r = 1 if a.w1 is None else a.w1.shape[-1]
    tile = tiles.sums(r)
    columns, matrix = divide_up(d, tile.BD), divide_up(d * r, tile.BD)
    blocks = {"prompt": 0, "w1": matrix, "w2": matrix, "b2": columns, "b1": divide_up(r, tile.RP)}
    each = sum(blocks[name] for name, x in sums.items() if x is not None)
    programs = each * (1 if a.entries is None else a.bank_size) + (0 if sums["prompt"] is None else S * columns)
    if programs == 0:
        return
    pairs = (parts.w1, sums["w1"], parts.w2, sums["w2"], parts.b2, sums["b2"], db1, sums["b1"])
    token_parts = 0 if db1 is None else db1.shape[0]
    sizes = (B, S, d, parts.number, token_parts, a.offset_scale)
    arguments = (grad_output, *grad_output.stride(), sums["prompt"], *pairs, *sizes)
    _launch(target, "sums", (programs,), arguments, tile, R=r)


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
        _launch_hidden(grad_output, a, _HiddenResults(None, None, da, None), target)
        _sum_spans(da.view(B, N, r), _list_spans(a, T, N), N, 1.0, sums.view(K * T, r), target)
        gradients["low_rank_a"] = sums
    if "low_rank_b" in needs:
        # The gathered rows have r columns, which is small compared to d. An empty bank has no entry to choose.
        choices = a.entries.clamp(min=0) if K > 0 else a.entries[:0]
        hidden = a.low_rank_a[:, :N].index_select(0, choices).view(-1, r)
        z = torch.nn.functional.pad(hidden, (0, _pad(r) - r))
        parts = _sum_weights(grad_output, a, z, None, {"w2"}, target)
        gradients["low_rank_b"] = a.offset_scale * _require(parts.w2).sum(1)


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


def _choose_rows(B: int, blocks: int, target: Target) -> int:
    """Return how many rows of the batch share an offset, so that the programs still fill the device."""
    groups = max(divide_up(B, _ROWS), divide_up(_WAVES * target.processors, max(1, blocks)))
    return divide_up(B, min(groups, B))


def _loads_ahead(a: EmbeddingArguments, tile: tiles.EmbeddingTile) -> bool:
    """Return True if a kernel loads w1 one step ahead. Triton pipelines wide loads itself, and large tiles spill."""
    if a.w1 is None:
        return False
    return a.w1.shape[-1] * a.w1.element_size() % 16 != 0 and a.w1.element_size() == 2 and tile.RP <= 64


def _pad(r: int) -> int:
    """Return the columns of z and dh in memory, so that their rows begin at multiples of 32 bytes."""
    return divide_up(r, 16) * 16


def _require(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _allocate_floats(a: EmbeddingArguments, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=a.weight.device)


def _make_dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _describe_ids(a: EmbeddingArguments) -> tuple[Any, ...]:
    return (a.input_ids, *a.input_ids.stride())


def _describe_table(a: EmbeddingArguments) -> tuple[Any, ...]:
    return (a.weight, *a.weight.stride())


def _describe_inputs(a: EmbeddingArguments, grad_output: Tensor) -> tuple[Any, ...]:
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
        "sums": kernels.prompt_embedding_bwd_sum_kernel,
    }


def _launch(
    target: Target,
    name: str,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    tile: tiles.EmbeddingTile,
    **constants: int,
) -> None:
    constants |= {"BT": tile.BT, "BD": tile.BD} | ({"RP": tile.RP} if tile.RP else {})
    target.launch(_load_kernels()[name], grid, arguments, constants, tile)
