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
from torch import nn
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
from .attachment import Model, get_attachment
from .attention import Prefix
from .discovery import Layer, find_layers, find_method_layers
from .fully_sharded import gathering_around, is_fully_sharded, run_gathered
from .hooks import Forward, count_past, name_arguments
from .initial import find_shared_sources
from .positions import refuse_packed
from .prefix import PrefixHooks
from .prompt import PromptHooks
from .sharding import TensorParallelHeads
from .shared_prompt import SharedPromptHooks
from .switching import evaluating, find_device, list_configurations, load_offloaded, loads_all_inside

_ROWS = 4096  # of the table that are computed at once


def merge(model: Model) -> Model:
    """Merge a method into its model as far as possible, for inference. Nothing can be trained afterwards.

    Merging again changes nothing. ``detach`` restores the model bit for bit. What was merged into a prefix alone, can
    be saved, as a plain prefix. After merging ADePT, ``inputs_embeds`` takes what the model's own input embeddings
    give, the offset included.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no method attached, or nothing of it can be baked in, and why.
    """
    adapter = get_attachment(model).adapter
    if adapter.merged:
        return model
    method, hooks = adapter.method, adapter.hooks
    with evaluating(model), torch.no_grad():
        if isinstance(method, PrefixMethod):
            _merge_prefix(model, adapter, method)
        elif isinstance(hooks, SharedPromptHooks):
            _merge_shared_prompt(model, adapter, method, hooks)
        elif isinstance(method, ADePT) and type(hooks) is PromptHooks:
            _merge_table(model, adapter, method, hooks)
        else:
            raise ValueError(
                f"`model` must have something to merge, but {type(method).__name__} on the path "
                f'"{method.prompt_path}" computes the prompt anew for every input. Use the model as it is.'
            )
    adapter.merged = True
    adapter.mark(model)
    model.requires_grad_(False)
    return model


def export_cache(model: PreTrainedModel, batch_size: int = 1) -> DynamicCache:
    """Return a prefix as ``past_key_values`` for the model without this package, or any model with the same weights.

    It takes the prefix's columns in ``attention_mask``, as every cache does. Calls and ``generate`` extend a cache:
    export one for each.

    Raises:
        ValueError: the method is more than keys and values that stand before all tokens, and what it is.
    """
    adapter = get_attachment(model).adapter
    method = adapter.method
    if not isinstance(method, PrefixMethod):
        raise ValueError(
            f"`model` must have a prefix, but has the prompt of {type(method).__name__}. Call fastprefix.merge first."
        )
    if adapter.outside is not None:
        raise ValueError(
            f"`model` must have an adapter that is all in its prefix, but {adapter.outside}. Use the adapter itself."
        )
    if method.config.prefix_position != "shift":
        raise ValueError('`prefix_position` must be "shift" for a cache, whose tokens come after it, but is "none".')
    if method.needs_hidden():
        raise ValueError(f"`model` must have gates that do not depend on the input, but has {type(method).__name__}.")
    refuse_more_than_keys(method, "a cache")
    assert isinstance(adapter.hooks, PrefixHooks)
    modules = list(adapter.hooks.bindings)
    if nameless := [type(module).__name__ for module in modules if not isinstance(_get_index(module), int)]:
        raise ValueError(f"`model` must have attention layers with a layer_idx, but {nameless[0]} has none.")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pairs = method.baked().prefixes()
        if adapter.hooks.heads is not None:
            pairs = adapter.hooks.heads.take_prefixes(pairs)
        prefixes = dict(zip(map(_get_index, modules), pairs, strict=True))
        sources = find_shared_sources(model, prefixes)
        for index, pair in prefixes.items():
            if index not in sources:
                key, value = (t.to(model.dtype).expand(batch_size, -1, -1, -1).contiguous() for t in pair)
                cache.update(key, value, index)
            elif not all(map(torch.equal, pair, prefixes[sources[index]])):
                raise ValueError(
                    f"`model` must be one with the same prefix in layers that share their keys and values, but layer "
                    f"{index} of {type(model).__name__} reads those of layer {sources[index]} from a cache, and its "
                    "prefix is another: use the adapter on the model instead"
                )
    return cache


def refuse_more_than_keys(method: PrefixMethod, what: str) -> None:
    """Refuse a prefix that is more than keys and values at the positions before all tokens."""
    if method.key_bias(0) is not None:
        raise ValueError(f"`key_bias` must be False for {what}, which has no place for biases of keys, but is True.")
    shift, length = method.position_shift(), method.config.num_virtual_tokens
    if shift != length:
        raise ValueError(
            f"`position_shift` must be None for {what}, whose tokens stand right behind {length} keys, but is {shift}."
        )


def _get_index(module: nn.Module) -> Any:
    return getattr(module, "layer_idx", None)


def _merge_prefix(model: Any, adapter: Adapter, method: PrefixMethod) -> None:
    with gathering_around(model, [method]):
        baked = method.baked()
    adapter.hooks.remove()
    hooks = PrefixHooks(model, baked, find_method_layers(model, baked.config))
    if hooks.heads is not None:
        hooks.heads.distribute(baked)
    _exchange(model, adapter, baked, [hooks])


def _merge_shared_prompt(model: Any, adapter: Adapter, method: PromptMethod, hooks: SharedPromptHooks) -> None:
    """Turn a prompt into a prefix that stands before all tokens."""
    with load_offloaded(model, hooks.backbone), gathering_around(model, [method]):
        prefixes = hooks.run_prompt()
    table = _rewrite_table(hooks) if isinstance(method, ADePT) else None
    hooks.remove()
    layers = find_layers(model)
    pairs, heads = [prefixes[index] for index in range(len(layers))], TensorParallelHeads.find(model, layers)
    if heads is not None:
        pairs = [heads.spread_prefix(pair, index) for index, pair in enumerate(pairs)]
    prefix = _make_plain_prefix(method, pairs, layers)
    parts: list[Hooks] = []
    if table is not None:
        parts.append(NewTable(hooks, table))
    elif isinstance(method, DePT):
        prefix.add_module("offset", method)
        parts.append(OffsetHooks(model, method))
    merged = PrefixHooks(model, prefix, layers)
    merged.longest = hooks.positions.by_length
    _exchange(model, adapter, prefix, [*parts, merged])
    adapter.outside = _describe_outside(method)
    if merged.longest is not None and adapter.outside is None:
        adapter.outside = f"its keys are rotated for rows of up to {merged.longest} tokens alone"


def _merge_table(model: Any, adapter: Adapter, method: ADePT, hooks: PromptHooks) -> None:
    """Merge ADePT's network alone, which leaves prompt tuning."""
    config = PromptTuningConfig(
        method.config.num_virtual_tokens, modules_to_save=method.config.modules_to_save, shared_prompt=False
    )
    prompt = PromptTuning(config, method.shape)
    prompt.prompt, prompt.prompt_path = method.prompt, method.prompt_path
    if is_fully_sharded(model):  # the gathered parameter is freed again
        with gathering_around(model, [method]):
            prompt.prompt = nn.Parameter(method.prompt.detach().clone())
    table = NewTable(hooks, _rewrite_table(hooks))
    hooks.remove()
    hooks.method = prompt
    _exchange(model, adapter, prompt, [table, hooks])
    adapter.outside = _describe_outside(method)


def _describe_outside(method: PromptMethod) -> str | None:
    if isinstance(method, ADePT):
        return "ADePT's network is part of the embedding table"
    return "DePT's offset stands beside its prefix" if isinstance(method, DePT) else None


def _exchange(model: Any, adapter: Adapter, method: PrefixMethod | PromptMethod, parts: list[Hooks]) -> None:
    """Exchange what the adapter is."""
    setattr(model, MODULE, method.eval())
    adapter.config, adapter.method = method.config, method
    adapter.hooks = parts[0] if len(parts) == 1 else Several(parts)
    adapter.hooks.install(model)


def _make_plain_prefix(method: PromptMethod, prefixes: list[Prefix], layers: Sequence[Layer]) -> PrefixTuning:
    config = PrefixTuningConfig(
        method.config.num_virtual_tokens, modules_to_save=method.config.modules_to_save, prefix_position="shift"
    )
    prefix = PrefixTuning(config, [layer.whole_shape for layer in layers])
    prefix.set_prefixes(prefixes)
    return prefix


def _rewrite_table(hooks: PromptHooks) -> nn.Embedding:
    """Compute the embedding table with ADePT's offset, in blocks, and with all else that the former module does to a
    row.
    """
    former = hooks.embedding
    if getattr(former, "max_norm", None) is not None:
        raise ValueError("`model` must have an embedding that does not change its own weights, but it has max_norm.")
    around = (m for m in hooks.model.modules() if loads_all_inside(m))
    if any(inside is former for module in around for inside in module.modules()):
        raise ValueError(
            "`model` is offloaded with preload_module_classes, so accelerate would load the former embedding table in "
            "the place of the merged one: offload it without that option, or do not merge"
        )
    former_table = hooks.table
    table = torch.empty(former_table.shape, dtype=former_table.dtype, device=find_device(hooks.model))
    for ids in torch.arange(table.shape[0], device=table.device).split(_ROWS):
        with load_offloaded(hooks.model, former), gathering_around(hooks.model, [former, hooks.method]):
            table[ids[0] : ids[-1] + 1] = hooks.embed_ids(ids[None])[0]
    rows, width = table.shape
    return nn.Embedding(rows, width, padding_idx=getattr(former, "padding_idx", None), _weight=table)


class NewTable:
    """A backbone with another embedding in the places of its own.

    Weights that are tied to the former table stay as they are. The configurations say so in the meantime, or
    ``tie_weights``, which resizing a vocabulary calls too, would tie them to the new table.
    """

    def __init__(self, hooks: PromptHooks, embedding: nn.Embedding) -> None:
        self.model = hooks.model
        self.former, self.embedding = hooks.embedding, embedding
        self.tying: list[Any] = []  # the configurations that said that weights are tied
        self.tied: list[str] = []  # the names of the parameters that were tied to the former table
        self.places = [
            (parent, name)
            for parent in hooks.backbone.modules()
            for name, child in parent.named_children()
            if child is self.former
        ]

    def install(self, model: PreTrainedModel) -> None:
        """Put the new embedding there. The model may have been moved or resized since the table was computed."""
        weight: Any = self.former.weight
        _resize_like(self.embedding.to(device=find_device(model), dtype=weight.dtype), self.former)
        for parent, name in self.places:
            setattr(parent, name, self.embedding)
        self.tied = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
        self.tying = [config for config in list_configurations(model) if getattr(config, "tie_word_embeddings", False)]
        for config in self.tying:
            config.tie_word_embeddings = False

    def remove(self) -> None:
        """Put the former embedding back. The model may have been moved or resized since."""
        for config in self.tying:
            config.tie_word_embeddings = True
        weight = self.embedding.weight
        if not self.former.weight.is_meta:  # where accelerate has offloaded it, it has not been moved
            _resize_like(self.former.to(device=weight.device, dtype=weight.dtype), self.embedding)
        for parent, name in self.places:
            if getattr(parent, name) is self.embedding:
                setattr(parent, name, self.former)
        for name in self.tied:
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.former.weight)


def _resize_like(embedding: nn.Embedding, other: nn.Embedding) -> None:
    """Give an embedding as many rows as another has; those that it lacks are the other's."""
    rows, former = other.weight.shape[0], embedding.weight.shape[0]
    if rows != former:
        embedding.weight.data = torch.cat(
            [embedding.weight.data[:rows], other.weight.data[former:].to(embedding.weight)]
        )
        embedding.num_embeddings, embedding.padding_idx = rows, other.padding_idx


class OffsetHooks(PromptHooks):
    """A prompt method's offset without its prompt."""

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the backbone on embeddings with the offset."""
        arguments = name_arguments(self.names, args, kwargs)
        refuse_packed(arguments, self.backbone)
        return run_gathered(
            self.backbone, self.method, lambda: self.run_with_offset(forward, arguments, count_past(arguments))
        )


class Several:
    """Changes that are taken back together, the last first."""

    def __init__(self, parts: list[Hooks]) -> None:
        self.parts = parts

    def install(self, model: PreTrainedModel) -> None:
        """Make them, the first first."""
        for part in self.parts:
            part.install(model)

    def remove(self) -> None:
        """Undo all changes."""
        for part in reversed(self.parts):
            part.remove()
