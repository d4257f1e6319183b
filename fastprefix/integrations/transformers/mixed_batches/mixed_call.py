"""Describe a call whose rows have different adapters: its parts, and each row's part, gates and offsets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....methods import AttentionShape, PrefixMethod, PrefixTuning, PromptMethod
from ....ops.prefix_attention.spans import Span
from ....ops.prompt_embedding import prompt_embedding
from ..adapter import Method
from ..models.attention import Binding, Prefix, make_span_bias
from ..models.discovery import Layer, Projection
from ..models.positions import RowShift
from ..prefixes.gates import CallGates
from ..prefixes.prefix import LayerBinding
from ..sharding.tensor_parallel import TensorParallelHeads
from .span_store import KeyedPrefix, SpanStore

BASE = "__base__"
"""The reserved name for rows that run on the base model alone. PEFT uses the same name."""


@dataclass(eq=False)
class Part:
    """The data of an adapter that a mixed batch needs.

    Args:
        name: the name of the adapter.
        length: the number of its virtual tokens.
        shift: the number of positions by which the adapter moves the tokens of its rows.
        indices: the index of the adapter's layer for each attention module.
        method: computes gates and offsets, and the keys and values that are not in the store. None if not needed.
        projections: the projection of each attention module, for a method whose layers project its states.
        has_own_softmax: whether its keys have a separate softmax.
        is_prompt: whether its keys and values are computed from a prompt.
        heads: the heads of the method's layers on a tensor-parallel model, or None.
        identity: distinguishes the adapter from other ones of the same name, for caches. None if names are enough.
    """

    name: str
    length: int
    shift: int
    indices: Mapping[nn.Module, int]
    method: Method | None = None
    projections: Mapping[nn.Module, Projection] = field(default_factory=dict)
    has_own_softmax: bool = False
    is_prompt: bool = False
    heads: TensorParallelHeads | None = None
    identity: str | None = None

    @property
    def has_offset(self) -> bool:
        """Return whether the adapter adds an offset to the embeddings of the tokens."""
        return isinstance(self.method, PromptMethod) and self.method.changes_tokens

    @property
    def is_projected(self) -> bool:
        """Return whether the model's layers project the adapter's keys and values."""
        return bool(self.projections)

    @property
    def gates(self) -> PrefixMethod | None:
        """Return the method if its gates are computed from hidden states, or None."""
        return self.method if isinstance(self.method, PrefixMethod) and self.method.needs_hidden() else None


def compute_prefixes(part: Part) -> dict[nn.Module, KeyedPrefix]:
    """Return the keys and values of a prefix method for each attention module, with constant gates multiplied in.

    On a tensor-parallel model they have this rank's heads only.
    """
    method = part.method
    assert isinstance(method, PrefixMethod)
    if isinstance(method, PrefixTuning) and not method.needs_hidden():
        pairs = method.gated_prefixes()
    else:
        pairs = method.prefixes()
    if not pairs:
        return {}
    biases = [method.key_bias(i) for i in range(len(pairs))]
    if part.heads is not None:
        pairs, biases = part.heads.take_prefixes(pairs), part.heads.take_biases(biases)
    return {module: KeyedPrefix(*pairs[i], biases[i]) for module, i in part.indices.items()}


class MixedRows:
    """The parts of a call, and the part of each row.

    ``rows`` are indices into ``parts``, and -1 is the base model. Modules may be called with a multiple of these rows,
    for example in beam search. Each row then represents that many consecutive rows.
    """

    def __init__(self, names: tuple[str, ...], parts: Sequence[Part], device: torch.device) -> None:
        known = {part.name: index for index, part in enumerate(parts)}
        self.names = names
        self.parts = tuple(parts)
        self.rows = [known.get(name, -1) for name in names]
        self.device = device
        self.longest = max((part.length for part in parts), default=0)
        self.gated = any(part.gates is not None for part in parts)
        self.projected = any(part.is_projected for part in parts)
        self.has_own_softmax = any(part.has_own_softmax for part in parts)
        self.has_offsets = any(part.has_offset for part in parts)
        self.has_prompts = any(part.is_prompt for part in parts)
        self.index = self.make_tensor(self.rows)
        """The index of each row's part in ``parts``, or -1, int64 ``[B]``."""
        self.lengths = self.make_tensor([self.parts[row].length if row >= 0 else 0 for row in self.rows])
        """The length of each row's prefix, int64 ``[B]``."""
        shifts = [self.parts[row].shift if row >= 0 else 0 for row in self.rows]
        same = len(set(shifts)) == 1
        self.shift = shifts[0] if same else RowShift(self.make_tensor(shifts)[:, None], max(shifts))
        """The number of positions by which the tokens of each row are moved. It is an int if all rows agree."""

    def make_tensor(self, values: Sequence[Any]) -> Tensor:
        """Return a list with one number, or several, per row as a tensor."""
        return torch.tensor(values, device=self.device)

    def repeat_names(self, count: int) -> tuple[str, ...]:
        """Return the names of ``count`` rows, a multiple of the rows with names."""
        return tuple(name for name in self.names for _ in range(count // len(self.names)))

    def repeat_shift(self, count: int) -> int | RowShift:
        """Return the shift of ``count`` rows, a multiple of the rows with names."""
        return self.shift if isinstance(self.shift, int) else RowShift(repeat(self.shift[0], count), self.shift.largest)


def repeat(tensor: Tensor, count: int) -> Tensor:
    """Repeat each row of a tensor so that it has ``count`` rows, a multiple of its own number of rows."""
    rows = tensor.shape[0]
    if count == rows:
        return tensor
    if count % rows:
        raise ValueError(
            f"`adapter_names` must have a name for each row of the batch, but has {rows} names for {count} rows."
        )
    return tensor.repeat_interleave(count // rows, 0)


class LayerStore(NamedTuple):
    """A layer's keys and values of all parts, and the span ``[B, 2]`` of each row in them."""

    prefix: KeyedPrefix
    spans: Tensor


Place = tuple[int, int] | None
"""Start and length of a part in a layer's store, or None if the part is not in the layer."""


class MixedCall:
    """A call whose rows have different adapters: the state that the bindings of its layers share."""

    def __init__(
        self, layers: Mapping[nn.Module, Layer], rows: MixedRows, heads: TensorParallelHeads | None = None
    ) -> None:
        self.rows = rows
        self.gates = CallGates()
        self.heads = heads
        self.method = MixedGates([layer.shape for layer in layers.values()], rows, list(layers))
        self.stores: list[LayerStore | None] = [None] * len(layers)
        self.store: SpanStore | None = None  # holds the keys and values, if they are stored
        self.bindings: dict[nn.Module, Binding] = {
            module: MixedBinding(self, index, layer) for index, (module, layer) in enumerate(layers.items())
        }

    def begin(self, arguments: dict[str, Any], backbone: nn.Module) -> None:
        """Read the inputs of the gates from the arguments of the backbone."""
        self.gates = CallGates(arguments)
        if self.rows.gated:
            poolings = [each for part in self.rows.parts for each in getattr(part.gates, "poolings", ())]
            self.gates.load_gates(arguments, backbone, poolings)

    def set_prefixes(self, prefixes: Sequence[Mapping[nn.Module, KeyedPrefix]]) -> None:
        """Concatenate the keys and values of all parts in each layer, differentiably."""
        for index, module in enumerate(self.bindings):
            self.stores[index] = self.make_store([each.get(module) for each in prefixes])

    def set_spans(self, store: SpanStore, spans: Sequence[Span | None]) -> None:
        """Use the keys and values of a store, in which the parts have these spans."""
        self.store = store
        for index, module in enumerate(self.bindings):
            places: list[Place] = [
                None if span is None or module not in part.indices else (span.start, span.length)
                for part, span in zip(self.rows.parts, spans, strict=True)
            ]
            if index in store.layers:
                self.stores[index] = LayerStore(store.layers[index], self.make_spans(places))

    def make_store(self, prefixes: Sequence[KeyedPrefix | None]) -> LayerStore | None:
        """Return the concatenated keys and values of all parts in a layer, or None if no part has any."""
        places: list[Place] = []
        end = 0
        for each in prefixes:
            length = 0 if each is None else int(each.key.shape[1])
            places.append(None if each is None else (end, length))
            end += length
        return LayerStore(join(prefixes), self.make_spans(places)) if end else None

    def make_spans(self, places: Sequence[Place]) -> Tensor:
        """Return the spans ``[B, 2]`` of the rows, given the spans of the parts."""
        return self.rows.make_tensor([places[row] or (0, 0) if row >= 0 else (0, 0) for row in self.rows.rows])


def join(prefixes: Sequence[KeyedPrefix | None]) -> KeyedPrefix:
    """Concatenate keys and values along the tokens, with biases if any prefix has biases."""
    present = [each for each in prefixes if each is not None]
    if len(present) == 1:
        return present[0]
    key, value = (torch.cat([each[i] for each in present], dim=1) for i in (0, 1))  # type: ignore[misc]
    if all(each.bias is None for each in present):
        return KeyedPrefix(key, value)
    biases = [each.key.new_zeros(each.key.shape[:2]) if each.bias is None else each.bias for each in present]
    return KeyedPrefix(key, value, torch.cat(biases, dim=1))


class MixedGates:
    """The gates of the parts of a call, each applied to its own rows, with the interface of one method."""

    def __init__(self, shapes: Sequence[AttentionShape], rows: MixedRows, modules: Sequence[nn.Module]) -> None:
        self.shapes = shapes
        self.rows = rows
        self.modules = modules

    def needs_hidden(self) -> bool:
        """Return whether a part has gates that are computed from hidden states."""
        return self.rows.gated

    def prefix_gate(
        self, layer: int, hidden: Tensor | None, attended: Tensor | None, sequences: Tensor | None = None
    ) -> Tensor | None:
        """Return gates ``[B, 1, m]``, or ``[B, 1, N, m]`` if a part has a gate per query; 1 in rows without gates."""
        if hidden is None:
            return None
        batch, longest, module = hidden.shape[0], self.rows.longest, self.modules[layer]
        gates: list[tuple[Tensor, Tensor]] = []
        for which, part in enumerate(self.rows.parts):
            if part.gates is None or module not in part.indices:
                continue
            rows = (repeat(self.rows.index, batch) == which).nonzero().squeeze(1).to(hidden.device)
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
        """Return output gates ``[B, Hq]``, 0 in rows without one, or None if all rows have one joint softmax."""
        if not self.rows.has_own_softmax:
            return None
        heads, module = query.shape[1], self.modules[layer]
        gates = [query.new_zeros(heads)]
        for part in self.rows.parts:
            assert isinstance(part.method, PrefixMethod)
            index = part.indices.get(module)
            gate = None if index is None else part.method.output_gate(index)
            if gate is not None and index is not None and part.heads is not None:
                gate = part.heads.take_heads(gate, part.heads.splits[index].queries)
            gates.append(gates[0] if gate is None else gate.to(query).expand(heads))
        return torch.stack(gates)[repeat(self.rows.index, query.shape[0]).to(query.device) + 1]


class MixedBinding(LayerBinding):
    """The binding of an attention module to the prefixes and gates of a call's rows."""

    call: Any

    def __init__(self, call: MixedCall, index: int, layer: Layer) -> None:
        self.call = call
        self.heads = call.heads
        self.index = index
        self.layer = layer
        self.module = layer.module
        self.window = layer.window
        self.hidden = None

    def get_prefix(self, query: Tensor, key: Tensor, value: Tensor) -> Prefix | None:
        """Return the keys and values of all parts, or None if the layer has none or projects a prefix now."""
        if self.call.rows.projected:
            self.call.stores[self.index] = self._project(query)
        store = self.call.stores[self.index]
        if store is None:
            return None
        prefix = store.prefix
        if self.call.store is not None and prefix.key.device != query.device:
            prefix = self.call.store.move_layer(self.index, query.device)
        return prefix.key.to(query), prefix.value.to(query)

    def _project(self, query: Tensor) -> LayerStore | None:
        """Project the states of all parts with the layer's projection."""
        prefixes: list[KeyedPrefix | None] = []
        for part in self.call.rows.parts:
            states, projected = None, None
            if self.module in part.indices:
                assert isinstance(part.method, PrefixMethod)
                states = part.method.projected_states(part.indices[self.module])
            if states is not None:
                projected = KeyedPrefix(*part.projections[self.module](states.to(query), self))
            prefixes.append(projected)
        store: LayerStore | None = self.call.make_store(prefixes)
        return store

    def get_gates(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the prefix gate and the output gate."""
        gate = self._prefix_gate(query, mask) if self.call.rows.gated else None
        if gate is not None and self.heads is not None:
            gate = self.heads.take_gate(gate, self.index)
        return gate, self.call.method.output_gates(self.index, query)

    def get_bias(self, query: Tensor) -> Tensor | None:
        """Return the bias that applies a sliding window to prefixes with positions before the tokens."""
        rows, gates = self.call.rows, self.call.gates
        if self.window is None or rows.shift == 0:
            return None
        lengths = repeat(rows.lengths, query.shape[0]).to(query.device)
        return make_span_bias(query, self.window, lengths, rows.longest, gates.past, gates.tokens)

    def get_key_bias(self, query: Tensor) -> Tensor | None:
        """Return the biases of the keys of all parts, or None if no part has biases."""
        store = self.call.stores[self.index]
        return None if store is None or store.prefix.bias is None else store.prefix.bias.to(query)

    def get_spans(self, query: Tensor) -> Tensor | None:
        """Return the rows' spans, or None if the layer has no prefix."""
        store = self.call.stores[self.index]
        return None if store is None else repeat(store.spans, query.shape[0]).to(query.device)

    def count_frozen(self) -> int:
        """Return 0, since parameters that are not trained need no gradient anyway."""
        return 0


class MixedOffsets(nn.Module):
    """The offsets of the parts of a call on its token embeddings, with the interface of one prompt method."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_virtual_tokens=0)
        self.rows: MixedRows | None = None  # rows of the call in progress
        self.prompt_path: str | None = None

    changes_positions = False  # PromptHooks refused models that pass embeddings to the decoder

    @property
    def changes_tokens(self) -> bool:
        """Return whether a part of the call in progress has an offset."""
        return self.rows is not None and self.rows.has_offsets

    def embed(self, input_ids: Tensor, table: Tensor, first_position: int, with_prompt: bool) -> Tensor:
        """Return the embeddings ``[B, N, d]`` with the offset of each row."""
        assert self.rows is not None
        assert not with_prompt
        embedded: Tensor | None = None
        for bank, members in self._make_banks(input_ids.shape[1], first_position, table.dtype):
            entries = torch.full((len(self.rows.parts) + 1,), -1)
            entries[members] = torch.arange(len(members))  # the last entry is the base model's
            index = entries.to(input_ids.device)[repeat(self.rows.index, input_ids.shape[0]).to(input_ids.device)]
            if embedded is not None:  # a second kind of offset uses the embeddings so far as its table
                ids = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
                input_ids, table = ids, embedded.flatten(0, 1)
            embedded = prompt_embedding(input_ids, table, index=index, **bank)
        return prompt_embedding(input_ids, table) if embedded is None else embedded

    def _make_banks(self, tokens: int, first: int, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Yield banks of offsets as arguments of ``prompt_embedding``, each with the indices of its parts."""
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
    """Return ADePT's networks as a bank. Zeros pad the hidden layers to equal width, which adds nothing."""
    width = max(network[0].shape[1] for network, _ in offsets)
    banks = []
    for (w1, b1, w2, b2), scale in offsets:
        more = width - w1.shape[1]
        banks.append((F.pad(w1, (0, more)), F.pad(b1, (0, more)), F.pad(scale * w2, (0, 0, 0, more)), scale * b2))
    return tuple(torch.stack(tensors) for tensors in zip(*banks, strict=True))


def _join_pairs(offsets: Sequence[tuple[tuple[Tensor, ...], float]]) -> tuple[Tensor, ...]:
    """Return DePT's low-rank pairs as a bank, padded with zeros to equal rank."""
    rank = max(pair[0].shape[1] for pair, _ in offsets)
    banks = [
        (F.pad(a, (0, rank - a.shape[1])), F.pad(scale * b, (0, 0, 0, rank - b.shape[0]))) for (a, b), scale in offsets
    ]
    return tuple(torch.stack(tensors) for tensors in zip(*banks, strict=True))


def _join_rows(offsets: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return dense offsets as a bank."""
    return torch.stack([scale * rows for rows, scale in offsets])


_JOINED: dict[str, Any] = {"ffn": _join_networks, "low_rank": _join_pairs, "position_offset": _join_rows}
"""The function that builds a bank of each kind of offset. The keys are arguments of ``prompt_embedding``."""
