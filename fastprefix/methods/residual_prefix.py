"""Prefix tuning with a residual reparameterization and a gate (Jung, Hwang, Lee, IEEE Access 2025).

The paper's equations are not public. This implementation is our interpretation: ``E' = E + MLP_res(E)``, the prefix is
``W2 tanh(W1 E' + b1) + b2``, and each prefix token is weighted by a gate ``sigmoid(w)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .base import check_choice, check_positive, register
from .prefix_tuning import PrefixTuning, PrefixTuningConfig, ReparameterizedPrefix
from .shapes import AttentionShape


@dataclass(kw_only=True)
class ResidualPrefixConfig(PrefixTuningConfig):
    """A reparameterized prefix with a residual network and a gate on each prefix token.

    The prefix is ``W2 tanh(W1 E' + b1) + b2`` with ``E' = E + MLP_res(E)``, times ``sigmoid(w)``. The paper's equations
    are not public, so this is our interpretation. The options of ``PrefixTuningConfig`` apply too.

    Args:
        bottleneck_dim: hidden size ``b`` of ``MLP_res``, which is Linear d -> b, ReLU, Linear b -> d, LayerNorm.
        residual: True enables ``MLP_res``. False uses ``E' = E``.
        gate: True multiplies prefix tokens by ``sigmoid(w)`` with ``w [m]``.
        per_layer_gate: True uses a separate gate for each layer, ``w [L, m]``.
    """

    reparameterization: Literal["mlp"] | None = "mlp"
    bottleneck_dim: int = 128
    residual: bool = True
    gate: bool = True
    per_layer_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("bottleneck_dim", self.bottleneck_dim)
        for name in ("residual", "gate", "per_layer_gate"):
            check_choice(name, getattr(self, name), (False, True))
        if self.per_layer_gate and not self.gate:
            raise ValueError("`per_layer_gate` must be False without `gate`, got True")
        if self.reparameterization is None:
            raise ValueError('`reparameterization` must be "mlp" for this method, got None')


class ResidualPrefix(PrefixTuning):
    """A prefix with a residual reparameterization, and a gate that starts at 1/2."""

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
        """Initialize the prefix, and set ``w = 0``, so that every gate starts at 1/2."""
        super().reset_parameters(text_keys_values)
        if self.config.gate:
            nn.init.zeros_(self.gate_logits)

    def prefix_gate(
        self, layer: int, hidden: Tensor | None, attended: Tensor | None, sequences: Tensor | None = None
    ) -> Tensor | None:
        """Return ``sigmoid(w) [m]``, or None without a gate."""
        if not self.config.gate:
            return None
        return torch.sigmoid(self.gate_logits[layer if self.config.per_layer_gate else 0])

    def gate_weights(self) -> Tensor | None:
        """Return the current values of the gate, ``[m]`` or ``[L, m]``, or None without a gate."""
        if not self.config.gate:
            return None
        weights = torch.sigmoid(self.gate_logits.detach())
        return weights if self.config.per_layer_gate else weights[0]


register("residual_prefix", ResidualPrefixConfig, ResidualPrefix)
