"""APT, adaptive prefix tuning (Zhang et al., "Towards adaptive prefix tuning for parameter-efficient language model
fine-tuning", ACL 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import LearningRates, check_choice, register
from .prefix_tuning import PrefixTuning, PrefixTuningConfig
from .shapes import AttentionShape


@dataclass(kw_only=True)
class APTConfig(PrefixTuningConfig):
    r"""Prefix tuning with gates. In layer i, ``(pk_i, pv_i) <- lambda_i sigmoid(h_{i-1} W_i) * (pk_i, pv_i)``.

    ``h_{i-1}`` is a hidden state that enters the layer. ``W_i [d, m]`` starts at 0 and the scalar ``lambda_i`` at 1,
    so every gate starts at 1/2. The paper specifies neither which hidden state it uses nor how the gates are
    initialized.

    Args:
        pooling: the hidden state that the gate is computed from. "cls" uses the first token that is not padding. It is
            the default in encoders. With a cache, the gate of the prefill is kept. "mean" uses the mean over the tokens
            that are not padding. It requires bidirectional attention, because in a decoder a token would depend on
            later tokens. "query" computes a gate for each token from its own hidden state. It is the default in
            decoders, including cross-attention. None uses the default of each layer.
        token_gate: True enables the token-level gate ``sigmoid(h W_i)``.
        layer_gate: True enables the layer-level gate ``lambda_i``.
    """

    learning_rates: ClassVar[LearningRates] = LearningRates(gates=1e-3)

    pooling: Literal["cls", "mean", "query"] | None = None
    token_gate: bool = True
    layer_gate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pooling", self.pooling, (None, "cls", "mean", "query"))
        check_choice("token_gate", self.token_gate, (False, True))
        check_choice("layer_gate", self.layer_gate, (False, True))


class APT(PrefixTuning):
    """A prefix, and a projection and a scalar for the gate of each layer.

    If ``Hkv D = d``, these are 1.5 times the parameters of prefix tuning plus one scalar per layer.
    """

    config: APTConfig

    def __init__(self, config: APTConfig, shapes: Sequence[AttentionShape]) -> None:
        super().__init__(config, shapes)
        self.poolings = [config.pooling or ("cls" if _is_of_an_encoder(shape) else "query") for shape in shapes]
        if config.pooling == "mean" and not all(map(_is_of_an_encoder, shapes)):
            raise ValueError(
                '`pooling` must not be "mean" for causal attention or cross-attention, where tokens would depend on '
                "later tokens"
            )
        if config.pooling == "cls" and any(shape.role == "cross" for shape in shapes):
            raise ValueError(
                '`pooling` must not be "cls" for cross-attention. Set `attentions` to roles other than "cross"'
            )
        m = config.num_virtual_tokens
        if config.token_gate:
            self.gate_projections = nn.ParameterList([torch.empty(shape.width, m) for shape in shapes])
        if config.layer_gate:
            self.layer_gates = nn.ParameterList([torch.empty(1) for _ in shapes])  # FSDP refuses 0-D parameters

    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Initialize the prefix, and set ``W = 0`` and ``lambda = 1``, so that every gate starts at 1/2."""
        super().reset_parameters(text_keys_values)
        if self.config.token_gate:
            for projection in self.gate_projections:
                nn.init.zeros_(projection)
        if self.config.layer_gate:
            for gate in self.layer_gates:
                nn.init.ones_(gate)

    def baked(self) -> PrefixTuning:
        """Return a prefix without a reparameterization, multiplied by the layer gate.

        The token gate is kept, since it depends on the input.

        Raises:
            ValueError: the method has only the token gate and a free prefix, so nothing can be precomputed.
        """
        if not self.config.token_gate:
            return super().baked()
        if self.config.reparameterization is None and not self.config.layer_gate:
            raise ValueError("APT's token gate depends on the input, and nothing else can be computed in advance")
        config = replace(self.config, reparameterization=None, layer_gate=False)
        baked = self._fill_baked(APT(config, self.shapes))
        baked.gate_projections = nn.ParameterList(p.detach().clone() for p in self.gate_projections)
        return baked

    def constant_gate(self, layer: int) -> Tensor | None:
        """Return the layer gate, or None without one."""
        return self.layer_gates[layer] if self.config.layer_gate else None

    def needs_hidden(self) -> bool:
        """Return True if the token-level gate is enabled, since it is computed from hidden states."""
        return self.config.token_gate

    def prefix_gate(
        self, layer: int, hidden: Tensor | None, attended: Tensor | None, sequences: Tensor | None = None
    ) -> Tensor | None:
        """Return ``lambda_i sigmoid(h W_i)``, of shape ``[B, 1, m]``, or ``[B, 1, N, m]`` with a gate for each query.

        Without a token gate, return ``lambda_i [1]``, or None.
        """
        gate = self.constant_gate(layer)
        if not self.config.token_gate:
            return gate
        if hidden is None:
            raise RuntimeError("`hidden` must be the hidden states that enter the layer for APT's gate, got None")
        if hidden.ndim != 3:
            raise ValueError(
                f"APT's token gate requires hidden states [B, N, d] at the input of each layer, got "
                f"{list(hidden.shape)}. Use token_gate=False"
            )
        pooled = self._pool(self.poolings[layer], hidden, attended, sequences)
        alpha = torch.sigmoid(pooled @ self.gate_projections[layer].to(pooled)).unsqueeze(1)
        return alpha if gate is None else gate.to(alpha.device) * alpha

    def _pool(self, pooling: str, hidden: Tensor, attended: Tensor | None, sequences: Tensor | None) -> Tensor:
        """Return the pooled hidden states: ``[B, d]``, or ``[B, N, d]`` for "query" and for packed sequences."""
        if pooling == "query":
            return hidden
        if pooling == "mean":
            if attended is None:
                return hidden.mean(dim=1)
            count = attended.sum(dim=1).clamp(min=1).unsqueeze(-1)
            total = (hidden * attended.unsqueeze(-1)).sum(dim=1, dtype=torch.promote_types(hidden.dtype, torch.float32))
            return (total / count).to(hidden.dtype)  # the sum can exceed the range of float16
        if sequences is not None:
            return hidden.gather(1, _find_first_tokens(sequences).unsqueeze(-1).expand_as(hidden))
        if attended is None:
            return hidden[:, 0]
        first = attended.to(torch.int32).argmax(dim=1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), first]


def _find_first_tokens(sequences: Tensor) -> Tensor:
    """Return the index of the first token of each token's sequence, ``[B, N]``."""
    begins = torch.diff(sequences, prepend=sequences[:, :1], dim=1) != 0
    return (torch.arange(sequences.shape[1], device=sequences.device) * begins).cummax(dim=1).values


def _is_of_an_encoder(shape: AttentionShape) -> bool:
    return not shape.causal and shape.role != "cross"


register("apt", APTConfig, APT)
