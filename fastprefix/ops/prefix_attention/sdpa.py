"""The sdpa backend: concatenate the gated prefix with the tokens and call ``scaled_dot_product_attention``.

This is how prefix tuning is usually run without kernels for it. PyTorch chooses its fastest attention for the device
and stores no scores if that is a flash kernel. The function consists of differentiable PyTorch operations, so autograd
computes the gradients, and higher derivatives exist wherever PyTorch has them. The accuracy is that of its kernel.

It supports gates of keys, masks, causality, windows, segments, and an output gate if every query sees some token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import AttentionArguments, explain_unsupported
from .visibility import find_visible_tokens

_ABSENT = ("prefix_bias", "prefix_key_bias", "prefix_spans", "sinks", "softcap", "dropout_seed")


def refusal(a: AttentionArguments) -> str | None:
    """Explain why a call is not supported, or return None if it is."""
    if reason := explain_unsupported(a, _ABSENT):
        return reason
    if a.prefix_gate is not None and a.prefix_gate.ndim == 4:
        return "it supports gates of prefix keys, not gates of pairs of a query and a key"
    if a.query.device.type != "cpu" and not a.scale > 0.0:  # the kernels hide scores before they multiply them by it
        return f"it supports scales above 0 on this device, not {a.scale}"
    keys = (a.prefix_key.shape[2], a.key.shape[2])
    if 0 in a.query.shape[:3] or 0 in ((sum(keys),) if a.output_gate is None else keys):
        return "it requires at least one row, one query, and one key in each softmax"
    if _can_hide_all_keys(a):  # PyTorch's kernels differ in what they return for a query that sees nothing
        return "it requires that every query sees a key, which is only certain with a prefix in the same softmax"
    return None


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, Hq, N, Dv]``, and an empty tensor in place of the normalizers."""
    a = AttentionArguments(*arguments)
    prefix_key, prefix_value = _apply_gate(a)
    if a.output_gate is None:
        output = _attend(a, _concatenate(prefix_key, a.key), _concatenate(prefix_value, a.value), a.prefix_key.shape[2])
    else:
        output = _attend(a, a.key, a.value)
        key, value = (x.expand(len(a.query), -1, -1, -1) for x in (prefix_key, prefix_value))
        of_prefix = _attend(a._replace(is_causal=False), key, value)
        output = output + a.output_gate[:, :, None, None] * of_prefix
    return _lay_out(output, a.query), a.query.new_empty(0)


def _can_hide_all_keys(a: AttentionArguments) -> bool:
    if a.output_gate is None and a.prefix_key.shape[2] > 0:
        return False
    return _has_mask(a) or (a.is_causal and a.query.shape[2] > a.key.shape[2])


def _has_mask(a: AttentionArguments) -> bool:
    """Return whether anything other than causality can hide tokens."""
    return not (a.attn_mask is None and a.window_size is None and a.query_segments is None)


def _apply_gate(a: AttentionArguments) -> tuple[Tensor, Tensor]:
    """Return prefix keys and values ``[1|B, Hkv, P, *]`` times the gate. The frozen ones get no gradient."""
    prefix = [a.prefix_key, a.prefix_value]
    if a.frozen_prefix > 0:
        parts = (x.tensor_split([a.frozen_prefix], 2) for x in prefix)
        prefix = [torch.cat([frozen.detach(), trained], 2) for frozen, trained in parts]
    key, value = prefix if a.prefix_gate is None else (x * a.prefix_gate[..., None] for x in prefix)
    return key, value


def _concatenate(prefix: Tensor, tokens: Tensor) -> Tensor:
    if prefix.shape[2] == 0 and not prefix.requires_grad:
        return tokens
    return torch.cat([prefix.expand(len(tokens), -1, -1, -1), tokens], 2)


def _lay_out(output: Tensor, query: Tensor) -> Tensor:
    """Return the output with heads and length in the memory order of ``query``. Usually it has that order already."""
    if query.stride(1) < query.stride(2):
        return output.transpose(1, 2).contiguous().transpose(1, 2)
    return output.contiguous()


def _attend(a: AttentionArguments, key: Tensor, value: Tensor, prefix: int = 0) -> Tensor:
    """Attend to keys of which the first ``prefix`` are visible to all queries, and the others are the tokens."""
    tokens = key.shape[2] - prefix
    # PyTorch aligns causality at the first query and key, and hides scores before it multiplies them by the scale.
    if a.is_causal and prefix == 0 and a.query.shape[2] == tokens and a.scale > 0.0 and not _has_mask(a):
        mask, is_causal = None, True
    else:
        mask, is_causal = _make_mask(a, prefix), False
    return F.scaled_dot_product_attention(
        a.query, key, value, mask, is_causal=is_causal, scale=a.scale, enable_gqa=bool(a.groups > 1)
    )


def _make_mask(a: AttentionArguments, prefix: int) -> Tensor | None:
    """Return a mask that broadcasts to ``[B, Hq, N, prefix + M]``, or None if every query sees every key."""
    visible = find_visible_tokens(a)
    if a.attn_mask is not None and a.attn_mask.is_floating_point():
        bias = a.attn_mask if visible is None else a.attn_mask.masked_fill(~visible, -torch.inf)
        return F.pad(bias.expand(*bias.shape[:3], a.key.shape[2]), (prefix, 0))
    if visible is None:
        return None
    return F.pad(visible.expand(*visible.shape[:3], a.key.shape[2]), (prefix, 0), value=True)
