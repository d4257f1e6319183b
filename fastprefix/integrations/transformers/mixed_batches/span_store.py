"""Store the prefixes of many adapters in one tensor for each layer's keys and one for its values.

A call whose rows have different adapters passes these tensors to ``prefix_attention`` with a span for each row, so that
no prefix is copied or expanded. Prefixes can be added and dropped without new tensors, since freed gaps are reused. If
no gap is large enough, all prefixes move into new tensors with some slack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....ops.prefix_attention.spans import Span

SLACK = 0.04
"""The slack of new tensors, as a fraction of the stored tokens."""


class KeyedPrefix(NamedTuple):
    """A layer's keys ``[Hkv, m, D]``, values ``[Hkv, m, Dv]`` and optional biases of the keys ``[Hkv, m]``."""

    key: Tensor
    value: Tensor
    bias: Tensor | None = None


class SpanStore:
    """Prefixes by key, such as a name. A prefix has the same span in each of its layers."""

    def __init__(self) -> None:
        self.capacity = 0
        self.spans: dict[Hashable, Span] = {}
        self.layers: dict[int, KeyedPrefix] = {}
        """Keys ``[Hkv, capacity, D]``, values ``[Hkv, capacity, Dv]`` and biases of each layer with a prefix."""

    @property
    def tokens(self) -> int:
        """Return the number of stored tokens."""
        return sum(span.length for span in self.spans.values())

    @property
    def nbytes(self) -> int:
        """Return the memory of all layers, in bytes."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer if tensor is not None)

    def write(self, key: Hashable, prefixes: Mapping[int, KeyedPrefix], dtype: torch.dtype) -> Span:
        """Store a prefix of some layers, replace any prefix with the same key, and return its span.

        A prefix of another length gets a new span. Layers are stored in ``dtype`` on the device of their first prefix.
        If the memory is not sufficient, the stored prefixes are unchanged.
        """
        length = next(iter(prefixes.values())).key.shape[1]
        with _outside_inference_mode(), torch.no_grad():
            span = self.spans.get(key)
            if span is None or span.length != length:
                span = Span(self._find_room(length), length)
            for index, prefix in prefixes.items():
                self._add_layer(index, prefix, dtype)
            for index, prefix in prefixes.items():
                self._write_layer(index, prefix, span)
        self.spans[key] = span
        return span

    def drop(self, key: Hashable) -> None:
        """Free the span of a prefix."""
        del self.spans[key]

    def rename(self, key: Hashable, new: Hashable) -> None:
        """Change the key of a prefix."""
        self.spans = {new if each == key else each: span for each, span in self.spans.items()}

    def reserve(self, tokens: int) -> None:
        """Grow the tensors to a capacity of at least ``tokens``."""
        if tokens > self.capacity:
            self._move(tokens)

    def compact(self) -> None:
        """Move all prefixes together, and free the memory of all gaps and of the slack."""
        self._move(self.tokens)

    def list_gaps(self) -> Iterator[Span]:
        """Yield the gaps between the prefixes and after the last one."""
        end = 0
        for span in sorted(self.spans.values()):
            if span.start > end:
                yield Span(end, span.start - end)
            end = span.start + span.length
        if self.capacity > end:
            yield Span(end, self.capacity - end)

    def _find_room(self, length: int) -> int:
        """Return a start for a prefix of ``length`` tokens, in the smallest gap that is large enough."""
        fitting = [gap for gap in self.list_gaps() if gap.length >= length]
        if not fitting:
            needed = self.tokens + length
            self._move(max(needed, self.capacity if needed <= self.capacity else math.floor((1 + SLACK) * needed)))
            fitting = [gap for gap in self.list_gaps() if gap.length >= length]
        return min(fitting, key=lambda gap: (gap.length, gap.start)).start

    def _move(self, capacity: int) -> None:
        """Move all prefixes together into new tensors, one layer at a time.

        If the memory is not sufficient for all layers, the prefixes of the others are moved together in place, so that
        all layers have the same spans again, and the error is raised.
        """
        former, spans, start = self.spans, dict[Hashable, Span](), 0
        for key, span in sorted(former.items(), key=lambda item: item[1]):
            spans[key] = Span(start, span.length)
            start += span.length
        waiting = dict(self.layers)
        with _outside_inference_mode(), torch.no_grad():
            try:
                for index, layer in self.layers.items():
                    moved = _map_tensors(layer, lambda tensor: _make_room(tensor, capacity))
                    _copy_spans(layer, moved, former, spans)
                    self.layers[index] = moved
                    del waiting[index]
            except BaseException:
                for layer in waiting.values():
                    _copy_spans(layer, layer, former, spans)
                capacity = min(layer.key.shape[1] for layer in self.layers.values())
                raise
            finally:
                self.spans, self.capacity = spans, capacity

    def _add_layer(self, index: int, prefix: KeyedPrefix, dtype: torch.dtype) -> None:
        """Make room for the keys and values of a layer, and for biases of its keys, if it has none yet."""
        make = functools.partial(_make_room, capacity=self.capacity, dtype=dtype)
        layer = self.layers.get(index) or KeyedPrefix(make(prefix.key), make(prefix.value))
        if layer.bias is None and prefix.bias is not None:
            layer = layer._replace(bias=make(prefix.bias))
        self.layers[index] = layer

    def _write_layer(self, index: int, prefix: KeyedPrefix, span: Span) -> None:
        key, value, bias = self.layers[index]
        cut_span(key, span).copy_(prefix.key)
        cut_span(value, span).copy_(prefix.value)
        if bias is not None and prefix.bias is not None:
            cut_span(bias, span).copy_(prefix.bias)
        elif bias is not None:
            cut_span(bias, span).zero_()

    def convert(self, dtype: torch.dtype) -> None:
        """Convert all layers to a dtype, after the model was converted."""
        for index, layer in self.layers.items():
            if layer.key.dtype is not dtype:
                with _outside_inference_mode():
                    self.layers[index] = _map_tensors(layer, lambda tensor: tensor.to(dtype))

    def move_layer(self, index: int, device: torch.device) -> KeyedPrefix:
        """Return a layer on a device. If the model was moved, the stored layer moves too."""
        layer = self.layers[index]
        if layer.key.device != device:
            with _outside_inference_mode():
                layer = self.layers[index] = _map_tensors(layer, lambda tensor: tensor.to(device))
        return layer

    def read(self, key: Hashable) -> dict[int, KeyedPrefix]:
        """Return views of a prefix by layer. The content of layers that do not belong to the prefix is undefined."""
        span = self.spans[key]
        return {i: _map_tensors(layer, lambda tensor: cut_span(tensor, span)) for i, layer in self.layers.items()}


def _make_room(like: Tensor, capacity: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros for ``capacity`` tokens with the heads and sizes of a tensor. Gaps are never read."""
    return like.new_zeros(like.shape[0], capacity, *like.shape[2:], dtype=dtype)


def _copy_spans(
    source: KeyedPrefix, target: KeyedPrefix, former: Mapping[Hashable, Span], spans: Mapping[Hashable, Span]
) -> None:
    """Copy all prefixes of a layer to other spans, which in the same tensors are not behind the former ones."""
    for key, span in sorted(former.items(), key=lambda item: item[1]):
        for read, written in zip(source, target, strict=True):
            if read is not None and written is not None:
                values = cut_span(read, span)
                cut_span(written, spans[key]).copy_(values.clone() if read is written else values)


def _outside_inference_mode() -> AbstractContextManager[Any]:
    """Return a context for tensors that later calls without inference mode can change."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def cut_span(tensor: Tensor, span: Span) -> Tensor:
    """Return a span of a tensor ``[Hkv, T, ...]``."""
    return tensor[:, span.start : span.start + span.length]


def _map_tensors(layer: KeyedPrefix, function: Callable[[Tensor], Tensor]) -> KeyedPrefix:
    key, value, bias = layer
    return KeyedPrefix(function(key), function(value), None if bias is None else function(bias))
