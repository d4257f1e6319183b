"""The attention function that ``transformers`` calls under the name "fastprefix"."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ...ops.prefix_attention import prefix_attention
from .masks import fastprefix_mask, read_mask

NAME = "fastprefix"
BINDING = "_fastprefix_binding"
"""The attribute of an attention module that holds its ``Binding``."""

Prefix = tuple[Tensor, Tensor]
"""Keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]``."""


class Binding(Protocol):
    """What an attention module asks for its prefix, gates and bias."""

    def prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix | None:
        """The prefix, or None."""

    def gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The prefix gate and the output gate, each or None."""

    def bias(self, query: Tensor) -> Tensor | None:
        """What is added to the scores of the prefix, ``[N, m]``, or None; -inf hides a prefix key."""


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
    binding: Binding | None = getattr(module, BINDING, None)
    masking = read_mask(attention_mask, query)
    prefix = None if binding is None else binding.prefix(query, key, value)
    pk, pv = (key[:, :, :0], value[:, :, :0]) if prefix is None else prefix
    gates = (None, None) if binding is None or prefix is None else binding.gates(query, key, attention_mask)
    output = prefix_attention(
        query,
        key,
        value,
        pk,
        pv,
        prefix_gate=gates[0],
        output_gate=gates[1],
        prefix_bias=None if binding is None or prefix is None else binding.bias(query),
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
