"""Store the pooled gates of sequences on their key/value cache, so that they move with the rows of the cache.

Beam search, for example, reorders the rows of a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..models.attention import check_one_sequence
from ..models.hooks import count_past, count_tokens, find_cache
from ..models.positions import find_packed_sequences

_HELD = "fastprefix_held"
"""The attribute of a key/value cache that lists its attributes with a state per row."""
_SELECTIONS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")
"""The methods of a key/value cache that select, reorder or repeat its rows."""


class ByRow(Protocol):
    """A state with one entry per row of a cache."""

    def select_rows(self, name: str, rows: Any) -> ByRow:
        """Return the state of the rows that the cache method ``name`` selects when it is called with ``rows``."""


def hold_by_row(cache: Cache, attribute: str, state: ByRow) -> None:
    """Set an attribute of a cache to a state that follows the cache's rows."""
    setattr(cache, attribute, state)
    held: tuple[str, ...] = getattr(cache, _HELD, ())
    if attribute in held:
        return
    setattr(cache, _HELD, (*held, attribute))
    for name in _SELECTIONS:
        if hasattr(cache, name):
            setattr(cache, name, partial(_select_rows, cache, name))


def drop_by_row(cache: Cache, attribute: str) -> None:
    """Drop an attribute that ``hold_by_row`` has set."""
    held: tuple[str, ...] = getattr(cache, _HELD, ())
    if attribute in held:
        setattr(cache, _HELD, tuple(other for other in held if other != attribute))
        delattr(cache, attribute)


def _select_rows(cache: Cache, name: str, *args: Any, **kwargs: Any) -> None:
    """Run a row-selecting method of a cache, and apply the same selection to every state per row."""
    getattr(type(cache), name)(cache, *args, **kwargs)
    (rows,) = (*args, *kwargs.values())
    for attribute in getattr(cache, _HELD):
        setattr(cache, attribute, getattr(cache, attribute).select_rows(name, rows))


_GATES = "fastprefix_gates"
"""The attribute of a key/value cache that holds the gates of its sequences."""


class HeldGates:
    """The gates of the sequences of a key/value cache, pooled from the first tokens of each.

    ``gates`` maps a layer index to gates ``[B, 1, m]``. ``begun``, bool ``[B]``, marks the sequences with at least one
    token that is not padding. None marks all sequences.
    """

    def __init__(self, gates: dict[int, Tensor] | None = None, begun: Tensor | None = None) -> None:
        self.gates = gates or {}
        self.begun = begun

    def choose_gate(self, index: int, pooled: Tensor) -> Tensor:
        """Return a layer's gate. Sequences that have begun keep their stored gate, the others get ``pooled``."""
        if self.begun is None:
            return self.gates[index]
        begun = self.begun.to(pooled.device)  # layers may be on several devices
        return torch.where(begun[:, None, None], self.gates[index], pooled)

    def advance(self, gates: dict[int, Tensor], begun: Tensor | None) -> HeldGates:
        """Return the state after another call, in which the sequences in ``begun`` have begun (None: all)."""
        if begun is not None and self.begun is not None:
            begun = begun | self.begun
        if begun is not None and not torch.compiler.is_compiling() and bool(begun.all()):
            begun = None
        return HeldGates(gates, begun)

    def select_rows(self, name: str, rows: Any) -> HeldGates:
        """Return the gates of the rows that the cache method ``name`` selects when it is called with ``rows``."""
        gates = {index: select_rows(gate, name, rows) for index, gate in self.gates.items()}
        return HeldGates(gates, None if self.begun is None else select_rows(self.begun, name, rows))


def select_rows(tensor: Tensor, name: str, rows: Any) -> Tensor:
    """Return the rows of a tensor that the cache method ``name`` selects when it is called with ``rows``."""
    if name == "batch_repeat_interleave":
        return tensor.repeat_interleave(rows, 0)
    return tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows]


class CallGates:
    """The tokens of a call, and the gates pooled from these tokens or from earlier ones.

    Without arguments it describes a layer that is called outside its model, whose gates are not stored.
    """

    def __init__(self, arguments: Mapping[str, Any] | None = None) -> None:
        self.past = 0 if arguments is None else count_past(arguments)  # tokens in the cache
        self.tokens = 0 if arguments is None else count_tokens(arguments)
        self.held = HeldGates()  # gates of the sequences in the cache
        self.pooled: dict[int, Tensor] | None = None if arguments is None else {}  # gates after the call, until its end
        self.begun: Tensor | None = None  # sequences with a token in the call; None: all
        self.sequences: Tensor | None = None  # the sequence of each token in the call, if rows are packed

    def load_gates(self, arguments: Mapping[str, Any], backbone: nn.Module, poolings: Sequence[str]) -> None:
        """Read the inputs of pooled gates from the arguments of a call, and load the gates stored on its cache."""
        if self.past > 0:
            self.held = getattr(find_cache(arguments), _GATES, self.held)
        self.sequences = find_packed_sequences(arguments, backbone)
        # A gate may depend on several tokens. A compiled graph cannot read the values of masks.
        pools = any(pooling != "query" for pooling in poolings) and not torch.compiler.is_compiling()
        for name in ("attention_mask", "decoder_attention_mask"):
            mask = arguments.get(name)
            if pools and isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] > 1:
                check_one_sequence(mask, mask.shape[2], self.past)

    def hold(self, index: int, gate: Tensor, attended: Tensor | None) -> Tensor:
        """Store a layer's gate for later calls with the same cache, and return the gate for this call."""
        if self.past > 0:
            if index not in self.held.gates:
                raise ValueError(
                    "`past_key_values` must be a cache that was filled with this adapter, since its gates are pooled "
                    "from the first tokens of a sequence."
                )
            gate = self.held.choose_gate(index, gate)
        if self.pooled is None:  # a recomputed layer
            return gate
        self.pooled[index] = gate
        self.begun = None if attended is None else attended.any(dim=1).expand(gate.shape[0])
        return gate

    def store_gates(self, cache: Cache | None) -> None:
        """Store the pooled gates of a call on its cache at the end of the call.

        Gradient checkpointing holds this object, so it must not hold tensors of the layers' graphs.
        """
        pooled, self.pooled = self.pooled, None
        if pooled and cache is not None:
            hold_by_row(cache, _GATES, self.held.advance(pooled, self.begun))
