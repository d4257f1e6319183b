"""Device functions of the softmax: online in the forward pass, made again from what it left in the backward pass."""

import triton
import triton.language as tl

from .kinds import Rows, Sums
from .memory import row_numbers, zeros
from .scores import LOG2E, sink_score

LN2_HIGH = tl.constexpr(0.693359375)  # ln 2 of so few bits that its products with small whole numbers are exact
LN2_LOW = tl.constexpr(-2.1219444005469058e-4)


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
def finite(b_m):
    """The largest score, or 0 in a row that has seen nothing."""
    return tl.where(b_m == float("-inf"), 0.0, b_m)


@triton.jit
def inverse(b_l):
    """1 / l, and 0 where nothing was seen."""
    return tl.where(b_l == 0.0, 0.0, 1.0 / tl.where(b_l == 0.0, 1.0, b_l))


@triton.jit
def nothing_yet(BM: tl.constexpr, DVP: tl.constexpr):
    m = tl.full([BM], float("-inf"), tl.float32)
    return Sums(zeros(BM, DVP), m, tl.zeros([BM], tl.float32))


@triton.jit
def softmax_step(b_s, factor, b_m, b_l, a):
    """One step of the online softmax over scores ``b_s * factor``, of which the factor is positive: probabilities
    against the new maximum, what older sums decay by, the new maximum and sum.
    """
    b_max = tl.maximum(b_m, tl.max(b_s, 1) * factor)
    b_p = power(b_s * factor - finite(b_max)[:, None], a)
    b_decay = power(b_m - finite(b_max), a)
    return b_p, b_decay, b_max, b_l * b_decay + tl.sum(b_p, 1)


@triton.jit
def add_sink(sums, a, h):
    """A sink joins the sum, and adds nothing to the output."""
    if a.sinks.p is None:
        return sums
    else:
        b_sink = sink_score(a, h)
        b_max = tl.maximum(sums.m, b_sink)
        b_decay = power(sums.m - finite(b_max), a)
        b_l = sums.l * b_decay + power(b_sink - finite(b_max), a)
        return Sums(sums.acc * b_decay[:, None], b_max, b_l)


@triton.jit
def store_normalizers(p_normalizers, softmax, plane, i, there, b_m, b_l, a, n):
    """Maximum and sum of the rows' scores: [softmaxes, 2, B, Hq, N]."""
    tl.store(row_numbers(p_normalizers, 2 * softmax, plane, a, n) + i, b_m, mask=there)
    tl.store(row_numbers(p_normalizers, 2 * softmax + 1, plane, a, n) + i, b_l, mask=there)


@triton.jit
def load_normalizers(p_normalizers, softmax, plane, i, a, n):
    """Reference and inverse of rows i: maximum and 1 / sum, or, which saves a product for every pair, the log-sum-exp
    and 1. In 16 bits its rounding is nothing, unless a bias can make scores huge.
    """
    b_m = tl.load(row_numbers(p_normalizers, 2 * softmax, plane, a, n) + i, mask=i < n.N, other=0.0)
    b_l = tl.load(row_numbers(p_normalizers, 2 * softmax + 1, plane, a, n) + i, mask=i < n.N, other=0.0)
    if a.exact is not None:
        return tl.where(b_l == 0.0, 0.0, b_m), inverse(b_l)
    else:
        b_lse = tl.where(b_l == 0.0, float("inf"), b_m + tl.log2(tl.where(b_l == 0.0, 1.0, b_l)))
        return b_lse, tl.full(b_l.shape, 1.0, tl.float32)


@triton.jit
def store_rows(p_rows, softmax, plane, i, b_reference, b_inverse, b_delta, a, n):
    """What the kernels after the delta pass load: [softmaxes, 2, B, Hq, N], or 3 where there is an inverse."""
    if a.exact is None:
        tl.store(row_numbers(p_rows, 2 * softmax, plane, a, n) + i, b_reference, mask=i < n.N)
        tl.store(row_numbers(p_rows, 2 * softmax + 1, plane, a, n) + i, b_delta, mask=i < n.N)
    else:
        tl.store(row_numbers(p_rows, 3 * softmax, plane, a, n) + i, b_reference, mask=i < n.N)
        tl.store(row_numbers(p_rows, 3 * softmax + 1, plane, a, n) + i, b_delta, mask=i < n.N)
        tl.store(row_numbers(p_rows, 3 * softmax + 2, plane, a, n) + i, b_inverse, mask=i < n.N)


@triton.jit
def load_rows(p_rows, softmax, plane, i, a, n):
    """Of rows i; those that are not there have probabilities of 0."""
    if a.exact is None:
        b_reference = tl.load(row_numbers(p_rows, 2 * softmax, plane, a, n) + i, mask=i < n.N, other=float("inf"))
        b_delta = tl.load(row_numbers(p_rows, 2 * softmax + 1, plane, a, n) + i, mask=i < n.N, other=0.0)
        return Rows(b_reference, 1.0, b_delta)
    else:
        b_reference = tl.load(row_numbers(p_rows, 3 * softmax, plane, a, n) + i, mask=i < n.N, other=0.0)
        b_delta = tl.load(row_numbers(p_rows, 3 * softmax + 1, plane, a, n) + i, mask=i < n.N, other=0.0)
        b_inverse = tl.load(row_numbers(p_rows, 3 * softmax + 2, plane, a, n) + i, mask=i < n.N, other=0.0)
        return Rows(b_reference, b_inverse, b_delta)


@triton.jit
def probability(b_s, b_reference, b_inverse, a):
    """Of a score, by what ``load_normalizers`` or ``load_rows`` loaded."""
    if a.exact is None:
        return power(b_s - b_reference, a)
    else:
        return power(b_s - b_reference, a) * b_inverse
