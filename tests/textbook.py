"""Prefix attention as a user would write it for ``transformers``: eager attention over concatenated keys and values,
with the library's own eager masks. The oracle for whole models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fastprefix.integrations.transformers.models.attention import find_binding
from fastprefix.integrations.transformers.models.switching import Implementation


def textbook_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Concatenate ``[g pk; k]`` and ``[g pv; v]`` for every row and query head, and attend; or, with an output gate,
    attend to each by itself.
    """
    bias = kwargs.get("position_bias")
    if bias is not None:  # as in T5: on the scores of the tokens
        mask = bias if mask is None else bias + mask
    binding: Any = find_binding(module)
    if binding is None:
        return plain_attention(query, key, value, mask, scaling)
    batch, heads = query.shape[:2]
    groups = heads // key.shape[1]
    states = binding.call.method.projected_states(binding.index)
    prefix = binding.get_prefix(query, key, value) if states is None else projected(module, states, key.shape[3])
    pk, pv = (t.expand(batch, *t.shape).repeat_interleave(groups, 1) for t in prefix)
    gate, output_gate = binding.get_gates(query, key, mask)
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if gate is None:
        gate = query.new_ones(())
    if gate.ndim < 4:  # one for all queries
        gate = gate.reshape((1,) * (3 - gate.ndim) + gate.shape).unsqueeze(2)
        gate = gate.repeat_interleave(groups, 1) if gate.shape[1] > 1 else gate
    prefix_scores = (query @ pk.mT) * gate
    if output_gate is not None:
        output, scores = plain_attention(query, k, v, None if mask is None else mask[..., : k.shape[2]], scaling)
        own = output_gate[:, None, None] * ((prefix_scores * scaling).softmax(-1) * gate) @ pv
        return output + own.transpose(1, 2), scores
    scores = torch.cat([prefix_scores, query @ k.mT], dim=-1) * scaling
    if mask is not None:
        scores = scores + nn.functional.pad(mask[..., : k.shape[2]], (pk.shape[2], 0))
    weights = scores.softmax(-1)
    p_prefix, p_tokens = weights.split([pk.shape[2], k.shape[2]], dim=-1)
    return ((p_prefix * gate) @ pv + p_tokens @ v).transpose(1, 2), weights


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Run the attention of a layer without a prefix."""
    scores = query @ key.mT * scaling + (0.0 if mask is None else mask)
    return (scores.softmax(-1) @ value).transpose(1, 2), scores


def projected(module: nn.Module, states: Tensor, size: int) -> list[Tensor]:
    """Return LLaMA-Adapter's keys and values, projected from its states by BERT's or Llama's own layers."""
    layers = (module.key, module.value) if hasattr(module, "key") else (module.k_proj, module.v_proj)
    return [layer(states).unflatten(-1, (-1, size)).transpose(0, 1) for layer in layers]


@contextmanager
def textbook(model: PreTrainedModel) -> Iterator[None]:
    """Run an attached model on the textbook attention."""
    AttentionInterface.register("textbook", textbook_attention)
    AttentionMaskInterface.register("textbook", AttentionMaskInterface()["eager"])
    former = model.config._attn_implementation
    model.set_attn_implementation("textbook")
    try:
        with mock.patch.object(Implementation, "check"):  # which would notice it
            yield
    finally:
        model.set_attn_implementation(former)
