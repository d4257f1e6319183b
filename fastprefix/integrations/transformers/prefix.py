"""Bind each attention layer of a model to its prefix and gates.

``PrefixCache`` is a key/value cache that stands for a prefix: it counts the prefix's tokens and holds none of them. A
model that gets one computes positions and masks as it would with a cache that holds the prefix, expanded to the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...methods import PrefixMethod
from .attention import (
    Binding,
    GivenPrefix,
    Prefix,
    attended_tokens,
    carried_bindings,
    refuse_lost_bindings,
    runs_again,
    window_bias,
)
from .discovery import Layer, backbone_of, first_tensor
from .hooks import (
    Cut,
    Positions,
    by_name,
    cache_parameter,
    find_cache,
    parameter_names,
    past_length,
    reentrant,
    refuse_one_row_masks,
    refuse_packed,
    refuse_replicas,
    rows_for_masks,
    shifted_positions,
)
from .switching import Implementation, takes_text


class PrefixCache(DynamicCache):
    """The keys and values of the tokens after a prefix, and the prefix itself for calls that carry it.

    Prefixes are kept by the names of their attention modules: a name survives ``copy.deepcopy`` and ``pickle``.
    """

    def __init__(self, layers: int, length: int, prefixes: Mapping[str, GivenPrefix] | None = None) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [PrefixCacheLayer(length) for _ in range(layers)]
        self.prefixes = dict(prefixes or {})
        self.length = length

    def bindings(self, modules: Mapping[str, nn.Module], tokens: int) -> dict[nn.Module, Binding]:
        """Return the prefix of each attention module in the next call, given the modules by name."""
        past = int(self.get_seq_length()) - self.length
        return {modules[name]: replace(prefix, past=past, tokens=tokens) for name, prefix in self.prefixes.items()}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of a layer's tokens, unless gradient checkpointing runs the layer again.

        Raises:
            RuntimeError: the call does not carry the prefix, which would be lost.
        """
        if self.prefixes:
            refuse_lost_bindings()
            carried = carried_bindings()
            if carried is None:
                raise RuntimeError(
                    "this cache was filled by an accelerated PEFT model (fastprefix.accelerate), and can be used with "
                    "an accelerated model only: fill another one"
                )
            if runs_again():
                past = next((each.past for each in carried.bindings.values() if isinstance(each, GivenPrefix)), 0)
                return self._prefix_layers()[layer_idx].again(key_states, value_states, past)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, and where there are fewer, the last ones of the prefix.

        ``tokens_to_remove`` is negative; older ``transformers`` give a positive length to keep instead.
        """
        total = int(self.get_seq_length())
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(total - tokens_to_remove, 0)
        tokens = total - self.length
        for layer in self._prefix_layers():
            layer.remove_tokens(min(removed, tokens))
        if removed > tokens:
            self._set_length(max(total - removed, 0))

    def reset(self) -> None:
        """Remove everything, the prefix too."""
        super().reset()  # type: ignore[no-untyped-call]
        self._set_length(0)

    def _prefix_layers(self) -> list[PrefixCacheLayer]:
        return [layer for layer in self.layers if isinstance(layer, PrefixCacheLayer)]

    def _set_length(self, length: int) -> None:
        """Keep only so many tokens of the prefix."""
        self.length = length
        for layer in self._prefix_layers():
            layer.prefix_length = length
        shorter = (
            (name, replace(prefix, key=prefix.key[:, :length], value=prefix.value[:, :length]))
            for name, prefix in self.prefixes.items()
        )
        self.prefixes = dict(shorter) if length else {}


class PrefixCacheLayer(DynamicLayer):
    """One layer's tokens, after a prefix of ``prefix_length``."""

    def __init__(self, prefix_length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix_length = prefix_length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens; the first ones are kept as they are, not copied."""
        if self.is_initialized:
            keys, values = super().update(key_states, value_states)
            return keys, values
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def again(self, key_states: Tensor, value_states: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Return what ``update`` returned after so many tokens, without adding anything."""
        if past == 0 or self.keys is None or self.values is None:
            return key_states, value_states
        keys = torch.cat([self.keys[..., :past, :], key_states], dim=-2)
        return keys, torch.cat([self.values[..., :past, :], value_states], dim=-2)

    def get_seq_length(self) -> int:
        """How many tokens came before, those of the prefix too."""
        return self.prefix_length + int(super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys there are, and at which position they begin: after the prefix."""
        return int(super().get_seq_length()) + query_length, self.prefix_length

    def remove_tokens(self, count: int) -> None:
        """Remove the last tokens, of which there are at least so many."""
        if count > 0 and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the rows. A layer that never ran, such as one beyond a model's last, has none."""
        if self.is_initialized:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        if self.is_initialized:
            super().batch_select_indices(indices)


_GATES = "fastprefix_gates"
"""The attribute of a key/value cache that holds the gates of its sequences."""


class LayerBinding:
    """What an attention module finds on itself: its prefix and its gates."""

    def __init__(self, attachment: PrefixHooks, index: int, layer: Layer) -> None:
        self.attachment = attachment
        self.index = index
        self.window = layer.window if attachment.shifts else None  # that cuts the prefix
        self.projection = layer.projection  # of a method that has the layer project its prefix
        self.hidden: Tensor | None = None  # what entered the layer, until its attention is done

    def prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix | None:
        """The prefix in the dtype of the query; None while the layer projects it."""
        states = self.attachment.method.projected_states(self.index)
        if states is None or self.projection is None:
            pk, pv = self.attachment.prefix(self.index)
        elif self.projection.running:
            self.projection.prefix(query, key, value)
            return None
        else:
            pk, pv = self.projection(states.to(query))
        return pk.to(query), pv.to(query)

    def gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The prefix gate and the output gate."""
        method = self.attachment.method
        output_gate = method.output_gate(self.index)
        return self._prefix_gate(query, key, mask), None if output_gate is None else output_gate.to(query)

    def bias(self, query: Tensor) -> Tensor | None:
        """A prefix that stands at positions of its own is cut by a sliding window as a key/value cache is."""
        length = self.attachment.method.config.num_virtual_tokens
        return window_bias(query, self.window, length, self.attachment.past)

    def _prefix_gate(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        method, attachment = self.attachment.method, self.attachment
        if attachment.decoding and self.index in attachment.held:
            return attachment.held[self.index].to(query)
        attended = attended_tokens(mask, query.shape[2]) if method.needs_hidden() else None
        gate = method.prefix_gate(self.index, self.hidden, attended)
        if gate is None:
            return None
        if gate.ndim == 3 and method.needs_hidden():  # pooled from the first tokens, for those to come as well
            if attachment.decoding:
                raise ValueError(
                    "past_key_values takes a cache that was filled with this adapter, whose gates are pooled from a "
                    "sequence's first tokens"
                )
            attachment.held[self.index] = gate
        return gate.to(query)

    def enter_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module that is given what entered the layer."""
        self.hidden = first_tensor(args, kwargs)

    def leave_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the attention: what entered the layer is not kept alive."""
        self.hidden = None

    def __getstate__(self) -> dict[str, Any]:
        """What lives only while a model runs is not copied or pickled."""
        return {**self.__dict__, "hidden": None}


class PrefixHooks:
    """A prefix method for a model, whose attention is "fastprefix" from ``install`` to ``remove``."""

    def __init__(self, model: PreTrainedModel, method: PrefixMethod, layers: list[Layer]) -> None:
        self.method = method
        text = takes_text(model)
        self.backbone = backbone_of(model) if text else model
        self.names = parameter_names(self.backbone)
        self.positions = Positions.of(self.backbone)
        self.prefixes: list[Prefix] | None = None
        self.past = 0  # tokens in the cache of the call in progress
        self.decoding = False  # the call in progress goes on with what is in its cache
        self.held: dict[int, Tensor] = {}  # gates pooled from a sequence's first tokens, by layer
        self.shifts = method.config.prefix_position == "shift"
        self.windows = any(layer.window is not None for layer in layers)
        self.cut = Cut()
        halves = model.config.is_encoder_decoder
        self.encoder: Any = model.get_encoder() if halves else None  # which generation calls by itself
        self.running = False
        self.embedding = model.get_input_embeddings() if text else None
        self.bindings = {layer.module: LayerBinding(self, index, layer) for index, layer in enumerate(layers)}
        self.entries = {layer.module: layer.entry for layer in layers}
        self.handles: list[RemovableHandle] = []
        self.implementation: Implementation | None = None

    def install(self, model: PreTrainedModel) -> None:
        """Switch the model's attention, and set the hooks."""
        if self.implementation is None:
            self.implementation = Implementation(model, {**self.bindings})
        else:
            self.implementation.resume()
        self.handles = [
            self.backbone.register_forward_pre_hook(self.begin, with_kwargs=True),
            self.backbone.register_forward_hook(self.end),
        ]
        if self.embedding is not None:
            self.handles.append(self.embedding.register_forward_hook(self.tie))
        if self.encoder is not None:
            self.handles.append(self.encoder.register_forward_pre_hook(self.begin_encoder))
            self.handles.append(self.backbone.register_forward_hook(self.leave_backbone, always_call=True))
        if self.method.needs_hidden():
            for attention, binding in self.bindings.items():
                self._watch(attention, binding)

    def _watch(self, attention: nn.Module, binding: LayerBinding) -> None:
        entry = self.entries[attention]
        assert entry is not None  # checked before anything was changed
        self.handles.append(entry.register_forward_pre_hook(binding.enter_layer, with_kwargs=True))
        self.handles.append(attention.register_forward_hook(binding.leave_attention, always_call=True))

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the backbone: the prefixes are computed once, and positions shifted."""
        assert self.implementation is not None
        self.implementation.check()
        refuse_replicas(module)
        arguments = by_name(self.names, args, kwargs)
        if arguments.get("output_attentions") or getattr(self.backbone.config, "output_attentions", False):
            raise ValueError(
                "output_attentions takes False with a prefix method: its kernels make no attention weights"
            )
        self.prefixes = self.method.prefixes()
        self.running = True
        self._take_up(arguments)
        if torch.is_grad_enabled():
            if reentrant(self.backbone):
                self._check_embedding()
                self.cut.cut(self.prefixes)
            else:
                self.cut.clear()
        if self.embedding is None:
            refuse_one_row_masks(arguments)
        else:
            arguments = rows_for_masks(arguments)
        if self.embedding is not None and arguments.get("inputs_embeds") is not None:
            arguments["inputs_embeds"] = self.tie(self.embedding, (), arguments["inputs_embeds"])
        if self.shifts:
            if self.windows:
                refuse_packed(arguments, self.backbone.config)
            self._shift(arguments)
        return (), arguments

    def _take_up(self, arguments: dict[str, Any]) -> None:
        """The gates of the sequences that are in a call's cache, if any are."""
        self.decoding = self.method.needs_hidden() and past_length(arguments) > 0
        self.held = getattr(find_cache(arguments), _GATES, {}) if self.decoding else {}

    def _check_embedding(self) -> None:
        if self.embedding is None:
            raise RuntimeError(
                f"use_reentrant takes False for gradient checkpointing of {type(self.backbone).__name__}, which is no "
                "encoder or decoder of text: gradients would not reach the prefixes"
            )

    def begin_encoder(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of an encoder: called by itself, it has prefixes computed, not those of a former call."""
        if not self.running:
            self.prefixes = self.method.prefixes()

    def leave_backbone(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of an encoder-decoder, which is called after an error too."""
        self.running = False

    def _shift(self, arguments: dict[str, Any]) -> None:
        """Move the tokens up by the prefix's length, as a key/value cache of that length would."""
        length = self.method.config.num_virtual_tokens
        encoder = not any(shape.causal for shape in self.method.shapes)
        if encoder and arguments.get("position_ids") is None and (name := cache_parameter(self.names)) is not None:
            # Encoders count positions in their own ways (RoBERTa leaves padding out), but all from their cache on.
            arguments[name] = PrefixCache(len(self.method.shapes), length)
            return
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments["inputs_embeds"]
        self.past = past_length(arguments)
        end, limit = length + self.past + tokens.shape[1], self.positions.limit
        if limit is not None and end > limit:
            raise ValueError(
                f'prefix_position="shift" moves {end - length} tokens up by {length}, beyond {limit} positions'
            )
        arguments["position_ids"] = shifted_positions(arguments, tokens, self.past + self.positions.first, length)

    def tie(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the embedding: what enters the first layer is tied to prefixes that were cut off."""
        return output if self.cut.tied else self.cut.tie(output)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the backbone."""
        cache = find_cache(output)
        if self.held and not self.decoding and cache is not None:
            setattr(cache, _GATES, self.held)
        self.decoding, self.held = False, {}
        if not self.cut.tied:
            raise RuntimeError(
                f"use_reentrant takes False for gradient checkpointing of {type(module).__name__}, which does not call "
                "its input embeddings: gradients would not reach the prefixes"
            )

    def prefix(self, index: int) -> Prefix:
        """The prefix of a layer; a layer that is called outside its model computes its own."""
        if (leaves := self.cut.prefix(index)) is not None:
            return leaves
        prefixes = self.method.prefixes() if self.prefixes is None else self.prefixes
        return prefixes[index]

    def remove(self) -> None:
        """Take everything back."""
        for handle in self.handles:
            handle.remove()
        assert self.implementation is not None
        self.implementation.restore()

    def __getstate__(self) -> dict[str, Any]:
        """What lives only while a model runs is not copied or pickled."""
        return {**self.__dict__, "prefixes": None, "held": {}}
