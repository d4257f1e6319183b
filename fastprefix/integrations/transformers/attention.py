"""The attention function that ``transformers`` calls under the name "fastprefix"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ...ops.prefix_attention import prefix_attention
from .masks import biased, fastprefix_mask, full_mask, read_mask, split_bias, window_bias

NAME = "fastprefix"
FULL_MASKS = "fastprefix_full_masks"
"""The same attention, for models that make something else of the masks that they are given."""

MASKS: dict[str, Any] = {NAME: fastprefix_mask, FULL_MASKS: full_mask}
"""The mask function of each name."""

BINDING = "_fastprefix_binding"
"""The attribute of an attention module that holds its ``Binding``."""

CARRIED = "fastprefix_bindings"
"""The keyword under which a call carries bindings of its own, by attention module, in place of those on the modules.

A call's own arguments are also what gradient checkpointing runs a layer again with.
"""

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


@dataclass(frozen=True, eq=False)
class GivenPrefix:
    """A binding that holds its prefix.

    ``output_gate`` is that of a softmax of the prefix's own. A sliding ``window`` cuts the prefix, which stands before
    all tokens; ``past`` of them are in a cache.
    """

    key: Tensor
    value: Tensor
    output_gate: Tensor | None = None
    window: int | None = None
    past: int = 0

    def prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix:
        """The prefix, where the query is and in its dtype."""
        return self.key.to(query), self.value.to(query)

    def gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[None, Tensor | None]:
        """The output gate."""
        return None, None if self.output_gate is None else self.output_gate.to(query)

    def bias(self, query: Tensor) -> Tensor | None:
        """What hides the prefix that the window does not reach."""
        return window_bias(query, self.window, self.key.shape[1], self.past)


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

    A sliding window is in the mask already. Where ``position_bias`` is wider than the keys, its first columns are the
    prefix's. Returns ``[B, N, H, Dv]`` and no attention weights.
    """
    if kwargs.get("indices") is not None:
        raise ValueError(f"{type(module).__name__} passes indices to its attention, which fastprefix does not serve")
    carried: Mapping[nn.Module, Binding] | None = kwargs.get(CARRIED)
    binding: Binding | None = getattr(module, BINDING, None) if carried is None else carried.get(module)
    if carried is not None and attention_mask is not None:
        attention_mask = attention_mask[..., -key.shape[2] :]  # some encoders' masks count the prefix
    prefix_bias, position_bias = split_bias(position_bias, key)
    masking = biased(read_mask(attention_mask, query), position_bias, key)
    prefix = None if binding is None else binding.prefix(query, key, value)
    pk, pv = (key[:, :, :0], value[:, :, :0]) if prefix is None else prefix
    gates = (None, None) if binding is None or prefix is None else binding.gates(query, key, attention_mask)
    if binding is not None and prefix is not None and (hidden := binding.bias(query)) is not None:
        prefix_bias = hidden if prefix_bias is None else hidden + prefix_bias
    output = prefix_attention(
        query,
        key,
        value,
        pk,
        pv,
        prefix_gate=gates[0],
        output_gate=gates[1],
        prefix_bias=None if prefix_bias is None else prefix_bias.to(query.dtype),
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
    for name, mask in MASKS.items():
        AttentionInterface.register(name, fastprefix_attention)
        AttentionMaskInterface.register(name, mask)
