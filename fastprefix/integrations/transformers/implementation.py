"""Switching a model's attention to this package's, and back."""

import copy
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .attention import BINDING, Binding, register
from .borrowing import set_attention
from .trial import tried


class _Owner(NamedTuple):
    module: Any
    former: Any  # its configuration before
    own: Any  # and meanwhile


class Implementation:
    """A model on this package's attention, each of its attention modules bound, until it is restored.

    The model gets configurations of its own meanwhile, since the name of the attention stands in the configuration and
    another model may share it.
    """

    def __init__(self, model: PreTrainedModel, bindings: dict[nn.Module, Binding]) -> None:
        register()
        name = tried(model).attention
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
        set_attention(model, name)

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
