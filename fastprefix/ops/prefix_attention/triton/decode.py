"""Decoding: few queries against many keys. Keys are split over programs, and a second kernel joins the parts.

The queries of all heads of a group (and, where the prefix is shared, of all rows of the batch) are rows of one tile,
so that keys are read once for all of them. Prefix and tokens are parts like any other; they are made in one launch.
"""

import triton
import triton.language as tl

from .common import (
    from_natural,
    inverse,
    load_entry,
    load_rows,
    power,
    row_address,
    row_of,
    store_normalizers,
)
from .forward import attend_band, attend_prefix


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
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the keys for a tile of queries: weighted sums of values [part, b, h, i, DV], maxima and sums."""
    kv_heads = a.heads // a.group
    pid = tl.program_id(0)
    if pid < prefix_programs:
        rows = a.group * N
        if a.pk.b is None:
            rows *= a.planes16 // 16 // a.heads
        part, tile, hk, b0 = locate(pid, prefix_parts, tl.cdiv(rows, BM), kv_heads)
        r, b, h, i = queries(tile, rows, b0, hk, N, a, BM)
        b_q = load_rows(a.q, b, h, i, r < rows, D, DP)
        b_acc, b_m, b_l = nothing_yet(BM, DVP)
        start = part * prefix_chunk
        b_acc, b_m, b_l = attend_prefix(
            b_acc, b_m, b_l, b_q, a, b[:, None], h[:, None], i[:, None], b0, hk,
            start, tl.minimum(start + prefix_chunk, P), N, P, D, DV, BP, PRECISION,
        )  # fmt: skip
        store_part(p_parts, p_sums, part, b_acc, b_m, b_l, r < rows, b, h, i, a, N, DV)
    else:
        rows = a.group * N
        part, tile, hk, b0 = locate(pid - prefix_programs, token_parts, tl.cdiv(rows, BM), kv_heads)
        r, b, h, i = queries(tile, rows, b0, hk, N, a, BM)
        b_q = load_rows(a.q, b, h, i, r < rows, D, DP)
        b_acc, b_m, b_l = nothing_yet(BM, DVP)
        start = part * chunk
        b_acc, b_m, b_l = attend_band(
            b_acc, b_m, b_l, b_q, a, b0, h[:, None], 0, N, i[:, None], b0, hk,
            start, tl.minimum(start + chunk, M), N, M, P, D, DV, BN, PRECISION,
        )  # fmt: skip
        store_part(p_parts, p_sums, prefix_parts + part, b_acc, b_m, b_l, r < rows, b, h, i, a, N, DV)


@triton.jit
def locate(pid, parts, tiles, kv_heads):
    """Part of the keys, tile of queries, key/value head and row of the batch of a program."""
    return pid % parts, pid // parts % tiles, pid // parts // tiles % kv_heads, pid // parts // tiles // kv_heads


@triton.jit
def queries(tile, rows, b0, hk, N, a, BM: tl.constexpr):
    """Coordinates of a tile of the queries that share keys: all those of a group, from row ``b0`` of the batch on."""
    r = tile * BM + tl.arange(0, BM)
    o_r = tl.minimum(r, rows - 1)
    return r, b0 + o_r // N // a.group, hk * a.group + o_r // N % a.group, o_r % N


@triton.jit
def nothing_yet(BM: tl.constexpr, DVP: tl.constexpr):
    return tl.zeros([BM, DVP], tl.float32), tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)


@triton.jit
def store_part(p_parts, p_sums, part, b_acc, b_m, b_l, there, b, h, i, a, N, DV: tl.constexpr):
    o_d = tl.arange(0, b_acc.shape[1])
    plane = b * a.heads + h
    store_normalizers(p_sums, part, plane, i, there, b_m, b_l, a, N)
    p_rows = p_parts + row_of(part, plane, i, a, N)[:, None] * DV + o_d[None, :]
    tl.store(p_rows, b_acc, mask=there[:, None] & (o_d < DV)[None, :])


@triton.jit(do_not_specialize=["N", "prefix_parts", "parts"])
def prefix_attention_combine_kernel(
    a,
    o,
    p_normalizers,
    p_parts,
    p_sums,
    N,
    prefix_parts,
    parts,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BS: tl.constexpr,
):
    """Join the parts of one query, in a fixed order: one softmax over all, or one over the prefix's and one over the
    tokens', and the sinks.
    """
    plane = tl.program_id(0) // N
    i = tl.program_id(0) % N
    b, h = plane // a.heads, plane % a.heads
    o_d = tl.arange(0, DVP)
    i_one = i + tl.arange(0, 1)
    there = i_one < N
    if a.og.p is None:
        b_o, b_m, b_l = join(p_parts, p_sums, plane, i_one, 0, parts, True, a, h, N, DV, DVP, BS)
    else:
        b_o, b_m, b_l = join(p_parts, p_sums, plane, i_one, 0, prefix_parts, False, a, h, N, DV, DVP, BS)
        b_prefix = b_o * load_entry(a.og, b, h, i, i).to(tl.float32)
        store_normalizers(p_normalizers, 1, plane, i_one, there, b_m, b_l, a, N)
        b_o, b_m, b_l = join(p_parts, p_sums, plane, i_one, prefix_parts, parts, True, a, h, N, DV, DVP, BS)
        b_o += b_prefix
    store_normalizers(p_normalizers, 0, plane, i_one, there, b_m, b_l, a, N)
    tl.store(row_address(o, b, h, i) + o_d.to(tl.int64) * o.c, b_o.to(o.p.dtype.element_ty), mask=o_d < DV)


@triton.jit
def join(
    p_parts,
    p_sums,
    plane,
    i,
    start,
    end,
    TOKENS: tl.constexpr,
    a,
    h,
    N,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BS: tl.constexpr,
):
    """Output [DVP], maximum and sum [1] of parts [start, end); the sink belongs to the tokens' softmax."""
    o_d = tl.arange(0, DVP)
    b_acc = tl.zeros([DVP], tl.float32)
    b_m = tl.full([1], float("-inf"), tl.float32)
    if TOKENS and a.sinks.p is not None:
        b_m = tl.full([1], 0.0, tl.float32) + from_natural(load_entry(a.sinks, h, h, h, h).to(tl.float32), a)
    b_l = tl.where(b_m == float("-inf"), 0.0, 1.0)
    for s0 in tl.range(start, end, BS):
        s = s0 + tl.arange(0, BS)
        b_part_m = tl.load(p_sums + row_of(2 * s, plane, i, a, N), mask=s < end, other=float("-inf"))  # [BS]
        b_part_l = tl.load(p_sums + row_of(2 * s + 1, plane, i, a, N), mask=s < end, other=0.0)
        p_rows = p_parts + row_of(s, plane, i, a, N)[:, None] * DV + o_d[None, :]
        b_o = tl.load(p_rows, mask=(s < end)[:, None] & (o_d < DV)[None, :], other=0.0)  # [BS, DVP]
        b_max = tl.maximum(b_m, tl.max(b_part_m, 0))
        b_ref = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_weight, b_decay = power(b_part_m - b_ref, a), power(b_m - b_ref, a)
        b_acc = b_acc * b_decay + tl.sum(b_weight[:, None] * b_o, 0)
        b_l = b_l * b_decay + tl.sum(b_weight * b_part_l, 0)
        b_m = b_max
    return b_acc * inverse(b_l), b_m, b_l
