"""Read the spans of a store of prefixes. Each row of the batch attends to the prefix keys in its span."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from .arguments import AttentionArguments

_OF_ROWS = ("query", "key", "value", "output_gate", "attn_mask", "query_segments", "key_segments")


class Span(NamedTuple):
    """The prefix keys of the store that a row attends to: ``length`` keys that begin at ``start``."""

    start: int
    length: int


def list_columns(a: AttentionArguments) -> dict[str, checks.Size]:
    """Return the numbers of columns of ``prefix_gate`` and ``prefix_bias``, without those that broadcast over the keys.

    With spans, each must be at least the length of the longest span.
    """
    given = {"prefix_gate": a.prefix_gate, "prefix_bias": a.prefix_bias}
    return {
        name: tensor.shape[-1]
        for name, tensor in given.items()
        if isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.shape[-1] != 1
    }


def find_longest(spans: list[Span]) -> int:
    """Return the length of the longest span."""
    return max((span.length for span in spans), default=0)


def read_spans(a: AttentionArguments) -> list[Span]:
    """Return the rows' spans as numbers. On a device other than the CPU, this waits for the device.

    Raises ``ValueError`` if a span is outside the store, or longer than ``prefix_gate`` or ``prefix_bias`` allow, or if
    ``vmap`` maps over the spans.
    """
    assert a.prefix_spans is not None
    if checks.is_mapped(a.prefix_spans):
        raise ValueError("`prefix_spans` must be the same in all calls of torch.func.vmap: pass it with in_dims=None")
    spans = [Span(*span) for span in a.prefix_spans.tolist()]
    store = a.prefix_key.shape[2]
    for row, (start, length) in enumerate(spans):
        if start < 0 or length < 0 or start + length > store:
            raise ValueError(
                f"`prefix_spans` must hold spans within the store of {store} prefix keys; row {row} starts at {start} "
                f"and has length {length}"
            )
    longest = find_longest(spans)
    for name, columns in list_columns(a).items():
        if columns < longest:
            raise ValueError(
                f"`{name}` must have a column for each key of the longest span in `prefix_spans` ({longest}), "
                f"got {columns}"
            )
    return spans


def check_spans(a: AttentionArguments) -> None:
    """Check the values of ``prefix_spans`` where values can be read. Values are never clamped."""
    if a.prefix_spans is not None and checks.can_read_values(a.prefix_spans):
        read_spans(a)


def take_row(a: AttentionArguments, row: int, span: Span) -> AttentionArguments:
    """Return the arguments of one row of the batch, with its span of the store as prefix. All tensors are views."""

    def take(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[0] == 1 else tensor[row : row + 1]

    start, end = span.start, span.start + span.length
    named: dict[str, Any] = {name: take(getattr(a, name)) for name in _OF_ROWS}
    named |= {name: getattr(a, name)[:, :, start:end] for name in ("prefix_key", "prefix_value")}
    named |= {name: _take_columns(take(getattr(a, name)), 0, span.length) for name in ("prefix_gate", "prefix_bias")}
    named["prefix_key_bias"] = _take_columns(a.prefix_key_bias, start, end)
    frozen = min(max(a.frozen_prefix - start, 0), span.length)
    return a._replace(**named, prefix_spans=None, frozen_prefix=frozen)


def _take_columns(tensor: Tensor | None, start: int, end: int) -> Tensor | None:
    return tensor if tensor is None or tensor.shape[-1] == 1 else tensor[..., start:end]


def gather_prefixes(a: AttentionArguments) -> tuple[AttentionArguments, Tensor]:
    """Return the arguments with each row's prefix gathered from the store, and a mask ``[B, P]`` of existing keys.

    The gathered prefix is ``[B, Hkv, P, *]``. This function defines the meaning of spans for the reference. Backends do
    not make these copies.
    """
    assert a.prefix_spans is not None
    longest = find_longest(read_spans(a))
    start, length = a.prefix_spans[:, :1], a.prefix_spans[:, 1:]
    p = torch.arange(longest, device=a.query.device)
    there = p < length  # [B, P]
    index = torch.where(there, start + p, 0)

    def gather(store: Tensor) -> Tensor:
        return torch.where(there[:, None, :, None], store[0][:, index].movedim(0, 1), 0.0)

    bias = a.prefix_key_bias
    if bias is not None and bias.shape[-1] != 1:
        bias = bias[0][:, index].movedim(0, 1)  # [B, Hkv, P]
    rows = a._replace(
        prefix_key=gather(a.prefix_key),
        prefix_value=gather(a.prefix_value),
        prefix_gate=_take_columns(a.prefix_gate, 0, longest),
        prefix_bias=_take_columns(a.prefix_bias, 0, longest),
        prefix_key_bias=bias,
        prefix_spans=None,
    )
    return rows, there
