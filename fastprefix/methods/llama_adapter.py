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
    """Learned states ``[m, d]`` in the last layers, which tokens attend to with a separate softmax and a gate.

    In each layer, the prefix keys and values are frozen projections of the states by the layer's own weights, without
    position encoding. The attention output of the prefix is multiplied by ``tanh(g_h)``, with one ``g_h`` per query
    head, and added to that of the tokens. ``g`` starts at 0, so training starts from the frozen model.

    Args:
        layers: number of layers with a prefix, counted from the last layer. None means all layers.
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
    """The states ``[m, d]`` and the gates ``[Hq]`` of each layer."""

    config: LlamaAdapterConfig

    def __init__(self, config: LlamaAdapterConfig, shapes: Sequence[AttentionShape]) -> None:
        super().__init__(config, shapes)
        self.states = nn.ParameterList([torch.empty(config.num_virtual_tokens, shape.width) for shape in shapes])
        self.gates = nn.ParameterList([torch.empty(shape.heads) for shape in shapes])

    @classmethod
    def chosen_layers(cls, config: LlamaAdapterConfig, shapes: Sequence[AttentionShape]) -> range:
        """Return the indices of the last ``layers`` layers."""
        count = len(shapes)
        layers = count if config.layers is None else config.layers
        if layers > count:
            raise ValueError(
                f"`layers` must be at most {count}, the number of attention layers of the model, got {layers}"
            )
        return range(count - layers, count)

    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Draw the states from normal(0, 1), as in the authors' code, and set ``g = 0``."""
        for states in self.states:
            nn.init.normal_(states)
        for gate in self.gates:
            nn.init.zeros_(gate)

    def prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """Return an empty list, because the layers compute keys and values from ``projected_states``."""
        return []

    def projected_states(self, layer: int) -> Tensor:
        """Return the states ``[m, d]`` of a layer."""
        states: Tensor = self.states[layer]
        return states

    def head_parameters(self) -> dict[str, Literal["keys", "queries"]]:
        """Return the gates."""
        return {f"gates.{layer}": "queries" for layer in range(len(self.shapes))}

    def output_gate(self, layer: int) -> Tensor:
        """Return ``tanh(g) [Hq]``."""
        return torch.tanh(self.gates[layer])


register("llama_adapter", LlamaAdapterConfig, LlamaAdapter)
