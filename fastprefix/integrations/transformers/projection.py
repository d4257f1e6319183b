"""The keys and values that a layer's own projections make of states that are no tokens, for LLaMA-Adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from .attention import Prefix
from .borrowing import evaluated
from .implementation import switched
from .probe import Layer, find_layers, first_tensor


class Projection:
    """Keys ``[Hkv, m, D]`` and values ``[Hkv, m, Dv]`` of states ``[m, d]``, as an attention module computes them.

    The module is called as its model calls it for one token at position 0, where a rotary embedding does not rotate;
    each state is such a token, in a row of its own. So nothing has to be known of the module, neither the names of its
    projections nor what else it does to keys and values.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self.call = (args, kwargs)
        self.running = False
        self.projected: Prefix | None = None

    def __call__(self, states: Tensor) -> Prefix:
        hidden = first_tensor(*self.call)

        def adapted(tensor: Tensor) -> Tensor:
            """The states in place of the token; the rest where and as the states are, should the model have moved."""
            if tensor is hidden:
                return states[:, None]
            return tensor.to(states if tensor.is_floating_point() else states.device)

        args, kwargs = tree_map_only(Tensor, adapted, self.call)
        self.running = True
        try:
            self.module.forward(*args, **kwargs)
        finally:
            self.running, projected, self.projected = False, self.projected, None
        if projected is None:
            raise RuntimeError(f"{type(self.module).__name__} did not call the attention interface")
        key, value = projected  # [m, Hkv, 1, D]
        return key.squeeze(2).transpose(0, 1), value.squeeze(2).transpose(0, 1)

    def prefix(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Take what the module calls its attention with; for that call there is no prefix."""
        self.projected = (key, value)

    def gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[None, None]:
        """None."""
        return None, None

    def bias(self, query: Tensor) -> None:
        """None."""


def find_projections(model: PreTrainedModel, layers: list[Layer]) -> list[Projection]:
    """The projections of attention layers, found by running the model on one token.

    Raises:
        ValueError: a layer whose keys and values are not its own projections of what enters it.
    """
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, dict(kwargs)))

    handles = [layer.module.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        find_layers(model, torch.zeros(1, 1, dtype=torch.long))
    finally:
        for handle in handles:
            handle.remove()
    projections = [Projection(layer.module, *calls.get(layer.module, ((), {}))) for layer in layers]
    with switched(model, {p.module: p for p in projections}), evaluated(model), torch.no_grad():
        if lost := [layer.name for layer, p in zip(layers, projections, strict=True) if not _projects(layer, p)]:
            raise ValueError(
                f"model takes one whose layers compute keys and values of what enters their attention; not: {lost}"
            )
    return projections


def _projects(layer: Layer, projection: Projection) -> bool:
    """Whether a projection gives each of two states keys and values of its own, in the layer's shapes."""
    hidden = first_tensor(*projection.call)
    if hidden is None or hidden.shape != (1, 1, layer.shape.width):
        return False
    keys, values = projection(torch.randn(2, layer.shape.width).to(hidden))
    shape = layer.shape
    return (
        keys.shape == (shape.kv_heads, 2, shape.key_size)
        and values.shape == (shape.kv_heads, 2, shape.value_size)
        and not torch.equal(keys[:, 0], keys[:, 1])
        and not torch.equal(values[:, 0], values[:, 1])
    )
