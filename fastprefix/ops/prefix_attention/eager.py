"""The eager backend: forward and backward formulas in PyTorch operations, on any device and floating dtype.

The prefix is never concatenated with the tokens and never expanded to the batch; scores are materialised, so memory
grows with N * (P + M). Sums are made in float32 (float64 for float64). The letters are those of the formulas:
``s`` scores, ``p`` probabilities, ``do`` the gradient of the output, ``delta`` its product with the output.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import random
from .arguments import DIFFERENTIABLE, Arguments
from .layout import empty_gradient, empty_heads
from .visibility import visible_tokens


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, N, Dv] and log-sum-exp: [B, Hq, N], with an output gate [2, B, Hq, N] (tokens, prefix)."""
    prefix, tokens = _prefix_half(a), _token_half(a)
    lse_prefix, lse_tokens = _log_sum_exp(prefix.s), _log_sum_exp(tokens.s)
    if a.sinks is not None:
        lse_tokens = torch.logaddexp(lse_tokens, _grouped(a, a.sinks[None, :, None]))
    if a.output_gate is None:
        joint = torch.logaddexp(lse_prefix, lse_tokens)
        lse_prefix = lse_tokens = joint
        og: Tensor | float = 1.0
        lse = joint.reshape(a.query.shape[:3])
    else:
        og = _grouped(a, a.output_gate[:, :, None])[..., None]
        lse = torch.stack([lse_tokens, lse_prefix]).reshape(2, *a.query.shape[:3])
    p_prefix = _probabilities(prefix.s, lse_prefix) * prefix.keep
    p_tokens = _probabilities(tokens.s, lse_tokens) * tokens.keep
    o = _weighted_sum(p_tokens, tokens.v) + og * _weighted_sum(prefix.g * p_prefix, prefix.v)
    output = empty_heads(a.query, a.value.shape[3])
    return output.copy_(o.reshape(output.shape)), lse


def backward(
    grad_output: Tensor, output: Tensor, lse: Tensor, a: Arguments, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """The gradients asked for, in the order of ``DIFFERENTIABLE``."""
    needs = dict(zip(DIFFERENTIABLE, needs_grad, strict=True))
    gradients = _prefix_gradients(grad_output, output, lse, a, needs)
    if any(needs[name] for name in ("query", "key", "value", "attn_mask", "sinks")):
        _add_token_gradients(gradients, grad_output, output, lse, a, needs)
    results = []
    for name in (name for name in DIFFERENTIABLE if needs[name]):
        tensor: Tensor = getattr(a, name)
        result = empty_gradient(tensor)
        results.append(result.copy_(gradients[name].reshape(tensor.shape)))
    return results


class _Half(NamedTuple):
    """One half of the columns, prefix or tokens. Query heads stand in groups: [B, Hkv, G, N, *]."""

    q: Tensor  # [B, Hkv, G, N, D]
    k: Tensor  # [1|B, Hkv, K, D]
    v: Tensor  # [1|B, Hkv, K, Dv]
    g: Tensor | float  # the gate, broadcastable to the scores
    product: Tensor  # c <q, k>, before the gate
    capped: Tensor  # after gate and soft cap, before bias and mask
    s: Tensor  # scores [B, Hkv, G, N, K]
    keep: Tensor | float  # dropout's factor


def _prefix_half(a: Arguments) -> _Half:
    g = _grouped_gate(a)
    bias = None if a.prefix_bias is None else _grouped(a, a.prefix_bias)
    return _half(a, a.prefix_key, a.prefix_value, g, bias, None, first_column=0)


def _token_half(a: Arguments) -> _Half:
    bias = None
    if a.attn_mask is not None and a.attn_mask.is_floating_point():
        bias = _grouped(a, a.attn_mask)
    visible = visible_tokens(a)
    if visible is not None:
        visible = _split_heads(a, visible)
    return _half(a, a.key, a.value, 1.0, bias, visible, first_column=a.prefix_key.shape[2])


def _half(
    a: Arguments,
    k: Tensor,
    v: Tensor,
    g: Tensor | float,
    bias: Tensor | None,
    visible: Tensor | None,
    first_column: int,
) -> _Half:
    q, k, v = _grouped(a, a.query), k.to(a.accumulator), v.to(a.accumulator)
    product = a.scale * _scores(q, k)
    capped = g * product
    if a.softcap is not None:
        capped = a.softcap * torch.tanh(capped / a.softcap)
    s = capped if bias is None else capped + bias
    if visible is not None:
        s = s.masked_fill(~visible, -torch.inf)
    return _Half(q, k, v, g, product, capped, s, _keep_factor(a, s, first_column))


def _prefix_gradients(
    grad_output: Tensor, output: Tensor, lse: Tensor, a: Arguments, needs: dict[str, bool]
) -> dict[str, Tensor]:
    """Gradients of the prefix's arguments, and the prefix's part of dq."""
    half = _prefix_half(a)
    do = _grouped(a, grad_output)
    p = _probabilities(half.s, _grouped_lse(a, lse, separate=1))
    weighed = half.g * p * half.keep  # what multiplies pv
    dov = _scores(do, half.v)  # <do, pv>
    gradients: dict[str, Tensor] = {}
    if a.output_gate is None:
        delta = _delta(a, grad_output, output)
        dp = half.keep * half.g * dov
    else:
        og = _grouped(a, a.output_gate[:, :, None])[..., None]
        o_prefix = (weighed * dov).sum(-1, keepdim=True)  # <do, o_prefix>
        gradients["output_gate"] = (
            o_prefix.squeeze(-1).sum(-1).reshape(a.query.shape[:2]).sum_to_size(a.output_gate.shape)
        )
        p, weighed = og * p, og * weighed
        delta, dp = o_prefix, half.keep * half.g * dov
    ds = p * (dp - delta)
    if needs["prefix_bias"]:
        assert a.prefix_bias is not None
        gradients["prefix_bias"] = _sum_to(a, ds, a.prefix_bias)
    ds = _through_softcap(a, ds, half)
    if needs["prefix_gate"]:
        assert a.prefix_gate is not None
        dg = ds * half.product + p * half.keep * dov
        gradients["prefix_gate"] = _sum_gate(a, dg)
    gated = ds * half.g * a.scale
    if needs["prefix_key"]:
        gradients["prefix_key"] = _sum_over_queries(gated, half.q, a.prefix_key.shape[0])
    if needs["prefix_value"]:
        gradients["prefix_value"] = _sum_over_queries(weighed, do, a.prefix_value.shape[0])
    if needs["query"]:
        gradients["query"] = _weighted_sum(gated, half.k)
    return gradients


def _add_token_gradients(
    gradients: dict[str, Tensor], grad_output: Tensor, output: Tensor, lse: Tensor, a: Arguments, needs: dict[str, bool]
) -> None:
    """Add the tokens' part of dq, and the gradients of key, value, attn_mask and sinks."""
    half = _token_half(a)
    do = _grouped(a, grad_output)
    token_lse = _grouped_lse(a, lse, separate=0)
    p = _probabilities(half.s, token_lse)
    dov = half.keep * _scores(do, half.v)
    # With two softmaxes the tokens' own output is not kept: its product with do is made from the probabilities.
    delta = _delta(a, grad_output, output) if a.output_gate is None else (p * dov).sum(-1, keepdim=True)
    ds = p * (dov - delta)
    if needs["attn_mask"]:
        assert a.attn_mask is not None
        gradients["attn_mask"] = _sum_to(a, ds, a.attn_mask)
    ds = _through_softcap(a, ds, half) * a.scale
    if needs["query"]:
        gradients["query"] = gradients["query"] + _weighted_sum(ds, half.k)
    if needs["key"]:
        gradients["key"] = _sum_over_queries(ds, half.q, a.key.shape[0])
    if needs["value"]:
        gradients["value"] = _sum_over_queries(p * half.keep, do, a.value.shape[0])
    if needs["sinks"]:
        assert a.sinks is not None
        p_sink = _probabilities(_grouped(a, a.sinks[None, :, None, None]), token_lse)
        gradients["sinks"] = -(p_sink * delta).sum(dim=(0, 3, 4))


def _grouped(a: Arguments, tensor: Tensor) -> Tensor:
    """[b, Hq|1, ...] to [b, Hkv|1, G|1, ...] in the accumulator's dtype."""
    return _split_heads(a, tensor.to(a.accumulator))


def _split_heads(a: Arguments, tensor: Tensor) -> Tensor:
    heads = (1, 1) if tensor.shape[1] == 1 and a.query.shape[1] != 1 else (a.key.shape[1], a.groups)
    return tensor.reshape(tensor.shape[0], *heads, *tensor.shape[2:])


def _grouped_gate(a: Arguments) -> Tensor | float:
    """The prefix gate, broadcastable to [B, Hkv, G, N, P]."""
    if a.prefix_gate is None:
        return 1.0
    if a.prefix_gate.ndim == 4:
        return _grouped(a, a.prefix_gate)
    return a.prefix_gate[:, :, None, None, :].to(a.accumulator)


def _grouped_lse(a: Arguments, lse: Tensor, separate: int) -> Tensor:
    """[B, Hkv, G, N] from the joint log-sum-exp, or from one of the two."""
    return _grouped(a, lse if a.output_gate is None else lse[separate])


def _delta(a: Arguments, grad_output: Tensor, output: Tensor) -> Tensor:
    return (_grouped(a, grad_output) * _grouped(a, output)).sum(-1, keepdim=True)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """<q, k> [B, Hkv, G, N, K]; keys shared by the batch are one product over all its queries."""
    if k.shape[0] == 1:
        return torch.einsum("bhgnd,hkd->bhgnk", q, k[0])
    return torch.einsum("bhgnd,bhkd->bhgnk", q, k)


def _weighted_sum(p: Tensor, v: Tensor) -> Tensor:
    """p v [B, Hkv, G, N, *]."""
    if v.shape[0] == 1:
        return torch.einsum("bhgnk,hkd->bhgnd", p, v[0])
    return torch.einsum("bhgnk,bhkd->bhgnd", p, v)


def _sum_over_queries(p: Tensor, q: Tensor, batch: int) -> Tensor:
    """p^T q, summed over the queries of a key/value head, and over the batch where the keys are shared by it."""
    if batch == 1:
        return torch.einsum("bhgnk,bhgnd->hkd", p, q)[None]
    return torch.einsum("bhgnk,bhgnd->bhkd", p, q)


def _log_sum_exp(s: Tensor) -> Tensor:
    if s.shape[-1] == 0:
        return s.new_full(s.shape[:-1], -torch.inf)
    return torch.logsumexp(s, dim=-1)


def _probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """e^(s - lse), and 0 where the row sees nothing (lse = -inf)."""
    return torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def _through_softcap(a: Arguments, ds: Tensor, half: _Half) -> Tensor:
    return ds if a.softcap is None else ds * (1.0 - (half.capped / a.softcap).square())


def _sum_to(a: Arguments, ds: Tensor, like: Tensor) -> Tensor:
    """Sum [B, Hkv, G, N, K] over whatever a bias broadcasts over."""
    return ds.flatten(1, 2).sum_to_size(like.shape)


def _sum_gate(a: Arguments, dg: Tensor) -> Tensor:
    assert a.prefix_gate is not None
    if a.prefix_gate.ndim == 4:
        return _sum_to(a, dg, a.prefix_gate)
    return dg.sum(dim=(2, 3)).sum_to_size(a.prefix_gate.shape)


def _keep_factor(a: Arguments, s: Tensor, first_column: int) -> Tensor | float:
    """Dropout's factor for a block of columns [B, Hkv, G, N, K]; the counter is (column, query, row and head)."""
    if a.dropout_seed is None:
        return 1.0
    return random.keep_factor_at(a.dropout_seed, a.dropout_p, s.shape, first_column).to(s.dtype)
