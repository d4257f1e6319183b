"""Provide the device functions of the kernels: blocks of a band, memory, scores, and the softmax.

``a`` is the call's :class:`~.operands.Operands`, ``sizes`` its :class:`~.operands.Lengths`, and ``T`` the
:class:`~.operands.KernelShape`. Tiles of scores are [BM, BN] for tokens and [BM, BP] for the prefix. In the kernels for
the gradients of keys, they are [BN, BM] and [BP, BM]. The functions support both.

Scores of float16 and bfloat16 inputs are in units of log2. The factor log2(e) is part of the scale, so that exp2 needs
no further product. Scores of float32 inputs are natural, because that product would add a rounding error.
"""

import triton
import triton.language as tl

from ...products import add_exact_product
from .operands import ROWS_PADDING, Lengths, Rows, Sums

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # ln 2, rounded to so few bits that its products with small integers are exact
LN2_LOW = tl.constexpr(-2.1219444005469058e-4)
PADDING = tl.constexpr(ROWS_PADDING)
ROWS = tl.constexpr(32)  # rows of the batch whose spans are read together


# ---- the band of a causal or windowed problem: blocks to skip, blocks to compare, and blocks that are entirely visible


@triton.jit
def find_keys(a, i0, i1, sizes, BN: tl.constexpr):
    """Find the keys that queries [i0, i1) see.

    Return the first key that any of them sees, the range of keys that all of them see (first and end), and the end of
    the keys that any of them sees. All but the last are multiples of BN.
    """
    shift = sizes.M - sizes.N
    lo, inner_lo, inner_hi, hi = 0, 0, sizes.M, sizes.M
    if a.far is not None:
        lo = tl.maximum(i0 + shift - a.far, 0) // BN * BN
        inner_lo = tl.cdiv(tl.maximum(i1 - 1 + shift - a.far, 0), BN) * BN
    if a.near is not None:
        hi = tl.maximum(tl.minimum(sizes.M, i1 + shift - a.near), 0)
        inner_hi = tl.maximum(tl.minimum(sizes.M, i0 + shift - a.near + 1), 0)
    return lo, inner_lo, inner_hi // BN * BN, hi


@triton.jit
def find_queries(a, j0, j1, sizes, BM: tl.constexpr):
    """Find the queries that see keys [j0, j1).

    Return the first query that sees any of them, the range of queries that see all of them (first and end), and the end
    of the queries that see any of them. The first two are multiples of BM, and so is the third one with a window.
    """
    shift = sizes.M - sizes.N
    lo, inner_lo, inner_hi, hi = 0, 0, sizes.N, sizes.N
    if a.near is not None:
        lo = tl.maximum(j0 - shift + a.near, 0) // BM * BM
        inner_lo = tl.cdiv(tl.maximum(j1 - 1 - shift + a.near, 0), BM) * BM
    if a.far is not None:
        hi = tl.maximum(tl.minimum(sizes.N, j1 - shift + a.far), 0)
        inner_hi = tl.maximum(tl.minimum(sizes.N, j0 - shift + a.far + 1), 0) // BM * BM
    return lo, inner_lo, inner_hi, hi


# ---- memory: operands with any strides


@triton.jit
def find_stride(stride, aligned):
    """Return the actual stride of rows, heads or positions (``operands.Strided``)."""
    if aligned is None:
        return stride // 16
    else:
        return stride


@triton.jit
def find_row(operand, b, h, n):
    """Find the addresses where rows begin, in 64 bits. Dimensions that broadcast are ignored."""
    pointer = operand.pointer
    if operand.b is not None:
        pointer += tl.cast(b, tl.int64) * find_stride(operand.b, operand.aligned)
    if operand.h is not None:
        pointer += tl.cast(h, tl.int64) * find_stride(operand.h, operand.aligned)
    if operand.n is not None:
        pointer += tl.cast(n, tl.int64) * find_stride(operand.n, operand.aligned)
    return pointer


@triton.jit
def find_block(operand, b, h, n0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Find the addresses [ROWS, COLUMNS] of a block.

    They are the block's start plus offsets that are the same for every block, which a loop computes only once.
    """
    o_n = tl.arange(0, ROWS).to(tl.int64)[:, None]
    o_d = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    return find_row(operand, b, h, n0) + (o_n * find_stride(operand.n, operand.aligned) + o_d * operand.c)


@triton.jit
def load_block(
    operand, b, h, n0, end, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ALL: tl.constexpr = False
):
    """Load rows ``n0, n0 + 1, ...`` of a matrix as a tile [ROWS, DP].

    The tile is zero from row ``end`` on and from column D on. With ALL, the caller guarantees that all rows exist.
    """
    p_block = find_block(operand, b, h, n0, ROWS, DP)
    there = tl.arange(0, ROWS)[:, None] < end - n0
    within = tl.arange(0, DP)[None, :] < D
    if ALL and DP == D:
        return tl.load(p_block)
    elif ALL:
        return tl.load(p_block, mask=within, other=0.0)
    elif DP == D:
        return tl.load(p_block, mask=there, other=0.0)
    else:
        return tl.load(p_block, mask=there & within, other=0.0)


@triton.jit
def store_block(operand, b, h, n0, end, b_x, D: tl.constexpr):
    """Store a tile [ROWS, DP] as the rows ``n0, n0 + 1, ...`` of a matrix, in its dtype."""
    p_block = find_block(operand, b, h, n0, b_x.shape[0], b_x.shape[1])
    there = tl.arange(0, b_x.shape[0])[:, None] < end - n0
    within = tl.arange(0, b_x.shape[1])[None, :] < D
    tl.store(p_block, b_x.to(operand.pointer.dtype.element_ty), mask=there & within)


@triton.jit
def make_zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Make a float32 tile [ROWS, COLUMNS] of zeros."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def add_product(b_x, b_y, b_sum, T: tl.constexpr):
    """Add ``b_x @ b_y`` to a float32 sum with the precision ``T.PRECISION``."""
    if T.PRECISION == "ieee":
        return add_exact_product(b_x, b_y, b_sum)
    else:
        return tl.dot(b_x, b_y, b_sum, input_precision=T.PRECISION)


@triton.jit
def load_entry(operand, b, h, n, c):
    """Load elements of a gate, bias or mask by their coordinates, which must be in range.

    The stride of a dimension that the operand lacks is None. The coordinate of such a dimension is ignored.
    """
    pointer = find_row(operand, b, h, n)
    if operand.c is not None:
        pointer += c.to(tl.int64) * operand.c
    return tl.load(pointer)


@triton.jit
def load_span(a, b):
    """Load the starts and lengths of the spans of rows b, in the shape of b."""
    p_span = find_row(a.spans, b, b, b)
    return tl.load(p_span).to(tl.int32), tl.load(p_span + a.spans.c).to(tl.int32)


@triton.jit
def find_lengths(a, b, N, M, P):
    """Find the lengths of row b of the batch: with all P prefix keys, or with its own span of a store."""
    if a.spans.pointer is None:
        return Lengths(N, M, P, 0)
    else:
        start, length = load_span(a, b)
        return Lengths(N, M, length, start)


@triton.jit
def load_prefix(
    operand, b, h, p0, sizes, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ALL: tl.constexpr = False
):
    """Load prefix keys or values ``p0, p0 + 1, ...`` of a row as a tile [ROWS, DP], with zeros beyond the last one.

    With ALL, the caller guarantees that all of them exist.
    """
    return load_block(operand, b, h, sizes.start + p0, sizes.start + sizes.P, ROWS, D, DP, ALL)


@triton.jit
def find_numbers(p_numbers, index, plane, a, sizes):
    """Find where the numbers of a plane's queries begin in a tensor [indices, B, Hq, N]."""
    return p_numbers + (index * (a.planes16 // 16) + plane).to(tl.int64) * sizes.N


# ---- scores and their gradients: scale, soft cap, gates, biases, visibility, dropout


@triton.jit
def convert_natural(x, a):
    """Convert a natural score to the unit of the kernels."""
    if a.q.pointer.dtype.element_ty == tl.float32:
        return x
    else:
        return x * LOG2E


@triton.jit
def compute_decay(x):
    """Compute e^(-2 |x|)."""
    return tl.exp2(tl.abs(x) * (-2.0 * LOG2E))


@triton.jit
def tanh(x, a):
    """Compute tanh.

    For float32 inputs it is a series near zero, where the quotient cancels. In 16 bits this error is invisible.
    """
    if a.q.pointer.dtype.element_ty == tl.float32:
        e = compute_decay(x)
        quotient = (1.0 - e) / (1.0 + e)
        y = x * x
        series = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
        return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))
    else:
        return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def cap_scores(b_qk, b_gate, a):
    """Compute scores from <q, k> by applying gate, scale and soft cap."""
    if a.softcap is None:
        return b_qk * b_gate * convert_natural(a.scale, a)
    else:
        return tanh(b_qk * b_gate * (a.scale / a.softcap), a) * convert_natural(a.softcap, a)


@triton.jit
def differentiate_cap(b_ds, b_qk, b_gate, a):
    """Compute the gradient of the scores before the soft cap from the gradient after it.

    For float32 inputs, the slope 1 - tanh^2 is not computed as a difference, which cancels if tanh is almost 1.
    """
    if a.softcap is None:
        return b_ds
    elif a.q.pointer.dtype.element_ty == tl.float32:
        e = compute_decay(b_qk * b_gate * (a.scale / a.softcap))
        return b_ds * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    else:
        t = tanh(b_qk * b_gate * (a.scale / a.softcap), a)  # the compiler reuses the tanh of the scores
        return b_ds * (1.0 - t * t)


@triton.jit
def make_no_gate():
    """Return a gate of 1, [1, 1]."""
    return tl.full((1, 1), 1.0, tl.float32)


@triton.jit
def find_prefix_keys(at, a, sizes):
    """Return a mask of prefix keys that exist. A block of a store may begin before a row's span."""
    if a.spans.pointer is None:
        return at.j < sizes.P
    else:
        return (at.j >= 0) & (at.j < sizes.P)


@triton.jit
def limit_prefix_keys(at, a, sizes):
    """Clamp the indices of prefix keys to existing ones. Values loaded for other keys are not used."""
    if a.spans.pointer is None:
        return tl.minimum(at.j, sizes.P - 1)
    else:
        return tl.maximum(tl.minimum(at.j, sizes.P - 1), 0)


@triton.jit
def load_prefix_gate(at, a, sizes):
    """Load the gates of prefix keys in a shape that broadcasts to the tile of scores, or 1 without a gate."""
    i, p = tl.minimum(at.i, sizes.N - 1), limit_prefix_keys(at, a, sizes)
    if a.gate.pointer is not None and a.gate.c is None:
        return load_entry(a.gate, at.b, at.h // a.group, i, p).to(tl.float32)
    elif a.gate.pointer is not None:  # unclamped indices with a mask, so that consecutive keys are loaded together
        p_gate = find_row(a.gate, at.b, at.h // a.group, i) + tl.cast(at.j, tl.int64) * a.gate.c
        return tl.load(p_gate, mask=find_prefix_keys(at, a, sizes), other=0.0).to(tl.float32)
    elif a.query_gate.pointer is not None:
        return load_entry(a.query_gate, at.b, at.h, i, p).to(tl.float32)
    else:
        return make_no_gate()


@triton.jit
def load_output_gate(a, b, h):
    """Load the output gate of the prefix's separate softmax, or 1 with a joint softmax."""
    if a.og.pointer is None:
        return make_no_gate()
    else:
        return load_entry(a.og, b, h, h, h).to(tl.float32)


@triton.jit
def load_sink(a, h):
    """Load the score of a head's sink."""
    return convert_natural(load_entry(a.sinks, h, h, h, h).to(tl.float32), a)


@triton.jit
def load_bias(bias, b, h, i, j, a):
    """Load elements of a bias, in the unit of the kernels."""
    return convert_bias(load_entry(bias, b, h, i, j).to(tl.float32), a)


@triton.jit
def load_key_bias(at, a, sizes):
    """Load the biases of prefix keys, which are the same for every query."""
    h = at.h // a.group
    if a.key_bias.c is None:
        b_x = load_entry(a.key_bias, at.b, h, h, h)
    else:  # a masked load of consecutive keys, as for the gate
        p_bias = find_row(a.key_bias, at.b, h, h) + tl.cast(sizes.start + at.j, tl.int64) * a.key_bias.c
        b_x = tl.load(p_bias, mask=find_prefix_keys(at, a, sizes), other=0.0)
    return convert_bias(b_x.to(tl.float32), a)


@triton.jit
def convert_bias(b_x, a):
    """Convert a bias to the unit of the kernels.

    Masks often contain the lowest finite number. It stays finite in this unit, because a query with no larger score
    must still attend to these keys.
    """
    b_bias = convert_natural(b_x, a)
    return tl.where((b_bias == float("-inf")) & (b_x != float("-inf")), b_x, b_bias)


@triton.jit
def finish_prefix_scores(b_s, at, a, sizes, INSIDE: tl.constexpr = False):
    """Add the biases to capped scores, and hide the keys beyond the prefix. INSIDE: no key is beyond it."""
    if a.bias.pointer is not None:
        b_s += load_bias(a.bias, at.b, at.h, tl.minimum(at.i, sizes.N - 1), limit_prefix_keys(at, a, sizes), a)
    if a.key_bias.pointer is not None:
        b_s += load_key_bias(at, a, sizes)
    if INSIDE:
        return b_s
    else:
        return tl.where(find_prefix_keys(at, a, sizes), b_s, float("-inf"))


@triton.jit
def finish_token_scores(b_s, at, a, sizes, INSIDE: tl.constexpr):
    """Add the mask to capped scores, and hide keys that a query may not attend to.

    INSIDE: every query of the tile may attend to every key.
    """
    if not INSIDE:
        o_distance = at.i + (sizes.M - sizes.N) - at.j
        b_seen = at.j < sizes.M
        if a.near is not None:
            b_seen = b_seen & (o_distance >= a.near)
        if a.far is not None:
            b_seen = b_seen & (o_distance <= a.far)
        b_s = tl.where(b_seen, b_s, float("-inf"))
    i, j = tl.minimum(at.i, sizes.N - 1), at.j
    if not INSIDE or at.j.shape[1] == 1:  # a tile with keys as rows may contain missing keys even INSIDE
        j = tl.minimum(j, sizes.M - 1)
    if a.mask.pointer is not None:
        b_s += load_bias(a.mask, at.b, at.h, i, j, a)
    if a.visible.pointer is not None:
        b_s = tl.where(load_entry(a.visible, at.b, at.h, i, j) != 0, b_s, float("-inf"))
    if a.query_segments.pointer is not None:
        b_same = load_entry(a.query_segments, at.b, at.h, i, j) == load_entry(a.key_segments, at.b, at.h, j, i)
        b_s = tl.where(b_same, b_s, float("-inf"))
    return b_s


@triton.jit
def draw_kept(at, a, TOKENS: tl.constexpr):
    """Draw the dropout factors of a tile of scores.

    The four words of a counter decide for two queries and two keys that are 8 apart. A thread has these four elements
    in its registers, so the compiler can draw once for all of them.
    """
    if a.seed is None:
        return make_no_gate()
    else:
        zero = tl.zeros_like(at.i + at.j)
        plane = at.b * a.heads + at.h + zero
        w00, w01, w10, w11 = tl.philox(tl.load(a.seed), (at.j & -9) + zero, (at.i & -9) + zero, plane, zero + TOKENS)
        w0, w1 = tl.where((at.j & 8) == 0, w00, w01), tl.where((at.j & 8) == 0, w10, w11)
        word = tl.where((at.i & 8) == 0, w0, w1)
        return tl.where(word >= tl.cast(a.drop_below, tl.uint32), a.keep_scale, 0.0)


# ---- the softmax: online in the forward pass, recomputed from the normalizers in the backward pass


@triton.jit
def exponentiate(b_x, a):
    """Compute e to the power of a difference of scores."""
    if a.q.pointer.dtype.element_ty == tl.float32:
        # x = n ln 2 + r with a small r, so that rounding r * log2(e) costs little accuracy.
        b_x = tl.where(b_x < -150.0, -150.0, b_x)
        b_n = tl.floor(b_x * LOG2E + 0.5)
        b_r = (b_x - b_n * LN2_HIGH) - b_n * LN2_LOW
        return tl.exp2(b_n) * tl.exp2(b_r * LOG2E)
    else:
        return tl.exp2(b_x)


@triton.jit
def bound_maximum(b_m):
    """Return the largest score, or 0 for queries that have seen nothing."""
    return tl.where(b_m == float("-inf"), 0.0, b_m)


@triton.jit
def invert(b_l):
    """Compute 1 / l, or 0 for queries that have seen nothing."""
    return tl.where(b_l == 0.0, 0.0, 1.0 / tl.where(b_l == 0.0, 1.0, b_l))


@triton.jit
def start_sums(BM: tl.constexpr, DVP: tl.constexpr):
    """Return the state of an online softmax that has seen nothing."""
    m = tl.full([BM], float("-inf"), tl.float32)
    return Sums(make_zeros(BM, DVP), m, tl.zeros([BM], tl.float32))


@triton.jit
def step_softmax(b_s, factor, b_m, b_l, a):
    """Run one step of the online softmax over scores ``b_s * factor`` [BM, keys] with a positive factor.

    Return the exponentials relative to the new maximum [BM, keys], and the decay of older sums, the new maximum and the
    new sum, all [BM].
    """
    b_max = tl.maximum(b_m, tl.max(b_s, 1) * factor)
    b_p = exponentiate(b_s * factor - bound_maximum(b_max)[:, None], a)
    b_decay = exponentiate(b_m - bound_maximum(b_max), a)
    return b_p, b_decay, b_max, b_l * b_decay + tl.sum(b_p, 1)


@triton.jit
def add_sink(sums, a, h):
    """Add a sink to the sum of exponentials. It adds nothing to the output."""
    if a.sinks.pointer is None:
        return sums
    else:
        b_sink = load_sink(a, h)
        b_max = tl.maximum(sums.m, b_sink)
        b_decay = exponentiate(sums.m - bound_maximum(b_max), a)
        b_l = sums.l * b_decay + exponentiate(b_sink - bound_maximum(b_max), a)
        return Sums(sums.acc * b_decay[:, None], b_max, b_l)


@triton.jit
def store_normalizers(p_normalizers, softmax, plane, i, there, b_m, b_l, a, sizes):
    """Store the maximum and sum of the scores of queries i in [softmaxes, 2, B, Hq, N]."""
    tl.store(find_numbers(p_normalizers, 2 * softmax, plane, a, sizes) + i, b_m, mask=there)
    tl.store(find_numbers(p_normalizers, 2 * softmax + 1, plane, a, sizes) + i, b_l, mask=there)


@triton.jit
def load_normalizers(p_normalizers, softmax, plane, i, a, sizes):
    """Load the reference and the inverse of queries i: the maximum and 1 / sum, or the log-sum-exp and 1.

    The log-sum-exp saves a product for every pair. For 16-bit inputs its rounding error is negligible, unless a bias
    can make scores huge. Queries that see nothing or do not exist have an infinite reference, so that all their
    probabilities are 0.
    """
    b_m = tl.load(find_numbers(p_normalizers, 2 * softmax, plane, a, sizes) + i, mask=i < sizes.N, other=0.0)
    b_l = tl.load(find_numbers(p_normalizers, 2 * softmax + 1, plane, a, sizes) + i, mask=i < sizes.N, other=0.0)
    if a.exact is not None:
        return tl.where(b_l == 0.0, float("inf"), b_m), invert(b_l)
    else:
        b_lse = tl.where(b_l == 0.0, float("inf"), b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l)))
        return b_lse, tl.full(b_l.shape, 1.0, tl.float32)


@triton.jit
def find_padded(p_rows, index, plane, a, sizes):
    """Find where the numbers of a plane's queries begin in a tensor [indices, B, Hq, N rounded up to PADDING]."""
    padded = tl.cdiv(sizes.N, PADDING) * PADDING
    return p_rows + (index * (a.planes16 // 16) + plane).to(tl.int64) * padded


@triton.jit
def store_rows(p_rows, softmax, plane, i, b_reference, b_inverse, b_delta, a, sizes):
    """Store the numbers that ``load_rows`` loads in [softmaxes, 2, B, Hq, padded N], or 3 if inverses are stored.

    Padding queries are stored too, with probabilities of 0, so that the other kernels need no mask for queries.
    """
    if a.exact is None:
        tl.store(find_padded(p_rows, 2 * softmax, plane, a, sizes) + i, b_reference)
        tl.store(find_padded(p_rows, 2 * softmax + 1, plane, a, sizes) + i, b_delta)
    else:
        tl.store(find_padded(p_rows, 3 * softmax, plane, a, sizes) + i, b_reference)
        tl.store(find_padded(p_rows, 3 * softmax + 1, plane, a, sizes) + i, b_delta)
        tl.store(find_padded(p_rows, 3 * softmax + 2, plane, a, sizes) + i, b_inverse)


@triton.jit
def load_rows(p_rows, softmax, plane, i, a, sizes):
    """Load the numbers that the backward pass needs for queries i. Padding queries have probabilities of 0."""
    if a.exact is None:
        b_reference = tl.load(find_padded(p_rows, 2 * softmax, plane, a, sizes) + i)
        return Rows(b_reference, 1.0, tl.load(find_padded(p_rows, 2 * softmax + 1, plane, a, sizes) + i))
    else:
        b_reference = tl.load(find_padded(p_rows, 3 * softmax, plane, a, sizes) + i)
        b_delta = tl.load(find_padded(p_rows, 3 * softmax + 1, plane, a, sizes) + i)
        return Rows(b_reference, tl.load(find_padded(p_rows, 3 * softmax + 2, plane, a, sizes) + i), b_delta)


@triton.jit
def compute_probability(b_s, b_reference, b_inverse, a):
    """Compute the probability of a score from the numbers of ``load_normalizers`` or ``load_rows``."""
    if a.exact is None:
        return exponentiate(b_s - b_reference, a)
    else:
        return exponentiate(b_s - b_reference, a) * b_inverse
