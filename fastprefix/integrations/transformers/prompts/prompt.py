"""Run prompt methods on a model: put the prompt before the tokens of the backbone, and hide it from the caller.

The model still receives token ids. Placeholder ids, one for each virtual token, are put before them, so that everything
that a family derives from ids (positions, masks, embeddings per layer, places of images) includes the prompt. The
embedding module runs on the caller's own ids. Its output gets the method's offset and the prompt in front.

The caller sees hidden states, logits, labels, losses and cache lengths for the tokens alone. In an encoder-decoder the
prompt comes before the encoder's tokens, and the decoder attends to it too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from ....methods import PromptMethod
from ..adapter import Casts
from ..models.attention import WatchHandle, carry_through_checkpoints, make_two_adapters_error
from ..models.discovery import find_entry, find_input_path, list_ordinary_ids
from ..models.hooks import (
    CallState,
    Forward,
    Interception,
    PartHook,
    asks_for,
    check_mask_length,
    check_parameter_names,
    count_past,
    find_cache,
    name_arguments,
    read_parameter_names,
    refuse_names,
    refuse_replicas,
)
from ..models.positions import Positions, refuse_packed
from ..prefixes.prefix import PrefixCache
from ..sharding.fully_sharded import run_gathered
from .multitask import list_task_handles


@dataclass
class Insertion:
    """The embedding of one call: the number of virtual tokens in front, and the first position of the tokens."""

    rows: int  # virtual tokens before the tokens: 0 if the prompt is in the cache, or shared
    tokens: int
    first_position: int
    embedded: bool = False  # the embedding module has embedded the ids (GPT-2 calls it again, with token types)
    entered: bool = False  # the block around the embedding module has run
    state: Tensor | None = None  # the last hidden states, for a pooler that gets only the first of them
    unfinished: bool = False  # other hooks must see the module's output before the method changes it


@dataclass
class OuterCall:
    """A call of a model that embeds its ids itself, and passes embeddings to the backbone inside."""

    shape: torch.Size  # of the ids ``[B, N]``
    has_offset: bool = False  # the embedding module has added the offset, which the backbone must not add again


class _PromptState(CallState):
    def __init__(self) -> None:
        self.insertion: Insertion | None = None
        self.outer: OuterCall | None = None  # the call of a model that embeds ids for the backbone


class PromptHooks:
    """A prompt method on a model, with the prompt in every row. Its hooks are set from ``install`` to ``remove``."""

    def __init__(self, model: PreTrainedModel, method: PromptMethod, encoder: nn.Module | None = None) -> None:
        self.method = method
        path = find_input_path(model, encoder)
        self.backbone: Any = path.backbone if encoder is None else encoder
        self.model = model
        self.names = check_parameter_names(self.backbone)
        self.positions = Positions.find(self.backbone)
        self.router_mask = RouterMask(model, method.config.num_virtual_tokens)
        self.placeholder = choose_placeholder_id(model.config)
        self.state = _PromptState()
        self.handles: list[RemovableHandle | Interception | WatchHandle] = []
        self.embedding_handles: list[RemovableHandle | Interception] = []
        self.interception: Interception
        self.finish_id = 0
        self.hooked: Any = None  # the embedding module that has the hooks
        self.receives_ids = path.receives_ids
        self.by_rows = not (path.receives_ids and path.embeds_ids)
        self._check_inputs()
        # The module whose output is ``inputs_embeds``: the embedding, or a block around it.
        self.entry: Any = find_entry(self.backbone, self.embedding)
        self.entry_is_embedding = self.entry is self.embedding

    def _check_inputs(self) -> None:
        name = type(self.backbone).__name__
        if self.by_rows and "inputs_embeds" not in self.names:
            raise ValueError(
                f"`model` must call its input embeddings with the ids that it gets, or accept inputs_embeds, but "
                f"{name} does neither."
            )
        if not self.receives_ids and self.method.changes_positions:
            raise ValueError(
                f"`model` must pass ids to its decoder for {type(self.method).__name__}, whose offset depends on the "
                f"position, but {type(self.model).__name__} passes embeddings. Use ADePT."
            )

    def install(self, model: PreTrainedModel) -> None:
        """Set the hooks."""
        self.handles = [Interception(self.backbone, self.run)]
        if self.backbone is not model:
            self.handles.append(Interception(model, self.router_mask.run))
        if not self.receives_ids:
            self.handles += [Interception(m, functools.partial(self.run_outer, m)) for m in self._list_around(model)]
        self.handles += list_task_handles(self.method, self.backbone, model)
        self._hook_pooler()
        self._hook_embedding()

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in (*self.handles, *self.embedding_handles):
            handle.remove()
        self.handles, self.embedding_handles, self.hooked = [], [], None

    @property
    def forward(self) -> Forward:
        """Return the backbone's forward without these hooks."""
        interception = self.handles[0]
        assert isinstance(interception, Interception)
        return interception.forward

    @property
    def embedding(self) -> Any:
        """Return the backbone's embedding module, which may have been replaced."""
        return self.backbone.get_input_embeddings()

    @property
    def table(self) -> Tensor:
        """Return the embedding table."""
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def precision(self) -> torch.dtype:
        """Return the dtype of the embedding module's output. A table that is trained in float32 is cast afterwards."""
        owners = (getattr(hook, "__self__", None) for hook in self.embedding._forward_hooks.values())
        casts = next((owner for owner in owners if isinstance(owner, Casts)), None)
        return (None if casts is None else casts.read_model_precision()) or self.table.dtype

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the backbone with the prompt in every row."""
        refuse_replicas(self.backbone)
        refuse_names(kwargs, self.backbone)
        arguments = name_arguments(self.names, args, kwargs)
        carry_through_checkpoints(self.model)
        return run_gathered(self.backbone, self.method, lambda: self.run_in_every_row(forward, arguments))

    def _list_around(self, model: PreTrainedModel) -> list[PreTrainedModel]:
        """Return the models around the backbone."""
        models = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not self.backbone]
        return [each for each in models if any(inside is self.backbone for inside in each.modules())]

    def run_outer(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a model around the backbone, which may embed its ids itself."""
        ids = name_arguments(read_parameter_names(module), args, kwargs).get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return forward(*args, **kwargs)
        former, self.state.outer = self.state.outer, OuterCall(ids.shape)
        try:
            return forward(*args, **kwargs)
        finally:
            self.state.outer = former

    def run_in_every_row(self, forward: Forward, arguments: dict[str, Any]) -> Any:
        """Run the backbone on placeholders and tokens, and return its output for the tokens."""
        self.router_mask.restore(arguments)
        refuse_packed(arguments, self.backbone)
        self.read_tokens(arguments)
        cache, length = find_cache(arguments), self.method.config.num_virtual_tokens
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                "`past_key_values` or `cache_implementation` must be a cache that grows, since it also holds the "
                "virtual tokens of the prompt. Use a DynamicCache, or share the prompt."
            )
        if isinstance(cache, PrefixCache):
            raise make_two_adapters_error()
        forget_rows_if_empty(cache)
        if cache is None or not holds_rows(cache):
            if hasattr(cache, SHARED) and count_past(arguments) > 0:
                reason = str(self.method.prompt_path).partition(": ")[2]
                raise ValueError(
                    f"`past_key_values` was filled with a shared prompt, which this call does not support: {reason}."
                )
            return self._run_rows(forward, arguments)
        refuse_other_prompt(getattr(cache, _ROWS), self.method)
        count_all_rows(cache)
        try:
            return self._run_rows(forward, arguments)
        finally:
            if not torch.compiler.is_compiling():
                count_tokens_only(cache, length)

    def _run_rows(self, forward: Forward, arguments: dict[str, Any]) -> Any:
        """Run the backbone on placeholders and tokens. A cache reports all rows that it holds."""
        past, length = count_past(arguments), self.method.config.num_virtual_tokens
        inserted = 0 if past > 0 else length
        leading, arguments = flatten_leading(arguments)
        given = self.prepare_input(arguments)
        insertion = Insertion(inserted, given.shape[1], max(past - length, 0))
        self._extend(arguments, given, max(past - length, 0), insertion)
        self.positions.check(arguments.get("position_ids"), past + inserted + given.shape[1], length)
        as_tuple = not (self.backbone.config.return_dict if (asked := arguments.get("return_dict")) is None else asked)
        if as_tuple:
            arguments["return_dict"] = True
        output = self.run_embedding(insertion, forward, arguments)
        cropped = self.crop(output, insertion)
        if leading is not None:
            unflatten_leading(cropped, leading)
        if (cache := find_cache(output)) is not None and not torch.compiler.is_compiling():
            count_tokens_only(cache, length)
        return cropped.to_tuple() if as_tuple and isinstance(cropped, ModelOutput) else cropped

    def run_alone(self, prompt: Tensor, **arguments: Any) -> Any:
        """Run the backbone on a prompt ``[m, d]`` alone, as a batch of one row, or on prompts ``[K, m, d]``."""
        rows = prompt if prompt.ndim == 3 else prompt[None]
        if not needs_ids(self.model.config):
            return self.forward(inputs_embeds=rows, **arguments)
        ids = torch.full(rows.shape[:2], self.placeholder, device=prompt.device)
        return self.run_embedding(Insertion(rows.shape[1], 0, 0), self.forward, {"input_ids": ids, **arguments})

    def run_with_offset(self, forward: Forward, arguments: dict[str, Any], past: int) -> Any:
        """Run the backbone on the tokens alone, with the method's offset. The cache holds ``past`` tokens."""
        if not self.method.changes_tokens:
            return forward(**arguments)
        given = self.prepare_input(arguments)
        if given.is_floating_point():
            arguments["inputs_embeds"] = self.embed_rows(given, past, with_prompt=False)
            return forward(**arguments)
        return self.run_embedding(Insertion(0, given.shape[1], past), forward, arguments)

    def crop(self, output: Any, insertion: Insertion) -> Any:
        """Return the backbone's output for the caller's tokens."""
        return crop_rows(output, insertion.rows, insertion.tokens)

    def run_embedding(self, insertion: Insertion, forward: Forward, arguments: dict[str, Any]) -> Any:
        """Run the backbone while the embedding module applies an insertion."""
        if self.embedding is not self.hooked:
            self._hook_embedding()
        former, self.state.insertion = self.state.insertion, insertion
        try:
            output = forward(**arguments)
        finally:
            self.state.insertion = former
        if not (insertion.embedded or insertion.entered) and arguments.get("input_ids") is not None:
            raise RuntimeError(
                f"{type(self.backbone).__name__} did not call its input embeddings with `input_ids`, so the adapter "
                "had no effect. Pass `inputs_embeds` instead."
            )
        return output

    def prepare_input(self, arguments: dict[str, Any]) -> Tensor:
        """Return the ids ``[B, N]`` or the embeddings ``[B, N, d]`` that the backbone will get."""
        ids, rows = self.read_tokens(arguments)
        if ids is None:
            assert rows is not None
            return rows
        if not self.by_rows:
            return ids
        arguments.update(input_ids=None, inputs_embeds=self.embedding(ids))
        embeds: Tensor = arguments["inputs_embeds"]
        return embeds

    def read_tokens(self, arguments: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Return the caller's ids ``[B, N]`` or embeddings ``[B, N, d]``.

        Raises:
            ValueError: if none or both of them are given.
        """
        ids, rows = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if (ids is None) == (rows is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        return ids, rows

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Return the embeddings ``[B, N, d]`` of ids ``[B, N]`` at positions from 0, with the offset."""
        return self.embed_rows(self.embedding(ids), 0, with_prompt=False)

    def embed_rows(self, rows: Tensor, first_position: int, with_prompt: bool) -> Tensor:
        """Return embeddings ``[B, N, d]`` with the method's offset, and optionally the prompt, ``[B, S + N, d]``."""
        if not with_prompt and not self.method.changes_tokens:
            return rows
        if self.state.outer is not None and self.state.outer.has_offset:
            return self._before(rows) if with_prompt else rows
        if rows.shape[1] == 0:
            return self._before(rows) if with_prompt else rows
        return self.method.embed(*_make_table(rows), first_position, with_prompt)

    def _before(self, rows: Tensor) -> Tensor:
        """Return rows with the prompt in front, without an offset."""
        return torch.cat([self.method.repeat_prompt(rows.shape[0]).to(rows.dtype), rows], dim=1)

    # A pooler inside the backbone must pool the caller's first token, not the prompt's.

    def _hook_pooler(self) -> None:
        pooler = getattr(self.backbone, "pooler", None)
        if isinstance(pooler, nn.Module):
            self.handles.append(
                pooler.register_forward_pre_hook(PartHook(pooler, self.crop_pooled, (self.model, self.backbone)))
            )
            others = (child for child in self.backbone.children() if child is not pooler)
            self.handles += [child.register_forward_hook(self.keep_state) for child in others]

    def keep_state(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the last hidden states for the pooler (a forward hook of the backbone's other children)."""
        states = output.values() if isinstance(output, ModelOutput) else output
        state = states if isinstance(states, Tensor) else next(iter(states), None)
        if self.state.insertion is not None and isinstance(state, Tensor) and state.ndim == 3:
            self.state.insertion.state = state

    def crop_pooled(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Pass the tokens' states to the pooler, or only the first token's for ALBERT (a forward pre-hook)."""
        insertion = self.state.insertion
        if insertion is None or insertion.rows == 0:
            return None
        if args[0].ndim == 3:
            return (args[0][:, insertion.rows :], *args[1:])
        assert insertion.state is not None
        return (insertion.state[:, insertion.rows], *args[1:])

    # The embedding module

    def _hook_embedding(self) -> None:
        for handle in self.embedding_handles:
            handle.remove()
        if self.entry_is_embedding:
            self.entry = self.embedding  # it may have been replaced
        self.hooked = self.embedding
        owners = (self.model, self.backbone)
        self.interception = Interception(self.hooked, self.embed, owners)
        finish = self.hooked.register_forward_hook(PartHook(self.hooked, self.finish_embedding, owners))
        self.finish_id = finish.id
        self.embedding_handles = [self.interception, finish]
        if not self.entry_is_embedding:
            self.embedding_handles.append(Interception(self.entry, self.enter, owners))

    def embed(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the embedding module on the caller's own ids, then add the method's offset and prompt to its output."""
        insertion, here = self.state.insertion, self.entry_is_embedding
        outer = self.state.outer
        if outer is not None and insertion is None and self.method.changes_tokens:
            ids = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if ids is None or ids.shape != outer.shape:
                return forward(*args, **kwargs)
            outer.has_offset = True
            return self.method.embed(*_make_table(forward(*args, **kwargs)), 0, with_prompt=False)
        if insertion is None or (not here and not self.method.changes_tokens):
            return forward(*args, **kwargs)
        columns = insertion.rows if here else 0
        if insertion.embedded or not _is_of(args, kwargs, columns + insertion.tokens):
            return forward(*args, **kwargs)
        insertion.embedded = True
        args, kwargs = _cut_columns(args, kwargs, columns)
        with_prompt = here and insertion.rows > 0
        if self._is_plain():
            ids = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            return self.method.embed(ids, self.table, insertion.first_position, with_prompt)
        rows = forward(*args, **kwargs)
        if _has_hooks(self.hooked, self.finish_id):
            insertion.unfinished = True
            self.hooked._forward_hooks.move_to_end(self.finish_id)
            return rows
        return self._finish(rows, insertion)

    def _finish(self, output: Any, insertion: Insertion) -> Any:
        """Return the output of the embedding module with offset and prompt. I-BERT's output includes a scale."""
        with_prompt = self.entry_is_embedding and insertion.rows > 0
        if isinstance(output, tuple):
            return (self.embed_rows(output[0], insertion.first_position, with_prompt), *output[1:])
        return self.embed_rows(output, insertion.first_position, with_prompt)

    def finish_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Add the offset and the prompt after all other hooks of the embedding module (the last forward hook)."""
        insertion = self.state.insertion
        if insertion is None or not insertion.unfinished:
            return None
        insertion.unfinished = False
        return self._finish(output, insertion)

    def enter(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block around the embedding on the caller's own tokens, and put the prompt before its output."""
        insertion = self.state.insertion
        columns = 0 if insertion is None else insertion.rows
        if insertion is None or insertion.entered or not _is_of(args, kwargs, columns + insertion.tokens):
            return forward(*args, **kwargs)
        insertion.entered = True
        args, kwargs = _cut_columns(args, kwargs, columns)
        if isinstance(positions := kwargs.get("position_ids"), Tensor):
            kwargs["position_ids"] = positions - columns  # the block does not see the prompt
        rows = forward(*args, **kwargs)
        return rows if columns == 0 else self._before(rows)

    def _is_plain(self) -> bool:
        """Return whether the embedding module is a plain lookup, which the fused kernel computes."""
        module = self.hooked
        return (
            type(module) is nn.Embedding
            and module.max_norm is None
            and type(module.weight) is nn.Parameter
            and not module.weight.is_meta
            and not (module.weight.requires_grad and module.padding_idx is not None)
            and self.interception.is_innermost
            and not _has_hooks(module, self.finish_id)
        )

    # The arguments of the backbone

    def _extend(self, arguments: dict[str, Any], given: Tensor, past: int, insertion: Insertion) -> None:
        """Extend ids, masks, positions and all other values per token to the virtual tokens of the prompt."""
        batch, tokens, inserted = given.shape[0], insertion.tokens, insertion.rows
        length = self.method.config.num_virtual_tokens
        mask = arguments.get("attention_mask")
        if mask is not None:
            check_mask_length(mask, past + tokens, length)
            arguments["attention_mask"] = _extend_mask(mask, batch, length, inserted)
        positions = arguments.get("position_ids")
        if positions is not None:
            first = self.positions.first
            prompt = torch.arange(first, first + inserted, device=positions.device).expand(*positions.shape[:-1], -1)
            arguments["position_ids"] = torch.cat([prompt, positions + length], dim=-1)
            if mask is None and find_cache(arguments) is None:  # else the gap after the prompt would begin a sequence
                arguments["attention_mask"] = given.new_ones(batch, inserted + tokens, dtype=torch.long)
        if given.is_floating_point():
            arguments["inputs_embeds"] = self.embed_rows(given, insertion.first_position, inserted > 0)
        else:
            arguments["input_ids"] = nn.functional.pad(given, (inserted, 0), value=self.placeholder)
        for name, value in find_token_arguments(arguments, batch, tokens).items():
            arguments[name] = torch.cat([value.new_zeros(len(value), inserted, *value.shape[2:]), value], dim=1)


class _MaskState(CallState):
    def __init__(self) -> None:
        self.given: Tensor | None = None
        self.extended: Tensor | None = None


class RouterMask:
    """Extend the attention mask with which a model's head counts the tokens of each expert.

    The load-balancing loss is computed over every token of the backbone, including a prompt in every row, with the
    attention mask that was passed to the model.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        self.model = model
        self.names = read_parameter_names(model)
        self.length = length
        self.state = _MaskState()

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model with an extended mask if it will compute an auxiliary loss."""
        self.state.given = self.state.extended = None
        arguments = name_arguments(self.names, args, kwargs)
        mask = arguments.get("attention_mask")
        if not asks_for(arguments, self.model, "output_router_logits") or count_past(arguments) > 0:
            return forward(*args, **kwargs)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return forward(*args, **kwargs)
        self.state.given, self.state.extended = mask, nn.functional.pad(mask, (self.length, 0), value=1)
        return forward(**{**arguments, "attention_mask": self.state.extended})

    def restore(self, arguments: dict[str, Any]) -> None:
        """Restore the caller's own mask in a call of the backbone."""
        if self.state.extended is not None and arguments.get("attention_mask") is self.state.extended:
            arguments["attention_mask"] = self.state.given
        self.state.given = self.state.extended = None


def choose_placeholder_id(config: PretrainedConfig) -> int:
    """Return the token id of the placeholders for a prompt.

    Families with embeddings per layer look up the prompt's embeddings with it. They get the padding's embeddings, as
    for images. Other families get an ordinary token, since padding has no position in some of them.
    """
    text: Any = config.get_text_config()
    if needs_ids(config):
        return int(text.pad_token_id or 0)
    return list_ordinary_ids(config, 1)[0]


def needs_ids(config: PretrainedConfig) -> bool:
    """Return whether a model uses ids beyond their input embeddings, as Gemma does for its embeddings per layer."""
    return bool(getattr(config.get_text_config(), "hidden_size_per_layer_input", None))


def _make_table(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return embeddings ``[B, N, d]`` as ids and a table with one entry per token."""
    ids = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device).reshape(rows.shape[:2])
    return ids, rows.flatten(0, 1)


def _is_of(args: tuple[Any, ...], kwargs: dict[str, Any], columns: int) -> bool:
    """Return whether the embedding is called with the call's tokens: ids ``[B, columns]``, or padded (Longformer)."""
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    return first is not None and first.ndim == 2 and first.shape[1] >= columns and not first.is_floating_point()


def _cut_columns(args: tuple[Any, ...], kwargs: dict[str, Any], columns: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call without the prompt's columns."""
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def cut(value: Tensor) -> Tensor:
        return value[:, columns:] if value.ndim >= 2 and value.shape[1] == first.shape[1] else value

    without: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(Tensor, cut, (args, kwargs))
    return without


def _has_hooks(module: nn.Module, own: int) -> bool:
    """Return whether a module has hooks other than the forward hook ``own``."""
    hooks = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or any(key != own for key in module._forward_hooks)


def find_token_arguments(arguments: dict[str, Any], batch: int, tokens: int) -> dict[str, Tensor]:
    """Return the other arguments with a value per token, ``[B, N]`` or ``[B, N, ...]``, such as types and boxes."""
    others = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and not value.is_floating_point() and value.ndim in (2, 3)
        if name not in others and value.shape[0] in (1, batch) and value.shape[1] == tokens
    }


def crop_rows(output: Any, inserted: int, tokens: int) -> Any:
    """Return a backbone's output for the caller's tokens, without the prompt at the start of its hidden states."""
    if inserted == 0:
        return output

    def cut(value: Any, states: bool) -> Any:
        if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[-2] == inserted + tokens:
            return value[..., inserted:, :] if states or value.ndim == 3 else value
        return tuple(cut(each, states) for each in value) if isinstance(value, tuple) else value

    if isinstance(output, ModelOutput):
        for name, value in list(output.items()):  # Gemma 3n's hidden states have a dimension before the batch
            output[name] = cut(value, "hidden_state" in name)
        return output
    return cut(output, False)


def flatten_leading(arguments: dict[str, Any]) -> tuple[torch.Size | None, dict[str, Any]]:
    """Reshape ids ``[B, C, N]`` (several choices per row) and other arguments to ``[B C, N]``; return the sizes too."""
    ids = arguments.get("input_ids")
    if ids is None or ids.ndim <= 2:
        return None, arguments
    leading = ids.shape[:-1]

    def flatten(value: Any) -> Any:
        return value.flatten(0, ids.ndim - 2) if isinstance(value, Tensor) and value.shape == ids.shape else value

    return leading, {name: flatten(value) for name, value in arguments.items()}


def unflatten_leading(output: Any, leading: torch.Size) -> None:
    """Restore the leading sizes of the caller's ids in the last hidden states."""
    output.last_hidden_state = output.last_hidden_state.unflatten(0, leading)


SHARED = "fastprefix_prompt"
"""The attribute of a key/value cache that holds the ``SharedPrompt`` of the call that began it.

Its keys and values may depend on that call (its token types, the rotary frequencies for its length), and the calls that
continue the cache must use the same ones.
"""

# A cache with the prompt's virtual tokens counts them only while the backbone runs, since generation uses the length of
# the cache to find the tokens that are new.

_ROWS = "fastprefix_rows"
"""The attribute of a cache that holds the number of virtual tokens in it."""


def count_tokens_only(cache: Cache, rows: int) -> None:
    """Make a cache that holds ``rows`` virtual tokens report the other tokens only."""
    setattr(cache, _ROWS, rows)
    attributes: dict[str, Any] = vars(cache)
    attributes["get_seq_length"] = functools.partial(_count_tokens_only, cache)
    attributes["crop"] = functools.partial(_crop_tokens, cache)


def refuse_other_prompt(length: int, method: PromptMethod, held: int = 1, count: int = 1) -> None:
    """Refuse a cache whose prompt has another ``length`` than a method, or with ``held`` prompts, not ``count``.

    The positions of the tokens after the prompt would not fit those of the tokens in the cache.
    """
    own = method.config.num_virtual_tokens
    if length != own or held != count:
        raise ValueError(
            f"`past_key_values` must hold {_describe_prompts(count, own)} of the adapter, but it was filled with "
            f"{_describe_prompts(held, length)}. Use the adapter that filled it, or pass a new cache."
        )


def _describe_prompts(count: int, length: int) -> str:
    return f"a prompt of {length} virtual tokens" if count == 1 else f"{count} prompts of {length} virtual tokens"


def holds_rows(cache: Cache | None) -> bool:
    """Return whether a cache holds the virtual tokens of a prompt. Call ``forget_rows_if_empty`` before."""
    return hasattr(cache, _ROWS)


def forget_rows_if_empty(cache: Cache | None) -> None:
    """Forget the virtual tokens of a cache from which everything has been removed, such as by ``reset``."""
    if cache is not None and holds_rows(cache) and int(type(cache).get_seq_length(cache)) == 0:
        count_all_rows(cache)
        delattr(cache, _ROWS)


def count_all_rows(cache: Cache) -> None:
    """Make a cache report everything that it holds."""
    for name in ("get_seq_length", "crop"):
        vars(cache).pop(name, None)


def _count_tokens_only(cache: Cache, *args: Any, **kwargs: Any) -> int:
    rows: int = getattr(cache, _ROWS)
    return max(int(type(cache).get_seq_length(cache, *args, **kwargs)) - rows, 0)


def _crop_tokens(cache: Cache, tokens_to_remove: int) -> None:
    """Remove the last tokens of a cache, but not the virtual tokens before them.

    ``tokens_to_remove`` is negative or 0. Older ``transformers`` pass a positive length to keep instead.
    """
    if tokens_to_remove > 0:
        tokens_to_remove += getattr(cache, _ROWS)
    else:
        tokens_to_remove = max(tokens_to_remove, -cache.get_seq_length())
    type(cache).crop(cache, tokens_to_remove)


def _extend_mask(mask: Any, batch: int, length: int, inserted: int) -> Tensor:
    """Return a mask that also covers a prompt of ``length`` tokens, which all tokens see.

    In a mask with one row per query, the added rows of the prompt are causal. The mask itself must be causal, since
    other masks do not define which tokens the prompt sees.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return torch.cat([mask.new_ones(batch, length), mask], dim=1)
    if not isinstance(mask, Tensor) or mask.ndim != 4 or inserted == 0:
        raise ValueError(
            "`attention_mask` must be [B, K] with a prompt in every row, or [B, 1, N, N] in a call without a cache."
        )
    seen, hidden = (True, False) if mask.dtype is torch.bool else (0.0, torch.finfo(mask.dtype).min)
    tokens = mask.shape[3]
    if mask.shape[2] != tokens or (mask.triu(1) == seen).logical_and(mask.new_ones(tokens, tokens).triu(1) != 0).any():
        raise ValueError("`attention_mask` must be a causal [B, 1, N, N], or [B, K], with a prompt in every row.")
    extended = mask.new_full((*mask.shape[:2], length + tokens, length + tokens), seen)
    extended[:, :, :length].masked_fill_(extended.new_ones(length, length + tokens).triu(1) != 0, hidden)
    extended[:, :, length:, length:] = mask
    return extended


class OffsetHooks(PromptHooks):
    """The offset of a prompt method on a model, without the prompt."""

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the backbone on embeddings with the offset."""
        arguments = name_arguments(self.names, args, kwargs)
        if self.method.changes_tokens:
            refuse_packed(arguments, self.backbone)
        return run_gathered(
            self.backbone, self.method, lambda: self.run_with_offset(forward, arguments, count_past(arguments))
        )


_MASK = "encoder_attention_mask"


class EncoderPromptHooks(PromptHooks):
    """A prompt method for an encoder-decoder of text.

    The encoder's output keeps the virtual tokens, ``[B, S + N, d]``. The mask ``[B, N]`` of that output is extended
    when it is passed to the decoder.
    """

    def __init__(self, model: PreTrainedModel, method: PromptMethod) -> None:
        super().__init__(model, method, model.get_encoder())
        self.decoder: nn.Module = model.get_decoder()
        self.decoder_names = check_parameter_names(self.decoder)
        missing = [name for name in ("inputs_embeds", "attention_mask") if name not in self.names]
        if missing or _MASK not in self.decoder_names:
            raise ValueError(
                f"`model` must have an encoder that accepts inputs_embeds and attention_mask, and a decoder that "
                f"accepts {_MASK}, but {type(model).__name__} has no {missing[0] if missing else _MASK}."
            )

    def install(self, model: PreTrainedModel) -> None:
        """Set the hooks."""
        super().install(model)
        self.handles.append(Interception(self.decoder, self.run_decoder))

    def crop(self, output: Any, insertion: Insertion) -> Any:
        """Return the encoder's output unchanged, since the decoder sees the prompt."""
        return output

    def run_decoder(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the decoder with a mask that lets all its tokens attend to the prompt."""
        arguments = name_arguments(self.decoder_names, args, kwargs)
        mask, states = arguments.get(_MASK), arguments.get("encoder_hidden_states")
        length = self.method.config.num_virtual_tokens
        if mask is None or states is None or mask.shape[-1] + length != states.shape[1]:
            return forward(*args, **kwargs)  # no mask is needed, or the caller's mask covers the prompt
        if mask.ndim != 2:
            raise ValueError(f"`attention_mask` must be [B, N] with a prompt in every row, but is {list(mask.shape)}.")
        return forward(**{**arguments, _MASK: nn.functional.pad(mask, (length, 0), value=1)})
