"""LLaMA-Adapter (Zhang et al., "LLaMA-Adapter: efficient fine-tuning of large language models with zero-initialized
attention", ICLR 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import MethodConfig, PrefixMethod, check_positive, register
from .shapes import AttentionShape


@dataclass(kw_only=True)
class LlamaAdapterConfig(MethodConfig):
    """Learned states ``[m, d]`` in the last layers, attended to with a softmax and a gate of their own.

    In layer i the prefix keys and values are the layer's own frozen projections of its states, without positions; what
    the queries get from them is multiplied by ``tanh(g_h)``, one ``g_h`` a query head, and added. ``g = 0`` at the
    start, so training starts from the frozen model.

    Args:
        layers: how many layers, counted from the last; None: all.
    """

    kind: ClassVar[str] = "prefix"
    init_text: ClassVar[None] = None
    prefix_position: ClassVar[str] = "none"

    layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            check_positive("layers", self.layers)


class LlamaAdapter(PrefixMethod):
    """States ``[m, d]`` and gates ``[Hq]`` of each layer."""

    config: LlamaAdapterConfig

    def __init__(self, config: LlamaAdapterConfig, shapes: Sequence[AttentionShape]) -> None:
        super().__init__(config, shapes)
        self.states = nn.ParameterList([torch.empty(config.num_virtual_tokens, shape.width) for shape in shapes])
        self.gates = nn.ParameterList([torch.empty(shape.heads) for shape in shapes])

    @classmethod
    def chosen_layers(cls, config: LlamaAdapterConfig, shapes: Sequence[AttentionShape]) -> range:
        """Return the last ``layers`` of them."""
        count = len(shapes)
        layers = count if config.layers is None else config.layers
        if layers > count:
            raise ValueError(
                f"`layers` must be at most {count}, the number of attention layers of the model, got {layers}"
            )
        return range(count - layers, count)

    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """States normal(0, 1), as in the authors' code; ``g = 0``."""
        for states in self.states:
            nn.init.normal_(states)
        for gate in self.gates:
            nn.init.zeros_(gate)

    def prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """None: the layers make them of their states."""
        return []

    def projected_states(self, layer: int) -> Tensor:
        """``[m, d]`` of a layer."""
        states: Tensor = self.states[layer]
        return states

    def head_parameters(self) -> dict[str, Literal["keys", "queries"]]:
        """Return the gates."""
        return {f"gates.{layer}": "queries" for layer in range(len(self.shapes))}

    def output_gate(self, layer: int) -> Tensor:
        """``tanh(g)``, ``[Hq]``."""
        return torch.tanh(self.gates[layer])


register("llama_adapter", LlamaAdapterConfig, LlamaAdapter)
