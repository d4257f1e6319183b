"""Spans of a store of prefixes: what each row of the batch sees of it."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import AttentionArguments


class Span(NamedTuple):
    """The keys of the store that a row of the batch sees: ``length`` of them from ``start`` on."""

    start: int
    length: int


def read_spans(a: AttentionArguments) -> list[Span]:
    """Return the rows' spans as numbers, which waits for a device that is not the CPU.

    Raises ``ValueError`` for a span that is not within the store, or longer than the rows' own gates and biases.
    """
    assert a.prefix_spans is not None
    spans = [Span(*span) for span in a.prefix_spans.tolist()]
    store = a.prefix_key.shape[2]
    for row, (start, length) in enumerate(spans):
        if start < 0 or length < 0 or start + length > store:
            raise ValueError(
                f"`prefix_spans` must lie within the store of {store} prefix keys; row {row} starts at {start} and has "
                f"length {length}"
            )
    for name, tensor in (("prefix_gate", a.prefix_gate), ("prefix_bias", a.prefix_bias)):
        columns = 1 if tensor is None else tensor.shape[-1]
        longest = max((span.length for span in spans), default=0)
        if columns != 1 and columns < longest:
            raise ValueError(
                f"`{name}` must have a column for each key of the longest span in `prefix_spans` ({longest}), "
                f"got {columns}"
            )
    return spans


def check_spans(a: AttentionArguments) -> None:
    """Check the values of ``prefix_spans``: on a CPU always; elsewhere, where looking would wait for the device, only
    with ``FASTPREFIX_CHECK_IDS=1`` in the environment. Spans are never clamped.
    """
    if a.prefix_spans is None:
        return
    if a.prefix_spans.device.type == "cpu" or os.environ.get("FASTPREFIX_CHECK_IDS") == "1":
        read_spans(a)


def take_row(a: AttentionArguments, row: int, span: Span) -> AttentionArguments:
    """Return the arguments of one row of the batch, whose prefix is its span of the store. All tensors are views."""

    def take(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[0] == 1 else tensor[row : row + 1]

    def take_columns(tensor: Tensor | None, start: int) -> Tensor | None:
        tensor = take(tensor)
        return tensor if tensor is None or tensor.shape[-1] == 1 else tensor[..., start : start + span.length]

    end = span.start + span.length
    named = {name: take(getattr(a, name)) for name in _OF_ROWS}
    named |= {name: getattr(a, name)[:, :, span.start : end] for name in ("prefix_key", "prefix_value")}
    named |= {name: take_columns(getattr(a, name), 0) for name in ("prefix_gate", "prefix_bias")}
    named["prefix_key_bias"] = take_columns(a.prefix_key_bias, span.start)
    frozen = min(max(a.frozen_prefix - span.start, 0), span.length)
    return a._replace(**named, prefix_spans=None, frozen_prefix=frozen)  # type: ignore[arg-type]


_OF_ROWS = ("query", "key", "value", "output_gate", "attn_mask", "query_segments", "key_segments")


def gather_prefixes(a: AttentionArguments) -> tuple[AttentionArguments, Tensor]:
    """Return the arguments with a prefix ``[B, Hkv, P, *]`` of each row's own in place of the store, and which of its
    keys are there, ``[B, P]``. This is what spans mean; no backend makes these copies.
    """
    assert a.prefix_spans is not None
    longest = max((span.length for span in read_spans(a)), default=0)
    start, length = a.prefix_spans[:, :1], a.prefix_spans[:, 1:]
    p = torch.arange(longest, device=a.query.device)
    there = p < length  # [B, P]
    index = torch.where(there, start + p, 0)

    def gather(store: Tensor) -> Tensor:
        return torch.where(there[:, None, :, None], store[0][:, index].movedim(0, 1), 0.0)

    def cut(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[-1] == 1 else tensor[..., :longest]

    bias = a.prefix_key_bias
    if bias is not None and bias.shape[-1] != 1:
        bias = bias[0][:, index].movedim(0, 1)  # [B, Hkv, P]
    rows = a._replace(
        prefix_key=gather(a.prefix_key),
        prefix_value=gather(a.prefix_value),
        prefix_gate=cut(a.prefix_gate),
        prefix_bias=cut(a.prefix_bias),
        prefix_key_bias=bias,
        prefix_spans=None,
    )
    return rows, there
