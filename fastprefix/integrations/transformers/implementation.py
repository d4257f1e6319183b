"""Switching a model's attention to "fastprefix", and back."""

import copy
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .attention import BINDING, NAME, Binding, register


class _Owner(NamedTuple):
    module: Any
    former: Any  # its configuration before
    own: Any  # and meanwhile


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set a model's attention, and that of parts with a copy of its configuration (T5's halves), which older
    ``transformers`` pass over.
    """
    model.set_attn_implementation(name)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and type(part.config) is type(model.config):
            part.config._attn_implementation_internal = name


class Implementation:
    """A model on the attention "fastprefix", each of its attention modules bound, until it is restored.

    The model gets configurations of its own meanwhile, since the name of the attention stands in the configuration and
    another model may share it.
    """

    def __init__(self, model: PreTrainedModel, bindings: dict[nn.Module, Binding]) -> None:
        register()
        memo: dict[int, Any] = {}
        self.bindings = bindings
        self.owners = [
            _Owner(module, module.config, copy.deepcopy(module.config, memo))
            for module in model.modules()
            if hasattr(module, "config")
            and hasattr(module.config, "to_dict")
            and not isinstance(getattr(type(module), "config", None), property)
        ]
        self.resume()
        set_attention(model, NAME)

    def resume(self) -> None:
        """Put back what ``restore`` took, what was changed in the configurations before included."""
        for owner in self.owners:
            owner.module.config = owner.own
        for module, binding in self.bindings.items():
            setattr(module, BINDING, binding)

    def restore(self) -> None:
        """Take everything back."""
        for module in self.bindings:
            delattr(module, BINDING)
        for owner in self.owners:
            owner.module.config = owner.former
