"""Gradient checkpointing, and prefixes under the reentrant kind.

That kind runs the backward of each checkpointed layer by itself. A prefix that several layers have from one network
would then be differentiated once a layer, and the network's graph is gone after the first. So the layers are given
leaves in the place of such a prefix, and a node below the first layer, whose backward comes after those of all layers,
hands what the leaves have gathered to the network, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Prefix


class Cut:
    """The prefixes of the last call that was differentiable, cut off from the graph that they come from."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.tied = True

    def cut(self, prefixes: list[Prefix]) -> None:
        """Make leaves with the values of the prefixes; ``tie`` has to follow in the same call."""
        self.tensors = [tensor for prefix in prefixes for tensor in prefix]
        self.leaves = [tensor.detach().requires_grad_() for tensor in self.tensors]
        self.tied = False

    def clear(self) -> None:
        """The call that begins needs no leaves."""
        self.tensors, self.leaves, self.tied = [], [], True

    def prefix(self, index: int) -> Prefix | None:
        """A layer's leaves, if there are any and they are to be differentiated."""
        if not (self.leaves and torch.is_grad_enabled()):
            return None
        return self.leaves[2 * index], self.leaves[2 * index + 1]

    def tie(self, hidden: Tensor) -> Tensor:
        """What enters the first layer, tied to the prefixes that were cut off."""
        self.tied = True
        # It needs a gradient in any case: reentrant checkpointing gives none to a layer none of whose inputs needs one.
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        tied: Tensor = _Gather.apply(self, self.leaves, hidden, *self.tensors)  # type: ignore[no-untyped-call]
        return tied

    def __getstate__(self) -> dict[str, Any]:
        """What lives only while a model runs is not copied or pickled."""
        return vars(Cut())


class _Gather(torch.autograd.Function):
    """The identity; its backward also gives the prefixes the gradients that their leaves have gathered."""

    @staticmethod
    def forward(ctx: Any, cut: Cut, leaves: list[Tensor], hidden: Tensor, *tensors: Tensor) -> Tensor:
        ctx.cut, ctx.leaves = cut, leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # A layer that is run again takes the leaves of the last call, be it differentiated for that call or another.
        gathered = [_sum(_taken(leaf), _taken(last)) for leaf, last in zip(ctx.leaves, ctx.cut.leaves, strict=True)]
        return None, None, gradient, *gathered


def reentrant(backbone: nn.Module) -> bool:
    """Whether a backbone trains with reentrant gradient checkpointing."""
    if not backbone.training or torch.compiler.is_compiling():
        return False
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in _checkpointed(backbone))
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions if function)


@contextmanager
def not_checkpointed(backbone: nn.Module) -> Iterator[None]:
    """A context in which a backbone runs without gradient checkpointing."""
    modules = _checkpointed(backbone)
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def _checkpointed(backbone: nn.Module) -> list[Any]:
    """The modules of a backbone that run with gradient checkpointing."""
    return [module for module in backbone.modules() if getattr(module, "gradient_checkpointing", False)]


def _taken(leaf: Tensor) -> Tensor | None:
    gradient, leaf.grad = leaf.grad, None
    return gradient


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if second is None else second if first is None else first + second
