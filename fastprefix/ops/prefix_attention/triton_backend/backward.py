"""Run the backward pass: a delta kernel, then kernels for queries and gates, for keys and values, and for the prefix.

Names follow the formulas: ``ds`` is the gradient of a score, ``dov`` is <do, v>, and ``delta`` is the term that the
softmax subtracts from it. The kernels use no atomic additions. Sums over programs are stored in parts, and
``prefix_attention_sum_kernel`` adds them in order.
"""

import triton
import triton.language as tl

from .operands import Keys, KeySums, Lengths, Pairs, Queries
from .primitives import (
    PADDING,
    ROWS,
    add_product,
    cap_scores,
    compute_probability,
    differentiate_cap,
    draw_kept,
    find_keys,
    find_lengths,
    find_queries,
    find_row,
    finish_prefix_scores,
    finish_token_scores,
    invert,
    load_block,
    load_normalizers,
    load_output_gate,
    load_prefix,
    load_prefix_gate,
    load_rows,
    load_sink,
    load_span,
    make_no_gate,
    make_zeros,
    store_block,
    store_rows,
)


@triton.jit
def compute_token_probabilities(b_qk, at, b_reference, b_inverse, a, sizes, INSIDE: tl.constexpr):
    """Compute the probabilities of tokens from <q, k>, in the shape of ``b_qk``."""
    b_s = finish_token_scores(cap_scores(b_qk, make_no_gate(), a), at, a, sizes, INSIDE)
    return compute_probability(b_s, b_reference, b_inverse, a)


@triton.jit
def compute_prefix_probabilities(b_qk, b_gate, at, b_reference, b_inverse, a, sizes):
    """Compute the probabilities of prefix keys from <q, pk>, in the shape of ``b_qk``."""
    b_s = finish_prefix_scores(cap_scores(b_qk, b_gate, a), at, a, sizes)
    return compute_probability(b_s, b_reference, b_inverse, a)


@triton.jit
def differentiate_token_scores(b_qk, b_dov, at, rows, a, sizes, INSIDE: tl.constexpr):
    """Compute the gradient of c <q, k> and the probability after dropout from <q, k> and <do, v>.

    Both have the shape of ``b_qk``.
    """
    b_p = compute_token_probabilities(b_qk, at, rows.reference, rows.inverse, a, sizes, INSIDE)
    b_keep = draw_kept(at, a, True)
    return differentiate_cap(b_p * (b_keep * b_dov - rows.delta), b_qk, make_no_gate(), a), b_p * b_keep


@triton.jit
def differentiate_prefix_scores(b_qk, b_dov, b_gate, at, rows, a, sizes):
    """Compute gradients of the prefix's scores from <q, pk> and <do, pv>.

    Return the gradient of the scores after the soft cap, the gradient of c g <q, pk> before it, and the probability
    after dropout, times the output gate. All have the shape of ``b_qk``.
    """
    b_p = compute_prefix_probabilities(b_qk, b_gate, at, rows.reference, rows.inverse, a, sizes)
    b_p = load_output_gate(a, at.b, at.h) * b_p
    b_keep = draw_kept(at, a, False)
    b_ds = b_p * (b_keep * b_gate * b_dov - rows.delta)
    return b_ds, differentiate_cap(b_ds, b_qk, b_gate, a), b_p * b_keep


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_bwd_delta_kernel(
    a,
    o,
    do,
    p_normalizers,
    p_rows,
    p_dog,
    p_dsinks,
    N,
    M,
    P,
    TOKENS: tl.constexpr,
    PREFIX: tl.constexpr,
    T: tl.constexpr,
):
    """Compute delta = <do, o> and the gradient of the sinks, and store the normalizers that the other kernels load.

    The grid also has programs for the queries that pad the last block. TOKENS and PREFIX specify whether the gradients
    of the scores of tokens and prefix are needed. With two softmaxes, each has its own delta, computed from its
    probabilities, because the output is the sum of both and its rounding would hide the smaller one. The kernel then
    also computes the gradient of the output gate.
    """
    blocks = tl.cdiv(N, PADDING) * (PADDING // T.BM)
    plane = tl.program_id(0) // blocks
    b, h = plane // a.heads, plane % a.heads
    sizes = find_lengths(a, b, N, M, P)
    i0 = tl.program_id(0) % blocks * T.BM
    i = i0 + tl.arange(0, T.BM)
    # [BM, DVP]
    b_do = load_block(do, b, h, i0, N, T.BM, T.DV, T.DVP)
    # [BM]
    b_reference, b_inverse = load_normalizers(p_normalizers, 0, plane, i, a, sizes)
    b_delta = tl.zeros([i.shape[0]], tl.float32)
    if a.og.pointer is None:
        if TOKENS or PREFIX:
            # [BM, DVP]
            b_o = load_block(o, b, h, i0, N, T.BM, T.DV, T.DVP)
            # [BM]
            b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    else:
        # [BM, DP]
        b_q = load_block(a.q, b, h, i0, N, T.BM, T.D, T.DP)
        queries = Queries(b_q, b, h, i[:, None], b, h // a.group)
        if TOKENS:
            # [BM]
            b_delta = sum_tokens_delta(queries, b_do, i0, b_reference, b_inverse, a, sizes, T)
        # [BM]
        b_prefix_reference, b_prefix_inverse = load_normalizers(p_normalizers, 1, plane, i, a, sizes)
        b_prefix = tl.zeros([i.shape[0]], tl.float32)
        if PREFIX:
            # [BM]
            b_prefix = sum_prefix_delta(queries, b_do, b_prefix_reference, b_prefix_inverse, a, sizes, T)
        store_rows(p_rows, 1, plane, i, b_prefix_reference, b_prefix_inverse, b_prefix, a, sizes)
        if p_dog is not None:
            tl.store(p_dog + tl.program_id(0), tl.sum(b_prefix))
    store_rows(p_rows, 0, plane, i, b_reference, b_inverse, b_delta, a, sizes)
    if p_dsinks is not None:
        # [BM]
        b_p = compute_probability(load_sink(a, h), b_reference, b_inverse, a)
        tl.store(p_dsinks + tl.program_id(0), -tl.sum(b_p * b_delta))


@triton.jit
def sum_prefix_delta(queries, b_do, b_reference, b_inverse, a, sizes, T: tl.constexpr):
    """Compute <do, output of the prefix's separate softmax> [BM], divided by the actual sum of the probabilities.

    Without the division, rounding would give a query with a single key a gradient that is not 0.
    """
    # [BM]
    b_delta = tl.zeros([queries.q.shape[0]], tl.float32)
    b_mass = tl.zeros([queries.q.shape[0]], tl.float32)
    for p0 in tl.range(0, sizes.P, T.BP):
        at = Pairs(queries.b, queries.h, queries.i, p0 + tl.arange(0, T.BP)[None, :])
        # [BM, BP] or a shape that broadcasts to it
        b_gate = load_prefix_gate(at, a, sizes)
        # [BP, DP]
        b_pk = load_prefix(a.pk, queries.key_b, queries.key_h, p0, sizes, T.BP, T.D, T.DP)
        # [BP, DVP]
        b_pv = load_prefix(a.pv, queries.key_b, queries.key_h, p0, sizes, T.BP, T.DV, T.DVP)
        # [BM, BP]
        b_qk = tl.dot(queries.q, tl.trans(b_pk), input_precision=T.PRECISION)
        b_p = compute_prefix_probabilities(b_qk, b_gate, at, b_reference[:, None], b_inverse[:, None], a, sizes)
        b_dov = tl.dot(b_do, tl.trans(b_pv), input_precision=T.PRECISION)
        b_delta += tl.sum(b_p * (draw_kept(at, a, False) * b_gate * b_dov), 1)
        b_mass += tl.sum(b_p, 1)
    return b_delta * invert(b_mass)


@triton.jit
def sum_tokens_delta(queries, b_do, i0, b_reference, b_inverse, a, sizes, T: tl.constexpr):
    """Compute <do, output of the tokens' separate softmax> [BM], divided by the actual sum of the probabilities."""
    # [BM]
    b_delta = tl.zeros([queries.q.shape[0]], tl.float32)
    b_mass = tl.zeros([queries.q.shape[0]], tl.float32)
    if a.sinks.pointer is not None:
        b_mass += compute_probability(load_sink(a, queries.h), b_reference, b_inverse, a)
    start, _, _, end = find_keys(a, i0, tl.minimum(i0 + T.BM, sizes.N), sizes, T.BN)
    for j0 in tl.range(start, end, T.BN):
        at = Pairs(queries.b, queries.h, queries.i, j0 + tl.arange(0, T.BN)[None, :])
        # [BN, DP]
        b_k = load_block(a.k, queries.key_b, queries.key_h, j0, sizes.M, T.BN, T.D, T.DP)
        # [BN, DVP]
        b_v = load_block(a.v, queries.key_b, queries.key_h, j0, sizes.M, T.BN, T.DV, T.DVP)
        # [BM, BN]
        b_qk = tl.dot(queries.q, tl.trans(b_k), input_precision=T.PRECISION)
        b_p = compute_token_probabilities(b_qk, at, b_reference[:, None], b_inverse[:, None], a, sizes, False)
        b_dov = tl.dot(b_do, tl.trans(b_v), input_precision=T.PRECISION)
        b_delta += tl.sum(b_p * (draw_kept(at, a, True) * b_dov), 1)
        b_mass += tl.sum(b_p, 1)
    return b_delta * invert(b_mass)


@triton.jit(do_not_specialize=["N", "M", "P", "columns"])
def prefix_attention_bwd_dq_kernel(a, do, dq, given, dgate, p_rows, N, M, P, columns, T: tl.constexpr):
    """Compute gradients of queries and of the prefix gate.

    The gradient of the gate is [B, Hq, rows, columns]. If the gate differs by query, it has a row per query. Otherwise
    it has a row per block of queries, summed over the block. If the gate differs by key, it has a column per key.
    Otherwise it has one column, summed over the keys. ``given`` is a part of the gradient of queries that is already
    known. Without token keys in ``a``, the rest is due to the prefix alone.
    """
    blocks = tl.cdiv(N, T.BM)
    block = blocks - 1 - tl.program_id(0) % blocks  # start causal blocks with the most keys first
    plane = tl.program_id(0) // blocks
    b, h = plane // a.heads, plane % a.heads
    sizes = find_lengths(a, b, N, M, P)
    i0 = block * T.BM
    i = i0 + tl.arange(0, T.BM)
    queries = Queries(load_block(a.q, b, h, i0, N, T.BM, T.D, T.DP), b, h, i[:, None], b, h // a.group)
    # [BM, DVP]
    b_do = load_block(do, b, h, i0, N, T.BM, T.DV, T.DVP)
    b_dq = make_zeros(T.BM, T.DP)
    own: tl.constexpr = a.og.pointer is not None  # the prefix has a separate softmax
    rows = load_rows(p_rows, own, plane, i[:, None], a, sizes)
    of_block: tl.constexpr = a.query_gate.n is None
    of_keys: tl.constexpr = a.gate.c is not None or a.query_gate.c is not None
    # [BM]
    b_sum = tl.zeros([i.shape[0]], tl.float32)  # the gate's gradient, summed over keys
    if dgate.pointer is not None:
        row = block if of_block else queries.i
        p_dgate = find_row(dgate, b, h, row)
    for p0 in tl.range(0, sizes.P, T.BP):
        p = p0 + tl.arange(0, T.BP)
        at = Pairs(b, h, queries.i, p[None, :])
        # [BM, BP] or a shape that broadcasts to it
        b_gate = load_prefix_gate(at, a, sizes)
        # [BP, DP]
        b_pk = load_prefix(a.pk, b, queries.key_h, p0, sizes, T.BP, T.D, T.DP)
        # [BP, DVP]
        b_pv = load_prefix(a.pv, b, queries.key_h, p0, sizes, T.BP, T.DV, T.DVP)
        # [BM, BP]
        b_qk = tl.dot(queries.q, tl.trans(b_pk), input_precision=T.PRECISION)
        b_dov = tl.dot(b_do, tl.trans(b_pv), input_precision=T.PRECISION)
        _, b_ds, b_p = differentiate_prefix_scores(b_qk, b_dov, b_gate, at, rows, a, sizes)
        if dgate.pointer is not None:
            # [BM, BP]
            b_dgate = b_ds * (a.scale * b_qk) + b_p * b_dov
            if not of_keys:
                b_sum += tl.sum(b_dgate, 1)
            elif of_block:
                store_gate(p_dgate, p * dgate.c, tl.sum(b_dgate, 0), p < sizes.P)
            else:
                store_gate(p_dgate, at.j * dgate.c, b_dgate, (queries.i < N) & (at.j < sizes.P))
        if dq.pointer is not None:
            b_dq = add_product((b_ds * b_gate).to(b_pk.dtype), b_pk, b_dq, T)
    if dgate.pointer is not None:
        if of_keys and a.spans.pointer is not None:  # zero the columns beyond a shorter span
            for p0 in tl.range(sizes.P, columns, T.BP):
                p = p0 + tl.arange(0, T.BP)
                if of_block:
                    store_gate(p_dgate, p * dgate.c, tl.zeros([p.shape[0]], tl.float32), p < columns)
                else:
                    there = (queries.i < N) & (p[None, :] < columns)
                    store_gate(p_dgate, p[None, :] * dgate.c, make_zeros(T.BM, T.BP), there)
        elif not of_keys and of_block:
            tl.store(p_dgate, tl.sum(b_sum).to(p_dgate.dtype.element_ty))
        elif not of_keys:
            store_gate(p_dgate, 0, b_sum[:, None], queries.i < N)
    if dq.pointer is not None:
        if a.k.pointer is not None:
            rows = load_rows(p_rows, 0, plane, i[:, None], a, sizes)
            lo, inner_lo, inner_hi, hi = find_keys(a, i0, tl.minimum(i0 + T.BM, N), sizes, T.BN)
            if a.seed is None:
                if a.far is not None:
                    b_dq = add_tokens(b_dq, queries, b_do, rows, lo, tl.minimum(inner_lo, hi), a, sizes, T, False)
                b_dq = add_tokens(b_dq, queries, b_do, rows, inner_lo, inner_hi, a, sizes, T, True)
                lo = tl.maximum(inner_lo, inner_hi)
            # With dropout, one loop processes all keys, for the same reason as in the dkv kernel.
            b_dq = add_tokens(b_dq, queries, b_do, rows, lo, hi, a, sizes, T, False)
        b_dq = b_dq * a.scale
        if given.pointer is not None:
            b_dq += load_block(given, b, h, i0, N, T.BM, T.D, T.DP)
        store_block(dq, b, h, i0, N, b_dq, T.D)


@triton.jit
def store_gate(p_row, o_p, b_dgate, there):
    """Store gradients of the gate in the dtype of ``p_row``."""
    tl.store(p_row + o_p, b_dgate.to(p_row.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["N", "M", "P", "columns", "batch", "heads", "shared", "chunk"])
def prefix_attention_bwd_dgate_kernel(
    a, do, dgate, p_rows, N, M, P, columns, batch, heads, shared, chunk, T: tl.constexpr
):
    """Compute a block [BM, BP] of the gradient of a gate that differs by query and key and that rows or heads share.

    The gradient is [batch, heads, N, columns]. A program sums over one part of the ``shared`` rows and heads that have
    the same gate.
    """
    query_blocks, key_blocks = tl.cdiv(N, T.BM), tl.cdiv(columns, T.BP)
    p0 = tl.program_id(0) % key_blocks * T.BP
    i0 = tl.program_id(0) // key_blocks % query_blocks * T.BM
    plane = tl.program_id(0) // key_blocks // query_blocks
    b0, h0 = plane // heads, plane % heads
    own: tl.constexpr = a.og.pointer is not None  # the prefix has a separate softmax
    i = (i0 + tl.arange(0, T.BM))[:, None]
    p = (p0 + tl.arange(0, T.BP))[None, :]
    b_dgate = make_zeros(T.BM, T.BP)
    first = tl.program_id(1) * chunk
    for number in tl.range(first, tl.minimum(first + chunk, shared)):
        b, h = b0 + number // (a.heads // heads), h0 + number % (a.heads // heads)
        sizes = find_lengths(a, b, N, M, P)
        at = Pairs(b, h, i, p)
        # [BM, DP]
        b_q = load_block(a.q, b, h, i0, N, T.BM, T.D, T.DP)
        # [BM, DVP]
        b_do = load_block(do, b, h, i0, N, T.BM, T.DV, T.DVP)
        rows = load_rows(p_rows, own, b * a.heads + h, i, a, sizes)
        # [BM, BP] or a shape that broadcasts to it
        b_gate = load_prefix_gate(at, a, sizes)
        # [BP, DP]
        b_pk = load_prefix(a.pk, b, h // a.group, p0, sizes, T.BP, T.D, T.DP)
        # [BP, DVP]
        b_pv = load_prefix(a.pv, b, h // a.group, p0, sizes, T.BP, T.DV, T.DVP)
        # [BM, BP]
        b_qk = tl.dot(b_q, tl.trans(b_pk), input_precision=T.PRECISION)
        b_dov = tl.dot(b_do, tl.trans(b_pv), input_precision=T.PRECISION)
        _, b_ds, b_p = differentiate_prefix_scores(b_qk, b_dov, b_gate, at, rows, a, sizes)
        b_dgate += b_ds * (a.scale * b_qk) + b_p * b_dov
    part = tl.program_id(1) * batch + b0  # parts are stacked along the batch dimension
    store_gate(find_row(dgate, part, h0, i), p * dgate.c, b_dgate, (i < N) & (p < columns))


@triton.jit
def add_tokens(b_dq, queries, b_do, rows, start, end, a, sizes, T: tl.constexpr, INSIDE: tl.constexpr):
    """Add the contribution of token keys [start, end) to the gradient of queries ``b_dq`` [BM, DP].

    INSIDE: all keys exist, and all queries see them.
    """
    for j0 in tl.range(start, end, T.BN):
        at = Pairs(queries.b, queries.h, queries.i, j0 + tl.arange(0, T.BN)[None, :])
        # [BN, DP]
        b_k = load_block(a.k, queries.key_b, queries.key_h, j0, sizes.M, T.BN, T.D, T.DP, INSIDE)
        # [BN, DVP]
        b_v = load_block(a.v, queries.key_b, queries.key_h, j0, sizes.M, T.BN, T.DV, T.DVP, INSIDE)
        # [BM, BN]
        b_qk = tl.dot(queries.q, tl.trans(b_k), input_precision=T.PRECISION)
        b_dov = tl.dot(b_do, tl.trans(b_v), input_precision=T.PRECISION)
        b_ds, _ = differentiate_token_scores(b_qk, b_dov, at, rows, a, sizes, INSIDE)
        b_dq = add_product(b_ds.to(b_k.dtype), b_k, b_dq, T)
    return b_dq


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_bwd_dkv_kernel(a, do, dk, dv, p_rows, N, M, P, T: tl.constexpr):
    """Compute gradients of a block of BN token keys and values, summed over all query heads that use them."""
    sizes = Lengths(N, M, P, 0)
    blocks = tl.cdiv(M, T.BN)
    kv_heads = a.heads // a.group
    j0 = tl.program_id(0) % blocks * T.BN
    b, hk = tl.program_id(0) // blocks // kv_heads, tl.program_id(0) // blocks % kv_heads
    # [BN, DP]
    b_k = load_block(a.k, b, hk, j0, M, T.BN, T.D, T.DP)
    # [BN, DVP]
    b_v = load_block(a.v, b, hk, j0, M, T.BN, T.DV, T.DVP)
    keys = Keys(b_k, b_v, b, hk, j0 + tl.arange(0, T.BN)[:, None])
    sums = KeySums(make_zeros(T.BN, T.DP), make_zeros(T.BN, T.DVP), tl.zeros([b_k.shape[0]], tl.float32))
    lo, inner_lo, inner_hi, hi = find_queries(a, j0, tl.minimum(j0 + T.BN, M), sizes, T.BM)
    inner_lo = tl.minimum(inner_lo, hi)
    if a.seed is not None:  # dropout costs far more than comparisons, and one loop saves registers
        sums = add_queries(sums, keys, do, dk, dv, p_rows, lo, hi, a, sizes, T, False)
    else:
        if a.near is not None or a.far is not None:
            sums = add_queries(sums, keys, do, dk, dv, p_rows, lo, inner_lo, a, sizes, T, False)
        sums = add_queries(sums, keys, do, dk, dv, p_rows, inner_lo, inner_hi, a, sizes, T, True)
        if a.far is not None:
            last = tl.maximum(inner_lo, inner_hi)
            sums = add_queries(sums, keys, do, dk, dv, p_rows, last, hi, a, sizes, T, False)
    if dk.pointer is not None:
        store_block(dk, b, hk, j0, M, sums.dk * a.scale, T.D)
    if dv.pointer is not None:
        store_block(dv, b, hk, j0, M, sums.dv, T.DV)


@triton.jit
def add_queries(sums, keys, do, dk, dv, p_rows, start, end, a, sizes, T: tl.constexpr, INSIDE: tl.constexpr):
    """Add the contribution of queries [start, end) of all heads of the group. INSIDE: all queries see all keys.

    A single loop over heads and blocks needs fewer registers than nested loops, and loads are pipelined across heads.
    """
    blocks = tl.cdiv(end - start, T.BM)
    h, block = keys.h * a.group, 0
    for _ in tl.range(0, a.group * blocks):
        i0 = start + block * T.BM
        sums = add_block(sums, keys, keys.b, h, i0, do, dk, dv, None, p_rows, a, sizes, T, False, INSIDE)
        h, block = advance_block(h, block, blocks)
    return sums


@triton.jit
def advance_block(h, block, blocks):
    """Return the head and index of the next block of queries. A head has ``blocks`` blocks."""
    following = block + 1
    return tl.where(following < blocks, h, h + 1), tl.where(following < blocks, following, 0)


@triton.jit
def add_block(
    sums,
    keys,
    b,
    h,
    i0,
    do,
    dk,
    dv,
    p_dbias,
    p_rows,
    a,
    sizes,
    T: tl.constexpr,
    PREFIX: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Add the contribution of a block of BM queries to the gradients of keys of the prefix (PREFIX) or the tokens.

    Tiles of scores are [keys, BM], where ``keys`` is BP or BN. A missing key produces garbage, but only in its own row,
    which is not stored.
    """
    own: tl.constexpr = PREFIX and a.og.pointer is not None  # the prefix has a separate softmax
    at = Pairs(b, h, i0 + tl.arange(0, T.BM)[None, :], keys.j - sizes.start)
    # [BM, DP]
    b_q = load_block(a.q, b, h, i0, sizes.N, T.BM, T.D, T.DP)
    # [BM, DVP]
    b_do = load_block(do, b, h, i0, sizes.N, T.BM, T.DV, T.DVP)
    rows = load_rows(p_rows, own, b * a.heads + h, at.i, a, sizes)
    # [keys, BM]
    b_qk = tl.dot(keys.k, tl.trans(b_q), input_precision=T.PRECISION)
    b_dov = tl.dot(keys.v, tl.trans(b_do), input_precision=T.PRECISION)
    b_dk, b_dv, b_dbias = sums.dk, sums.dv, sums.dbias
    if PREFIX:
        # [keys, BM] or a shape that broadcasts to it
        b_gate = load_prefix_gate(at, a, sizes)
        # [keys, BM] each
        b_dcapped, b_ds, b_p = differentiate_prefix_scores(b_qk, b_dov, b_gate, at, rows, a, sizes)
        if p_dbias is not None:
            b_dbias += tl.sum(b_dcapped, 1)
        b_ds, b_p = b_ds * b_gate, b_p * b_gate
    else:
        # [keys, BM]
        b_ds, b_p = differentiate_token_scores(b_qk, b_dov, at, rows, a, sizes, INSIDE)
    if dv.pointer is not None:
        b_dv = add_product(b_p.to(b_do.dtype), b_do, b_dv, T)
    if dk.pointer is not None:
        b_dk = add_product(b_ds.to(b_q.dtype), b_q, b_dk, T)
    return KeySums(b_dk, b_dv, b_dbias)


@triton.jit(do_not_specialize=["N", "M", "P", "begin", "tiles", "chunk", "batch"])
def prefix_attention_bwd_dprefix_kernel(
    a, do, dpk, dpv, p_dbias, p_rows, N, M, P, begin, tiles, chunk, batch, T: tl.constexpr
):
    """Compute gradients of a block of BP prefix keys in [begin, P), of their values, and of their biases.

    P may be smaller than the length of the prefix. The biases' gradient is [parts * batch, Hkv, P - begin].

    A program sums over one part of the tiles of queries that share the keys. These tiles belong to all heads of the
    group, and to all rows of the batch, or to one row if each row has its own prefix. With a store, they belong to the
    rows that see any of the block's keys.
    """
    first_key = 0 if begin is None else begin
    prefix_blocks = tl.cdiv(P - first_key, T.BP)
    kv_heads = a.heads // a.group
    p0 = first_key + tl.program_id(0) % prefix_blocks * T.BP
    hk, b0 = tl.program_id(0) // prefix_blocks % kv_heads, tl.program_id(0) // prefix_blocks // kv_heads
    # [BP, DP]
    b_pk = load_block(a.pk, b0, hk, p0, P, T.BP, T.D, T.DP)
    # [BP, DVP]
    b_pv = load_block(a.pv, b0, hk, p0, P, T.BP, T.DV, T.DVP)
    p = p0 + tl.arange(0, T.BP)
    keys = Keys(b_pk, b_pv, b0, hk, p[:, None])
    sums = KeySums(make_zeros(T.BP, T.DP), make_zeros(T.BP, T.DVP), tl.zeros([p.shape[0]], tl.float32))
    if a.spans.pointer is None:
        sizes = Lengths(N, M, P, 0)
        first = tl.program_id(1) * chunk
        blocks = tl.maximum(tl.cdiv(N, T.BM), 1)  # there are no tiles if N is 0, but dividing by 0 is undefined
        head, block = first // blocks, first % blocks  # head counts the heads of all rows
        b, h = b0 + head // a.group, hk * a.group + head % a.group
        for _ in tl.range(first, tl.minimum(first + chunk, tiles)):
            sums = add_block(sums, keys, b, h, block * T.BM, do, dpk, dpv, p_dbias, p_rows, a, sizes, T, True, False)
            h, block = advance_block(h, block, blocks)
            last = h == (hk + 1) * a.group
            b, h = tl.where(last, b + 1, b), tl.where(last, hk * a.group, h)
    else:
        sums = add_seeing_rows(sums, keys, p0, do, dpk, dpv, p_dbias, p_rows, N, M, P, a, T)
    part = tl.program_id(1) * batch + b0  # parts are stacked along the batch dimension
    if dpk.pointer is not None:
        store_block(dpk, part, hk, p0, P, sums.dk * a.scale, T.D)
    if dpv.pointer is not None:
        store_block(dpv, part, hk, p0, P, sums.dv, T.DV)
    if p_dbias is not None:
        p_part = p_dbias + (part * kv_heads + hk).to(tl.int64) * (P - first_key)
        tl.store(p_part + (p - first_key), sums.dbias, mask=p < P)


@triton.jit
def add_seeing_rows(sums, keys, p0, do, dpk, dpv, p_dbias, p_rows, N, M, P, a, T: tl.constexpr):
    """Add this program's part of the tiles of the rows that see any of the store's keys [p0, p0 + BP), in order.

    The kernel divides the tiles into parts, because the host does not know which rows see which keys.
    """
    batch = a.planes16 // 16 // a.heads
    blocks = tl.cdiv(N, T.BM)
    tiles = a.group * blocks  # per row
    seeing = 0
    for b0 in tl.range(0, batch, ROWS):
        b = b0 + tl.arange(0, ROWS)
        seeing += tl.sum((find_seeing(tl.minimum(b, batch - 1), p0, a, T) & (b < batch)).to(tl.int32))
    chunk = tl.cdiv(seeing * tiles, tl.num_programs(1))
    first = tl.program_id(1) * chunk  # relative to the current row's first tile
    for b in tl.range(0, batch):
        if find_seeing(b, p0, a, T) & (chunk > 0):
            sizes = find_lengths(a, b, N, M, P)
            start, end = tl.maximum(first, 0), tl.minimum(first + chunk, tiles)
            h, block = keys.h * a.group + start // blocks, start % blocks
            for _ in tl.range(start, end):
                i0 = block * T.BM
                sums = add_block(sums, keys, b, h, i0, do, dpk, dpv, p_dbias, p_rows, a, sizes, T, True, False)
                h, block = advance_block(h, block, blocks)
            first -= tiles
    return sums


@triton.jit
def find_seeing(b, p0, a, T: tl.constexpr):
    """Return which rows b see any of the keys [p0, p0 + BP) of the store."""
    start, length = load_span(a, b)
    return (length > 0) & (start < p0 + T.BP) & (start + length > p0)


@triton.jit(do_not_specialize=["count", "second_count", "parts"])
def prefix_attention_sum_kernel(
    p_out, p_parts, count, p_second_out, p_second_parts, second_count, parts, BLOCK: tl.constexpr
):
    """Add the float32 parts of one result, or of two results if the grid has a second index."""
    if tl.program_id(1) == 0:
        add_parts(p_out, p_parts, count, parts, BLOCK)
    elif p_second_out is not None:
        add_parts(p_second_out, p_second_parts, second_count, parts, BLOCK)


@triton.jit
def add_parts(p_out, p_parts, count, parts, BLOCK: tl.constexpr):
    """Add a block of BLOCK elements of all parts, in order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(0, parts):
        b_sum += tl.load(p_parts + o, mask=o < count, other=0.0)
        p_parts += count
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=o < count)
