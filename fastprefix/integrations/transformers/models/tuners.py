"""Find the tuner layers that PEFT has added to a model, such as those of LoRA and DoRA, and their parameters.

PEFT is not imported. Its classes are recognized by their names, so this module works without an installed PEFT.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

_MODELS = frozenset({"PeftModel", "PeftMixedModel"})
_LAYERS = frozenset({"BaseTunerLayer", "AuxiliaryTrainingWrapper"})
"""The classes of layers that replace a module of the base model, and of wrappers that train a copy of a module."""
_BASES = ("base_layer", "original_module")
"""The attributes of these layers and wrappers that hold the module of the base model."""


def _is_of(value: object, names: frozenset[str]) -> bool:
    return any(each.__name__ in names for each in type(value).__mro__)


def find_base_model(model: nn.Module) -> PreTrainedModel:
    """Return the model inside a PEFT model whose adapters are layers, or the model itself.

    A PEFT model with prompts, prefixes or adaption prompts is returned unchanged, since these are not layers.
    """
    if _is_of(model, _MODELS) and not getattr(model, "_is_prompt_learning", False):
        base = getattr(model._modules.get("base_model"), "model", None)
        if isinstance(base, PreTrainedModel) and "ADAPTION_PROMPT" not in str(getattr(model, "peft_type", "")):
            return base
    return cast(PreTrainedModel, model)


def list_tuner_layers(model: nn.Module) -> Iterator[Any]:
    """Yield PEFT's layers and wrappers in a model."""
    return (module for module in model.modules() if _is_of(module, _LAYERS))


def has_tuner_layers(model: nn.Module) -> bool:
    """Return whether PEFT has added layers to a model."""
    return next(list_tuner_layers(model), None) is not None


class TunerParameter(NamedTuple):
    """A parameter that PEFT has added to a model."""

    name: str
    parameter: nn.Parameter
    active: bool
    """True if the parameter belongs to a PEFT adapter in use."""


def list_tuner_parameters(model: nn.Module) -> Iterator[TunerParameter]:
    """Yield the parameters that PEFT has added to a model, without those of the base modules inside PEFT's layers."""
    for name, module in model.named_modules():
        if _is_of(module, _LAYERS):
            layer: Any = module
            for inside, parameter in _list_own(module):
                active = not set(layer.active_adapters).isdisjoint(inside.split("."))
                yield TunerParameter(f"{name}.{inside}" if name else inside, parameter, active)


def _list_own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters(recurse=False)
    for name, child in module.named_children():
        if name not in _BASES and not _is_of(child, _LAYERS):
            yield from ((f"{name}.{inside}", parameter) for inside, parameter in _list_own(child))


class Frozen:
    """The parameters that PEFT trains, frozen while an adapter of this package is in use."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []

    def freeze(self, model: nn.Module, own: Iterable[nn.Parameter] = ()) -> None:
        """Freeze all trainable parameters of a model, except for an adapter's ``own`` parameters."""
        kept = set(map(id, own))
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in kept:
                parameter.requires_grad_(False)
                self.parameters.append(parameter)

    def release(self, model: nn.Module) -> None:
        """Make the parameters trainable again, except for those of PEFT adapters that are no longer in use."""
        unused = {id(each.parameter) for each in list_tuner_parameters(model) if not each.active}
        for parameter in self.parameters:
            parameter.requires_grad_(parameter.requires_grad or id(parameter) not in unused)
        self.parameters = []


@contextmanager
def disable_tuners(model: nn.Module) -> Iterator[None]:
    """Run a model without PEFT's layers in this context. The same parameters stay trainable."""
    layers = [layer for layer in list_tuner_layers(model) if not layer.disable_adapters]
    trained = [(each.parameter, each.parameter.requires_grad) for each in list_tuner_parameters(model)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)


def read_tuner_state(model: nn.Module) -> object:
    """Return an object that compares equal as long as PEFT's layers compute the same function.

    Return None if that cannot be known, because PEFT's parameters are trainable or are inference tensors. Some
    optimizers change parameters in ways that PyTorch's version counters do not record.
    """
    parameters = [each.parameter for each in list_tuner_parameters(model)]
    if any(p.requires_grad or p.is_inference() for p in parameters):
        return None
    return *map(_read_layer, list_tuner_layers(model)), *((p.data_ptr(), p._version) for p in parameters)


def _read_layer(layer: Any) -> tuple[object, ...]:
    scales = getattr(layer, "scaling", None)
    read = tuple(map(_read_scale, scales.items())) if isinstance(scales, dict) else ()
    merged = tuple(getattr(layer, "merged_adapters", ()))
    return merged, tuple(layer.active_adapters), bool(layer.disable_adapters), read


def _read_scale(item: tuple[str, Any]) -> tuple[object, ...]:
    name, scale = item
    return (name, scale.data_ptr(), scale._version) if isinstance(scale, Tensor) else (name, scale)


_BY_ROW = ("adapter_names", "alora_offsets")
"""The arguments of PEFT's layers with a value for each row: its adapter, and where an activated LoRA begins."""


def differs_by_row(model: nn.Module) -> bool:
    """Return whether PEFT's layers compute different functions for the rows of the call in progress."""
    return bool(_list_hooks_by_row(model))


def refuse_different_rows(model: nn.Module, what: str) -> None:
    """Refuse a call whose rows have different PEFT adapters.

    PEFT's hooks of the call are removed, since PEFT itself does not remove them after an error.

    Args:
        model: a model that may have PEFT's layers.
        what: what runs once for all rows. The error message names it.

    Raises:
        ValueError: if PEFT's layers compute different functions for the rows of the call in progress.
    """
    hooks = _list_hooks_by_row(model)
    for layer, number in hooks:
        del layer._forward_pre_hooks[number]
        layer._forward_pre_hooks_with_kwargs.pop(number, None)
    if hooks:
        raise ValueError(
            f"`adapter_names` and activated LoRA must not be used with {what}, which runs through PEFT's layers once "
            "for all rows. Run each adapter in its own batch, with set_adapter."
        )


def _list_hooks_by_row(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """Return PEFT's layers with the numbers of their hooks that pass on a value for each row."""
    return [
        (layer, number)
        for layer in list_tuner_layers(model)
        for number, hook in layer._forward_pre_hooks.items()
        if isinstance(hook, functools.partial) and not hook.keywords.keys().isdisjoint(_BY_ROW)
    ]


def find_taken_by_peft(model: nn.Module, names: Collection[str]) -> list[str]:
    """Return the named modules that PEFT has added layers to, or that it trains as a copy or a part of a copy."""
    if not names:
        return []
    layers = {name: module for name, module in model.named_modules() if _is_of(module, _LAYERS)}
    wrappers = [name for name, module in layers.items() if "base_layer" not in module._modules]
    return [
        name
        for name in names
        if any(f"{each}.".startswith(f"{name}.") for each in layers)
        or any(f"{name}.".startswith(f"{each}.") for each in wrappers)
    ]
