"""Device functions that cut a causal or windowed problem into blocks: those to skip, to compare, and to take whole."""

import triton
import triton.language as tl


@triton.jit
def keys_of_queries(a, i0, i1, n, BN: tl.constexpr):
    """The keys that queries [i0, i1) see: first, first that all see, end of those that all see, end; in blocks."""
    shift = n.M - n.N
    lo, inner_lo, inner_hi, hi = 0, 0, n.M, n.M
    if a.far is not None:
        lo = tl.maximum(i0 + shift - a.far, 0) // BN * BN
        inner_lo = tl.cdiv(tl.maximum(i1 - 1 + shift - a.far, 0), BN) * BN
    if a.near is not None:
        hi = tl.maximum(tl.minimum(n.M, i1 + shift - a.near), 0)
        inner_hi = tl.maximum(tl.minimum(n.M, i0 + shift - a.near + 1), 0)
    return lo, inner_lo, inner_hi // BN * BN, hi


@triton.jit
def queries_of_keys(a, j0, j1, n, BM: tl.constexpr):
    """The queries that see keys [j0, j1): first, first that sees all, end of those that see all, end; in blocks."""
    shift = n.M - n.N
    lo, inner_lo, inner_hi, hi = 0, 0, n.N, n.N
    if a.near is not None:
        lo = tl.maximum(j0 - shift + a.near, 0) // BM * BM
        inner_lo = tl.cdiv(tl.maximum(j1 - 1 - shift + a.near, 0), BM) * BM
    if a.far is not None:
        hi = tl.maximum(tl.minimum(n.N, j1 - shift + a.far), 0)
        inner_hi = tl.maximum(tl.minimum(n.N, j0 - shift + a.far + 1), 0) // BM * BM
    return lo, inner_lo, inner_hi, hi
