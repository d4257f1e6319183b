"""Run the rows of one batch with different adapters.

The keys and values of all adapters of a call stand one behind the other in one tensor a layer, and each row attends to
its own span of it. Prompts become keys and values first: on a decoder they are the same in every row. Offsets on the
tokens come from banks with an entry for each adapter.

While gradients are computed, the tensors are concatenated from the adapters' parameters, and each adapter gets the
gradient of its rows. Without gradients they are those of the model's ``SpanStore``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...methods import AttentionShape, PrefixMethod, PrefixTuning, PromptMethod
from ...ops.prompt_embedding import prompt_embedding
from .adapter import Method
from .attention import (
    Binding,
    CarriedBindings,
    Prefix,
    carry_through_checkpoints,
    carrying,
    get_carried_bindings,
    make_span_bias,
    restore_checkpoints,
    unwatch,
    watch,
)
from .discovery import Layer, Projection, find_backbone, find_first_tensor
from .gates import CallGates, hold_by_row
from .hooks import (
    Forward,
    Interception,
    asks_for,
    check_mask_length,
    check_parameter_names,
    checkpoints_reentrantly,
    count_past,
    count_tokens,
    expand_one_row_mask,
    find_cache,
    name_arguments,
    refuse_one_row_masks,
    refuse_replicas,
    suspend_checkpointing,
)
from .positions import Positions, PositionShift, RowShift, refuse_packed
from .prefix import LayerBinding
from .prompt import OffsetHooks, needs_ids
from .shared_prompt import has_dropout
from .span_store import KeyedPrefix, SpanStore
from .switching import Implementation, runs_on_text

BASE = "__base__"
"""The name of no adapter: such a row runs on the base model alone. PEFT calls it the same."""


@dataclass(eq=False)
class Part:
    """What a mixed batch needs to know of an adapter.

    Args:
        name: of the adapter.
        length: the number of its virtual tokens.
        shift: the number of positions by which its rows are moved up.
        indices: by attention module, the index of the layer among the method's own.
        method: computes gates and offsets, and keys and values where the store has none.
        projections: of a method whose layers project its states, by attention module.
        has_own_softmax: whether its keys have a softmax of their own.
        is_prompt: whether its keys and values are those of a prompt.
    """

    name: str
    length: int
    shift: int
    indices: Mapping[nn.Module, int]
    method: Method | None = None
    projections: Mapping[nn.Module, Projection] = field(default_factory=dict)
    has_own_softmax: bool = False
    is_prompt: bool = False

    @property
    def has_offset(self) -> bool:
        """Return whether it adds an offset to the embeddings of the tokens."""
        return isinstance(self.method, PromptMethod) and self.method.changes_tokens

    @property
    def is_projected(self) -> bool:
        """Return whether the layers project its keys and values."""
        return bool(self.projections)

    @property
    def gates(self) -> PrefixMethod | None:
        """Return the method if it has gates that are computed from hidden states."""
        return self.method if isinstance(self.method, PrefixMethod) and self.method.needs_hidden() else None


def compute_prefixes(part: Part) -> dict[nn.Module, KeyedPrefix]:
    """Return the keys and values of a prefix method for each attention module, with constant gates multiplied in."""
    method = part.method
    assert isinstance(method, PrefixMethod)
    if isinstance(method, PrefixTuning) and not method.needs_hidden():
        pairs = method.gated_prefixes()
    else:
        pairs = method.prefixes()
    return {module: KeyedPrefix(*pairs[i], method.key_bias(i)) for module, i in part.indices.items()} if pairs else {}


class MixedRows:
    """The parts of a call, and which of them each row has.

    ``rows`` are indices into ``parts``, and -1 is the base. Modules may be called with a multiple of these rows, as
    when ``generate`` searches with several beams: each row then stands for as many neighbors.
    """

    def __init__(self, names: tuple[str, ...], parts: Sequence[Part]) -> None:
        known = {part.name: index for index, part in enumerate(parts)}
        self.names = names
        self.parts = tuple(parts)
        self.rows = [known.get(name, -1) for name in names]
        self.longest = max((part.length for part in parts), default=0)
        self.gated = any(part.gates is not None for part in parts)
        self.has_own_softmax = any(part.has_own_softmax for part in parts)
        self._tensors: dict[Any, Tensor] = {}

    def repeat(self, values: Sequence[Any], count: int) -> list[Any]:
        """Return values of the rows as those of ``count`` rows."""
        if count % len(values):
            raise ValueError(
                f"`adapter_names` must have a name for each row of the batch, but has {len(values)} for {count} rows."
            )
        return [value for value in values for _ in range(count // len(values))]

    def make_tensor(self, key: str, values: Sequence[Any], count: int, device: torch.device) -> Tensor:
        """Return values of the rows as an integer tensor of ``count`` rows, made once for each key."""
        place = key, count, device
        if place not in self._tensors:
            self._tensors[place] = torch.tensor(self.repeat(values, count), device=device)
        return self._tensors[place]

    def index(self, count: int, device: torch.device) -> Tensor:
        """Return the rows' indices into ``parts``, int64 ``[count]``."""
        return self.make_tensor("index", self.rows, count, device)

    def lengths(self, count: int, device: torch.device) -> Tensor:
        """Return the lengths of the rows' prefixes, int64 ``[count]``."""
        lengths = [0 if row < 0 else self.parts[row].length for row in self.rows]
        return self.make_tensor("lengths", lengths, count, device)

    def find_rows(self, which: int, count: int, device: torch.device) -> Tensor:
        """Return the rows that have a part, int64 ``[b]``."""
        place = f"rows of {which}", count, device
        if place not in self._tensors:
            rows = [row for row, each in enumerate(self.repeat(self.rows, count)) if each == which]
            self._tensors[place] = torch.tensor(rows, device=device)
        return self._tensors[place]

    def find_shift(self, count: int, device: torch.device) -> int | RowShift:
        """Return by how many positions the rows are moved up: a number if that is the same for all of them."""
        shifts = [0 if row < 0 else self.parts[row].shift for row in self.rows]
        if len(set(shifts)) == 1:
            return shifts[0]
        return RowShift(self.make_tensor("shifts", shifts, count, device)[:, None], max(shifts))


class LayerStore(NamedTuple):
    """A layer's keys and values of all parts, and where each part stands; None where it has none in the layer."""

    prefix: KeyedPrefix
    places: tuple[tuple[int, int] | None, ...]


class MixedCall:
    """A call whose rows have different adapters: what the bindings of its layers have in common."""

    def __init__(self, hooks: MixtureHooks, rows: MixedRows, arguments: dict[str, Any]) -> None:
        self.hooks = hooks
        self.rows = rows
        self.gates = CallGates(arguments)
        self.method = MixedGates(hooks.shapes, rows, list(hooks.layers))
        if rows.gated:
            poolings = [each for part in rows.parts if part.gates for each in getattr(part.gates, "poolings", ())]
            self.gates.take_up(arguments, hooks.backbone, poolings)
        self.shift: int | RowShift = 0
        self.stores: list[LayerStore | None] = []
        self.bindings: dict[nn.Module, Binding] = {
            module: MixedBinding(self, index, layer) for index, (module, layer) in enumerate(hooks.layers.items())
        }

    def concatenate(self) -> list[LayerStore | None]:
        """Put the keys and values of all parts of the call one behind the other, differentiably."""
        prefixes = self.hooks.compute_prefixes(self.rows.parts)
        stores: list[LayerStore | None] = []
        for module in self.hooks.layers:
            present = [each.get(module) for each in prefixes]
            places: list[tuple[int, int] | None] = []
            end = 0
            for each in present:
                length = 0 if each is None else int(each.key.shape[1])
                places.append(None if each is None else (end, length))
                end += length
            stores.append(LayerStore(join(present), tuple(places)) if end else None)
        return stores

    def look_up(self) -> list[LayerStore | None]:
        """Return the layers of the model's store, and where the parts of the call stand in them."""
        store, layers = self.hooks.store, list(self.hooks.layers)
        spans = [store.spans.get(self.hooks.find_key(part)) for part in self.rows.parts]
        return [
            LayerStore(
                store.layers[index],
                tuple(
                    None if span is None or module not in part.indices else (span.start, span.length)
                    for part, span in zip(self.rows.parts, spans, strict=True)
                ),
            )
            if index in store.layers
            else None
            for index, module in enumerate(layers)
        ]

    def make_spans(self, index: int, count: int, device: torch.device) -> Tensor | None:
        """Return the spans ``[count, 2]`` of the rows in a layer's store."""
        store = self.stores[index]
        if store is None:
            return None
        places = [(0, 0) if row < 0 else store.places[row] or (0, 0) for row in self.rows.rows]
        return self.rows.make_tensor(f"spans {store.places}", places, count, device)


def join(prefixes: Sequence[KeyedPrefix | None]) -> KeyedPrefix:
    """Return keys and values one behind the other, with biases if any of them has biases."""
    present = [each for each in prefixes if each is not None]
    if len(present) == 1:
        return present[0]
    key, value = (torch.cat([each[i] for each in present], dim=1) for i in (0, 1))  # type: ignore[misc]
    if all(each.bias is None for each in present):
        return KeyedPrefix(key, value)
    biases = [each.key.new_zeros(each.key.shape[:2]) if each.bias is None else each.bias for each in present]
    return KeyedPrefix(key, value, torch.cat(biases, dim=1))


class MixedGates(PrefixMethod):
    """The gates of the parts of a call, each in its own rows."""

    def __init__(self, shapes: Sequence[AttentionShape], rows: MixedRows, modules: Sequence[nn.Module]) -> None:
        super().__init__(SimpleNamespace(num_virtual_tokens=rows.longest), shapes)
        self.rows = rows
        self.attentions = tuple(modules)  # no children: they belong to the model

    def reset_parameters(self, text_keys_values: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Leave the parts as they are."""

    def prefixes(self) -> list[Prefix]:
        """Return nothing: the call has the keys and values."""
        return []

    def needs_hidden(self) -> bool:
        """Return whether a part has gates that are computed from hidden states."""
        return self.rows.gated

    def prefix_gate(
        self, layer: int, hidden: Tensor | None, attended: Tensor | None, sequences: Tensor | None = None
    ) -> Tensor | None:
        """``[B, 1, m]``, or for each query ``[B, 1, N, m]``; 1 in rows without such a gate."""
        if hidden is None:
            return None
        batch, longest, module = hidden.shape[0], self.rows.longest, self.attentions[layer]
        gates: list[tuple[Tensor, Tensor]] = []
        for which, part in enumerate(self.rows.parts):
            if part.gates is None or module not in part.indices:
                continue
            rows = self.rows.find_rows(which, batch, hidden.device)
            own = [None if each is None else each.expand(batch, -1)[rows] for each in (attended, sequences)]
            packed = {} if own[1] is None else {"sequences": own[1]}
            gate = part.gates.prefix_gate(part.indices[module], hidden[rows], own[0], **packed)
            assert gate is not None
            gates.append((rows, F.pad(gate, (0, longest - part.length), value=1.0)))
        by_query = any(gate.ndim == 4 for _, gate in gates)
        shape = (batch, 1, hidden.shape[1], longest) if by_query else (batch, 1, longest)
        mixed = hidden.new_ones(shape)
        for rows, gate in gates:
            whole = gate.unsqueeze(2) if by_query and gate.ndim == 3 else gate
            mixed = mixed.index_copy(0, rows, whole.to(mixed.dtype).expand(len(rows), *shape[1:]))
        return mixed

    def output_gates(self, layer: int, query: Tensor) -> Tensor | None:
        """``[B, Hq]``, 0 in rows without one; None for one joint softmax in all rows."""
        if not self.rows.has_own_softmax:
            return None
        heads, module = query.shape[1], self.attentions[layer]
        gates = [query.new_zeros(heads)]
        for part in self.rows.parts:
            assert isinstance(part.method, PrefixMethod)
            gate = part.method.output_gate(part.indices[module]) if module in part.indices else None
            gates.append(gates[0] if gate is None else gate.to(query).expand(heads))
        return torch.stack(gates)[self.rows.index(query.shape[0], query.device) + 1]


class MixedBinding(LayerBinding):
    """The binding of an attention module to the prefixes and gates of a call's rows."""

    attachment: Any

    def __init__(self, call: MixedCall, index: int, layer: Layer) -> None:
        self.attachment = self.call = call
        self.index = index
        self.module = layer.module
        self.window = layer.window
        self.hidden = None

    def get_prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix | None:
        """Return the keys and values of all parts, or None if the layer has none."""
        rows = self.call.rows
        running = next((p.projections[self.module] for p in rows.parts if self._is_running(p)), None)
        if running is not None:
            running.get_prefix(query, key, value)
            return None
        if any(part.is_projected for part in rows.parts):
            self.call.stores[self.index] = self._project(query)
        store = self.call.stores[self.index]
        return None if store is None else (store.prefix.key.to(query), store.prefix.value.to(query))

    def _is_running(self, part: Part) -> bool:
        return self.module in part.projections and part.projections[self.module].running

    def _project(self, query: Tensor) -> LayerStore | None:
        """Have the layer project the states of all parts, one behind the other."""
        parts = [part for part in self.call.rows.parts if self.module in part.indices]
        if not parts:
            return None
        states: list[Tensor] = []
        places: list[tuple[int, int] | None] = []
        end = 0
        for part in self.call.rows.parts:
            if part not in parts:
                places.append(None)
                continue
            assert isinstance(part.method, PrefixMethod)
            own = part.method.projected_states(part.indices[self.module])
            assert own is not None
            states.append(own.to(query))
            places.append((end, part.length))
            end += part.length
        pair = parts[0].projections[self.module](torch.cat(states))
        return LayerStore(KeyedPrefix(*pair), tuple(places))

    def get_gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the prefix gate and the output gate."""
        gate = self._prefix_gate(query, mask) if self.call.rows.gated else None
        return gate, self.call.method.output_gates(self.index, query)

    def get_bias(self, query: Tensor) -> Tensor | None:
        """Return the bias with which a sliding window cuts prefixes that stand at positions before the tokens."""
        if self.window is None or self.call.shift == 0:
            return None
        rows, gates = self.call.rows, self.call.gates
        lengths = rows.lengths(query.shape[0], query.device)
        return make_span_bias(query, self.window, lengths, rows.longest, gates.past, gates.tokens)

    def get_key_bias(self, query: Tensor) -> Tensor | None:
        """Return the biases of the keys of all parts."""
        store = self.call.stores[self.index]
        return None if store is None or store.prefix.bias is None else store.prefix.bias.to(query)

    def get_spans(self, query: Tensor) -> Tensor | None:
        """Return the rows' spans."""
        return self.call.make_spans(self.index, query.shape[0], query.device)

    def count_frozen(self) -> int:
        """Return 0: parameters that are not trained get no gradient by themselves."""
        return 0


class CaptureBinding(Binding):
    """The binding of an attention module whose keys and values are wanted, while prompts run."""

    def __init__(self) -> None:
        self.captured: Prefix | None = None

    def get_prefix(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep what the module's attention is called with."""
        self.captured = (key, value)


class MixedOffsets(nn.Module):
    """The offsets of the parts of a call on the embeddings of its tokens, in place of one prompt method."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_virtual_tokens=0)
        self.rows: MixedRows | None = None  # of the call in progress
        self.prompt_path: str | None = None

    @property
    def changes_tokens(self) -> bool:
        """Whether a part of the call in progress has an offset."""
        return self.rows is not None and any(part.has_offset for part in self.rows.parts)

    def embed(self, input_ids: Tensor, table: Tensor, first_position: int, with_prompt: bool) -> Tensor:
        """``[B, N, d]``: the embeddings with each row's own offset."""
        assert self.rows is not None
        assert not with_prompt
        embedded: Tensor | None = None
        for bank, members in self._make_banks(input_ids.shape[1], first_position, table.dtype):
            entries = [members.index(row) if row in members else -1 for row in self.rows.rows]
            key = f"bank of {members}"
            index = self.rows.make_tensor(key, entries, input_ids.shape[0], input_ids.device)
            if embedded is not None:  # another kind of offset: the embeddings so far are its table
                ids = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
                input_ids, table = ids, embedded.flatten(0, 1)
            embedded = prompt_embedding(input_ids, table, index=index, **bank)
        return prompt_embedding(input_ids, table) if embedded is None else embedded

    def _make_banks(self, tokens: int, first: int, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Yield the offsets of all parts as arguments of ``prompt_embedding``, and the parts that are in each."""
        assert self.rows is not None
        groups: dict[tuple[str, float], list[tuple[int, dict[str, Any]]]] = {}
        for which, part in enumerate(self.rows.parts):
            if part.has_offset:
                assert isinstance(part.method, PromptMethod)
                offset = part.method.offset(tokens, first, dtype)
                kind = next(name for name in _JOINED if offset.get(name) is not None)
                groups.setdefault((kind, offset.get("dropout_p", 0.0)), []).append((which, offset))
        for (kind, dropout), members in groups.items():
            offsets = [(offset[kind], offset.get("offset_scale", 1.0)) for _, offset in members]
            yield {kind: _JOINED[kind](offsets), "dropout_p": dropout}, [which for which, _ in members]


def _join_networks(offsets: Sequence[tuple[tuple[Tensor, ...], float]]) -> tuple[Tensor, ...]:
    """Return ADePT's networks as a bank, with hidden layers of one width: a hidden unit of zeros adds nothing."""
    width = max(network[0].shape[1] for network, _ in offsets)
    banks = []
    for (w1, b1, w2, b2), scale in offsets:
        more = width - w1.shape[1]
        banks.append((F.pad(w1, (0, more)), F.pad(b1, (0, more)), F.pad(scale * w2, (0, 0, 0, more)), scale * b2))
    return tuple(torch.stack(tensors) for tensors in zip(*banks, strict=True))


def _join_pairs(offsets: Sequence[tuple[tuple[Tensor, ...], float]]) -> tuple[Tensor, ...]:
    """Return DePT's pairs as a bank, of one rank."""
    rank = max(pair[0].shape[1] for pair, _ in offsets)
    banks = [
        (F.pad(a, (0, rank - a.shape[1])), F.pad(scale * b, (0, 0, 0, rank - b.shape[0]))) for (a, b), scale in offsets
    ]
    return tuple(torch.stack(tensors) for tensors in zip(*banks, strict=True))


def _join_rows(offsets: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return dense offsets as a bank."""
    return torch.stack([scale * rows for rows, scale in offsets])


_JOINED: dict[str, Any] = {"ffn": _join_networks, "low_rank": _join_pairs, "position_offset": _join_rows}
"""The function that makes a bank of offsets of each kind, for which ``prompt_embedding`` has an argument."""


class MixtureHooks:
    """A model whose rows have different adapters, from ``install`` to ``remove``."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer], store: SpanStore) -> None:
        self.model = model
        self.store = store
        self.layers = {layer.module: layer for layer in layers}
        self.shapes = [layer.shape for layer in layers]
        self.text = runs_on_text(model)
        self.backbone: Any = find_backbone(model) if self.text else model
        self.names = check_parameter_names(self.backbone)
        self.windows = any(layer.window is not None for layer in layers)
        self.encoder: Any = model.get_encoder() if model.config.is_encoder_decoder else None
        self.rows: MixedRows | None = None  # of the call that begins
        self.keys: dict[Part, Any] = {}  # in the store
        self.shift: PositionShift | None = None
        self.offsets: OffsetHooks | None = None
        self.implementation: Implementation | None = None
        self.handles: list[Any] = []
        self.leave: Any = None  # what returns to the adapter in use, for a call without names
        self.drops = has_dropout(self.backbone)

    def find_key(self, part: Part) -> Any:
        """Return the key of a part in the store."""
        return self.keys.get(part, part.name)

    def install(self, parts: Sequence[Part]) -> None:
        """Switch the model's attention, and set the hooks that these parts need."""
        if self.implementation is None:
            self.implementation = Implementation(self.model, {})
        else:
            self.implementation.resume()
        watch(self.layers)
        if any(isinstance(part.method, PromptMethod) for part in parts):
            self.offsets = OffsetHooks(self.model, MixedOffsets())  # type: ignore[arg-type]
            self.offsets.install(self.model)
            self.handles.append(self.offsets)
        self.handles.append(Interception(self.backbone, self.run))
        if self.shift is None and any(part.shift for part in parts):
            self.shift = PositionShift(self.backbone, Positions.find(self.backbone))
        if self.shift is not None:
            self.handles += self.shift.install()
        if self.encoder is not None:
            self.handles.append(Interception(self.encoder, self.run_encoder))
        if any(part.gates is not None for part in parts):
            for layer in self.layers.values():
                if layer.entry is not None:
                    self.handles.append(layer.entry.register_forward_pre_hook(Watch(layer.module), with_kwargs=True))

    def remove(self) -> None:
        """Remove all hooks, and restore the model's attention."""
        for handle in reversed(self.handles):
            handle.remove()
        self.handles, self.offsets = [], None
        unwatch(self.layers)
        restore_checkpoints(self.backbone)
        assert self.implementation is not None
        self.implementation.restore()

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the backbone, each row with its own adapter."""
        if self.rows is None:  # called by itself, without names
            self.leave()
            return self.backbone.forward(*args, **kwargs)
        assert self.implementation is not None
        self.implementation.check()
        refuse_replicas(self.backbone)
        arguments = name_arguments(self.names, args, kwargs)
        self._check(arguments)
        call = MixedCall(self, self.rows, arguments)
        call.stores = call.concatenate() if torch.is_grad_enabled() else call.look_up()
        arguments = self._arrange(arguments, call)
        if self.offsets is not None:
            self.offsets.method.rows = self.rows  # type: ignore[assignment]
        carry_through_checkpoints(self.backbone)
        try:
            with carrying(CarriedBindings(call.bindings)):
                output = forward(**arguments)
        finally:
            if self.shift is not None:
                self.shift.shift = 0
            if self.offsets is not None:
                self.offsets.method.rows = None  # type: ignore[assignment]
        cache = find_cache(output)
        call.gates.put_down(cache)
        if cache is not None and not torch.compiler.is_compiling():
            hold_names(cache, self.rows, arguments)
        return output

    def run_encoder(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an encoder, which ``generate`` calls by itself."""
        if self.rows is None or get_carried_bindings() is not None:
            return forward(*args, **kwargs)
        call = MixedCall(self, self.rows, {})
        call.stores = call.concatenate() if torch.is_grad_enabled() else call.look_up()
        with carrying(CarriedBindings(call.bindings)):
            return forward(*args, **kwargs)

    def _check(self, arguments: dict[str, Any]) -> None:
        assert self.rows is not None
        if asks_for(arguments, self.backbone, "output_attentions"):
            raise ValueError("`output_attentions` must be False with `adapter_names`: the kernels make no weights.")
        if torch.is_grad_enabled() and checkpoints_reentrantly(self.backbone):
            raise ValueError("`use_reentrant` must be False for gradient checkpointing with `adapter_names`.")
        prompts = [part.name for part in self.rows.parts if part.is_prompt]
        if prompts and self.drops and self.backbone.training:
            raise ValueError(
                f"`adapter_names` must not name the prompt {prompts[0]!r} while dropout in the model draws anew in "
                "every row: train it by itself, or set the model's dropout to 0."
            )
        if prompts and asks_for(arguments, self.backbone, "output_router_logits"):
            raise ValueError(
                f"`output_router_logits` must be False with the prompt {prompts[0]!r} in `adapter_names`: an auxiliary "
                "loss counts the prompt's tokens in every row."
            )

    def _arrange(self, arguments: dict[str, Any], call: MixedCall) -> dict[str, Any]:
        """Return the arguments with masks as the attention expects them, and with shifted positions."""
        if not self.text:
            refuse_one_row_masks(arguments)
            return arguments
        if not getattr(find_cache(arguments), "is_compileable", False):
            tokens = count_past(arguments) + count_tokens(arguments)
            check_mask_length(arguments.get("attention_mask"), tokens, call.rows.longest)
        arguments = expand_one_row_mask(arguments)
        if self.shift is not None:
            given = arguments.get("input_ids")
            given = arguments["inputs_embeds"] if given is None else given
            call.shift = call.rows.find_shift(given.shape[0], given.device)
            if call.shift != 0 and (self.windows or any(part.has_offset for part in call.rows.parts)):
                refuse_packed(arguments, self.backbone)
            self._check_frequencies(arguments, call)
            self.shift.begin(arguments, call.shift)
        return arguments

    def _check_frequencies(self, arguments: dict[str, Any], call: MixedCall) -> None:
        """Refuse rows so long that rotary frequencies differ from those that a prompt was run with."""
        assert self.shift is not None
        positions = self.shift.positions
        if positions.by_length is None or not any(part.is_prompt for part in call.rows.parts):
            return
        ends = int(positions.move_ids(arguments, call.shift).max()) + 1
        if ends > positions.by_length:
            raise ValueError(
                f"`input_ids` ends at position {ends} with the prompts in front, but the keys of prompts are rotated "
                f"for rows of up to {positions.by_length} tokens: in longer ones this model rotates all keys "
                "differently. Use the prompts one at a time, without `adapter_names`."
            )

    def compute_prefixes(self, parts: Sequence[Part]) -> list[dict[nn.Module, KeyedPrefix]]:
        """Return the keys and values of each part by attention module; stored ones as they are."""
        prompts = [part for part in parts if part.is_prompt and part not in self._list_stored(parts)]
        of_prompts = dict(zip(prompts, self.run_prompts([part.method for part in prompts]), strict=True))
        computed = []
        for part in parts:
            if part in of_prompts:
                computed.append(of_prompts[part])
            elif part in self._list_stored(parts):
                computed.append(self._read_stored(part))
            else:
                computed.append(compute_prefixes(part))
        return computed

    def _list_stored(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts that are in the store alone, not among the model's adapters."""
        return [part for part in parts if part not in self.keys and part.name in self.store.spans]

    def _read_stored(self, part: Part) -> dict[nn.Module, KeyedPrefix]:
        prefixes = self.store.read(part.name)
        return {m: prefixes[i] for i, m in enumerate(self.layers) if m in part.indices and i in prefixes}

    def run_prompts(self, methods: Sequence[Any]) -> list[dict[nn.Module, KeyedPrefix]]:
        """Compute the keys and values of prompts in every layer. Prompts of one length run in one batch."""
        results: dict[int, dict[nn.Module, KeyedPrefix]] = {}
        groups: dict[int, list[int]] = {}
        for which, method in enumerate(methods):
            alone = needs_ids(self.model.config)
            groups.setdefault(-1 - which if alone else len(method.prompt), []).append(which)
        for members in groups.values():
            captured = self._run_batch([methods[which] for which in members])
            for row, which in enumerate(members):
                results[which] = {
                    module: KeyedPrefix(key[row], value[row]) for module, (key, value) in captured.items()
                }
        return [results[which] for which in range(len(methods))]

    def _run_batch(self, methods: Sequence[Any]) -> dict[nn.Module, Prefix]:
        """Run prompts of one length as a batch, and return what each attention module was called with."""
        assert self.offsets is not None
        assert self.shift is not None
        dtype, offsets = self.offsets.table.dtype, self.offsets
        prompts = torch.stack([method.prompt.to(dtype) for method in methods])
        positions = self.shift.positions.first + torch.arange(prompts.shape[1], device=prompts.device)
        bindings = {module: CaptureBinding() for module in self.layers}
        self.shift.shift = 0
        with carrying(CarriedBindings({**bindings})), suspend_checkpointing(self.backbone):
            if needs_ids(self.model.config):
                former, offsets.method = offsets.method, methods[0]
                try:
                    offsets.run_alone(prompts[0], position_ids=positions[None], use_cache=False)
                finally:
                    offsets.method = former
            else:
                offsets.forward(inputs_embeds=prompts, position_ids=positions[None], use_cache=False)
        return {module: binding.captured for module, binding in bindings.items() if binding.captured is not None}


class Watch:
    """A forward pre-hook that keeps what enters a layer for the gates of a call in progress."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        carried = get_carried_bindings()
        binding = None if carried is None else carried.bindings.get(self.attention)
        if isinstance(binding, MixedBinding):
            binding.hidden = find_first_tensor(args, kwargs)


_NAMES = "fastprefix_names"
"""The attribute of a key/value cache that holds the names of its rows' adapters."""


class HeldNames:
    """The names of the adapters of a key/value cache's rows."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def select_rows(self, name: str, rows: Any) -> HeldNames:
        """Return the names of other rows, chosen as a cache's method of that name chooses them."""
        if name == "batch_repeat_interleave":
            return HeldNames(tuple(each for each in self.names for _ in range(int(rows))))
        chosen = rows.tolist() if isinstance(rows, Tensor) else rows
        return HeldNames(tuple(self.names[row] for row in chosen))


def hold_names(cache: Cache, rows: MixedRows, arguments: Mapping[str, Any]) -> None:
    """Keep the names of a call's rows on its cache."""
    count = count_rows(arguments) or len(rows.names)
    hold_by_row(cache, _NAMES, HeldNames(tuple(rows.repeat(rows.names, count))))


def get_held_names(cache: Cache | None) -> tuple[str, ...] | None:
    """Return the names of the adapters of a cache's rows, or None if it was filled without names."""
    held = getattr(cache, _NAMES, None)
    return held.names if isinstance(held, HeldNames) else None


def count_rows(arguments: Mapping[str, Any]) -> int | None:
    """Return how many rows a call has, or None if its arguments do not tell."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "pixel_values"):
        value = arguments.get(name)
        if isinstance(value, Tensor):
            return math.prod(value.shape[:-1]) if name.endswith("ids") else int(value.shape[0])
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    return int(tensors[0].shape[0]) if tensors else None
