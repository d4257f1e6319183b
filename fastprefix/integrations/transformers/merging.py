"""Merging a method into its model for inference, and handing a prefix to a model without this package.

What does not depend on the input is computed once:

- ADePT's network becomes part of the embedding table. An output head that is tied to the table keeps the old one.
- On a decoder that shares its prompt, the prompt becomes keys and values. DePT's offset depends on the position and
  stays where it is.
- A reparameterised prefix becomes a plain one, and gates that do not depend on the input are multiplied in.

The embedding that was there is kept until the method is detached, on its device, or there would be no way back. Where
an output head shares its weights, that costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ...methods import (
    ADePT,
    DePT,
    PrefixMethod,
    PrefixTuning,
    PrefixTuningConfig,
    PromptMethod,
    PromptTuning,
    PromptTuningConfig,
)
from .adapter import MODULE, Adapter, Hooks
from .attachment import Model, attachment_of
from .attention import Prefix
from .discovery import Layer, find_layers, method_layers
from .hooks import by_name, past_length, refuse_packed
from .prefix import PrefixHooks
from .prompt import PromptHooks
from .shared_prompt import SharedPromptHooks
from .switching import evaluated

_ROWS = 4096  # of the table that are computed at once


def merge(model: Model) -> Model:
    """Bake a method into its model as far as it goes, for inference: nothing can be trained afterwards.

    Merging again changes nothing. ``detach`` restores the model bit for bit. What was merged into a prefix alone, can
    be saved, as a plain prefix. After merging ADePT, ``inputs_embeds`` takes what the model's own input embeddings
    give, the offset included.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no method attached, or nothing of it can be baked in, and why.
    """
    adapter = attachment_of(model).adapter
    if adapter.merged:
        return model
    method, hooks = adapter.method, adapter.hooks
    with evaluated(model), torch.no_grad():
        if isinstance(method, PrefixMethod):
            _merge_prefix(model, adapter, method)
        elif isinstance(hooks, SharedPromptHooks):
            _merge_shared_prompt(model, adapter, method, hooks)
        elif isinstance(method, ADePT) and type(hooks) is PromptHooks:
            _merge_table(model, adapter, method, hooks)
        else:
            raise ValueError(
                f"model takes one with something to merge: {type(method).__name__} on the path "
                f'"{method.prompt_path}" computes the prompt anew for every input'
            )
    adapter.merged = True
    adapter.mark(model)
    model.requires_grad_(False)
    return model


def export_cache(model: PreTrainedModel, batch_size: int = 1) -> DynamicCache:
    """A prefix as ``past_key_values`` for the model without this package, or any model with the same weights.

    It takes the prefix's columns in ``attention_mask``, as every cache does. Calls and ``generate`` extend a cache:
    export one for each.

    Raises:
        ValueError: the method is more than keys and values that stand before all tokens, and what it is.
    """
    adapter = attachment_of(model).adapter
    method = adapter.method
    if not isinstance(method, PrefixMethod):
        raise ValueError(f"model takes one with a prefix; merge {type(method).__name__}'s prompt into one first")
    if adapter.outside is not None:
        raise ValueError(f"model takes one whose adapter is all in its prefix; {adapter.outside}")
    if method.config.prefix_position != "shift":
        raise ValueError('prefix_position takes "shift" for a cache, whose tokens come after it; got "none"')
    if method.needs_hidden():
        raise ValueError(f"model takes one whose gates do not depend on the input, got {type(method).__name__}")
    assert isinstance(adapter.hooks, PrefixHooks)
    modules = list(adapter.hooks.bindings)
    if nameless := [type(module).__name__ for module in modules if not isinstance(_index(module), int)]:
        raise ValueError(f"model takes one whose attention layers have a layer_idx; without: {nameless[0]}")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for module, pair in zip(modules, method.baked().prefixes(), strict=True):
            key, value = (t.to(model.dtype).expand(batch_size, -1, -1, -1).contiguous() for t in pair)
            cache.update(key, value, _index(module))
    return cache


def _index(module: nn.Module) -> Any:
    return getattr(module, "layer_idx", None)


def _merge_prefix(model: Any, adapter: Adapter, method: PrefixMethod) -> None:
    baked = method.baked()
    adapter.hooks.remove()
    _put(model, adapter, baked, [PrefixHooks(model, baked, method_layers(model, baked.config))])


def _merge_shared_prompt(model: Any, adapter: Adapter, method: PromptMethod, hooks: SharedPromptHooks) -> None:
    """The prompt as a prefix that stands before all tokens."""
    prefixes = hooks.run_prompt()
    table = _rewritten(hooks) if isinstance(method, ADePT) else None
    hooks.remove()
    layers = find_layers(model)
    prefix = _plain_prefix(method, [prefixes[index] for index in range(len(layers))], layers)
    parts: list[Hooks] = []
    if table is not None:
        parts.append(NewTable(hooks, table))
    elif isinstance(method, DePT):
        prefix.add_module("offset", method)
        parts.append(OffsetAttachment(model, method))
    merged = PrefixHooks(model, prefix, layers)
    merged.longest = hooks.positions.by_length
    _put(model, adapter, prefix, [*parts, merged])
    adapter.outside = _outside(method)
    if merged.longest is not None and adapter.outside is None:
        adapter.outside = f"its keys are rotated for rows of up to {merged.longest} tokens alone"


def _merge_table(model: Any, adapter: Adapter, method: ADePT, hooks: PromptHooks) -> None:
    """ADePT's network alone: what is left is prompt tuning."""
    config = PromptTuningConfig(
        method.config.num_virtual_tokens, modules_to_save=method.config.modules_to_save, shared_prompt=False
    )
    prompt = PromptTuning(config, method.shape)
    prompt.prompt, prompt.prompt_path = method.prompt, method.prompt_path
    table = NewTable(hooks, _rewritten(hooks))
    hooks.remove()
    hooks.method = prompt
    _put(model, adapter, prompt, [table, hooks])
    adapter.outside = _outside(method)


def _outside(method: PromptMethod) -> str | None:
    if isinstance(method, ADePT):
        return "ADePT's network is part of the embedding table"
    return "DePT's offset stands beside its prefix" if isinstance(method, DePT) else None


def _put(model: Any, adapter: Adapter, method: PrefixMethod | PromptMethod, parts: list[Hooks]) -> None:
    """Exchange what the adapter is."""
    setattr(model, MODULE, method.eval())
    adapter.config, adapter.method = method.config, method
    adapter.hooks = parts[0] if len(parts) == 1 else Several(parts)
    adapter.hooks.install(model)


def _plain_prefix(method: PromptMethod, prefixes: list[Prefix], layers: Sequence[Layer]) -> PrefixTuning:
    config = PrefixTuningConfig(
        method.config.num_virtual_tokens, modules_to_save=method.config.modules_to_save, prefix_position="shift"
    )
    prefix = PrefixTuning(config, [layer.shape for layer in layers])
    prefix.set_prefixes(prefixes)
    return prefix


def _rewritten(hooks: PromptHooks) -> nn.Embedding:
    """The embedding with ADePT's offset, in blocks; whatever else the former does to a row is in it too."""
    former = hooks.embedding
    if getattr(former, "max_norm", None) is not None:
        raise ValueError("model takes one whose embedding does not change its own weights, got one with max_norm")
    table = torch.empty_like(hooks.table, requires_grad=False)
    for ids in torch.arange(table.shape[0], device=table.device).split(_ROWS):
        table[ids[0] : ids[-1] + 1] = hooks.embed(ids[None], None, 0, with_prompt=False)[0]
    rows, width = table.shape
    return nn.Embedding(rows, width, padding_idx=getattr(former, "padding_idx", None), _weight=table)


class NewTable:
    """A backbone with another embedding in the places of its own."""

    def __init__(self, hooks: PromptHooks, embedding: nn.Embedding) -> None:
        self.former, self.embedding = hooks.embedding, embedding
        self.places = [
            (parent, name)
            for parent in hooks.backbone.modules()
            for name, child in parent.named_children()
            if child is self.former
        ]

    def install(self, model: PreTrainedModel) -> None:
        """Put it there. Meanwhile the model may have been moved."""
        weight: Any = self.former.weight
        for parent, name in self.places:
            setattr(parent, name, self.embedding.to(device=weight.device, dtype=weight.dtype))

    def remove(self) -> None:
        """Take it back. Meanwhile the model may have been moved."""
        weight = self.embedding.weight
        for parent, name in self.places:
            setattr(parent, name, self.former.to(device=weight.device, dtype=weight.dtype))


class OffsetAttachment(PromptHooks):
    """A prompt method's offset without its prompt."""

    def insert(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the backbone: embeddings with the offset."""
        arguments = by_name(self.names, args, kwargs)
        refuse_packed(arguments, self.backbone)
        ids, rows = self.tokens(arguments)
        embeds: Tensor = self.embed(ids, rows, past_length(arguments), with_prompt=False)
        arguments.update(input_ids=None, inputs_embeds=embeds)
        return (), {name: value for name, value in arguments.items() if value is not None or name in kwargs}


class Several:
    """Changes that are taken back together, the last first."""

    def __init__(self, parts: list[Hooks]) -> None:
        self.parts = parts

    def install(self, model: PreTrainedModel) -> None:
        """Make them, the first first."""
        for part in self.parts:
            part.install(model)

    def remove(self) -> None:
        """Take everything back."""
        for part in reversed(self.parts):
            part.remove()
