"""The reference of gated prefix attention: concatenate, score, softmax, sum.

It supports any floating-point dtype, and autograd computes its gradients. The outputs and gradients of every backend
are tested against it in float64.
"""

import torch
from torch import Tensor

from .. import random
from ..declaration import accept
from .arguments import AttentionArguments
from .spans import gather_prefixes
from .validation import canonicalize, collect_arguments
from .visibility import find_visible_tokens


@accept(collect_arguments)
def prefix_attention(given: AttentionArguments) -> Tensor:
    """Compute gated prefix attention in plain PyTorch.

    The arguments and errors are the same as in ``fastprefix.prefix_attention``, without ``backend``.
    """
    return attend(canonicalize(given))


def attend(a: AttentionArguments) -> Tensor:
    """Compute the formula on canonical arguments."""
    a = _freeze(a)
    there = None
    if a.prefix_spans is not None:
        a, there = gather_prefixes(a)
    g = _read_gate(a)
    k, v = _repeat_heads(a, a.key), _repeat_heads(a, a.value)
    pk, pv = _repeat_heads(a, a.prefix_key), _repeat_heads(a, a.prefix_value)

    s_prefix = _cap(a, a.scale * g * (a.query @ pk.mT))  # [B, Hq, N, P]
    if a.prefix_bias is not None:
        s_prefix = s_prefix + a.prefix_bias
    if a.prefix_key_bias is not None:
        s_prefix = s_prefix + _match_heads(a, a.prefix_key_bias[:, :, None, :])
    if there is not None:
        s_prefix = s_prefix.masked_fill(~there[:, None, None, :], -torch.inf)
    s_tokens = _mask(a, _cap(a, a.scale * (a.query @ k.mT)))  # [B, Hq, N, M]
    s_sinks = _expand_sinks(a, s_tokens)  # [B, Hq, N, 0 or 1]
    columns = [pk.shape[2], k.shape[2]]

    if a.output_gate is None:  # one softmax
        probabilities = _compute_softmax(torch.cat([s_prefix, s_tokens, s_sinks], dim=-1))
        p_prefix, p_tokens, _ = probabilities.split([*columns, s_sinks.shape[-1]], dim=-1)
        return (g * _drop(a, p_prefix, tokens=False)) @ pv + _drop(a, p_tokens, tokens=True) @ v

    p_tokens = _compute_softmax(torch.cat([s_tokens, s_sinks], dim=-1))[..., : columns[1]]
    o_tokens = _drop(a, p_tokens, tokens=True) @ v
    o_prefix = (g * _drop(a, _compute_softmax(s_prefix), tokens=False)) @ pv
    return o_tokens + a.output_gate[:, :, None, None] * o_prefix


def _read_gate(a: AttentionArguments) -> Tensor:
    """Return the prefix gate g, broadcastable to [B, Hq, N, P], or 1 without a gate."""
    if a.prefix_gate is None:
        return torch.ones((), dtype=a.query.dtype, device=a.query.device)
    if a.prefix_gate.ndim == 4:
        return a.prefix_gate
    return _match_heads(a, a.prefix_gate[:, :, None, :])


def _match_heads(a: AttentionArguments, tensor: Tensor) -> Tensor:
    """Repeat the heads of [b, Hkv|1, ...] to [b, Hq|1, ...]."""
    return tensor if tensor.shape[1] == 1 else tensor.repeat_interleave(a.groups, dim=1)


def _freeze(a: AttentionArguments) -> AttentionArguments:
    """Detach the first ``frozen_prefix`` prefix keys and values."""
    if a.frozen_prefix == 0:
        return a

    def freeze(keys: Tensor) -> Tensor:
        return torch.cat([keys[:, :, : a.frozen_prefix].detach(), keys[:, :, a.frozen_prefix :]], dim=2)

    return a._replace(prefix_key=freeze(a.prefix_key), prefix_value=freeze(a.prefix_value))


def _repeat_heads(a: AttentionArguments, keys: Tensor) -> Tensor:
    """Expand keys or values to the batch and repeat each head for the query heads that use it: [B, Hq, *, *]."""
    return keys.expand(a.query.shape[0], -1, -1, -1).repeat_interleave(a.groups, dim=1)


def _cap(a: AttentionArguments, scores: Tensor) -> Tensor:
    return scores if a.softcap is None else a.softcap * torch.tanh(scores / a.softcap)


def _mask(a: AttentionArguments, scores: Tensor) -> Tensor:
    if a.attn_mask is not None and a.attn_mask.is_floating_point():
        scores = scores + a.attn_mask
    visible = find_visible_tokens(a)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def _expand_sinks(a: AttentionArguments, scores: Tensor) -> Tensor:
    if a.sinks is None:
        return scores[..., :0]
    return a.sinks[None, :, None, None].expand(*scores.shape[:3], 1)


def _compute_softmax(scores: Tensor) -> Tensor:
    """Compute the softmax, with probabilities of 0 instead of NaN for queries that attend to nothing."""
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def _drop(a: AttentionArguments, probabilities: Tensor, tokens: bool) -> Tensor:
    """Apply dropout to the probabilities of the prefix or of the tokens."""
    if a.dropout_seed is None:
        return probabilities
    factor = random.draw_pair_factor(a.dropout_seed, a.dropout_p, probabilities.shape, tokens)
    return probabilities * factor.to(probabilities.dtype)
