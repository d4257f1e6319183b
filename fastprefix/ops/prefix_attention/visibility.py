"""Find the token keys that each query may attend to, by causality, windows, segments and bool masks."""

import torch
from torch import Tensor

from .arguments import AttentionArguments


def find_visible_tokens(a: AttentionArguments) -> Tensor | None:
    """Return a bool mask, broadcastable to [B, Hq, N, M], or None if every query attends to every token key.

    It combines ``is_causal``, ``window_size``, ``segment_ids`` and a bool ``attn_mask``.
    """
    rules: list[Tensor] = []
    if a.is_causal or a.window_size is not None:
        rules.append(_compare_positions(a))
    if a.query_segments is not None and a.key_segments is not None:
        rules.append(a.query_segments[:, None, :, None] == a.key_segments[:, None, None, :])
    if a.attn_mask is not None and a.attn_mask.dtype is torch.bool:
        rules.append(a.attn_mask)
    if not rules:
        return None
    visible = rules[0]
    for rule in rules[1:]:
        visible = visible & rule
    return visible


def _compare_positions(a: AttentionArguments) -> Tensor:
    queries, keys = a.query.shape[2], a.key.shape[2]
    i = torch.arange(queries, device=a.query.device)[:, None] + (keys - queries)  # aligned to the end
    j = torch.arange(keys, device=a.query.device)[None, :]
    visible = i >= j if a.is_causal else torch.ones_like(i >= j)
    if a.window_size is not None:
        distance = i - j if a.is_causal else (i - j).abs()
        visible = visible & (distance < a.window_size)
    return visible[None, None]
