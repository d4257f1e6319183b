"""Attend from few queries to many keys, which are split over programs. A second kernel combines the parts.

The queries of all heads of a group are rows of one tile, so that keys are read once for all of them. If rows of the
batch share a prefix, or the same span of a store, their queries are also in one tile. One launch processes the parts of
prefix and tokens.
"""

import triton
import triton.language as tl

from .forward import attend_band, attend_prefix_blocks
from .operands import Lengths, Queries
from .primitives import (
    ROWS,
    bound_maximum,
    exponentiate,
    find_lengths,
    find_numbers,
    find_row,
    invert,
    load_entry,
    load_sink,
    load_span,
    start_sums,
    store_normalizers,
)


@triton.jit(
    do_not_specialize=["N", "M", "P", "prefix_programs", "prefix_parts", "token_parts", "prefix_chunk", "chunk"]
)
def prefix_attention_decode_kernel(
    a,
    p_parts,
    p_sums,
    N,
    M,
    P,
    prefix_programs,
    prefix_parts,
    token_parts,
    prefix_chunk,
    chunk,
    T: tl.constexpr,
):
    """Attend from a tile of BM queries to one part of the keys.

    Store weighted sums of values [parts, B, Hq, N, DV], and maxima and sums of scores [parts, 2, B, Hq, N].
    """
    sizes = Lengths(N, M, P, 0)
    kv_heads = a.heads // a.group
    pid = tl.program_id(0)
    rows = a.group * N
    if pid < prefix_programs:
        if a.spans.pointer is not None:
            part, tile, hk, b0 = locate(pid, prefix_parts, tl.cdiv(rows, T.BM), kv_heads)
            attend_span(p_parts, p_sums, part, prefix_parts, tile, b0, hk, find_lengths(a, b0, N, M, P), a, T)
        else:
            if a.pk.b is None:
                rows *= a.planes16 // 16 // a.heads
            part, tile, hk, b0 = locate(pid, prefix_parts, tl.cdiv(rows, T.BM), kv_heads)
            queries, there = load_queries(tile, rows, b0, hk, a, sizes, T)
            start, sums = part * prefix_chunk, start_sums(T.BM, T.DVP)
            end = tl.minimum(start + prefix_chunk, P)
            sums = attend_prefix_blocks(sums, queries, start, end, a, sizes, T, False)
            store_part(p_parts, p_sums, part, sums, queries, there, a, sizes, T)
    else:
        part, tile, hk, b0 = locate(pid - prefix_programs, token_parts, tl.cdiv(rows, T.BM), kv_heads)
        queries, there = load_queries(tile, rows, b0, hk, a, sizes, T)
        start = part * chunk
        sums = attend_band(start_sums(T.BM, T.DVP), queries, 0, N, start, tl.minimum(start + chunk, M), a, sizes, T)
        store_part(p_parts, p_sums, prefix_parts + part, sums, queries, there, a, sizes, T)


@triton.jit
def locate(pid, parts, tiles, kv_heads):
    """Return the part of the keys, tile of queries, key/value head and row of the batch that a program processes."""
    return pid % parts, pid // parts % tiles, pid // parts // tiles % kv_heads, pid // parts // tiles // kv_heads


@triton.jit
def load_queries(tile, rows, b0, hk, a, sizes, T: tl.constexpr):
    """Load a tile of the queries that share keys, and return their mask [BM, 1] with it.

    These are all queries of a group of heads, beginning with row ``b0`` of the batch.
    """
    r = tile * T.BM + tl.arange(0, T.BM)[:, None]
    o_r = tl.minimum(r, rows - 1)
    b, h, i = b0 + o_r // sizes.N // a.group, hk * a.group + o_r // sizes.N % a.group, o_r % sizes.N
    return gather_queries(b, h, i, r < rows, b0, hk, a, T)


@triton.jit
def gather_queries(b, h, i, there, b0, hk, a, T: tl.constexpr):
    """Load queries b, h, i [BM, 1] as a tile that sees the keys of row ``b0``, and return it with the mask [BM, 1]."""
    o_d = tl.arange(0, T.DP)[None, :]
    p_q = find_row(a.q, b, h, i) + o_d.to(tl.int64) * a.q.c
    # [BM, DP]
    b_q = tl.load(p_q, mask=there & (o_d < T.D), other=0.0)
    return Queries(b_q, b, h, i, b0, hk), there


@triton.jit
def attend_span(p_parts, p_sums, part, parts, tile, b0, hk, sizes, a, T: tl.constexpr):
    """Attend from the rows that share a tile with row ``b0`` to one part of their span.

    Rows with the same span are assigned to tiles in order. The host does not know the spans or which rows share them,
    so the grid has programs for every row. A program does nothing if row ``b0`` is not the first row of its tile or if
    the span does not have the part.
    """
    queries = a.group * sizes.N  # per row
    members = tl.maximum(1, T.BM // queries)  # rows per tile
    chunk = divide_span(sizes.P, parts, T)
    there = part * chunk < sizes.P
    number = 0
    if there:
        number = count_equal_spans(b0, sizes, a)
    if there & (number % members == 0):
        r = tile * T.BM + tl.arange(0, T.BM)[:, None]
        b, found = find_members(b0, r // queries, sizes, a)
        found = found & (r // queries < members)
        b = tl.where(found, b, b0)
        h, i = hk * a.group + r // sizes.N % a.group, r % sizes.N
        q, found = gather_queries(b, h, i, found, b0, hk, a, T)
        start = part * chunk
        end = tl.minimum(start + chunk, sizes.P)
        sums = attend_prefix_blocks(start_sums(T.BM, T.DVP), q, start, end, a, sizes, T, False)
        first = parts - tl.cdiv(sizes.P, chunk)
        store_part(p_parts, p_sums, first + part, sums, q, found, a, sizes, T)


@triton.jit
def divide_span(length, parts, T: tl.constexpr):
    """Return the number of keys per part of a span with at most ``parts`` parts. Unused parts come first."""
    return tl.cdiv(tl.maximum(tl.cdiv(length, T.BP), 1), parts) * T.BP


@triton.jit
def find_equal_spans(b, sizes, a):
    """Return which rows b have the span in ``sizes``. Indices beyond the batch do not."""
    batch = a.planes16 // 16 // a.heads
    start, length = load_span(a, tl.minimum(b, batch - 1))
    return (start == sizes.start) & (length == sizes.P) & (b < batch)


@triton.jit
def count_equal_spans(b0, sizes, a):
    """Count the rows before ``b0`` that have the same span."""
    count = 0
    for j0 in tl.range(0, b0, ROWS):
        j = j0 + tl.arange(0, ROWS)
        count += tl.sum((find_equal_spans(j, sizes, a) & (j < b0)).to(tl.int32))
    return count


@triton.jit
def find_members(b0, number, sizes, a):
    """Return the rows of the batch [BM, 1] with the span of row ``b0``, and a mask [BM, 1] of those that exist.

    ``number`` [BM, 1] counts these rows from ``b0`` on.
    """
    b, count = tl.zeros_like(number), 0
    for j0 in tl.range(b0, a.planes16 // 16 // a.heads, ROWS):
        j = j0 + tl.arange(0, ROWS)
        # [ROWS]; the cumulative sum numbers the rows with this span
        b_equal = find_equal_spans(j, sizes, a).to(tl.int32)
        b_number = count + tl.cumsum(b_equal, 0) - 1
        # [BM, ROWS]
        b_found = (b_number[None, :] == number) & (b_equal[None, :] != 0)
        b += tl.sum(tl.where(b_found, j[None, :] + 1, 0), 1)[:, None]
        count += tl.sum(b_equal, 0)
    return b - 1, b > 0


@triton.jit
def store_part(p_parts, p_sums, part, sums, queries, there, a, sizes, T: tl.constexpr):
    """Store the weighted values [BM, DVP] and the maxima and sums [BM] of a part."""
    o_d = tl.arange(0, T.DVP)[None, :]
    plane = queries.b * a.heads + queries.h
    store_normalizers(p_sums, part, plane, queries.i, there, sums.m[:, None], sums.l[:, None], a, sizes)
    row = (part * (a.planes16 // 16) + plane).to(tl.int64) * sizes.N + queries.i
    tl.store(p_parts + row * T.DV + o_d, sums.acc, mask=there & (o_d < T.DV))


@triton.jit(do_not_specialize=["N", "prefix_parts", "parts"])
def prefix_attention_combine_kernel(
    a, o, p_normalizers, p_parts, p_sums, N, prefix_parts, parts, T: tl.constexpr, BS: tl.constexpr
):
    """Combine the parts of one query and the sinks in a fixed order.

    The parts form one softmax, or with an output gate one for the prefix and one for the tokens.
    """
    sizes = Lengths(N, N, N, 0)  # only N is read
    plane = tl.program_id(0) // N
    i = tl.program_id(0) % N
    b, h = plane // a.heads, plane % a.heads
    o_d = tl.arange(0, T.DVP)
    i_one = i + tl.arange(0, 1)
    there = i_one < N
    first = 0
    if a.spans.pointer is not None:  # a span's parts end right before the tokens' parts
        _, length = load_span(a, b)
        first = prefix_parts - tl.cdiv(length, divide_span(length, prefix_parts, T))
    if a.og.pointer is None:
        # [DVP], [1], [1]
        b_o, b_m, b_l = join(p_parts, p_sums, plane, i_one, first, parts, True, a, h, sizes, T, BS)
    else:
        # [DVP], [1], [1]
        b_o, b_m, b_l = join(p_parts, p_sums, plane, i_one, first, prefix_parts, False, a, h, sizes, T, BS)
        b_prefix = b_o * load_entry(a.og, b, h, i, i).to(tl.float32)
        store_normalizers(p_normalizers, 1, plane, i_one, there, b_m, b_l, a, sizes)
        # [DVP], [1], [1]
        b_o, b_m, b_l = join(p_parts, p_sums, plane, i_one, prefix_parts, parts, True, a, h, sizes, T, BS)
        b_o += b_prefix
    store_normalizers(p_normalizers, 0, plane, i_one, there, b_m, b_l, a, sizes)
    tl.store(find_row(o, b, h, i) + o_d.to(tl.int64) * o.c, b_o.to(o.pointer.dtype.element_ty), mask=o_d < T.DV)


@triton.jit
def join(p_parts, p_sums, plane, i, start, end, TOKENS: tl.constexpr, a, h, sizes, T: tl.constexpr, BS: tl.constexpr):
    """Combine parts [start, end), and return the output [DVP], maximum [1] and sum [1].

    TOKENS: the parts belong to the tokens' softmax, which includes the sink.
    """
    o_d = tl.arange(0, T.DVP)[None, :]
    # [DVP]
    b_acc = tl.zeros([o_d.shape[1]], tl.float32)
    b_m = tl.full([1], float("-inf"), tl.float32)
    if TOKENS and a.sinks.pointer is not None:
        b_m = tl.full([1], 0.0, tl.float32) + load_sink(a, h)
    b_l = tl.where(b_m == float("-inf"), 0.0, 1.0)
    for s0 in tl.range(start, end, BS):
        s = s0 + tl.arange(0, BS)
        # [BS]
        b_part_m = tl.load(find_numbers(p_sums, 2 * s, plane, a, sizes) + i, mask=s < end, other=float("-inf"))
        b_part_l = tl.load(find_numbers(p_sums, 2 * s + 1, plane, a, sizes) + i, mask=s < end, other=0.0)
        row = (s * (a.planes16 // 16) + plane).to(tl.int64) * sizes.N + i
        p_part = p_parts + row[:, None] * T.DV + o_d
        # [BS, DVP]
        b_o = tl.load(p_part, mask=(s < end)[:, None] & (o_d < T.DV), other=0.0)
        # [1]
        b_max = tl.maximum(b_m, tl.max(b_part_m, 0))
        # [BS]
        b_weight = exponentiate(b_part_m - bound_maximum(b_max), a)
        # [1]
        b_decay = exponentiate(b_m - bound_maximum(b_max), a)
        b_acc = b_acc * b_decay + tl.sum(b_weight[:, None] * b_o, 0)
        b_l = b_l * b_decay + tl.sum(b_weight * b_part_l, 0)
        b_m = b_max
    return b_acc * invert(b_l), b_m, b_l
