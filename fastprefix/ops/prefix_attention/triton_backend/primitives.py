"""Device functions from products to scores and back: scale, soft cap, gates, biases, who sees whom, dropout.

Scores of float16 and bfloat16 inputs are in units of log2: log2(e) is part of the scale, so that exp2 needs no further
product. Those of float32 are natural: that product would be a rounding too many.
"""

import triton
import triton.language as tl

from .memory import load_entry, row_address

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def from_natural(x, a):
    """A natural score in the unit of the kernels."""
    if a.q.p.dtype.element_ty == tl.float32:
        return x
    else:
        return x * LOG2E


@triton.jit
def decay(x):
    """e^(-2 |x|)."""
    return tl.exp2(tl.abs(x) * (-2.0 * LOG2E))


@triton.jit
def tanh(x, a):
    """In float32 by its series near zero, where the quotient would lose digits; 16 bits do not show them."""
    if a.q.p.dtype.element_ty == tl.float32:
        e = decay(x)
        quotient = (1.0 - e) / (1.0 + e)
        y = x * x
        series = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
        return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))
    else:
        return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def capped_scores(b_qk, b_gate, a):
    """From <q, k> to scores: gate, scale, soft cap."""
    if a.softcap is None:
        return b_qk * b_gate * from_natural(a.scale, a)
    else:
        return tanh(b_qk * b_gate * (a.scale / a.softcap), a) * from_natural(a.softcap, a)


@triton.jit
def through_cap(b_ds, b_qk, b_gate, a):
    """Gradient of the scores before the soft cap, from that after it.

    In float32 its slope, 1 - tanh^2, is not computed as a difference: that loses its digits where tanh is almost 1.
    """
    if a.softcap is None:
        return b_ds
    elif a.q.p.dtype.element_ty == tl.float32:
        e = decay(b_qk * b_gate * (a.scale / a.softcap))
        return b_ds * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    else:
        t = tanh(b_qk * b_gate * (a.scale / a.softcap), a)  # which the scores had, so that it costs nothing
        return b_ds * (1.0 - t * t)


@triton.jit
def no_gate():
    return tl.full((1, 1), 1.0, tl.float32)


@triton.jit
def prefix_gate(at, a, n):
    """The gate of prefix keys, for each query where it differs; 1 where there is none."""
    i, p = tl.minimum(at.i, n.N - 1), tl.minimum(at.j, n.P - 1)
    if a.gate.p is not None and a.gate.c is None:
        return load_entry(a.gate, at.b, at.h // a.group, i, p).to(tl.float32)
    elif a.gate.p is not None:  # not by ``p``: keys that follow one another are loaded together
        p_gate = row_address(a.gate, at.b, at.h // a.group, i) + tl.cast(at.j, tl.int64) * a.gate.c
        return tl.load(p_gate, mask=at.j < n.P, other=0.0).to(tl.float32)
    elif a.query_gate.p is not None:
        return load_entry(a.query_gate, at.b, at.h, i, p).to(tl.float32)
    else:
        return no_gate()


@triton.jit
def output_gate(a, b, h):
    """The gate of the prefix's own softmax; 1 with a joint softmax."""
    if a.og.p is None:
        return no_gate()
    else:
        return load_entry(a.og, b, h, h, h).to(tl.float32)


@triton.jit
def sink_score(a, h):
    """The score of a head's sink."""
    return from_natural(load_entry(a.sinks, h, h, h, h).to(tl.float32), a)


@triton.jit
def load_bias(x, b, h, i, j, a):
    """Elements of a bias. The least finite numbers, which masks are made of, stay finite in the unit of the kernels:
    where a row has nothing else, they hide nothing.
    """
    b_x = load_entry(x, b, h, i, j).to(tl.float32)
    b_bias = from_natural(b_x, a)
    return tl.where((b_bias == float("-inf")) & (b_x != float("-inf")), b_x, b_bias)


@triton.jit
def prefix_scores(b_s, at, a, n):
    """Add the bias to capped scores, and hide what lies beyond the prefix."""
    if a.bias.p is not None:
        b_s += load_bias(a.bias, at.b, at.h, tl.minimum(at.i, n.N - 1), tl.minimum(at.j, n.P - 1), a)
    return tl.where(at.j < n.P, b_s, float("-inf"))


@triton.jit
def token_scores(b_s, at, a, n, INSIDE: tl.constexpr):
    """Add the mask to capped scores, and hide what may not be seen. INSIDE: the whole tile lies within the band."""
    if not INSIDE:
        o_distance = at.i + (n.M - n.N) - at.j
        b_seen = at.j < n.M
        if a.near is not None:
            b_seen = b_seen & (o_distance >= a.near)
        if a.far is not None:
            b_seen = b_seen & (o_distance <= a.far)
        b_s = tl.where(b_seen, b_s, float("-inf"))
    i, j = tl.minimum(at.i, n.N - 1), at.j
    if not INSIDE or at.j.shape[1] == 1:  # where keys are rows, nothing hides those that are not there
        j = tl.minimum(j, n.M - 1)
    if a.mask.p is not None:
        b_s += load_bias(a.mask, at.b, at.h, i, j, a)
    if a.visible.p is not None:
        b_s = tl.where(load_entry(a.visible, at.b, at.h, i, j) != 0, b_s, float("-inf"))
    if a.query_segments.p is not None:
        b_same = load_entry(a.query_segments, at.b, at.h, i, j) == load_entry(a.key_segments, at.b, at.h, j, i)
        b_s = tl.where(b_same, b_s, float("-inf"))
    return b_s


@triton.jit
def kept(at, a, TOKENS: tl.constexpr):
    """What dropout multiplies by. Four words of a counter decide for two queries and two keys, 8 apart: a thread has
    those four in its registers, so the compiler can draw once for all of them.
    """
    if a.seed is None:
        return no_gate()
    else:
        zero = tl.zeros_like(at.i + at.j)
        plane = at.b * a.heads + at.h + zero
        w00, w01, w10, w11 = tl.philox(tl.load(a.seed), (at.j & -9) + zero, (at.i & -9) + zero, plane, zero + TOKENS)
        w0, w1 = tl.where((at.j & 8) == 0, w00, w01), tl.where((at.j & 8) == 0, w10, w11)
        word = tl.where((at.i & 8) == 0, w0, w1)
        return tl.where(word >= tl.cast(a.drop_below, tl.uint32), a.keep_scale, 0.0)
