"""Device functions that read and write operands, whatever their strides."""

import triton
import triton.language as tl


@triton.jit
def row_address(x, b, h, n):
    """Where rows begin, in 64 bits; dimensions that broadcast do not enter."""
    p = x.p
    if x.b is not None:
        p += tl.cast(b, tl.int64) * x.b
    if x.h is not None:
        p += tl.cast(h, tl.int64) * x.h
    if x.n is not None:
        p += tl.cast(n, tl.int64) * x.n
    return p


@triton.jit
def block_address(x, b, h, n0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses [ROWS, COLUMNS] of a block: where it begins, plus offsets that are the same for every block."""
    o_n = tl.arange(0, ROWS).to(tl.int64)[:, None]
    o_d = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    return row_address(x, b, h, n0) + (o_n * x.n + o_d * x.c)


@triton.jit
def load_block(x, b, h, n0, end, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ALL: tl.constexpr = False):
    """Rows ``n0, n0 + 1, ...`` of a matrix as a tile [ROWS, DP]: zero from row ``end`` on (with ALL, no row is), and
    beyond column D.
    """
    p_block = block_address(x, b, h, n0, ROWS, DP)
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
def store_block(x, b, h, n0, end, b_x, D: tl.constexpr):
    """Store a tile [ROWS, DP] as the rows ``n0, n0 + 1, ...`` of a matrix, in its dtype."""
    p_block = block_address(x, b, h, n0, b_x.shape[0], b_x.shape[1])
    there = tl.arange(0, b_x.shape[0])[:, None] < end - n0
    within = tl.arange(0, b_x.shape[1])[None, :] < D
    tl.store(p_block, b_x.to(x.p.dtype.element_ty), mask=there & within)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums to begin with."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def load_entry(x, b, h, n, c):
    """Elements of a small operand (a gate, a bias, a mask) by their coordinates, which must be in range."""
    p = row_address(x, b, h, n)
    if x.c is not None:
        p += c.to(tl.int64) * x.c
    return tl.load(p)


@triton.jit
def row_numbers(p, index, plane, a, n):
    """Where the numbers of a plane's rows begin, in [indices, B, Hq, N]."""
    return p + (index * (a.planes16 // 16) + plane).to(tl.int64) * n.N
