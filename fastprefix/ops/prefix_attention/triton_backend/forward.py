"""Run the forward pass. A program processes a block of queries of one head, first against the prefix, then the tokens.

With two softmaxes, the tokens come first, and their output is divided by their sum. A pass over the prefix scores then
finds the prefix's sum, and a second pass adds the normalized prefix output to the same accumulator.
"""

import triton
import triton.language as tl

from .operands import Lengths, Pairs, Queries, Sums
from .primitives import (
    add_product,
    add_sink,
    bound_maximum,
    cap_scores,
    convert_natural,
    draw_kept,
    exponentiate,
    find_keys,
    find_lengths,
    find_numbers,
    find_row,
    finish_prefix_scores,
    finish_token_scores,
    invert,
    load_block,
    load_output_gate,
    load_prefix,
    load_prefix_gate,
    make_no_gate,
    start_sums,
    step_softmax,
    store_block,
    store_normalizers,
)


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_fwd_kernel(a, o, p_normalizers, N, M, P, T: tl.constexpr):
    """Compute the output and the normalizers of a block of BM queries of one head."""
    blocks = tl.cdiv(N, T.BM)
    plane = tl.program_id(0) // blocks
    i0 = (blocks - 1 - tl.program_id(0) % blocks) * T.BM  # start causal blocks with the most keys first
    b, h = plane // a.heads, plane % a.heads
    sizes = find_lengths(a, b, N, M, P)
    i = i0 + tl.arange(0, T.BM)
    # [BM, DP]
    b_q = load_block(a.q, b, h, i0, N, T.BM, T.D, T.DP)
    queries = Queries(b_q, b, h, i[:, None], b, h // a.group)
    sums = start_sums(T.BM, T.DVP)
    if a.og.pointer is None:
        sums = attend_prefix(sums, queries, 0, sizes.P, a, sizes, T)
    sums = attend_band(sums, queries, i0, tl.minimum(i0 + T.BM, N), 0, M, a, sizes, T)
    sums = add_sink(sums, a, h)
    store_normalizers(p_normalizers, 0, plane, i, i < N, sums.m, sums.l, a, sizes)
    # [BM, DVP]
    b_o = sums.acc * invert(sums.l)[:, None]
    if a.og.pointer is not None:
        # [BM]
        b_m, b_l = sum_prefix(queries, a, sizes, T)
        store_normalizers(p_normalizers, 1, plane, i, i < N, b_m, b_l, a, sizes)
        # [BM, DVP]
        b_o = add_prefix(b_o, queries, b_m, b_l, a, sizes, T)
    store_block(o, b, h, i0, N, b_o, T.DV)


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_extend_kernel(a, o_tokens, p_logsumexp, o, p_normalizers, N, M, P, T: tl.constexpr):
    """Add the prefix to attention over the tokens, which is given by its output and natural log-sum-exp [B, Hq, N].

    The online softmax starts from the tokens' output, with the log-sum-exp as maximum and 1 as sum.
    """
    blocks = tl.cdiv(N, T.BM)
    plane = tl.program_id(0) // blocks
    i0 = tl.program_id(0) % blocks * T.BM
    b, h = plane // a.heads, plane % a.heads
    sizes = find_lengths(a, b, N, M, P)
    i = i0 + tl.arange(0, T.BM)
    # [BM, DP]
    b_q = load_block(a.q, b, h, i0, N, T.BM, T.D, T.DP)
    queries = Queries(b_q, b, h, i[:, None], b, h // a.group)
    # [BM, DVP]
    b_o = load_block(o_tokens, b, h, i0, N, T.BM, T.DV, T.DVP).to(tl.float32)
    # [BM]
    b_m = tl.load(find_numbers(p_logsumexp, 0, plane, a, sizes) + i, mask=i < N, other=0.0)
    sums = Sums(b_o, convert_natural(b_m, a), tl.full([T.BM], 1.0, tl.float32))
    sums = attend_prefix(sums, queries, 0, sizes.P, a, sizes, T)
    store_normalizers(p_normalizers, 0, plane, i, i < N, sums.m, sums.l, a, sizes)
    store_block(o, b, h, i0, N, sums.acc * invert(sums.l)[:, None], T.DV)


@triton.jit(do_not_specialize=["N"])
def prefix_attention_merge_kernel(a, o_tokens, tokens, o_prefix, prefix, o, p_normalizers, N, T: tl.constexpr):
    """Merge attention over the tokens and over the prefix, given by their outputs and natural log-sum-exps.

    Subtracting the larger log-sum-exp keeps the weights of both outputs finite.
    """
    blocks = tl.cdiv(N, T.BM)
    plane = tl.program_id(0) // blocks
    i0 = tl.program_id(0) % blocks * T.BM
    b, h = plane // a.heads, plane % a.heads
    i = i0 + tl.arange(0, T.BM)
    # [BM]
    b_tokens = tl.load(find_row(tokens, b, h, i), mask=i < N, other=0.0)
    b_prefix = tl.load(find_row(prefix, b, h, i), mask=i < N, other=0.0)
    b_m = tl.maximum(b_tokens, b_prefix)
    b_tokens, b_prefix = tl.exp(b_tokens - b_m), tl.exp(b_prefix - b_m)
    b_l = b_tokens + b_prefix
    # [BM, DVP]
    b_o = load_block(o_tokens, b, h, i0, N, T.BM, T.DV, T.DVP).to(tl.float32) * b_tokens[:, None]
    b_o += load_block(o_prefix, b, h, i0, N, T.BM, T.DV, T.DVP).to(tl.float32) * b_prefix[:, None]
    sizes = Lengths(N, N, N, 0)  # only N is read
    store_normalizers(p_normalizers, 0, plane, i, i < N, convert_natural(b_m, a), b_l, a, sizes)
    store_block(o, b, h, i0, N, b_o * invert(b_l)[:, None], T.DV)


@triton.jit
def score_prefix(queries, p0, a, sizes, T: tl.constexpr, INSIDE: tl.constexpr = False):
    """Compute the scores [BM, BP] of prefix keys p0, p0 + 1, ..., and the factors of their probabilities.

    Return the scores divided by a positive number, this number, and the factors (gate times dropout factor), which
    broadcast to [BM, BP]. INSIDE: all of the keys exist.
    """
    at = Pairs(queries.b, queries.h, queries.i, p0 + tl.arange(0, T.BP)[None, :])
    # [BP, DP]
    b_pk = load_prefix(a.pk, queries.key_b, queries.key_h, p0, sizes, T.BP, T.D, T.DP, INSIDE)
    # [BM, BP] or a shape that broadcasts to it
    b_gate = load_prefix_gate(at, a, sizes)
    # [BM, BP]
    b_s = tl.dot(queries.q, tl.trans(b_pk), input_precision=T.PRECISION)
    factor = 1.0
    if a.linear_prefix is None:
        b_s = cap_scores(b_s, b_gate, a)
    else:  # ``step_softmax`` multiplies by the scale when it computes the exponent
        factor = convert_natural(a.scale, a)
    return finish_prefix_scores(b_s, at, a, sizes, INSIDE), factor, b_gate * draw_kept(at, a, False)


@triton.jit
def attend_prefix(sums, queries, start, end, a, sizes, T: tl.constexpr):
    """Add prefix keys [start, end) to the softmax.

    Whole blocks run in a separate loop without masks. With gates, biases or float32, it would spill registers.
    """
    if a.linear_prefix is not None:
        whole = start + tl.maximum(end - start, 0) // T.BP * T.BP
        sums = attend_prefix_blocks(sums, queries, start, whole, a, sizes, T, True)
        return attend_prefix_blocks(sums, queries, whole, end, a, sizes, T, False)
    else:
        return attend_prefix_blocks(sums, queries, start, end, a, sizes, T, False)


@triton.jit
def attend_prefix_blocks(sums, queries, start, end, a, sizes, T: tl.constexpr, INSIDE: tl.constexpr):
    """Add prefix keys [start, end) to the softmax. INSIDE: they consist of whole blocks."""
    for p0 in tl.range(start, end, T.BP):
        # [BM, BP]
        b_s, factor, b_weight = score_prefix(queries, p0, a, sizes, T, INSIDE)
        # [BM, BP], [BM], [BM], [BM]
        b_p, b_decay, b_m, b_l = step_softmax(b_s, factor, sums.m, sums.l, a)
        # [BP, DVP]
        b_pv = load_prefix(a.pv, queries.key_b, queries.key_h, p0, sizes, T.BP, T.DV, T.DVP, INSIDE)
        # [BM, DVP]
        b_acc = sums.acc * b_decay[:, None]
        b_acc = add_product((b_p * b_weight).to(b_pv.dtype), b_pv, b_acc, T)
        sums = Sums(b_acc, b_m, b_l)
    return sums


@triton.jit
def sum_prefix(queries, a, sizes, T: tl.constexpr):
    """Compute the maximum and sum [BM] of the softmax over the prefix scores alone."""
    b_m = tl.full([queries.q.shape[0]], float("-inf"), tl.float32)
    b_l = tl.zeros([queries.q.shape[0]], tl.float32)
    for p0 in tl.range(0, sizes.P, T.BP):
        # [BM, BP]
        b_s, factor, _ = score_prefix(queries, p0, a, sizes, T)
        _, _, b_m, b_l = step_softmax(b_s, factor, b_m, b_l, a)
    return b_m, b_l


@triton.jit
def add_prefix(b_o, queries, b_m, b_l, a, sizes, T: tl.constexpr):
    """Add the output of the prefix's separate softmax, times the output gate, to ``b_o`` [BM, DVP]."""
    # [BM, 1]
    b_weight = load_output_gate(a, queries.b, queries.h) * invert(b_l)[:, None]
    for p0 in tl.range(0, sizes.P, T.BP):
        # [BM, BP]
        b_s, factor, b_factor = score_prefix(queries, p0, a, sizes, T)
        b_p = b_weight * exponentiate(b_s * factor - bound_maximum(b_m)[:, None], a) * b_factor
        # [BP, DVP]
        b_pv = load_prefix(a.pv, queries.key_b, queries.key_h, p0, sizes, T.BP, T.DV, T.DVP)
        b_o = add_product(b_p.to(b_pv.dtype), b_pv, b_o, T)
    return b_o


@triton.jit
def attend_band(sums, queries, i0, i1, start, end, a, sizes, T: tl.constexpr):
    """Add the token keys in [start, end) that queries [i0, i1) see to the softmax.

    Blocks that no query sees are skipped. Blocks that all queries see need no comparisons of positions.
    """
    lo, inner_lo, inner_hi, hi = find_keys(a, i0, i1, sizes, T.BN)
    lo, hi = tl.maximum(lo, start), tl.minimum(hi, end)
    inner_lo, inner_hi = tl.maximum(inner_lo, lo), tl.minimum(inner_hi, end)
    if a.far is not None:
        sums = attend_tokens(sums, queries, lo, tl.minimum(inner_lo, hi), a, sizes, T, False)
    sums = attend_tokens(sums, queries, inner_lo, inner_hi, a, sizes, T, True)
    return attend_tokens(sums, queries, tl.maximum(inner_lo, inner_hi), hi, a, sizes, T, False)


@triton.jit
def attend_tokens(sums, queries, start, end, a, sizes, T: tl.constexpr, INSIDE: tl.constexpr):
    """Add token keys [start, end) to the softmax. INSIDE: all keys exist, and all queries see them."""
    for j0 in tl.range(start, end, T.BN):
        at = Pairs(queries.b, queries.h, queries.i, j0 + tl.arange(0, T.BN)[None, :])
        # [BN, DP]
        b_k = load_block(a.k, queries.key_b, queries.key_h, j0, sizes.M, T.BN, T.D, T.DP, INSIDE)
        # [BM, BN]
        b_s = tl.dot(queries.q, tl.trans(b_k), input_precision=T.PRECISION)
        factor = 1.0
        if a.linear is None:
            b_s = cap_scores(b_s, make_no_gate(), a)
        else:  # ``step_softmax`` multiplies by the scale when it computes the exponent
            factor = convert_natural(a.scale, a)
        b_s = finish_token_scores(b_s, at, a, sizes, INSIDE)
        # [BM, BN], [BM], [BM], [BM]
        b_p, b_decay, b_m, b_l = step_softmax(b_s, factor, sums.m, sums.l, a)
        b_p = b_p * draw_kept(at, a, True)
        # [BN, DVP]
        b_v = load_block(a.v, queries.key_b, queries.key_h, j0, sizes.M, T.BN, T.DV, T.DVP, INSIDE)
        # [BM, DVP]
        b_acc = sums.acc * b_decay[:, None]
        b_acc = add_product(b_p.to(b_v.dtype), b_v, b_acc, T)
        sums = Sums(b_acc, b_m, b_l)
    return sums
