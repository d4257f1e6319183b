"""Call PyTorch's flash attention for rows with several sequences packed back to back.

The kernel requires the cumulative lengths of the sequences, which are computed from the values of ``segment_ids``. The
values are read once for each pair of tensors, which waits for the device. The layers of a model share the result.
"""

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..arguments import AttentionArguments
from . import flash
from .problem import MOST_SEQUENCES, Known, Packing, Problem

Read = tuple[weakref.ref[Tensor], tuple[int, ...], "Packing | str"]
_READ: Any = WeakTensorKeyDictionary()  # query segments -> key segments, versions with sizes, packing or refusal


def can_read(a: AttentionArguments) -> bool:
    """Return whether a call has segments whose values can be read. In a trace they cannot."""
    segments = a.query_segments
    if segments is None or torch.compiler.is_compiling():
        return False
    return not (isinstance(segments, FakeTensor) or segments.is_meta)


def explain_segments(a: AttentionArguments) -> str | None:
    """Explain why the segments of a call are not sequences packed back to back, or return None if they are."""
    found = _read_packing(a)
    return found if isinstance(found, str) else None


def find_packing(a: AttentionArguments) -> Packing | None:
    """Return the sequences of a call with segments, or None for a call without segments.

    Raises ``ValueError`` if the segments are not sequences packed back to back.
    """
    if a.query_segments is None:
        return None
    found = _read_packing(a)
    if isinstance(found, str):
        raise ValueError(f"backend 'composed' is not usable here: {found}")
    if found.queries.is_cuda:  # another call may have made them on another stream
        stream = torch.cuda.current_stream(found.queries.device)
        found.queries.record_stream(stream)
        found.keys.record_stream(stream)
    return found


def _read_packing(a: AttentionArguments) -> "Packing | str":
    """Return the sequences of a call, or a string that explains why they are not supported."""
    if a.query.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph would keep the sequences of its capture, even if the values of `segment_ids` change"
    found = _recall_packing(a)
    if not isinstance(found, str) and a.is_causal and any(q != k for q, k in found.starts):
        return "with `is_causal` it requires segments with as many queries as keys"
    return found


def _recall_packing(a: AttentionArguments) -> "Packing | str":
    queries, keys = a.query_segments, a.key_segments
    assert queries is not None
    assert keys is not None
    if queries.is_inference() or keys.is_inference():  # inference tensors have no version counter
        return _make_packing(a, queries, keys)
    versions = (queries._version, keys._version, *a.query.shape[:3], a.key.shape[2])
    known: Read | None = _READ.get(queries)
    if known is not None and known[0]() is keys and known[1] == versions:
        return known[2]
    made = _make_packing(a, queries, keys)
    _READ[queries] = (weakref.ref(keys), versions, made)
    return made


def _make_packing(a: AttentionArguments, query_segments: Tensor, key_segments: Tensor) -> "Packing | str":
    batch, _, queries, _ = a.query.shape
    of_queries = _find_runs(query_segments.cpu().expand(batch, queries))
    of_keys = _find_runs(key_segments.cpu().expand(batch, a.key.shape[2]))
    names = of_queries[0]
    if not torch.equal(names, of_keys[0]):
        return "it requires segments that queries and keys have in the same order"
    if len(names.unique(dim=0)) != len(names):
        return "it requires every segment to be in one piece"
    if len(names) > MOST_SEQUENCES:
        return f"it supports up to {MOST_SEQUENCES:,} sequences in a call, not {len(names):,}"
    starts = torch.stack([of_queries[1], of_keys[1]])
    on_device = starts.to(a.query.device, torch.int32)
    longest = starts.diff().amax(1).tolist()
    pairs = tuple((int(q), int(k)) for q, k in zip(*starts.tolist(), strict=True))
    return Packing(on_device[0], on_device[1], pairs, (int(longest[0]), int(longest[1])))


def _find_runs(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and segment ``[runs, 2]`` of each run of equal segments, and the starts of the runs with the end.

    The starts ``[runs + 1]`` are positions in the flattened rows.
    """
    batch, length = segments.shape
    begins = torch.ones(batch, length, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    names = torch.stack([starts // length, segments.flatten()[starts]], 1)
    return names, torch.cat([starts, torch.tensor([batch * length])])


def attend(x: Problem) -> tuple[Tensor, Tensor]:
    """Return the output and the natural log-sum-exp of the scores, float32 ``[B, Hq, N]``."""
    assert x.packing is not None
    batch, heads, length, _ = x.query.shape
    if x.query.device.type == "cpu":
        output, logsumexp = torch.empty_like(x.query), torch.empty(batch, heads, length, dtype=torch.float32)
        for row, q, k in list_sequences(x.packing, length, x.key.shape[2]):
            found = flash.attend(_take_sequence(x, row, q, k))
            output[row, :, q], logsumexp[row, :, q] = (of[0] for of in found)
        return output, logsumexp
    operator, rows = torch.ops.aten._flash_attention_forward, map(_join_rows, x[:3])
    output, logsumexp = operator(*rows, *list_lengths(x.packing), 0.0, x.is_causal, False, scale=x.scale)[:2]
    return _split_rows(output, batch), logsumexp.unflatten(1, (batch, length)).transpose(0, 1)


def differentiate(x: Problem, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    assert x.packing is not None
    batch, _, length, _ = x.query.shape
    if x.query.device.type == "cpu":
        dq, dk, dv = (torch.empty_like(of) for of in x[:3])
        for row, q, k in list_sequences(x.packing, length, x.key.shape[2]):
            of_row = Known(*(_take(of, row, q) for of in known))
            found = flash.differentiate(_take_sequence(x, row, q, k), of_row)
            dq[row, :, q], dk[row, :, k], dv[row, :, k] = (of[0] for of in found)
        return dq, dk, dv
    rows = [_join_rows(of) for of in (known.grad_output, *x[:3], known.output)]
    logsumexp = known.logsumexp.transpose(0, 1).flatten(1).contiguous()
    random = x.query.new_empty(0, dtype=torch.uint64)  # the random state of dropout, which is unused
    rest = (*list_lengths(x.packing), 0.0, x.is_causal, random, random)
    found = torch.ops.aten._flash_attention_backward(*rows, logsumexp, *rest, scale=x.scale)
    dq, dk, dv = (_split_rows(of, batch) for of in found)
    return dq, dk, dv


def list_lengths(packing: Packing) -> tuple[Tensor, Tensor, int, int]:
    """Return the cumulative lengths of queries and of keys, and the largest lengths of queries and of keys."""
    return (packing.queries, packing.keys, *packing.longest)


def list_sequences(packing: Packing, queries: int, keys: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield the row, queries and keys of each sequence. Each row has ``queries`` queries and ``keys`` keys."""
    for (q0, k0), (q1, k1) in itertools.pairwise(packing.starts):
        row = q0 // queries
        q, k = row * queries, row * keys
        yield row, slice(q0 - q, q1 - q), slice(k0 - k, k1 - k)


def _take_sequence(x: Problem, row: int, q: slice, k: slice) -> Problem:
    return Problem(_take(x.query, row, q), _take(x.key, row, k), _take(x.value, row, k), x.is_causal, x.scale)


def _take(x: Tensor, row: int, at: slice) -> Tensor:
    return x[row : row + 1, :, at]


def _join_rows(x: Tensor) -> Tensor:
    """Return ``[B, H, N, D]`` as ``[B * N, H, D]``, which is a view if the memory has that order."""
    return x.transpose(1, 2).flatten(0, 1)


def _split_rows(x: Tensor, batch: int) -> Tensor:
    rows: Tensor = x.unflatten(0, (batch, -1))
    return rows.transpose(1, 2)
