"""Device functions that the kernels share: loads, scores, who sees whom, dropout, one step of the online softmax.

``b, h, i`` are the coordinates of queries and ``j`` or ``p`` those of keys. They come in any shapes that broadcast
together, so one function serves tiles of queries x keys and of keys x queries.

Scores of float16 and bfloat16 inputs are in units of log2: log2(e) is part of the scale, so that exp2 needs no further
product. Those of float32 are natural: that product would be a rounding too many.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH = tl.constexpr(0.693359375)  # of so few bits that its products with small whole numbers are exact
LN2_LOW = tl.constexpr(-2.1219444005469058e-4)


@triton.jit
def row_address(x, b, h, n):
    """Where rows begin, in 64 bits; dimensions that broadcast do not enter."""
    p = x.p
    if x.b is not None:
        p += b.to(tl.int64) * x.b
    if x.h is not None:
        p += h.to(tl.int64) * x.h
    if x.n is not None:
        p += n.to(tl.int64) * x.n
    return p


@triton.jit
def load_rows(x, b, h, n, there, D: tl.constexpr, DP: tl.constexpr):
    """Rows ``n`` [R] of a matrix as a tile [R, DP]: zero where a row is not ``there``, and beyond column D."""
    o_d = tl.arange(0, DP)
    p_rows = row_address(x, b, h, n)[:, None] + o_d.to(tl.int64)[None, :] * x.c
    if DP == D:
        return tl.load(p_rows, mask=there[:, None], other=0.0)
    else:
        return tl.load(p_rows, mask=there[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(x, b, h, n, there, b_x, D: tl.constexpr):
    """Store a tile [R, DP] as the rows ``n`` of a matrix, in its dtype."""
    o_d = tl.arange(0, b_x.shape[1])
    p_rows = row_address(x, b, h, n)[:, None] + o_d.to(tl.int64)[None, :] * x.c
    tl.store(p_rows, b_x.to(x.p.dtype.element_ty), mask=there[:, None] & (o_d < D)[None, :])


@triton.jit
def load_entry(x, b, h, n, c):
    """Elements of a small operand (a gate, a bias, a mask) by their coordinates, which must be in range."""
    p = row_address(x, b, h, n)
    if x.c is not None:
        p += c.to(tl.int64) * x.c
    return tl.load(p)


@triton.jit
def from_natural(x, a):
    """A natural score in the unit of the kernels."""
    if a.q.p.dtype.element_ty == tl.float32:
        return x
    else:
        return x * LOG2E


@triton.jit
def power(b_x, a):
    """e to the power of a difference of scores."""
    if a.q.p.dtype.element_ty == tl.float32:  # x = n ln 2 + r: the product with log2(e) is rounded where it is small
        b_x = tl.where(b_x < -150.0, -150.0, b_x)
        b_n = tl.floor(b_x * LOG2E + 0.5)
        b_r = (b_x - b_n * LN2_HIGH) - b_n * LN2_LOW
        return tl.exp2(b_n) * tl.exp2(b_r * LOG2E)
    else:
        return tl.exp2(b_x)


@triton.jit
def decay(x):
    """e^(-2 |x|)."""
    return tl.exp2(tl.abs(x) * (-2.0 * LOG2E))


@triton.jit
def tanh(x):
    """By its series near zero, where the quotient would lose digits."""
    e = decay(x)
    quotient = (1.0 - e) / (1.0 + e)
    y = x * x
    series = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def capped_scores(b_s, a):
    """From <q, k> (times the gate) to scores, soft cap included."""
    if a.softcap is None:
        return b_s * from_natural(a.scale, a)
    else:
        return tanh(b_s * (a.scale / a.softcap)) * from_natural(a.softcap, a)


@triton.jit
def through_cap(b_ds, b_s, a):
    """Gradient of the scores before the soft cap, from that after it; ``b_s`` as ``capped_scores`` takes it.

    Its slope, 1 - tanh^2, is not computed as a difference: that loses its digits where tanh is almost 1.
    """
    if a.softcap is None:
        return b_ds
    else:
        e = decay(b_s * (a.scale / a.softcap))
        return b_ds * (4.0 * e / ((1.0 + e) * (1.0 + e)))


@triton.jit
def prefix_gate(a, b, h, i, p, N, P):
    """The gate of prefix keys, for each query where it differs; 1 where there is none."""
    i, p = tl.minimum(i, N - 1), tl.minimum(p, P - 1)
    b_gate = tl.full((1, 1), 1.0, tl.float32)
    if a.gate.p is not None:
        b_gate = load_entry(a.gate, b, h // a.group, i, p).to(tl.float32)
    if a.query_gate.p is not None:
        b_gate = load_entry(a.query_gate, b, h, i, p).to(tl.float32)
    return b_gate


@triton.jit
def load_bias(x, b, h, i, j, a):
    """Elements of a bias. The least finite numbers, which masks are made of, stay finite in the unit of the kernels:
    where a row has nothing else, they hide nothing.
    """
    b_x = load_entry(x, b, h, i, j).to(tl.float32)
    b_bias = from_natural(b_x, a)
    return tl.where((b_bias == float("-inf")) & (b_x != float("-inf")), b_x, b_bias)


@triton.jit
def prefix_scores(b_s, a, b, h, i, p, N, P):
    """Add the bias to capped scores, and hide what lies beyond the prefix."""
    if a.bias.p is not None:
        b_s += load_bias(a.bias, b, h, tl.minimum(i, N - 1), tl.minimum(p, P - 1), a)
    return tl.where(p < P, b_s, float("-inf"))


@triton.jit
def token_scores(b_s, a, b, h, i, j, N, M, INSIDE: tl.constexpr):
    """Add the mask to capped scores, and hide what may not be seen. INSIDE: the whole tile lies within the band."""
    if not INSIDE:
        o_distance = i + (M - N) - j
        b_seen = j < M
        if a.near is not None:
            b_seen = b_seen & (o_distance >= a.near)
        if a.far is not None:
            b_seen = b_seen & (o_distance <= a.far)
        b_s = tl.where(b_seen, b_s, float("-inf"))
    i, j = tl.minimum(i, N - 1), tl.minimum(j, M - 1)
    if a.mask.p is not None:
        b_s += load_bias(a.mask, b, h, i, j, a)
    if a.visible.p is not None:
        b_s = tl.where(load_entry(a.visible, b, h, i, j) != 0, b_s, float("-inf"))
    if a.query_segments.p is not None:
        b_same = load_entry(a.query_segments, b, h, i, j) == load_entry(a.key_segments, b, h, j, i)
        b_s = tl.where(b_same, b_s, float("-inf"))
    return b_s


@triton.jit
def kept(b_p, a, b, h, i, column):
    """What dropout multiplies by. The counter is the element's position; the prefix's columns come first."""
    if a.seed is None:
        return tl.full((1, 1), 1.0, tl.float32)
    else:
        zero = tl.zeros(b_p.shape, tl.int32)
        word, _, _, _ = tl.philox(tl.load(a.seed), column + zero, i + zero, b * a.heads + h + zero, zero)
        return tl.where(word.to(tl.int64) >= a.drop_below, a.keep_scale, 0.0)


@triton.jit
def softmax_step(b_s, b_m, b_l, a):
    """One step of the online softmax: probabilities against the new maximum, factor for the old sums, new state."""
    b_max = tl.maximum(b_m, tl.max(b_s, 1))
    b_ref = tl.where(b_max == float("-inf"), 0.0, b_max)  # a row that has seen nothing yet
    b_p = power(b_s - b_ref[:, None], a)
    b_decay = power(b_m - b_ref, a)
    return b_p, b_decay, b_max, b_l * b_decay + tl.sum(b_p, 1)


@triton.jit
def add_sink(b_acc, b_m, b_l, a, h):
    """A sink joins the sum, and adds nothing to the output."""
    if a.sinks.p is not None:
        b_sink = from_natural(load_entry(a.sinks, h, h, h, h).to(tl.float32), a)
        b_max = tl.maximum(b_m, b_sink)
        b_ref = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_decay = power(b_m - b_ref, a)
        b_acc = b_acc * b_decay[:, None]
        b_l = b_l * b_decay + power(b_sink - b_ref, a)
        b_m = b_max
    return b_acc, b_m, b_l


@triton.jit
def inverse(b_l):
    """1 / l, and 0 where nothing was seen."""
    return tl.where(b_l == 0.0, 0.0, 1.0 / tl.where(b_l == 0.0, 1.0, b_l))


@triton.jit
def row_of(softmax, plane, i, a, N):
    """Where a row's number stands in [softmaxes, B, Hq, N]."""
    return (softmax * (a.planes16 // 16) + plane).to(tl.int64) * N + i


@triton.jit
def store_normalizers(p_normalizers, softmax, plane, i, there, b_m, b_l, a, N):
    """Maximum and sum of the rows' scores: [softmaxes, 2, B, Hq, N]."""
    tl.store(p_normalizers + row_of(2 * softmax, plane, i, a, N), b_m, mask=there)
    tl.store(p_normalizers + row_of(2 * softmax + 1, plane, i, a, N), b_l, mask=there)


@triton.jit
def load_normalizers(p_normalizers, softmax, plane, i, a, N):
    """What ``probability`` takes of rows i: it is 0 in those that are not there, and in those that see nothing.

    Maximum and 1 / sum, or, which saves a product for every pair, the log-sum-exp: in 16 bits its rounding is nothing,
    unless a bias can make scores huge.
    """
    b_m = tl.load(p_normalizers + row_of(2 * softmax, plane, i, a, N), mask=i < N, other=0.0)
    b_l = tl.load(p_normalizers + row_of(2 * softmax + 1, plane, i, a, N), mask=i < N, other=0.0)
    if a.q.p.dtype.element_ty == tl.float32 or a.mask.p is not None or a.bias.p is not None:
        return tl.where(b_l == 0.0, 0.0, b_m), inverse(b_l)
    else:
        b_lse = tl.where(b_l == 0.0, float("inf"), b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l)))
        return b_lse, b_lse


@triton.jit
def probability(b_s, b_m, b_inverse, a):
    """e^(s - m) / l, by what ``load_normalizers`` loaded."""
    if a.q.p.dtype.element_ty == tl.float32 or a.mask.p is not None or a.bias.p is not None:
        return power(b_s - b_m, a) * b_inverse
    else:
        return power(b_s - b_m, a)


@triton.jit
def load_delta(p_delta, softmax, plane, i, a, N):
    return tl.load(p_delta + row_of(softmax, plane, i, a, N), mask=i < N, other=0.0)


@triton.jit
def output_gate(a, b, h):
    """The gate of the prefix's own softmax; 1 with a joint softmax."""
    if a.og.p is None:
        return tl.full((1, 1), 1.0, tl.float32)
    else:
        return load_entry(a.og, b, h, h, h).to(tl.float32)


@triton.jit
def keys_of_queries(a, i0, i1, N, M, BN: tl.constexpr):
    """The keys that queries [i0, i1) see: first, first that all see, end of those that all see, end; in blocks."""
    lo, inner_lo, inner_hi, hi = 0, 0, M, M
    if a.far is not None:
        lo = tl.maximum(i0 + M - N - a.far, 0) // BN * BN
        inner_lo = tl.cdiv(tl.maximum(i1 - 1 + M - N - a.far, 0), BN) * BN
    if a.near is not None:
        hi = tl.maximum(tl.minimum(M, i1 + M - N - a.near), 0)
        inner_hi = tl.maximum(tl.minimum(M, i0 + M - N - a.near + 1), 0)
    return lo, inner_lo, inner_hi // BN * BN, hi


@triton.jit
def queries_of_keys(a, j0, j1, N, M, BM: tl.constexpr):
    """The queries that see keys [j0, j1): first, first that sees all, end of those that see all, end; in blocks."""
    lo, inner_lo, inner_hi, hi = 0, 0, N, N
    if a.near is not None:
        lo = tl.maximum(j0 - (M - N) + a.near, 0) // BM * BM
        inner_lo = tl.cdiv(tl.maximum(j1 - 1 - (M - N) + a.near, 0), BM) * BM
    if a.far is not None:
        hi = tl.maximum(tl.minimum(N, j1 - (M - N) + a.far), 0)
        inner_hi = tl.maximum(tl.minimum(N, j0 - (M - N) + a.far + 1), 0) // BM * BM
    return lo, inner_lo, inner_hi, hi
