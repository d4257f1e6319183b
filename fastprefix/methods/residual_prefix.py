"""Prefix tuning with a residual reparameterisation and a gate (Jung, Hwang, Lee, IEEE Access 2025).

The paper's equations are not public; the reading here is ours: ``E' = E + MLP_res(E)``, the prefix is
``W2 tanh(W1 E' + b1) + b2``, and each prefix token is weighed by a gate ``sigmoid(w)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .base import check_positive, register
from .prefix_tuning import PrefixTuning, PrefixTuningConfig, ReparameterizedPrefix
from .shapes import AttentionShape


@dataclass(kw_only=True)
class ResidualPrefixConfig(PrefixTuningConfig):
    """A reparameterised prefix with a residual network and a gate on the prefix tokens.

    Args:
        bottleneck_dim: ``b`` of ``MLP_res``: Linear d -> b, ReLU, Linear b -> d, LayerNorm.
        residual: whether there is ``MLP_res``.
        gate: whether prefix tokens are weighed by ``sigmoid(w)``, ``w [m]``.
        per_layer_gate: ``w [L, m]``, a gate a layer.
    """

    reparameterization: Literal["mlp"] | None = "mlp"
    bottleneck_dim: int = 128
    residual: bool = True
    gate: bool = True
    per_layer_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("bottleneck_dim", self.bottleneck_dim)
        if self.reparameterization is None:
            raise ValueError('reparameterization takes "mlp" for this method, got None')


class ResidualPrefix(PrefixTuning):
    """The residual reparameterisation and the gate, which starts at 1/2."""

    config: ResidualPrefixConfig

    def __init__(self, config: ResidualPrefixConfig, shapes: Sequence[AttentionShape]) -> None:
        super().__init__(config, shapes)
        if config.gate:
            rows = len(shapes) if config.per_layer_gate else 1
            self.gate_logits = nn.Parameter(torch.empty(rows, config.num_virtual_tokens))

    def _make_prefix(self) -> ReparameterizedPrefix:
        width, b = self.shapes[0].width, self.config.bottleneck_dim
        residual = None
        if self.config.residual:
            residual = nn.Sequential(nn.Linear(width, b), nn.ReLU(), nn.Linear(b, width), nn.LayerNorm(width))
        return ReparameterizedPrefix(self.config.num_virtual_tokens, self.shapes, self.config.hidden_dim, residual)

    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """``w = 0``: every gate starts at 1/2."""
        super().reset_parameters(text_keys_values)
        if self.config.gate:
            nn.init.zeros_(self.gate_logits)

    def prefix_gate(
        self, layer: int, hidden: Tensor | None, attended: Tensor | None, sequences: Tensor | None = None
    ) -> Tensor | None:
        """``sigmoid(w)``, ``[m]``."""
        if not self.config.gate:
            return None
        return torch.sigmoid(self.gate_logits[layer if self.config.per_layer_gate else 0])

    def gate_weights(self) -> Tensor | None:
        """Return the values of the gate now, ``[m]`` or ``[L, m]``, or None without a gate."""
        if not self.config.gate:
            return None
        weights = torch.sigmoid(self.gate_logits.detach())
        return weights if self.config.per_layer_gate else weights[0]


register("residual_prefix", ResidualPrefixConfig, ResidualPrefix)
