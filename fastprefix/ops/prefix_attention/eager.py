"""The eager backend: forward and backward formulas in PyTorch operations, for any device and floating-point dtype.

The prefix is never concatenated with the tokens and never expanded to the batch. Scores are materialized, so memory
grows with N * (P + M). Sums are computed in float32, or float64 for float64 inputs. Variable names follow the formulas:
``s`` scores, ``p`` probabilities, ``do`` the upstream gradient, ``delta`` its product with the output.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import random
from .arguments import DIFFERENTIABLE, AttentionArguments
from .layout import allocate_gradient, allocate_heads
from .spans import Span, read_spans, take_row
from .visibility import find_visible_tokens

_FEW_KEYS = 16
"""Up to this many keys, all gradients are computed from the scores. The output's rounding errors do not average out."""


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the output [B, Hq, N, Dv] and the normalizers (``AttentionArguments.normalizers_shape``)."""
    a = AttentionArguments(*arguments)
    output = allocate_heads(a.query, a.value.shape[3])
    normalizers = a.query.new_empty(a.normalizers_shape, dtype=a.accumulator)
    for row, plane, rows in _list_rows(a, _read_spans(a)):
        o, softmaxes = _attend(row, plane)
        output[rows] = o.reshape(output[rows].shape)
        found = torch.stack([x for softmax in softmaxes for x in (softmax.m, softmax.l)])
        normalizers[:, :, rows] = found.reshape(row.normalizers_shape)
    return output, normalizers


def backward(
    grad_output: Tensor, output: Tensor, normalizers: Tensor, needs_grad: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    """Return the requested gradients in the order of ``DIFFERENTIABLE``. The tokens are processed only if needed."""
    a = AttentionArguments(*arguments)
    needs = dict(zip(DIFFERENTIABLE, needs_grad, strict=True))
    asked = [name for name in DIFFERENTIABLE if needs[name]]
    needs_tokens = any(needs[name] for name in ("query", "key", "value", "attn_mask", "sinks"))
    zeros: dict[str, Any] = {name: torch.zeros_like(getattr(a, name), dtype=a.accumulator) for name in asked}
    totals, spans = a._replace(**zeros), _read_spans(a)
    for (row, plane, rows), (total, _, _) in zip(_list_rows(a, spans), _list_rows(totals, spans), strict=True):
        gradients: dict[str, Tensor] = {}
        if needs_tokens or row.prefix_key.shape[2] + row.key.shape[2] <= _FEW_KEYS:
            _differentiate_all(gradients, grad_output[rows], row, plane, needs)
        else:
            saved = (output[rows], normalizers[:, :, rows])
            _differentiate_prefix_alone(gradients, grad_output[rows], *saved, row, plane, needs)
        for name in asked:
            to: Tensor = getattr(total, name)
            if name in ("prefix_key", "prefix_value"):
                to = to[:, :, row.frozen_prefix :]
            to += gradients[name].reshape(to.shape)
    return [allocate_gradient(getattr(a, name)).copy_(getattr(totals, name)) for name in asked]


def _read_spans(a: AttentionArguments) -> list[Span] | None:
    return None if a.prefix_spans is None else read_spans(a)


def _list_rows(a: AttentionArguments, spans: list[Span] | None) -> list[tuple[AttentionArguments, int, slice]]:
    """List the calls to compute: one for the whole batch, or with spans one per row with its span of the store.

    Each item has the arguments, the number of their first plane (row times query heads, for dropout), and the slice of
    their rows in the batch.
    """
    if spans is None:
        return [(a, 0, slice(None))]
    heads = a.query.shape[1]
    return [(take_row(a, row, span), row * heads, slice(row, row + 1)) for row, span in enumerate(spans)]


def _differentiate_all(
    gradients: dict[str, Tensor], grad_output: Tensor, a: AttentionArguments, plane: int, needs: dict[str, bool]
) -> None:
    """Differentiate prefix and tokens.

    The softmax is computed again from the scores, because the stored sums are rounded and the new ones are not.
    """
    do = _group_heads(a, grad_output)
    prefix, tokens = _score_prefix(a, plane), _score_tokens(a, plane)
    dov_prefix, dov_tokens = _multiply_values(prefix, do), _multiply_values(tokens, do)
    if a.output_gate is None:
        softmax = _compute_softmax([prefix.s, tokens.s], _group_sinks(a))
        p_prefix, p_tokens = softmax.p
        delta = _sum_delta(prefix, p_prefix, dov_prefix) + _sum_delta(tokens, p_tokens, dov_tokens)
        delta_prefix = delta_tokens = delta
    else:
        softmax = _compute_softmax([tokens.s], _group_sinks(a))
        p_prefix, p_tokens = _compute_softmax([prefix.s], None).p[0], softmax.p[0]
        delta_prefix, delta_tokens = _sum_delta(prefix, p_prefix, dov_prefix), _sum_delta(tokens, p_tokens, dov_tokens)
        p_prefix = _differentiate_output_gate(gradients, a, p_prefix, delta_prefix)
    _differentiate_prefix(gradients, a, prefix, p_prefix, dov_prefix, delta_prefix, do, needs)
    _differentiate_tokens(gradients, a, tokens, p_tokens, dov_tokens, delta_tokens, do, needs)
    if needs["sinks"]:
        assert softmax.p_sink is not None
        gradients["sinks"] = -(softmax.p_sink * delta_tokens).sum(dim=(0, 3, 4))


def _differentiate_prefix_alone(
    gradients: dict[str, Tensor],
    grad_output: Tensor,
    output: Tensor,
    normalizers: Tensor,
    a: AttentionArguments,
    plane: int,
    needs: dict[str, bool],
) -> None:
    """Differentiate the prefix without the tokens, in O(N P).

    The output and the normalizers contain everything that this needs about the tokens.
    """
    do, prefix = _group_heads(a, grad_output), _score_prefix(a, plane)
    dov = _multiply_values(prefix, do)
    if a.output_gate is None:
        m, l = (_split_heads(a, x[..., None]) for x in normalizers[0])
        p = torch.exp(prefix.s - m) / l.masked_fill(l == 0.0, 1.0)
        delta = (do * _group_heads(a, output)).sum(-1, keepdim=True)
    else:
        p = _compute_softmax([prefix.s], None).p[0]
        delta = _sum_delta(prefix, p, dov)
        p = _differentiate_output_gate(gradients, a, p, delta)
    _differentiate_prefix(gradients, a, prefix, p, dov, delta, do, needs)


class _Half(NamedTuple):
    """Scores and operands of the prefix or of the tokens. Query heads are grouped: [B, Hkv, G, N, *]."""

    q: Tensor  # [B, Hkv, G, N, D]
    k: Tensor  # [1|B, Hkv, K, D]
    v: Tensor  # [1|B, Hkv, K, Dv]
    g: Tensor | float  # the gate, broadcastable to the scores
    product: Tensor  # c <q, k>, before the gate [B, Hkv, G, N, K]
    gated: Tensor  # after the gate, before soft cap, bias and mask [B, Hkv, G, N, K]
    s: Tensor  # scores [B, Hkv, G, N, K]
    keep: Tensor | float  # dropout factors [B, Hkv, G, N, K], or 1


class _Softmax(NamedTuple):
    p: list[Tensor]  # probabilities of each block of columns [B, Hkv, G, N, K]
    p_sink: Tensor | None  # [B, Hkv, G, N, 1]
    m: Tensor  # [B, Hkv, G, N, 1]
    l: Tensor  # [B, Hkv, G, N, 1]


def _attend(a: AttentionArguments, plane: int) -> tuple[Tensor, list[_Softmax]]:
    """Return the output [B, Hkv, G, N, Dv] and the softmaxes."""
    prefix, tokens = _score_prefix(a, plane), _score_tokens(a, plane)
    og: Tensor | float = 1.0
    if a.output_gate is None:
        softmaxes = [_compute_softmax([prefix.s, tokens.s], _group_sinks(a))]
        p_prefix, p_tokens = softmaxes[0].p
    else:
        softmaxes = [_compute_softmax([tokens.s], _group_sinks(a)), _compute_softmax([prefix.s], None)]
        p_tokens, p_prefix = (softmax.p[0] for softmax in softmaxes)
        og = _group_heads(a, a.output_gate[:, :, None])[..., None]
    o = _sum_values(p_tokens * tokens.keep, tokens.v)
    return o + og * _sum_values(prefix.g * p_prefix * prefix.keep, prefix.v), softmaxes


def _score_prefix(a: AttentionArguments, plane: int) -> _Half:
    g = _group_gate(a)
    biases = [] if a.prefix_bias is None else [_group_heads(a, a.prefix_bias)]
    if a.prefix_key_bias is not None:
        biases.append(a.prefix_key_bias[:, :, None, None, :].to(a.accumulator))
    return _score_half(a, a.prefix_key, a.prefix_value, g, biases, None, plane, tokens=False)


def _score_tokens(a: AttentionArguments, plane: int) -> _Half:
    biases = []
    if a.attn_mask is not None and a.attn_mask.is_floating_point():
        biases.append(_group_heads(a, a.attn_mask))
    visible = find_visible_tokens(a)
    if visible is not None:
        visible = _split_heads(a, visible)
    return _score_half(a, a.key, a.value, 1.0, biases, visible, plane, tokens=True)


def _score_half(
    a: AttentionArguments,
    k: Tensor,
    v: Tensor,
    g: Tensor | float,
    biases: Sequence[Tensor],
    visible: Tensor | None,
    plane: int,
    tokens: bool,
) -> _Half:
    q, k, v = _group_heads(a, a.query), k.to(a.accumulator), v.to(a.accumulator)
    product = a.scale * _multiply_keys(q, k)
    gated = g * product
    s = gated if a.softcap is None else a.softcap * torch.tanh(gated / a.softcap)
    for bias in biases:
        s = s + bias
    if visible is not None:
        s = s.masked_fill(~visible, -torch.inf)
    return _Half(q, k, v, g, product, gated, s, _draw_keep_factor(a, s, plane, tokens))


def _multiply_values(half: _Half, do: Tensor) -> Tensor:
    """Compute <do, v> times the dropout factors, [B, Hkv, G, N, K]."""
    return half.keep * _multiply_keys(do, half.v)


def _sum_delta(half: _Half, p: Tensor, dov: Tensor) -> Tensor:
    """Return the contribution of the prefix or the tokens to <do, o>, [B, Hkv, G, N, 1].

    It is computed from the probabilities, because the stored output is rounded.
    """
    return (half.g * p * dov).sum(-1, keepdim=True)


def _differentiate_output_gate(gradients: dict[str, Tensor], a: AttentionArguments, p: Tensor, delta: Tensor) -> Tensor:
    """Add the output gate's gradient to ``gradients``, and return og p, the gated probabilities of the prefix."""
    assert a.output_gate is not None
    per_head = delta.sum(dim=(3, 4)).reshape(a.query.shape[:2])
    gradients["output_gate"] = per_head.sum_to_size(a.output_gate.shape)
    return _group_heads(a, a.output_gate[:, :, None])[..., None] * p


def _differentiate_prefix(
    gradients: dict[str, Tensor],
    a: AttentionArguments,
    half: _Half,
    p: Tensor,
    dov: Tensor,
    delta: Tensor,
    do: Tensor,
    needs: dict[str, bool],
) -> None:
    """Add the gradients of the prefix's arguments and the prefix's part of dq to ``gradients``."""
    trained = slice(a.frozen_prefix, None)
    if needs["prefix_value"]:
        weights = (half.g * p * half.keep)[..., trained]
        gradients["prefix_value"] = _sum_over_queries(weights, do, a.prefix_value.shape[0])
    ds = p * (half.g * dov - delta)
    if needs["prefix_bias"]:
        assert a.prefix_bias is not None
        gradients["prefix_bias"] = _sum_to(ds, a.prefix_bias)
    if needs["prefix_key_bias"]:
        assert a.prefix_key_bias is not None
        sums = ds.sum(dim=(2, 3), dtype=torch.float64)  # terms cancel if several keys share one bias
        gradients["prefix_key_bias"] = sums.sum_to_size(a.prefix_key_bias.shape)
    ds = _differentiate_softcap(a, ds, half)
    if needs["prefix_gate"]:
        gradients["prefix_gate"] = _sum_gate(a, ds * half.product + p * dov)
    gated = ds * half.g * a.scale
    if needs["prefix_key"]:
        gradients["prefix_key"] = _sum_over_queries(gated[..., trained], half.q, a.prefix_key.shape[0])
    if needs["query"]:
        gradients["query"] = _sum_values(gated, half.k)


def _differentiate_tokens(
    gradients: dict[str, Tensor],
    a: AttentionArguments,
    half: _Half,
    p: Tensor,
    dov: Tensor,
    delta: Tensor,
    do: Tensor,
    needs: dict[str, bool],
) -> None:
    """Add the tokens' part of dq and the gradients of key, value and attn_mask to ``gradients``."""
    ds = p * (dov - delta)
    if needs["attn_mask"]:
        assert a.attn_mask is not None
        gradients["attn_mask"] = _sum_to(ds, a.attn_mask)
    ds = _differentiate_softcap(a, ds, half) * a.scale
    if needs["query"]:
        gradients["query"] = gradients["query"] + _sum_values(ds, half.k)
    if needs["key"]:
        gradients["key"] = _sum_over_queries(ds, half.q, a.key.shape[0])
    if needs["value"]:
        gradients["value"] = _sum_over_queries(p * half.keep, do, a.value.shape[0])


def _group_heads(a: AttentionArguments, tensor: Tensor) -> Tensor:
    """Reshape [b, Hq|1, ...] to [b, Hkv|1, G|1, ...] in the accumulator's dtype."""
    return _split_heads(a, tensor.to(a.accumulator))


def _split_heads(a: AttentionArguments, tensor: Tensor) -> Tensor:
    heads = (1, 1) if tensor.shape[1] == 1 and a.query.shape[1] != 1 else (a.key.shape[1], a.groups)
    return tensor.reshape(tensor.shape[0], *heads, *tensor.shape[2:])


def _group_gate(a: AttentionArguments) -> Tensor | float:
    """Return the prefix gate, broadcastable to [B, Hkv, G, N, P]."""
    if a.prefix_gate is None:
        return 1.0
    if a.prefix_gate.ndim == 4:
        return _group_heads(a, a.prefix_gate)
    return a.prefix_gate[:, :, None, None, :].to(a.accumulator)


def _multiply_keys(q: Tensor, k: Tensor) -> Tensor:
    """Compute <q, k> [B, Hkv, G, N, K]. Keys that the batch shares need one product over all its queries."""
    if k.shape[0] == 1:
        return torch.einsum("bhgnd,hkd->bhgnk", q, k[0])
    return torch.einsum("bhgnd,bhkd->bhgnk", q, k)


def _sum_values(p: Tensor, v: Tensor) -> Tensor:
    """Compute p v [B, Hkv, G, N, *]."""
    if v.shape[0] == 1:
        return torch.einsum("bhgnk,hkd->bhgnd", p, v[0])
    return torch.einsum("bhgnk,bhkd->bhgnd", p, v)


def _sum_over_queries(p: Tensor, q: Tensor, batch: int) -> Tensor:
    """Compute p^T q [1|B, Hkv, K, *], summed over a key/value head's queries, and over a batch that shares the keys.

    The sum is computed per row and then over rows, because one long sum would have a larger rounding error than
    PyTorch's gradient of an expanded prefix.
    """
    sums = torch.einsum("bhgnk,bhgnd->bhgkd", p, q).sum(2)
    return sums.sum(0, keepdim=True) if batch == 1 else sums


def _group_sinks(a: AttentionArguments) -> Tensor | None:
    return None if a.sinks is None else _group_heads(a, a.sinks[None, :, None, None])


def _compute_softmax(blocks: Sequence[Tensor], sinks: Tensor | None) -> _Softmax:
    """Compute one softmax over blocks of columns and a sink, which has a probability but no value."""
    blocks = [*blocks] if sinks is None else [*blocks, sinks.expand(*blocks[0].shape[:-1], 1)]
    m = torch.stack([s.amax(-1) for s in blocks if s.shape[-1] > 0] or [blocks[0].new_full(blocks[0].shape[:-1], 0.0)])
    m = m.amax(0).unsqueeze(-1)
    m = m.masked_fill(m == -torch.inf, 0.0)
    e = [torch.exp(s - m) for s in blocks]
    l = torch.stack([x.sum(-1, keepdim=True) for x in e]).sum(0)
    p = [x / l.masked_fill(l == 0.0, 1.0) for x in e]
    return _Softmax(p if sinks is None else p[:-1], None if sinks is None else p[-1], m, l)


def _differentiate_softcap(a: AttentionArguments, ds: Tensor, half: _Half) -> Tensor:
    """Multiply by 1 - tanh^2, computed as 1 / cosh^2 because the difference cancels if tanh is almost 1."""
    return ds if a.softcap is None else ds / torch.cosh(half.gated / a.softcap).square()


def _sum_to(ds: Tensor, like: Tensor) -> Tensor:
    """Sum [B, Hkv, G, N, K] over the dimensions that ``like`` broadcasts over."""
    return ds.flatten(1, 2).sum_to_size(like.shape)


def _sum_gate(a: AttentionArguments, dg: Tensor) -> Tensor:
    assert a.prefix_gate is not None
    if a.prefix_gate.ndim == 4:
        return _sum_to(dg, a.prefix_gate)
    return dg.sum(dim=(2, 3)).sum_to_size(a.prefix_gate.shape)


def _draw_keep_factor(a: AttentionArguments, s: Tensor, plane: int, tokens: bool) -> Tensor | float:
    """Draw the dropout factors of the prefix's or the tokens' probabilities [B, Hkv, G, N, K], or return 1."""
    if a.dropout_seed is None:
        return 1.0
    return random.draw_pair_factor(a.dropout_seed, a.dropout_p, s.shape, tokens, plane).to(s.dtype)
