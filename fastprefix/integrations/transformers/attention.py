"""The attention function that ``transformers`` calls under the name "fastprefix"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ...ops.prefix_attention import prefix_attention
from .masks import fastprefix_mask, read_mask

if TYPE_CHECKING:
    from .prefix import LayerBinding

NAME = "fastprefix"
BINDING = "_fastprefix_binding"
"""The attribute of an attention module that holds its ``LayerBinding``."""


def fastprefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a module to its tokens and, where it is bound to one, to its prefix.

    A sliding window is in the mask already. Returns ``[B, N, H, Dv]`` and no attention weights.
    """
    for name, what in (("position_bias", position_bias), ("indices", kwargs.get("indices"))):
        if what is not None:
            raise ValueError(f"{type(module).__name__} passes {name} to its attention, which fastprefix does not serve")
    binding: LayerBinding | None = getattr(module, BINDING, None)
    masking = read_mask(attention_mask, query)
    if binding is None:
        pk, pv = key[0, :, :0], value[0, :, :0]
        prefix_gate = output_gate = None
    else:
        pk, pv = binding.prefix(query)
        prefix_gate, output_gate = binding.gates(query, key, attention_mask)
    output = prefix_attention(
        query,
        key,
        value,
        pk,
        pv,
        prefix_gate=prefix_gate,
        output_gate=output_gate,
        attn_mask=masking.attn_mask,
        is_causal=masking.is_causal,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.to(query.dtype),
        scale=scaling,
        dropout_p=dropout,
    )
    return output.transpose(1, 2), None


def register() -> None:
    """Make the attention and its masks known to ``transformers``; without its own masks, padding would be lost."""
    AttentionInterface.register(NAME, fastprefix_attention)
    AttentionMaskInterface.register(NAME, fastprefix_mask)
