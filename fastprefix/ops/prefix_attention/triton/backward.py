"""The backward pass: a delta pass, then one kernel each for keys and values, queries (with the gates), and the prefix.

Letters as in the formulas: ``ds`` gradient of a score, ``delta`` what softmax subtracts, ``dov`` <do, v>. Nothing is
added atomically: sums over programs are stored in parts, and ``prefix_attention_sum_kernel`` adds them in order.
"""

import triton
import triton.language as tl

from .common import (
    capped_scores,
    from_natural,
    kept,
    keys_of_queries,
    load_delta,
    load_entry,
    load_lse,
    load_rows,
    output_gate,
    power,
    prefix_gate,
    prefix_scores,
    queries_of_keys,
    store_rows,
    through_cap,
    token_scores,
)


@triton.jit
def token_gradients(b_s, b_dov, b_lse, b_delta, a, b, h, i, j, N, M, P, INSIDE: tl.constexpr):
    """Gradient of <q, k> c, and probability after dropout, from <q, k> and <do, v>."""
    b_s = capped_scores(b_s, a)
    b_p = power(token_scores(b_s, a, b, h, i, j, N, M, INSIDE) - b_lse, a)
    b_keep = kept(b_p, a, b, h, i, P + j)
    return through_cap(b_p * (b_keep * b_dov - b_delta), b_s, a), b_p * b_keep


@triton.jit
def prefix_gradients(b_s, b_dov, b_gate, b_lse, b_delta, a, b, h, i, p, N, P):
    """Gradient of g <q, pk> c, and probability after dropout (times the output gate), from <q, pk> and <do, pv>."""
    b_s = capped_scores(b_s * b_gate, a)
    b_p = output_gate(a, b, h) * power(prefix_scores(b_s, a, b, h, i, p, N, P) - b_lse, a)
    b_keep = kept(b_p, a, b, h, i, p)
    return through_cap(b_p * (b_keep * b_gate * b_dov - b_delta), b_s, a), b_p * b_keep


@triton.jit(do_not_specialize=["N", "P"])
def prefix_attention_bwd_delta_kernel(
    a,
    o,
    do,
    p_lse,
    p_delta,
    p_dog,
    p_dsinks,
    N,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta = <do, o>; with two softmaxes one for each, and what the output gate gets; what the sinks get."""
    blocks = tl.cdiv(N, BM)
    plane = tl.program_id(0) // blocks
    b, h = plane // a.heads, plane % a.heads
    i = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    o_row = plane.to(tl.int64) * N + i
    b_do = load_rows(do, b, h, i, i < N, DV, DVP)
    b_o = load_rows(o, b, h, i, i < N, DV, DVP)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    if a.og.p is not None:
        b_prefix = prefix_delta(b_do, p_lse, a, b, h, plane, i, N, P, D, DV, DP, BP, PRECISION)
        tl.store(p_delta + (a.planes + plane).to(tl.int64) * N + i, b_prefix, mask=i < N)
        if p_dog is not None:
            tl.store(p_dog + tl.program_id(0), tl.sum(b_prefix))
        b_delta -= load_entry(a.og, b, h, h, h).to(tl.float32) * b_prefix
    tl.store(p_delta + o_row, b_delta, mask=i < N)
    if p_dsinks is not None:
        b_sink = from_natural(load_entry(a.sinks, h, h, h, h).to(tl.float32), a)
        b_p = power(b_sink - load_lse(p_lse, plane, i, N, a), a)
        tl.store(p_dsinks + tl.program_id(0), -tl.sum(b_p * b_delta))


@triton.jit
def prefix_delta(
    b_do,
    p_lse,
    a,
    b,
    h,
    plane,
    i,
    N,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<do, output of the prefix's own softmax> [BM]."""
    b_q = load_rows(a.q, b, h, i, i < N, D, DP)
    b_lse = load_lse(p_lse, a.planes + plane, i, N, a)[:, None]
    b_delta = tl.zeros([b_do.shape[0]], tl.float32)
    for p0 in tl.range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        b_gate = prefix_gate(a, b, h, i[:, None], p[None, :], N, P)
        b_pk = load_rows(a.pk, b, h // a.group, p, p < P, D, DP)
        b_pv = load_rows(a.pv, b, h // a.group, p, p < P, DV, b_do.shape[1])
        b_s = capped_scores(tl.dot(b_q, tl.trans(b_pk), input_precision=PRECISION) * b_gate, a)
        b_p = power(prefix_scores(b_s, a, b, h, i[:, None], p[None, :], N, P) - b_lse, a)
        b_dov = tl.dot(b_do, tl.trans(b_pv), input_precision=PRECISION)
        b_delta += tl.sum(b_p * kept(b_p, a, b, h, i[:, None], p[None, :]) * b_gate * b_dov, 1)
    return b_delta


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_bwd_dq_kernel(
    a,
    do,
    dq,
    p_dgate,
    p_lse,
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
    prefix_plane = plane
    if a.og.p is not None:
        prefix_plane = a.planes + plane
    b_lse = load_lse(p_lse, prefix_plane, i, N, a)[:, None]
    b_delta = load_delta(p_delta, prefix_plane, i, N)[:, None]
    for p0 in tl.range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        b_gate = prefix_gate(a, b, h, i[:, None], p[None, :], N, P)
        b_pk = load_rows(a.pk, b, h // a.group, p, p < P, D, DP)
        b_pv = load_rows(a.pv, b, h // a.group, p, p < P, DV, DVP)
        b_s = tl.dot(b_q, tl.trans(b_pk), input_precision=PRECISION)
        b_dov = tl.dot(b_do, tl.trans(b_pv), input_precision=PRECISION)
        b_ds, b_p = prefix_gradients(b_s, b_dov, b_gate, b_lse, b_delta, a, b, h, i[:, None], p[None, :], N, P)
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
        b_lse = load_lse(p_lse, plane, i, N, a)[:, None]
        b_delta = load_delta(p_delta, plane, i, N)[:, None]
        lo, inner_lo, inner_hi, hi = keys_of_queries(a, i0, tl.minimum(i0 + BM, N), N, M, BN)
        if a.seed is not None:  # one loop for all, as for keys
            inner_lo, inner_hi = lo, lo
        if a.far is not None and a.seed is None:
            b_dq = add_tokens_to_dq(
                b_dq, b_q, b_do, b_lse, b_delta, a, b, h, i[:, None], lo, tl.minimum(inner_lo, hi), N, M, P,
                D, DV, BN, False, PRECISION,
            )  # fmt: skip
        if a.seed is None:
            b_dq = add_tokens_to_dq(
                b_dq, b_q, b_do, b_lse, b_delta, a, b, h, i[:, None], inner_lo, inner_hi, N, M, P,
                D, DV, BN, True, PRECISION,
            )  # fmt: skip
        b_dq = add_tokens_to_dq(
            b_dq, b_q, b_do, b_lse, b_delta, a, b, h, i[:, None], tl.maximum(inner_lo, inner_hi), hi, N, M, P,
            D, DV, BN, False, PRECISION,
        )  # fmt: skip
        store_rows(dq, b, h, i, i < N, b_dq * a.scale, D)


@triton.jit
def add_tokens_to_dq(
    b_dq,
    b_q,
    b_do,
    b_lse,
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
        b_ds, _ = token_gradients(b_s, b_dov, b_lse, b_delta, a, b, h, i, j[None, :], N, M, P, INSIDE)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["N", "M", "P"])
def prefix_attention_bwd_dkv_kernel(
    a,
    do,
    dk,
    dv,
    p_lse,
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
            b_dk, b_dv, b_k, b_v, do, dk, dv, p_lse, p_delta, a, b, h, j[:, None],
            lo, inner_lo, N, M, P, D, DV, BM, False, PRECISION,
        )  # fmt: skip
        if a.seed is None:
            b_dk, b_dv = add_queries(
                b_dk, b_dv, b_k, b_v, do, dk, dv, p_lse, p_delta, a, b, h, j[:, None],
                inner_lo, inner_hi, N, M, P, D, DV, BM, True, PRECISION,
            )  # fmt: skip
        if a.far is not None and a.seed is None:
            b_dk, b_dv = add_queries(
                b_dk, b_dv, b_k, b_v, do, dk, dv, p_lse, p_delta, a, b, h, j[:, None],
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
    p_lse,
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
        b_lse = load_lse(p_lse, plane, i, N, a)[None, :]
        b_delta = load_delta(p_delta, plane, i, N)[None, :]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        b_dov = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds, b_p = token_gradients(b_s, b_dov, b_lse, b_delta, a, b, h, i[None, :], j, N, M, P, INSIDE)
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
    p_lse,
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
    b_pk = load_rows(a.pk, b0, hk, p, p < P, D, DP)  # [BP, DP]
    b_pv = load_rows(a.pv, b0, hk, p, p < P, DV, DVP)  # [BP, DVP]
    b_dpk = tl.zeros([BP, DP], tl.float32)
    b_dpv = tl.zeros([BP, DVP], tl.float32)
    for r0 in tl.range(first, tl.minimum(first + chunk, rows), BM):
        r = r0 + tl.arange(0, BM)
        i = tl.where(r < rows, r % N, N)  # [BM]
        h = hk * a.group + r // N % a.group
        b = tl.minimum(b0 + r // N // a.group, a.planes // a.heads - 1)
        plane = b * a.heads + h
        b_q = load_rows(a.q, b, h, i, r < rows, D, DP)
        b_do = load_rows(do, b, h, i, r < rows, DV, DVP)
        if a.og.p is not None:
            plane += a.planes
        b_lse = load_lse(p_lse, plane, i, N, a)[None, :]
        b_delta = load_delta(p_delta, plane, i, N)[None, :]
        b_gate = prefix_gate(a, b[None, :], h[None, :], i[None, :], p[:, None], N, P)
        b_s = tl.dot(b_pk, tl.trans(b_q), input_precision=PRECISION)  # [BP, BM]
        b_dov = tl.dot(b_pv, tl.trans(b_do), input_precision=PRECISION)
        b_ds, b_p = prefix_gradients(
            b_s, b_dov, b_gate, b_lse, b_delta, a, b[None, :], h[None, :], i[None, :], p[:, None], N, P
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
