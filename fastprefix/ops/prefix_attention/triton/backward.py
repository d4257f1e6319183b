"""The backward pass: a delta pass, then one kernel each for keys and values, queries (with the gates), and the prefix.

Letters as in the formulas: ``ds`` gradient of a score, ``delta`` what softmax subtracts, ``dov`` <do, v>. Nothing is
added atomically: sums over programs are stored in parts, and ``prefix_attention_sum_kernel`` adds them in order.
"""

import triton
import triton.language as tl

from .common import (
    capped_scores,
    from_natural,
    inverse,
    kept,
    keys_of_queries,
    load_delta,
    load_entry,
    load_normalizers,
    load_rows,
    output_gate,
    prefix_gate,
    prefix_scores,
    probability,
    queries_of_keys,
    row_of,
    store_rows,
    through_cap,
    token_scores,
)


@triton.jit
def token_probabilities(b_s, b_m, b_inverse, a, b, h, i, j, N, M, INSIDE: tl.constexpr):
    """Probabilities from <q, k>."""
    b_s = token_scores(capped_scores(b_s, a), a, b, h, i, j, N, M, INSIDE)
    return probability(b_s, b_m, b_inverse, a)


@triton.jit
def prefix_probabilities(b_s, b_gate, b_m, b_inverse, a, b, h, i, p, N, P):
    """Probabilities from <q, pk>."""
    b_s = prefix_scores(capped_scores(b_s * b_gate, a), a, b, h, i, p, N, P)
    return probability(b_s, b_m, b_inverse, a)


@triton.jit
def token_gradients(b_s, b_dov, b_m, b_inverse, b_delta, a, b, h, i, j, N, M, P, INSIDE: tl.constexpr):
    """Gradient of <q, k> c, and probability after dropout, from <q, k> and <do, v>."""
    b_p = token_probabilities(b_s, b_m, b_inverse, a, b, h, i, j, N, M, INSIDE)
    b_keep = kept(b_p, a, b, h, i, P + j)
    return through_cap(b_p * (b_keep * b_dov - b_delta), b_s, a), b_p * b_keep


@triton.jit
def prefix_gradients(b_s, b_dov, b_gate, b_m, b_inverse, b_delta, a, b, h, i, p, N, P):
    """Gradient of g <q, pk> c, and probability after dropout (times the output gate), from <q, pk> and <do, pv>."""
    b_p = output_gate(a, b, h) * prefix_probabilities(b_s, b_gate, b_m, b_inverse, a, b, h, i, p, N, P)
    b_keep = kept(b_p, a, b, h, i, p)
    return through_cap(b_p * (b_keep * b_gate * b_dov - b_delta), b_s * b_gate, a), b_p * b_keep


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_bwd_delta_kernel(
    a,
    o,
    do,
    p_normalizers,
    p_delta,
    p_dog,
    p_dsinks,
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
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta = <do, o>, and what the sinks get.

    With two softmaxes a delta for each (the tokens' where TOKENS), from their probabilities, since the output is the
    sum of both and its rounding hides the smaller one; and what the output gate gets.
    """
    blocks = tl.cdiv(N, BM)
    plane = tl.program_id(0) // blocks
    b, h = plane // a.heads, plane % a.heads
    i0 = tl.program_id(0) % blocks * BM
    i = i0 + tl.arange(0, BM)
    b_do = load_rows(do, b, h, i, i < N, DV, DVP)
    if a.og.p is None:
        b_o = load_rows(o, b, h, i, i < N, DV, DVP)
        b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    else:
        b_q = load_rows(a.q, b, h, i, i < N, D, DP)
        b_prefix = prefix_delta(b_q, b_do, p_normalizers, a, b, h, plane, i[:, None], N, P, D, DV, BP, PRECISION)
        tl.store(p_delta + row_of(1, plane, i, a, N), b_prefix, mask=i < N)
        if p_dog is not None:
            tl.store(p_dog + tl.program_id(0), tl.sum(b_prefix))
        b_delta = tl.zeros([BM], tl.float32)
        if TOKENS:
            b_delta = tokens_delta(
                b_q, b_do, p_normalizers, a, b, h, plane, i0, i[:, None], N, M, P, D, DV, BN, PRECISION
            )
    tl.store(p_delta + row_of(0, plane, i, a, N), b_delta, mask=i < N)
    if p_dsinks is not None:
        b_sink = from_natural(load_entry(a.sinks, h, h, h, h).to(tl.float32), a)
        b_m, b_inverse = load_normalizers(p_normalizers, 0, plane, i, a, N)
        tl.store(p_dsinks + tl.program_id(0), -tl.sum(probability(b_sink, b_m, b_inverse, a) * b_delta))


@triton.jit
def prefix_delta(
    b_q,
    b_do,
    p_normalizers,
    a,
    b,
    h,
    plane,
    i,
    N,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<do, output of the prefix's own softmax> [BM], divided by what the probabilities really add up to: a row with one
    key would have gradients otherwise.
    """
    b_m, b_inverse = load_normalizers(p_normalizers, 1, plane, i, a, N)
    b_delta = tl.zeros([b_do.shape[0]], tl.float32)
    b_mass = tl.zeros([b_do.shape[0]], tl.float32)
    for p0 in tl.range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        b_gate = prefix_gate(a, b, h, i, p[None, :], N, P)
        b_pk = load_rows(a.pk, b, h // a.group, p, p < P, D, b_q.shape[1])
        b_pv = load_rows(a.pv, b, h // a.group, p, p < P, DV, b_do.shape[1])
        b_s = tl.dot(b_q, tl.trans(b_pk), input_precision=PRECISION)
        b_p = prefix_probabilities(b_s, b_gate, b_m, b_inverse, a, b, h, i, p[None, :], N, P)
        b_dov = tl.dot(b_do, tl.trans(b_pv), input_precision=PRECISION)
        b_delta += tl.sum(b_p * (kept(b_p, a, b, h, i, p[None, :]) * b_gate * b_dov), 1)
        b_mass += tl.sum(b_p, 1)
    return b_delta * inverse(b_mass)


@triton.jit
def tokens_delta(
    b_q,
    b_do,
    p_normalizers,
    a,
    b,
    h,
    plane,
    i0,
    i,
    N,
    M,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<do, output of the tokens' own softmax> [BM], in the same way."""
    b_m, b_inverse = load_normalizers(p_normalizers, 0, plane, i, a, N)
    b_delta = tl.zeros([b_do.shape[0]], tl.float32)
    b_mass = tl.zeros([b_do.shape[0]], tl.float32)
    if a.sinks.p is not None:
        b_sink = from_natural(load_entry(a.sinks, h, h, h, h).to(tl.float32), a)
        b_mass += tl.sum(probability(b_sink, b_m, b_inverse, a), 1)
    start, _, _, end = keys_of_queries(a, i0, tl.minimum(i0 + b_q.shape[0], N), N, M, BN)
    for j0 in tl.range(start, end, BN):
        j = j0 + tl.arange(0, BN)
        b_k = load_rows(a.k, b, h // a.group, j, j < M, D, b_q.shape[1])
        b_v = load_rows(a.v, b, h // a.group, j, j < M, DV, b_do.shape[1])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_p = token_probabilities(b_s, b_m, b_inverse, a, b, h, i, j[None, :], N, M, False)
        b_dov = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_delta += tl.sum(b_p * (kept(b_p, a, b, h, i, P + j[None, :]) * b_dov), 1)
        b_mass += tl.sum(b_p, 1)
    return b_delta * inverse(b_mass)


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_bwd_dq_kernel(
    a,
    do,
    dq,
    p_dgate,
    p_normalizers,
    p_delta,
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
    SUM_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of queries, and of the prefix gate: for each query, or (SUM_GATE) summed over this block of them."""
    blocks = tl.cdiv(N, BM)
    block = blocks - 1 - tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    b, h = plane // a.heads, plane % a.heads
    i0 = block * BM
    i = i0 + tl.arange(0, BM)
    b_q = load_rows(a.q, b, h, i, i < N, D, DP)  # [BM, DP]
    b_do = load_rows(do, b, h, i, i < N, DV, DVP)  # [BM, DVP]
    b_dq = tl.zeros([BM, DP], tl.float32)
    own: tl.constexpr = a.og.p is not None  # the prefix has a softmax of its own
    b_m, b_inverse = load_normalizers(p_normalizers, own, plane, i[:, None], a, N)
    b_delta = load_delta(p_delta, own, plane, i[:, None], a, N)
    for p0 in tl.range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        b_gate = prefix_gate(a, b, h, i[:, None], p[None, :], N, P)
        b_pk = load_rows(a.pk, b, h // a.group, p, p < P, D, DP)
        b_pv = load_rows(a.pv, b, h // a.group, p, p < P, DV, DVP)
        b_s = tl.dot(b_q, tl.trans(b_pk), input_precision=PRECISION)
        b_dov = tl.dot(b_do, tl.trans(b_pv), input_precision=PRECISION)
        b_ds, b_p = prefix_gradients(b_s, b_dov, b_gate, b_m, b_inverse, b_delta, a, b, h, i[:, None], p[None, :], N, P)
        if p_dgate is not None:
            b_dgate = b_ds * (a.scale * b_s) + b_p * b_dov
            if SUM_GATE:
                tl.store(p_dgate + (plane * blocks + block).to(tl.int64) * P + p, tl.sum(b_dgate, 0), mask=p < P)
            else:
                p_row = (p_dgate + (plane.to(tl.int64) * N + i) * P)[:, None] + p[None, :]
                tl.store(p_row, b_dgate, mask=(i < N)[:, None] & (p < P)[None, :])
        if dq.p is not None:
            b_dq = tl.dot((b_ds * b_gate).to(b_pk.dtype), b_pk, b_dq, input_precision=PRECISION)
    if dq.p is not None:
        b_m, b_inverse = load_normalizers(p_normalizers, 0, plane, i[:, None], a, N)
        b_delta = load_delta(p_delta, 0, plane, i[:, None], a, N)
        lo, inner_lo, inner_hi, hi = keys_of_queries(a, i0, tl.minimum(i0 + BM, N), N, M, BN)
        if a.seed is not None:  # one loop for all, as for keys
            inner_lo, inner_hi = lo, lo
        if a.far is not None and a.seed is None:
            b_dq = add_tokens_to_dq(
                b_dq, b_q, b_do, b_m, b_inverse, b_delta, a, b, h, i[:, None], lo, tl.minimum(inner_lo, hi), N, M, P,
                D, DV, BN, False, PRECISION,
            )  # fmt: skip
        if a.seed is None:
            b_dq = add_tokens_to_dq(
                b_dq, b_q, b_do, b_m, b_inverse, b_delta, a, b, h, i[:, None], inner_lo, inner_hi, N, M, P,
                D, DV, BN, True, PRECISION,
            )  # fmt: skip
        b_dq = add_tokens_to_dq(
            b_dq, b_q, b_do, b_m, b_inverse, b_delta, a, b, h, i[:, None], tl.maximum(inner_lo, inner_hi), hi, N, M, P,
            D, DV, BN, False, PRECISION,
        )  # fmt: skip
        store_rows(dq, b, h, i, i < N, b_dq * a.scale, D)


@triton.jit
def add_tokens_to_dq(
    b_dq,
    b_q,
    b_do,
    b_m,
    b_inverse,
    b_delta,
    a,
    b,
    h,
    i,
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
    for j0 in tl.range(start, end, BN):
        j = j0 + tl.arange(0, BN)
        b_k = load_rows(a.k, b, h // a.group, j, j < M, D, b_q.shape[1])
        b_v = load_rows(a.v, b, h // a.group, j, j < M, DV, b_do.shape[1])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_dov = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds, _ = token_gradients(b_s, b_dov, b_m, b_inverse, b_delta, a, b, h, i, j[None, :], N, M, P, INSIDE)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_bwd_dkv_kernel(
    a,
    do,
    dk,
    dv,
    p_normalizers,
    p_delta,
    N,
    M,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of token keys and values, over all query heads that use them. Tiles are [keys, queries]."""
    blocks = tl.cdiv(M, BN)
    kv_heads = a.heads // a.group
    j0 = tl.program_id(0) % blocks * BN
    b, hk = tl.program_id(0) // blocks // kv_heads, tl.program_id(0) // blocks % kv_heads
    j1 = tl.minimum(j0 + BN, M)
    j = j0 + tl.arange(0, BN)
    b_k = load_rows(a.k, b, hk, j, j < M, D, DP)  # [BN, DP]
    b_v = load_rows(a.v, b, hk, j, j < M, DV, DVP)  # [BN, DVP]
    b_dk = tl.zeros([BN, DP], tl.float32)
    b_dv = tl.zeros([BN, DVP], tl.float32)
    lo, inner_lo, inner_hi, hi = queries_of_keys(a, j0, j1, N, M, BM)
    inner_lo = tl.where(j0 + BN <= M, tl.minimum(inner_lo, hi), hi)  # a block that ends beyond M compares everywhere
    if a.seed is not None:  # dropout costs far more than comparisons: one loop for all, and fewer registers
        inner_lo, inner_hi = hi, hi
    for g in range(0, a.group):
        h = hk * a.group + g
        b_dk, b_dv = add_queries(
            b_dk, b_dv, b_k, b_v, do, dk, dv, p_normalizers, p_delta, a, b, h, j[:, None],
            lo, inner_lo, N, M, P, D, DV, BM, False, PRECISION,
        )  # fmt: skip
        if a.seed is None:
            b_dk, b_dv = add_queries(
                b_dk, b_dv, b_k, b_v, do, dk, dv, p_normalizers, p_delta, a, b, h, j[:, None],
                inner_lo, inner_hi, N, M, P, D, DV, BM, True, PRECISION,
            )  # fmt: skip
        if a.far is not None and a.seed is None:
            b_dk, b_dv = add_queries(
                b_dk, b_dv, b_k, b_v, do, dk, dv, p_normalizers, p_delta, a, b, h, j[:, None],
                tl.maximum(inner_lo, inner_hi), hi, N, M, P, D, DV, BM, False, PRECISION,
            )  # fmt: skip
    if dk.p is not None:
        store_rows(dk, b, hk, j, j < M, b_dk * a.scale, D)
    if dv.p is not None:
        store_rows(dv, b, hk, j, j < M, b_dv, DV)


@triton.jit
def add_queries(
    b_dk,
    b_dv,
    b_k,
    b_v,
    do,
    dk,
    dv,
    p_normalizers,
    p_delta,
    a,
    b,
    h,
    j,
    start,
    end,
    N,
    M,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    INSIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for i0 in tl.range(start, end, BM):
        i = i0 + tl.arange(0, BM)
        plane = b * a.heads + h
        b_q = load_rows(a.q, b, h, i, i < N, D, b_k.shape[1])
        b_do = load_rows(do, b, h, i, i < N, DV, b_v.shape[1])
        b_m, b_inverse = load_normalizers(p_normalizers, 0, plane, i[None, :], a, N)
        b_delta = load_delta(p_delta, 0, plane, i[None, :], a, N)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        b_dov = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds, b_p = token_gradients(b_s, b_dov, b_m, b_inverse, b_delta, a, b, h, i[None, :], j, N, M, P, INSIDE)
        if dv.p is not None:
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        if dk.p is not None:
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["N", "P", "rows", "chunk", "batch"])
def prefix_attention_bwd_dprefix_kernel(
    a,
    do,
    dpk,
    dpv,
    p_normalizers,
    p_delta,
    N,
    P,
    rows,
    chunk,
    batch,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of prefix keys and values, over one chunk of all the queries that share them.

    Those queries, of all rows of the batch (of one, where each has its own prefix) and all heads of the group, are
    one long list of ``rows``. Tiles are [prefix keys, queries].
    """
    blocks = tl.cdiv(P, BP)
    kv_heads = a.heads // a.group
    p = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    hk = tl.program_id(0) // blocks % kv_heads
    b0 = tl.program_id(0) // blocks // kv_heads
    first = tl.program_id(1) * chunk
    own: tl.constexpr = a.og.p is not None  # the prefix has a softmax of its own
    b_pk = load_rows(a.pk, b0, hk, p, p < P, D, DP)  # [BP, DP]
    b_pv = load_rows(a.pv, b0, hk, p, p < P, DV, DVP)  # [BP, DVP]
    b_dpk = tl.zeros([BP, DP], tl.float32)
    b_dpv = tl.zeros([BP, DVP], tl.float32)
    for r0 in tl.range(first, tl.minimum(first + chunk, rows), BM):
        r = r0 + tl.arange(0, BM)
        i = tl.where(r < rows, r % N, N)  # [BM]
        h = hk * a.group + r // N % a.group
        b = tl.minimum(b0 + r // N // a.group, a.planes16 // 16 // a.heads - 1)
        plane = b * a.heads + h
        b_q = load_rows(a.q, b, h, i, r < rows, D, DP)
        b_do = load_rows(do, b, h, i, r < rows, DV, DVP)
        b_m, b_inverse = load_normalizers(p_normalizers, own, plane[None, :], i[None, :], a, N)
        b_delta = load_delta(p_delta, own, plane[None, :], i[None, :], a, N)
        b_gate = prefix_gate(a, b[None, :], h[None, :], i[None, :], p[:, None], N, P)
        b_s = tl.dot(b_pk, tl.trans(b_q), input_precision=PRECISION)  # [BP, BM]
        b_dov = tl.dot(b_pv, tl.trans(b_do), input_precision=PRECISION)
        b_ds, b_p = prefix_gradients(
            b_s, b_dov, b_gate, b_m, b_inverse, b_delta, a, b[None, :], h[None, :], i[None, :], p[:, None], N, P
        )
        if dpv.p is not None:
            b_dpv = tl.dot((b_p * b_gate).to(b_do.dtype), b_do, b_dpv, input_precision=PRECISION)
        if dpk.p is not None:
            b_dpk = tl.dot((b_ds * b_gate).to(b_q.dtype), b_q, b_dpk, input_precision=PRECISION)
    part = tl.program_id(1) * batch + b0  # the parts are laid out as if they were rows of the batch
    if dpk.p is not None:
        store_rows(dpk, part, hk, p, p < P, b_dpk * a.scale, D)
    if dpv.p is not None:
        store_rows(dpv, part, hk, p, p < P, b_dpv, DV)


@triton.jit(do_not_specialize=["count", "parts"])
def prefix_attention_sum_kernel(p_out, p_parts, count, parts, BLOCK: tl.constexpr):
    """Add float32 parts in their order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(0, parts):
        b_sum += tl.load(p_parts + o, mask=o < count, other=0.0)
        p_parts += count
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=o < count)
