"""Merge a method into its model for inference, and export a prefix as a key/value cache.

Merging computes everything that does not depend on the input once:

- ADePT's network becomes part of the embedding table. An output head that is tied to the table keeps the old table.
- A shared prompt of a decoder becomes keys and values. DePT's offset depends on the position and is not merged.
- The rows that deep visual prompts insert into each layer become a prefix.
- A prompt that runs in every row and is computed from other parameters becomes a plain prompt.
- A reparameterized prefix becomes a plain prefix, and gates that do not depend on the input are multiplied in.

The former embedding table is kept on its device until the method is detached, so that ``detach`` can restore it. This
requires no extra memory if an output head shares its weights.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..._version import __version__
from ...methods import (
    ADePT,
    ComputedPrompt,
    PrefixMethod,
    PrefixTuning,
    PrefixTuningConfig,
    PromptMethod,
    VisualMethod,
    make_plain_prompt,
)
from ...methods.base import check_choice
from ...methods.prefix_tuning import FreePrefix
from .adapter import MODULE, Adapter, Hooks
from .attachment import Model, get_attachment
from .files.mlx_format import FORMATS, write_prompt_cache
from .models.attention import Prefix
from .models.discovery import Layer, find_layers, find_method_layers
from .models.hooks import Forward, Interception, count_past, name_arguments
from .models.switching import evaluating, find_device, list_configurations, load_offloaded, loads_all_inside
from .models.tuners import find_base_model, has_tuner_layers, read_tuner_state, refuse_different_rows
from .prefixes.initial import find_shared_sources
from .prefixes.prefix import PrefixHooks
from .prompts.prompt import OffsetHooks, PromptHooks
from .prompts.shared_prompt import SharedPromptHooks
from .prompts.task_prompts import TaskPromptHooks
from .sharding.fully_sharded import gathering_around, is_fully_sharded
from .sharding.partitioned import gathering_modules
from .sharding.tensor_parallel import TensorParallelHeads
from .vision.visual_prompt import VisualHooks

_ROWS = 4096  # the rows of the table that one step computes


def merge(model: Model) -> Model:
    """Merge the adapter in use into its model for faster inference. The model cannot be trained afterwards.

    Merging again changes nothing. ``detach`` restores the model bit for bit. If the merged adapter consists only of a
    prefix or a prompt, it can be saved as plain prefix tuning or prompt tuning. After merging ADePT, compute
    ``inputs_embeds`` with the model's own input embeddings, which include the offset.

    PEFT's layers are not merged. They are frozen while the merged adapter is in use. PEFT can still merge, switch and
    disable them: the keys and values of a merged prompt are then recomputed at the beginning of the next sequence.

    Args:
        model: a model with a method attached. It is changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no method attached or none in use, or no part of the method can be merged. After
            any error, the adapter is on the model as before.
    """
    attachment, base = get_attachment(model), find_base_model(model)
    adapter, routing = attachment.adapter, attachment.routing
    if adapter.merged:
        return model
    routing.leave()
    try:
        with evaluating(base), torch.no_grad(), gathering_modules(base):
            _merge(base, adapter)
    finally:
        routing.install()
    adapter.merged = True
    adapter.mark(base)
    attachment.together.clear()
    attachment.register_together(base)
    own = (base.get_submodule(name) for name in (MODULE, *adapter.saved_modules))
    adapter.frozen.freeze(base, own=[parameter for module in own for parameter in module.parameters()])
    base.requires_grad_(False)
    return model


def _merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Replace the method, the configuration and the hooks of an adapter by merged ones.

    Raises:
        ValueError: if no part of the method can be merged.
    """
    method, hooks = adapter.method, adapter.hooks
    if isinstance(method, PrefixMethod):
        _merge_prefix(model, adapter, method)
    elif isinstance(method, VisualMethod):
        _merge_rows(model, adapter, method)
    elif isinstance(hooks, TaskPromptHooks):
        raise ValueError(f"`num_tasks` must be 1 to merge the prompt, but is {hooks.method.config.num_tasks}.")
    elif isinstance(hooks, SharedPromptHooks):
        _merge_shared_prompt(model, adapter, method, hooks)
    elif isinstance(method, ADePT) and type(hooks) is PromptHooks:
        _merge_table(model, adapter, method, hooks)
    elif isinstance(hooks, PromptHooks) and isinstance(method, ComputedPrompt) and not method.changes_tokens:
        with gathering_around(model, [method]):
            baked = method.baked()
        with _removing_hooks(model, adapter):
            _put_on(model, adapter, baked, [_replace_method(hooks, baked)])
    else:
        raise ValueError(
            f"`model` must have something to merge, but {type(method).__name__} on the path "
            f'"{method.prompt_path}" recomputes the prompt for every input. Use the model without merging.'
        )


def export_cache(
    model: nn.Module,
    batch_size: int = 1,
    *,
    format: Literal["transformers", "mlx", "mlx-0.31"] = "transformers",
    path: str | os.PathLike[str] | None = None,
) -> DynamicCache:
    """Return the prefix in use as a key/value cache, which any model with the same weights accepts without fastprefix.

    Pass the cache as ``past_key_values``. An ``attention_mask`` passed with it must include the columns of the prefix,
    as with every cache. A call or ``generate`` extends the cache in place, so export a new one for each.

    Args:
        model: a model with a prefix whose ``prefix_position`` is "shift".
        batch_size: the number of rows of the cache.
        format: "transformers" only returns the cache. "mlx" also writes a file for ``load_prompt_cache`` of MLX-LM 0.32
            and later, and "mlx-0.31" a file for older versions. The MLX model must have the same weights.
        path: the path of that file. It holds keys and values ``[1, Hkv, m, D]`` for each layer.

    Returns:
        A ``DynamicCache`` with the prefix in every row, in the dtype of the model.

    Raises:
        ValueError: if the method is not only keys and values before all tokens, if ``format`` cannot represent it, or
            if ``path`` does not go with ``format``.
    """
    check_choice("format", format, ("transformers", *FORMATS))
    if (path is None) != (format == "transformers"):
        raise ValueError(f"`path` must be given for the formats {', '.join(FORMATS)}, and only for them.")
    adapter, base = get_attachment(model).adapter, find_base_model(model)
    method = adapter.method
    if not isinstance(method, PrefixMethod):
        raise ValueError(f"`model` must have a prefix, but has {type(method).__name__}. Call fastprefix.merge first.")
    refuse_saved_modules(adapter, "a cache")
    if adapter.outside is not None:
        raise ValueError(
            f"`model` must have an adapter that is entirely a prefix, but {adapter.outside}. Use the adapter itself."
        )
    if method.config.prefix_position != "shift":
        raise ValueError('`prefix_position` must be "shift" for a cache, since tokens follow the cache, but is "none".')
    if method.needs_hidden():
        raise ValueError(f"`model` must have gates that do not depend on the input, but has {type(method).__name__}.")
    refuse_more_than_keys(method, "a cache")
    assert isinstance(adapter.hooks, PrefixHooks)
    if format != "transformers" and adapter.hooks.windows:
        raise ValueError(
            "`model` must have no sliding windows for a prompt cache of MLX-LM, which uses a different class for them, "
            f"but {type(model).__name__} has sliding windows."
        )
    modules = list(adapter.hooks.bindings)
    if nameless := [type(module).__name__ for module in modules if not isinstance(_get_index(module), int)]:
        raise ValueError(f"`model` must have attention layers with a layer_idx, but {nameless[0]} has no layer_idx.")
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        with gathering_around(base, [method]):
            baked = method.baked().prefixes()
        if adapter.hooks.heads is not None:
            baked = adapter.hooks.heads.take_prefixes(baked)
        prefixes = dict(zip(map(_get_index, modules), baked, strict=True))
        sources = find_shared_sources(base, prefixes)
        pairs: list[Prefix] = []
        for index, pair in prefixes.items():
            if index not in sources:
                key, value = (t.to(base.dtype).expand(batch_size, -1, -1, -1).contiguous() for t in pair)
                cache.update(key, value, index)
                pairs.append((key[:1], value[:1]))
            elif not all(map(torch.equal, pair, prefixes[sources[index]])):
                raise ValueError(
                    f"`model` must have equal prefixes in layers that share keys and values, but layer {index} of "
                    f"{type(base).__name__} reads those of layer {sources[index]} from a cache and has a different "
                    "prefix. Use the adapter on the model instead of a cache."
                )
    if path is not None:
        about = {"model": base.name_or_path or type(base).__name__, "fastprefix": __version__}
        write_prompt_cache(Path(path), pairs, format, about)
    return cache


def refuse_saved_modules(adapter: Adapter, what: str) -> None:
    """Raise ValueError if an adapter trains modules of the base model, which an export would lose."""
    if adapter.saved_modules:
        raise ValueError(
            f"`model` must have an adapter without trained modules of the model for {what}, but it trains "
            f"{', '.join(adapter.saved_modules)}. Use the model with the adapter."
        )


def refuse_more_than_keys(method: PrefixMethod, what: str) -> None:
    """Raise ValueError if a prefix is not only keys and values at the positions before all tokens."""
    if method.key_bias(0) is not None:
        raise ValueError(f"`key_bias` must be False for {what}, which cannot hold biases of keys, but is True.")
    if method.output_gate(0) is not None:
        raise ValueError(
            f'`softmax` must be "joint" for {what}, since all of its keys share one softmax, but is "own".'
        )
    shift, length = method.position_shift(), method.config.num_virtual_tokens
    if shift != length:
        raise ValueError(
            f"`position_shift` must be None for {what}, since tokens follow its {length} keys directly, but is {shift}."
        )


def _get_index(module: nn.Module) -> Any:
    return getattr(module, "layer_idx", None)


def _merge_prefix(model: Any, adapter: Adapter, method: PrefixMethod) -> None:
    with gathering_around(model, [method]):
        baked = method.baked()
    with _removing_hooks(model, adapter):
        hooks = PrefixHooks(model, baked, find_method_layers(model, baked.config))
        if hooks.heads is not None:
            hooks.heads.distribute(baked)
        _put_on(model, adapter, baked, [hooks])


def _merge_rows(model: Any, adapter: Adapter, method: VisualMethod) -> None:
    """Turn prompt rows that do not depend on the image into a prefix of the vision layers."""
    hooks = adapter.hooks
    assert isinstance(hooks, VisualHooks)
    reason = hooks.find_reason(training=False)
    if reason is None and method.strength(0) is not None:
        reason = "its softmax over the rows has a fixed weight"
    if reason is not None:
        raise ValueError(
            f"`model` must have something to merge, but {type(method).__name__} cannot be merged: {reason}."
        )
    pairs = [(key[0], value[0]) for key, value in hooks.run_rows().prefixes or ()]
    reader = hooks.stack.reader
    config = PrefixTuningConfig(method.config.num_virtual_tokens, modules_to_save=method.config.modules_to_save)
    with _removing_hooks(model, adapter):
        found = {layer.module: layer for layer in find_layers(reader)}
        layers = [found[module] for module in hooks.stack.attentions]
        prefix = PrefixTuning(config, [layer.shape for layer in layers])
        prefix.set_prefixes(pairs)
        _put_on(model, adapter, prefix, [PrefixHooks(reader, prefix, layers)])
    if reader is not model or len(found) > len(layers):
        adapter.outside = "its prefix is only in the layers for images"


def _merge_shared_prompt(model: Any, adapter: Adapter, method: PromptMethod, hooks: SharedPromptHooks) -> None:
    """Turn a prompt into a prefix at the positions before all tokens."""
    tuners = read_tuner_state(hooks.backbone)
    with load_offloaded(model, hooks.backbone), gathering_around(model, [method]):
        prefixes = hooks.run_prompt()
    table = rewrite_table(hooks) if isinstance(method, ADePT) else None
    parts: list[Hooks] = []
    with _removing_hooks(model, adapter):
        layers = find_layers(model)
        pairs, heads = [prefixes[index] for index in range(len(layers))], TensorParallelHeads.find(model, layers)
        if heads is not None:
            pairs = [heads.spread_prefix(pair, index) for index, pair in enumerate(pairs)]
        prefix = _make_plain_prefix(method, pairs, layers)
        if table is not None:
            parts.append(NewTable(hooks, table))
        elif method.changes_positions:
            prefix.add_module("offset", method)
            parts.append(OffsetHooks(model, method))
        merged = MergedPromptHooks(model, prefix, layers, hooks, tuners)
        merged.longest = hooks.positions.by_length
        merged.parts = [*parts, merged]
        _put_on(model, adapter, prefix, merged.parts)
    adapter.outside = _describe_outside(method)
    if merged.longest is not None and adapter.outside is None:
        adapter.outside = f"its keys are rotated for rows of up to {merged.longest} tokens only"


def _merge_table(model: Any, adapter: Adapter, method: ADePT, hooks: PromptHooks) -> None:
    """Merge ADePT's network into the embedding table. The rest of the method is prompt tuning."""
    prompt = make_plain_prompt(method)
    prompt.config.shared_prompt = False
    if is_fully_sharded(model):  # the gathered parameter is freed again
        with gathering_around(model, [method]):
            prompt.prompt = nn.Parameter(method.prompt.detach().clone())
    table = NewTable(hooks, rewrite_table(hooks))
    with _removing_hooks(model, adapter):
        _put_on(model, adapter, prompt, [table, _replace_method(hooks, prompt)])
    adapter.outside = _describe_outside(method)


def _describe_outside(method: PromptMethod) -> str | None:
    if isinstance(method, ADePT):
        return "ADePT's network is part of the embedding table"
    return f"{type(method).__name__}'s offset is not part of its prefix" if method.changes_positions else None


@contextmanager
def _removing_hooks(model: Any, adapter: Adapter) -> Iterator[None]:
    """Remove the hooks of an adapter in this context, which installs others. After an error, restore the adapter."""
    former = vars(adapter).copy()
    adapter.hooks.remove()
    try:
        yield
    except BaseException:
        if adapter.hooks is not former["hooks"]:
            adapter.hooks.remove()
        vars(adapter).update(former)
        setattr(model, MODULE, adapter.method)
        adapter.hooks.install(model)
        raise


def _replace_method(hooks: PromptHooks, method: PromptMethod) -> PromptHooks:
    """Return a copy of hooks, to be installed with another method."""
    copied = copy.copy(hooks)
    copied.method = method
    return copied


def _put_on(model: Any, adapter: Adapter, method: PrefixMethod | PromptMethod, parts: list[Hooks]) -> None:
    """Replace the method, the configuration and the hooks of an adapter, and install the new hooks."""
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


def rewrite_table(hooks: PromptHooks) -> nn.Embedding:
    """Compute the embedding table with ADePT's offset in blocks.

    The result also includes everything else that the former embedding module does to a row.

    Raises:
        ValueError: if the embedding has PEFT layers or ``max_norm``, or accelerate would overwrite the new table.
    """
    former = hooks.embedding
    if has_tuner_layers(former):
        raise ValueError(
            "`model` must have input embeddings without layers of PEFT, since a merged table would not follow their "
            "changes. Call merge_and_unload of the PEFT model first, or use the adapter without merging."
        )
    if getattr(former, "max_norm", None) is not None:
        raise ValueError(
            "`model` must have an embedding that does not change its own weights, but its embedding has max_norm."
        )
    around = (m for m in hooks.model.modules() if loads_all_inside(m))
    if any(inside is former for module in around for inside in module.modules()):
        raise ValueError(
            "`model` is offloaded with preload_module_classes, so accelerate would load the former embedding table "
            "instead of the merged one. Offload the model without that option, or do not merge."
        )
    former_table = hooks.table
    table = torch.empty(former_table.shape, dtype=former_table.dtype, device=find_device(hooks.model))
    for ids in torch.arange(table.shape[0], device=table.device).split(_ROWS):
        with load_offloaded(hooks.model, former), gathering_around(hooks.model, [former, hooks.method]):
            table[ids[0] : ids[-1] + 1] = hooks.embed_ids(ids[None])[0]
    rows, width = table.shape
    padding = getattr(former, "padding_idx", None)
    return nn.Embedding(rows, width, padding_idx=padding, _weight=table, _freeze=True)


class NewTable:
    """A replacement of a backbone's embedding module by another one.

    Weights that are tied to the former table stay as they are. ``tie_word_embeddings`` is set to False until the table
    is removed. Otherwise ``tie_weights``, which resizing a vocabulary also calls, would tie them to the new table.
    """

    def __init__(self, hooks: PromptHooks, embedding: nn.Embedding) -> None:
        self.model, self.hooks = hooks.model, hooks
        self.precision = hooks.precision
        self.former, self.embedding = hooks.embedding, embedding
        self.tying: list[Any] = []  # the configurations with ``tie_word_embeddings``
        self.tied: list[str] = []  # the names of the parameters that were tied to the former table
        self.places = [
            (parent, name)
            for parent in hooks.backbone.modules()
            for name, child in parent.named_children()
            if child is self.former
        ]

    def install(self, model: PreTrainedModel) -> None:
        """Install the new embedding. The model may have been moved or resized since the table was computed."""
        weight: Any = self.former.weight
        self.precision = self.hooks.precision  # a table that was trained in float32 is cast after the lookup
        _resize_like(self.embedding.to(device=find_device(model), dtype=self.precision), self.former)
        for parent, name in self.places:
            setattr(parent, name, self.embedding)
        self.tied = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
        self.tying = [config for config in list_configurations(model) if getattr(config, "tie_word_embeddings", False)]
        for config in self.tying:
            config.tie_word_embeddings = False

    def remove(self) -> None:
        """Restore the former embedding. The model may have been moved or resized since ``install``."""
        for config in self.tying:
            config.tie_word_embeddings = True
        weight = self.embedding.weight
        if not self.former.weight.is_meta:  # an offloaded table has not been moved
            dtype = self.former.weight.dtype if weight.dtype is self.precision else weight.dtype
            _resize_like(self.former.to(device=weight.device, dtype=dtype), self.embedding)
        for parent, name in self.places:
            if getattr(parent, name) is self.embedding:
                setattr(parent, name, self.former)
        for name in self.tied:
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.former.weight)


def _resize_like(embedding: nn.Embedding, other: nn.Embedding) -> None:
    """Resize an embedding to as many rows as another one has. New rows are copied from the other one."""
    rows, former = other.weight.shape[0], embedding.weight.shape[0]
    if rows != former:
        embedding.weight.data = torch.cat(
            [embedding.weight.data[:rows], other.weight.data[former:].to(embedding.weight)]
        )
        embedding.num_embeddings, embedding.padding_idx = rows, other.padding_idx


class MergedPromptHooks(PrefixHooks):
    """The hooks of a prefix that was computed from a prompt. It is recomputed after PEFT's layers have changed.

    Args:
        model: the model.
        method: the prefix.
        layers: the attention layers of the prefix.
        source: the hooks of the prompt, which are not installed.
        tuners: the state of PEFT's layers for which the prefix was computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: PrefixTuning,
        layers: list[Layer],
        source: SharedPromptHooks,
        tuners: object,
    ) -> None:
        super().__init__(model, method, layers)
        self.source = source
        self.tuners = tuners
        self.is_up_to_date = False  # True during a call that has recomputed the prefix
        self.parts: list[Hooks] = [self]
        """All hooks that merging has installed on the model."""

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the backbone with the prefix. Recompute an outdated prefix at the beginning of a sequence."""
        begins = count_past(name_arguments(self.names, args, kwargs)) == 0
        if self.is_up_to_date or not begins or torch.compiler.is_compiling():
            return super().run(forward, args, kwargs)
        refuse_different_rows(self.backbone, "a merged prompt")
        tuners = read_tuner_state(self.backbone)
        if tuners is not None and tuners == self.tuners:
            return super().run(forward, args, kwargs)
        self._compute_again()
        self.tuners, self.is_up_to_date = tuners, True
        interception = self.handles[0]
        assert isinstance(interception, Interception)
        try:
            return interception(*args, **kwargs)  # the interception of this call has been removed
        finally:
            self.is_up_to_date = False

    def _compute_again(self) -> None:
        model = self.source.model
        for part in reversed(self.parts):
            part.remove()
        try:
            self.source.install(model)
            with evaluating(model), torch.no_grad(), load_offloaded(model, self.backbone):
                prefixes = self.source.run_prompt()
        finally:
            self.source.remove()
            for part in self.parts:
                part.install(model)
        prefix = self.method.get_submodule("prefix")
        assert isinstance(prefix, FreePrefix)
        prefix.write([prefixes[index] for index in range(len(prefixes))])


class Several:
    """Several hooks that are installed in order and removed in reverse order."""

    def __init__(self, parts: list[Hooks]) -> None:
        self.parts = parts

    def install(self, model: PreTrainedModel) -> None:
        """Install all hooks in order."""
        for part in self.parts:
            part.install(model)

    def remove(self) -> None:
        """Remove all hooks, the last one first."""
        for part in reversed(self.parts):
            part.remove()
