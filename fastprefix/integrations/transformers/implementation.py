"""Switching a model's attention to this package's, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .attention import BINDING, NAME, Binding, register
from .borrowing import set_attention
from .trial import tried


class _Owner(NamedTuple):
    module: Any
    former: Any  # its configuration before
    own: Any  # and meanwhile


class OwnConfigurations:
    """Configurations of its own for a model, until they are given back.

    The name of the attention stands in the configuration, and another model may share it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        memo: dict[int, Any] = {}
        self.owners = [
            _Owner(module, module.config, copy.deepcopy(module.config, memo)) for module in _configured(model)
        ]
        for owner in self.owners:
            owner.module.config = owner.own

    def restore(self) -> None:
        """Give the model's former configurations back, without what was changed meanwhile."""
        for owner in self.owners:
            owner.module.config = owner.former


class Implementation:
    """A model on this package's attention, each of its attention modules bound, until it is restored."""

    def __init__(self, model: PreTrainedModel, bindings: dict[nn.Module, Binding]) -> None:
        register()
        self.model = model
        self.name = tried(model).attention
        self.bindings = bindings
        self.former: list[tuple[Any, str | None]] = []
        self.watched: list[Any] = []  # the configurations that the bound modules read
        self.resume()

    def resume(self) -> None:
        """Switch, again after ``restore`` too."""
        configs = {id(module.config): module.config for module in _configured(self.model)}
        self.former = [(config, config._attn_implementation_internal) for config in configs.values()]
        readers: list[Any] = [module for module in self.bindings if hasattr(module, "config")] or [self.model]
        self.watched = list({id(module.config): module.config for module in readers}.values())
        set_attention(self.model, self.name)
        for module, binding in self.bindings.items():
            setattr(module, BINDING, binding)

    def check(self) -> None:
        """Notice that the attention was switched to another since, but for this package's own trials.

        Raises:
            RuntimeError: it was; the model would run without its adapter.
        """
        for config in self.watched:
            if not str(name := config._attn_implementation).startswith(NAME):
                raise RuntimeError(
                    f"set_attn_implementation takes no other attention while an adapter is on the model, got {name!r}: "
                    f"its attention is {self.name!r} until the adapter is taken off"
                )

    def restore(self) -> None:
        """Take everything back."""
        for module in self.bindings:
            delattr(module, BINDING)
        for config, name in self.former:
            config._attn_implementation_internal = name


@contextmanager
def switched(model: PreTrainedModel, bindings: dict[nn.Module, Binding]) -> Iterator[None]:
    """A context in which a model is on this package's attention."""
    configurations = OwnConfigurations(model)
    try:
        implementation = Implementation(model, bindings)
        try:
            yield
        finally:
            implementation.restore()
    finally:
        configurations.restore()


def _configured(model: nn.Module) -> Iterator[Any]:
    """The modules that hold a configuration."""
    for module in model.modules():
        of_its_class = isinstance(getattr(type(module), "config", None), property)
        if not of_its_class and isinstance(getattr(module, "config", None), PretrainedConfig):
            yield module
