"""The forward pass: one program for a block of queries of one head, prefix blocks first, then token blocks.

With two softmaxes the tokens come first: their sum is divided out, and the prefix, whose sum a pass over its scores has
found, is then added to the same accumulator.
"""

import triton
import triton.language as tl

from .common import (
    add_sink,
    capped_scores,
    inverse,
    kept,
    keys_of_queries,
    load_rows,
    output_gate,
    power,
    prefix_gate,
    prefix_scores,
    softmax_step,
    store_normalizers,
    store_rows,
    token_scores,
)


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_fwd_kernel(
    a,
    o,
    p_normalizers,
    N,
    M,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(N, BM)
    plane = tl.program_id(0) // blocks
    i0 = (blocks - 1 - tl.program_id(0) % blocks) * BM  # the longest rows of a causal problem first
    i1 = tl.minimum(i0 + BM, N)
    b, h = plane // a.heads, plane % a.heads
    i = i0 + tl.arange(0, BM)  # [BM]
    b_q = load_rows(a.q, b, h, i, i < N, D, DP)  # [BM, DP]
    b_acc = tl.zeros([BM, DVP], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    if a.og.p is None:
        b_acc, b_m, b_l = attend_prefix(
            b_acc, b_m, b_l, b_q, a, b, h, i[:, None], b, h // a.group, 0, P, N, P, D, DV, BP, PRECISION
        )
    b_acc, b_m, b_l = attend_band(
        b_acc, b_m, b_l, b_q, a, b, h, i0, i1, i[:, None], b, h // a.group, 0, M, N, M, P, D, DV, BN, PRECISION
    )
    b_acc, b_m, b_l = add_sink(b_acc, b_m, b_l, a, h)
    b_acc = b_acc * inverse(b_l)[:, None]
    store_normalizers(p_normalizers, 0, plane, i, i < N, b_m, b_l, a, N)
    if a.og.p is not None:
        b_m, b_l = prefix_sums(b_q, a, b, h, i[:, None], b, h // a.group, N, P, D, BP, PRECISION)
        b_acc = add_prefix(b_acc, b_m, b_l, b_q, a, b, h, i[:, None], N, P, D, DV, BP, PRECISION)
        store_normalizers(p_normalizers, 1, plane, i, i < N, b_m, b_l, a, N)
    store_rows(o, b, h, i, i < N, b_acc, DV)


@triton.jit
def gated_scores(b_q, a, b, h, i, bk, hk, p0, N, P, D: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [BM, BP] of prefix keys p0, p0 + 1, ..."""
    p = p0 + tl.arange(0, BP)
    b_pk = load_rows(a.pk, bk, hk, p, p < P, D, b_q.shape[1])
    b_s = tl.dot(b_q, tl.trans(b_pk), input_precision=PRECISION)
    b_s = capped_scores(b_s * prefix_gate(a, b, h, i, p[None, :], N, P), a)
    return prefix_scores(b_s, a, b, h, i, p[None, :], N, P)


@triton.jit
def attend_prefix(
    b_acc,
    b_m,
    b_l,
    b_q,
    a,
    b,
    h,
    i,
    bk,
    hk,
    start,
    end,
    N,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Prefix keys [start, end) of row ``bk`` and head ``hk`` join the softmax. Coordinates of queries are [BM, 1]."""
    for p0 in tl.range(start, end, BP):
        p = p0 + tl.arange(0, BP)
        b_s = gated_scores(b_q, a, b, h, i, bk, hk, p0, N, P, D, BP, PRECISION)
        b_p, b_decay, b_m, b_l = softmax_step(b_s, b_m, b_l, a)
        b_p = b_p * prefix_gate(a, b, h, i, p[None, :], N, P) * kept(b_p, a, b, h, i, p[None, :])
        b_pv = load_rows(a.pv, bk, hk, p, p < P, DV, b_acc.shape[1])
        b_acc = b_acc * b_decay[:, None]
        b_acc = tl.dot(b_p.to(b_pv.dtype), b_pv, b_acc, input_precision=PRECISION)
    return b_acc, b_m, b_l


@triton.jit
def prefix_sums(b_q, a, b, h, i, bk, hk, N, P, D: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr):
    """Maximum and sum [BM] of the prefix scores alone."""
    b_m = tl.full([b_q.shape[0]], float("-inf"), tl.float32)
    b_l = tl.zeros([b_q.shape[0]], tl.float32)
    for p0 in tl.range(0, P, BP):
        b_s = gated_scores(b_q, a, b, h, i, bk, hk, p0, N, P, D, BP, PRECISION)
        _, _, b_m, b_l = softmax_step(b_s, b_m, b_l, a)
    return b_m, b_l


@triton.jit
def add_prefix(
    b_acc,
    b_m,
    b_l,
    b_q,
    a,
    b,
    h,
    i,
    N,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the output of the prefix's own softmax, times the output gate."""
    b_ref = tl.where(b_l == 0.0, 0.0, b_m)
    b_weight = output_gate(a, b, h) * inverse(b_l)[:, None]
    for p0 in tl.range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        b_s = gated_scores(b_q, a, b, h, i, b, h // a.group, p0, N, P, D, BP, PRECISION)
        b_p = b_weight * power(b_s - b_ref[:, None], a)
        b_p = b_p * prefix_gate(a, b, h, i, p[None, :], N, P) * kept(b_p, a, b, h, i, p[None, :])
        b_pv = load_rows(a.pv, b, h // a.group, p, p < P, DV, b_acc.shape[1])
        b_acc = tl.dot(b_p.to(b_pv.dtype), b_pv, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def attend_band(
    b_acc,
    b_m,
    b_l,
    b_q,
    a,
    b,
    h,
    i0,
    i1,
    i,
    bk,
    hk,
    start,
    end,
    N,
    M,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Those of the token keys [start, end) that queries [i0, i1) see join the softmax; a block that none sees is
    skipped, and one that all see needs no comparisons.
    """
    lo, inner_lo, inner_hi, hi = keys_of_queries(a, i0, i1, N, M, BN)
    lo, hi = tl.maximum(lo, start), tl.minimum(hi, end)
    inner_lo, inner_hi = tl.maximum(inner_lo, lo), tl.minimum(inner_hi, end)
    if a.far is not None:
        b_acc, b_m, b_l = attend_tokens(
            b_acc, b_m, b_l, b_q, a, b, h, i, bk, hk, lo, tl.minimum(inner_lo, hi), N, M, P, D, DV, BN, False, PRECISION
        )
    b_acc, b_m, b_l = attend_tokens(
        b_acc, b_m, b_l, b_q, a, b, h, i, bk, hk, inner_lo, inner_hi, N, M, P, D, DV, BN, True, PRECISION
    )
    last = tl.maximum(inner_lo, inner_hi)
    return attend_tokens(b_acc, b_m, b_l, b_q, a, b, h, i, bk, hk, last, hi, N, M, P, D, DV, BN, False, PRECISION)


@triton.jit
def attend_tokens(
    b_acc,
    b_m,
    b_l,
    b_q,
    a,
    b,
    h,
    i,
    bk,
    hk,
    start,
    end,
    N,
    M,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    INSIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Token keys [start, end) join the softmax. INSIDE: all of them are there, and all queries see them."""
    for j0 in tl.range(start, end, BN):
        j = j0 + tl.arange(0, BN)
        b_k = load_rows(a.k, bk, hk, j, j < M, D, b_q.shape[1])
        b_s = capped_scores(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), a)
        b_s = token_scores(b_s, a, b, h, i, j[None, :], N, M, INSIDE)
        b_p, b_decay, b_m, b_l = softmax_step(b_s, b_m, b_l, a)
        b_p = b_p * kept(b_p, a, b, h, i, P + j[None, :])
        b_v = load_rows(a.v, bk, hk, j, j < M, DV, b_acc.shape[1])
        b_acc = b_acc * b_decay[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_m, b_l
