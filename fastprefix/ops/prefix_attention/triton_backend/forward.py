"""The forward pass: one program for a block of queries of one head, prefix blocks first, then token blocks.

With two softmaxes the tokens come first: their sum is divided out, and the prefix, whose sum a pass over its scores has
found, is then added to the same accumulator.
"""

import triton
import triton.language as tl

from .band import keys_of_queries
from .kinds import Lengths, Pairs, Queries, Sums
from .memory import load_block, store_block
from .scores import capped_scores, from_natural, kept, no_gate, output_gate, prefix_gate, prefix_scores, token_scores
from .softmax import add_sink, finite, inverse, nothing_yet, power, softmax_step, store_normalizers


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_fwd_kernel(a, o, p_normalizers, N, M, P, T: tl.constexpr):
    n = Lengths(N, M, P)
    blocks = tl.cdiv(N, T.BM)
    plane = tl.program_id(0) // blocks
    i0 = (blocks - 1 - tl.program_id(0) % blocks) * T.BM  # the longest rows of a causal problem first
    b, h = plane // a.heads, plane % a.heads
    i = i0 + tl.arange(0, T.BM)
    b_q = load_block(a.q, b, h, i0, N, T.BM, T.D, T.DP)
    x = Queries(b_q, b, h, i[:, None], b, h // a.group)
    sums = nothing_yet(T.BM, T.DVP)
    if a.og.p is None:
        sums = attend_prefix(sums, x, 0, P, a, n, T)
    sums = attend_band(sums, x, i0, tl.minimum(i0 + T.BM, N), 0, M, a, n, T)
    sums = add_sink(sums, a, h)
    store_normalizers(p_normalizers, 0, plane, i, i < N, sums.m, sums.l, a, n)
    b_o = sums.acc * inverse(sums.l)[:, None]
    if a.og.p is not None:
        b_m, b_l = prefix_sums(x, a, n, T)
        store_normalizers(p_normalizers, 1, plane, i, i < N, b_m, b_l, a, n)
        b_o = add_prefix(b_o, x, b_m, b_l, a, n, T)
    store_block(o, b, h, i0, N, b_o, T.DV)


@triton.jit
def gated_scores(x, p0, a, n, T: tl.constexpr):
    """Scores [BM, BP] of prefix keys p0, p0 + 1, ..., and what their probabilities are multiplied by."""
    at = Pairs(x.b, x.h, x.i, p0 + tl.arange(0, T.BP)[None, :])
    b_pk = load_block(a.pk, x.key_b, x.key_h, p0, n.P, T.BP, T.D, T.DP)
    b_gate = prefix_gate(at, a, n)
    b_s = capped_scores(tl.dot(x.q, tl.trans(b_pk), input_precision=T.PRECISION), b_gate, a)
    return prefix_scores(b_s, at, a, n), b_gate * kept(at, a, False)


@triton.jit
def attend_prefix(sums, x, start, end, a, n, T: tl.constexpr):
    """Prefix keys [start, end) join the softmax."""
    for p0 in tl.range(start, end, T.BP):
        b_s, b_factor = gated_scores(x, p0, a, n, T)
        b_p, b_decay, b_m, b_l = softmax_step(b_s, 1.0, sums.m, sums.l, a)
        b_pv = load_block(a.pv, x.key_b, x.key_h, p0, n.P, T.BP, T.DV, T.DVP)
        b_acc = sums.acc * b_decay[:, None]
        b_acc = tl.dot((b_p * b_factor).to(b_pv.dtype), b_pv, b_acc, input_precision=T.PRECISION)
        sums = Sums(b_acc, b_m, b_l)
    return sums


@triton.jit
def prefix_sums(x, a, n, T: tl.constexpr):
    """Maximum and sum [BM] of the prefix scores alone."""
    b_m = tl.full([x.q.shape[0]], float("-inf"), tl.float32)
    b_l = tl.zeros([x.q.shape[0]], tl.float32)
    for p0 in tl.range(0, n.P, T.BP):
        b_s, _ = gated_scores(x, p0, a, n, T)
        _, _, b_m, b_l = softmax_step(b_s, 1.0, b_m, b_l, a)
    return b_m, b_l


@triton.jit
def add_prefix(b_o, x, b_m, b_l, a, n, T: tl.constexpr):
    """Add the output of the prefix's own softmax, times the output gate."""
    b_weight = output_gate(a, x.b, x.h) * inverse(b_l)[:, None]
    for p0 in tl.range(0, n.P, T.BP):
        b_s, b_factor = gated_scores(x, p0, a, n, T)
        b_p = b_weight * power(b_s - finite(b_m)[:, None], a) * b_factor
        b_pv = load_block(a.pv, x.key_b, x.key_h, p0, n.P, T.BP, T.DV, T.DVP)
        b_o = tl.dot(b_p.to(b_pv.dtype), b_pv, b_o, input_precision=T.PRECISION)
    return b_o


@triton.jit
def attend_band(sums, x, i0, i1, start, end, a, n, T: tl.constexpr):
    """Those of the token keys [start, end) that queries [i0, i1) see join the softmax; a block that none sees is
    skipped, and one that all see needs no comparisons.
    """
    lo, inner_lo, inner_hi, hi = keys_of_queries(a, i0, i1, n, T.BN)
    lo, hi = tl.maximum(lo, start), tl.minimum(hi, end)
    inner_lo, inner_hi = tl.maximum(inner_lo, lo), tl.minimum(inner_hi, end)
    if a.far is not None:
        sums = attend_tokens(sums, x, lo, tl.minimum(inner_lo, hi), a, n, T, False)
    sums = attend_tokens(sums, x, inner_lo, inner_hi, a, n, T, True)
    return attend_tokens(sums, x, tl.maximum(inner_lo, inner_hi), hi, a, n, T, False)


@triton.jit
def attend_tokens(sums, x, start, end, a, n, T: tl.constexpr, INSIDE: tl.constexpr):
    """Token keys [start, end) join the softmax. INSIDE: all of them are there, and all queries see them."""
    for j0 in tl.range(start, end, T.BN):
        at = Pairs(x.b, x.h, x.i, j0 + tl.arange(0, T.BN)[None, :])
        b_k = load_block(a.k, x.key_b, x.key_h, j0, n.M, T.BN, T.D, T.DP, INSIDE)
        b_s = tl.dot(x.q, tl.trans(b_k), input_precision=T.PRECISION)
        factor = 1.0
        if a.linear is None:
            b_s = capped_scores(b_s, no_gate(), a)
        else:  # the scale goes into the exponent's own product
            factor = from_natural(a.scale, a)
        b_s = token_scores(b_s, at, a, n, INSIDE)
        b_p, b_decay, b_m, b_l = softmax_step(b_s, factor, sums.m, sums.l, a)
        b_p = b_p * kept(at, a, True)
        b_v = load_block(a.v, x.key_b, x.key_h, j0, n.M, T.BN, T.DV, T.DVP, INSIDE)
        b_acc = sums.acc * b_decay[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=T.PRECISION)
        sums = Sums(b_acc, b_m, b_l)
    return sums
