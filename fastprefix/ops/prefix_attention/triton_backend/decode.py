"""Decoding: few queries against many keys. Keys are split over programs, and a second kernel joins the parts.

The queries of all heads of a group (and, where the prefix is shared, of all rows of the batch) are rows of one tile,
so that keys are read once for all of them. Prefix and tokens are parts like any other; they are made in one launch.
"""

import triton
import triton.language as tl

from .forward import attend_band, attend_prefix
from .operands import Lengths, Queries
from .primitives import (
    bound_maximum,
    exponentiate,
    find_numbers,
    find_row,
    invert,
    load_entry,
    load_sink,
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
    """Attend from a tile of queries to one part of the keys: weighted sums [part, b, h, i, DV], maxima and sums."""
    sizes = Lengths(N, M, P)
    kv_heads = a.heads // a.group
    pid = tl.program_id(0)
    rows = a.group * N
    if pid < prefix_programs:
        if a.pk.b is None:
            rows *= a.planes16 // 16 // a.heads
        part, tile, hk, b0 = locate(pid, prefix_parts, tl.cdiv(rows, T.BM), kv_heads)
        queries, there = load_queries(tile, rows, b0, hk, a, sizes, T)
        start = part * prefix_chunk
        sums = attend_prefix(start_sums(T.BM, T.DVP), queries, start, tl.minimum(start + prefix_chunk, P), a, sizes, T)
        store_part(p_parts, p_sums, part, sums, queries, there, a, sizes, T)
    else:
        part, tile, hk, b0 = locate(pid - prefix_programs, token_parts, tl.cdiv(rows, T.BM), kv_heads)
        queries, there = load_queries(tile, rows, b0, hk, a, sizes, T)
        start = part * chunk
        sums = attend_band(start_sums(T.BM, T.DVP), queries, 0, N, start, tl.minimum(start + chunk, M), a, sizes, T)
        store_part(p_parts, p_sums, prefix_parts + part, sums, queries, there, a, sizes, T)


@triton.jit
def locate(pid, parts, tiles, kv_heads):
    """Return the part of the keys, tile of queries, key/value head and row of the batch of a program."""
    return pid % parts, pid // parts % tiles, pid // parts // tiles % kv_heads, pid // parts // tiles // kv_heads


@triton.jit
def load_queries(tile, rows, b0, hk, a, sizes, T: tl.constexpr):
    """Load a tile of the queries that share keys, all those of a group, from row ``b0`` of the batch on, and their
    mask.
    """
    r = tile * T.BM + tl.arange(0, T.BM)[:, None]
    o_r = tl.minimum(r, rows - 1)
    b, h, i = b0 + o_r // sizes.N // a.group, hk * a.group + o_r // sizes.N % a.group, o_r % sizes.N
    o_d = tl.arange(0, T.DP)[None, :]
    p_q = find_row(a.q, b, h, i) + o_d.to(tl.int64) * a.q.c
    b_q = tl.load(p_q, mask=(r < rows) & (o_d < T.D), other=0.0)
    return Queries(b_q, b, h, i, b0, hk), r < rows


@triton.jit
def store_part(p_parts, p_sums, part, sums, queries, there, a, sizes, T: tl.constexpr):
    o_d = tl.arange(0, T.DVP)[None, :]
    plane = queries.b * a.heads + queries.h
    store_normalizers(p_sums, part, plane, queries.i, there, sums.m[:, None], sums.l[:, None], a, sizes)
    row = (part * (a.planes16 // 16) + plane).to(tl.int64) * sizes.N + queries.i
    tl.store(p_parts + row * T.DV + o_d, sums.acc, mask=there & (o_d < T.DV))


@triton.jit(do_not_specialize=["N", "prefix_parts", "parts"])
def prefix_attention_combine_kernel(
    a, o, p_normalizers, p_parts, p_sums, N, prefix_parts, parts, T: tl.constexpr, BS: tl.constexpr
):
    """Join the parts of one query, in a fixed order: one softmax over all, or one over the prefix's and one over the
    tokens', and the sinks.
    """
    sizes = Lengths(N, N, N)
    plane = tl.program_id(0) // N
    i = tl.program_id(0) % N
    b, h = plane // a.heads, plane % a.heads
    o_d = tl.arange(0, T.DVP)
    i_one = i + tl.arange(0, 1)
    there = i_one < N
    if a.og.pointer is None:
        b_o, b_m, b_l = join(p_parts, p_sums, plane, i_one, 0, parts, True, a, h, sizes, T, BS)
    else:
        b_o, b_m, b_l = join(p_parts, p_sums, plane, i_one, 0, prefix_parts, False, a, h, sizes, T, BS)
        b_prefix = b_o * load_entry(a.og, b, h, i, i).to(tl.float32)
        store_normalizers(p_normalizers, 1, plane, i_one, there, b_m, b_l, a, sizes)
        b_o, b_m, b_l = join(p_parts, p_sums, plane, i_one, prefix_parts, parts, True, a, h, sizes, T, BS)
        b_o += b_prefix
    store_normalizers(p_normalizers, 0, plane, i_one, there, b_m, b_l, a, sizes)
    tl.store(find_row(o, b, h, i) + o_d.to(tl.int64) * o.c, b_o.to(o.pointer.dtype.element_ty), mask=o_d < T.DV)


@triton.jit
def join(p_parts, p_sums, plane, i, start, end, TOKENS: tl.constexpr, a, h, sizes, T: tl.constexpr, BS: tl.constexpr):
    """Join parts [start, end): output [DVP], maximum and sum [1]. The sink belongs to the tokens' softmax."""
    o_d = tl.arange(0, T.DVP)[None, :]
    b_acc = tl.zeros([o_d.shape[1]], tl.float32)
    b_m = tl.full([1], float("-inf"), tl.float32)
    if TOKENS and a.sinks.pointer is not None:
        b_m = tl.full([1], 0.0, tl.float32) + load_sink(a, h)
    b_l = tl.where(b_m == float("-inf"), 0.0, 1.0)
    for s0 in tl.range(start, end, BS):
        s = s0 + tl.arange(0, BS)
        b_part_m = tl.load(find_numbers(p_sums, 2 * s, plane, a, sizes) + i, mask=s < end, other=float("-inf"))  # [BS]
        b_part_l = tl.load(find_numbers(p_sums, 2 * s + 1, plane, a, sizes) + i, mask=s < end, other=0.0)
        row = (s * (a.planes16 // 16) + plane).to(tl.int64) * sizes.N + i
        p_part = p_parts + row[:, None] * T.DV + o_d
        b_o = tl.load(p_part, mask=(s < end)[:, None] & (o_d < T.DV), other=0.0)  # [BS, DVP]
        b_max = tl.maximum(b_m, tl.max(b_part_m, 0))
        b_weight = exponentiate(b_part_m - bound_maximum(b_max), a)
        b_decay = exponentiate(b_m - bound_maximum(b_max), a)
        b_acc = b_acc * b_decay + tl.sum(b_weight[:, None] * b_o, 0)
        b_l = b_l * b_decay + tl.sum(b_weight * b_part_l, 0)
        b_m = b_max
    return b_acc * invert(b_l), b_m, b_l
