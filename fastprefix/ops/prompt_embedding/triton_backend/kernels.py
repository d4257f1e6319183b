# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernels. ``t`` counts tokens (b * N + i), ``c`` columns of the model width, ``j`` hidden units.

``BT``, ``BD`` and ``RP`` are the sizes of tiles; RP covers all hidden units in the forward pass of ADePT, elsewhere a
part of them. Small parameters and the output are contiguous; the table and the ids are read where they lie. Nothing is
compiled anew for another batch or length (``VARYING``).
"""

import triton
import triton.language as tl

VARYING = ["stride_ids_b", "B", "N", "S", "rows", "blocks"]


@triton.jit
def load_ids(p_ids, stride_ids_b, stride_ids_n, o_t, there, N):
    """Load ids in 64 bits, which are 0 beyond the tokens."""
    p = p_ids + (o_t // N).to(tl.int64) * stride_ids_b + (o_t % N).to(tl.int64) * stride_ids_n
    return tl.load(p, mask=there, other=0).to(tl.int64)


@triton.jit
def load_tile(p, o_row, stride_row, stride_column, o_c, there, d):
    """Load rows ``o_row`` (64 bits) and columns ``o_c``, which are 0 beyond the matrix."""
    p_tile = p + (o_row * stride_row)[:, None] + o_c.to(tl.int64)[None, :] * stride_column
    return tl.load(p_tile, mask=there[:, None] & (o_c < d)[None, :], other=0.0)


@triton.jit
def load_w1(p_w1, o_c, o_j, d, r):
    """Load a tile of w1, [BD, RP]."""
    there = (o_c < d)[:, None] & (o_j < r)[None, :]
    return tl.load(p_w1 + o_c.to(tl.int64)[:, None] * r + o_j[None, :], mask=there, other=0.0)


@triton.jit
def load_w2(p_w2, o_j, o_c, d, r):
    """Load a tile of w2, [RP, BD]."""
    there = (o_j < r)[:, None] & (o_c < d)[None, :]
    return tl.load(p_w2 + o_j.to(tl.int64)[:, None] * d + o_c[None, :], mask=there, other=0.0)


@triton.jit
def draw_factors(p_seed, o_t, o_j, N, drop_below, keep):
    """Draw dropout factors of hidden units [BT, RP]. The counter is (hidden unit, position, row of the batch)."""
    zero = tl.zeros((o_t.shape[0], o_j.shape[0]), tl.int32)
    word, _, _, _ = tl.philox(
        tl.load(p_seed), o_j[None, :] + zero, (o_t % N)[:, None] + zero, (o_t // N)[:, None] + zero, zero
    )
    return tl.where(word.to(tl.int64) >= drop_below, keep, 0.0)


@triton.jit
def copy_prompt(p_prompt, p_out, block, B, N, S, d, BT: tl.constexpr, BD: tl.constexpr):
    """Copy prompt rows to the front of every row of the batch. ``block`` counts blocks of the B * S rows."""
    o_row = block * BT + tl.arange(0, BT)
    there = o_row < B * S
    o_from = (o_row % S).to(tl.int64)
    o_to = (o_row // S).to(tl.int64) * (S + N) + o_from
    for c in range(0, d, BD):
        o_c = c + tl.arange(0, BD)
        b_x = load_tile(p_prompt, o_from, d, 1, o_c, there, d)
        tl.store(p_out + (o_to * d)[:, None] + o_c[None, :], b_x, mask=there[:, None] & (o_c < d)[None, :])


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_fwd_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d,
    p_prompt, p_w1, p_b1, p_w2, p_b2, p_seed, p_out,
    B, N, S, d, r, scale, drop_below, keep,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Embed tokens for PT (no w1) and ADePT. The first programs run BT tokens each, the others BT prompt rows."""
    block = tl.program_id(0)
    token_blocks = tl.cdiv(B * N, BT)
    if block >= token_blocks:
        if p_prompt is not None:
            copy_prompt(p_prompt, p_out, block - token_blocks, B, N, S, d, BT, BD)
    else:
        o_t = block * BT + tl.arange(0, BT)
        there = o_t < B * N
        o_id = load_ids(p_ids, stride_ids_b, stride_ids_n, o_t, there, N)
        p_row = p_out + ((o_t // N).to(tl.int64) * (S + N) + S + o_t % N) * d
        o_j = tl.arange(0, RP)
        if p_w1 is not None:
            b_h = tl.zeros((BT, RP), tl.float32)
            for c in range(0, d, BD):
                o_c = c + tl.arange(0, BD)
                b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
                b_h = tl.dot(b_e, load_w1(p_w1, o_c, o_j, d, r), b_h, input_precision="ieee")
            b_h += tl.load(p_b1 + o_j, mask=o_j < r, other=0.0).to(tl.float32)[None, :]
            if p_seed is not None:
                b_h *= draw_factors(p_seed, o_t, o_j, N, drop_below, keep)
            b_z = tl.where(b_h < 0.0, 0.0, b_h).to(p_w2.dtype.element_ty)
        for c in range(0, d, BD):
            o_c = c + tl.arange(0, BD)
            b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
            if p_w1 is not None:
                b_y = tl.dot(b_z, load_w2(p_w2, o_j, o_c, d, r), input_precision="ieee")
                b_y += tl.load(p_b2 + o_c, mask=o_c < d, other=0.0).to(tl.float32)[None, :]
                b_e = (b_e.to(tl.float32) + scale * b_y).to(b_e.dtype)
            tl.store(p_row[:, None] + o_c[None, :], b_e, mask=there[:, None] & (o_c < d)[None, :])


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_low_rank_fwd_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_prompt, p_a, p_b, p_out,
    B, N, S, d, r, scale, rows,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Embed tokens for DePT: BT positions of ``rows`` rows of the batch, with one offset, or prompts."""
    block = tl.program_id(0)
    position_blocks = tl.cdiv(N, BT)
    token_blocks = position_blocks * tl.cdiv(B, rows)
    if block >= token_blocks:
        if p_prompt is not None:
            copy_prompt(p_prompt, p_out, block - token_blocks, B, N, S, d, BT, BD)
    else:
        o_i = block % position_blocks * BT + tl.arange(0, BT)
        first = block // position_blocks * rows
        for c in range(0, d, BD):
            o_c = c + tl.arange(0, BD)
            b_y = tl.zeros((BT, BD), tl.float32)
            for j in range(0, r, RP):
                o_j = j + tl.arange(0, RP)
                b_a = load_w1(p_a, o_i, o_j, N, r)
                b_y = tl.dot(b_a, load_w2(p_b, o_j, o_c, d, r), b_y, input_precision="ieee")
            b_y *= scale
            for b in range(first, tl.minimum(first + rows, B)):
                o_id = load_ids(p_ids, stride_ids_b, stride_ids_n, b * N + o_i, o_i < N, N)
                b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, o_i < N, d)
                p_row = p_out + (b * (S + N) + S + o_i).to(tl.int64) * d
                b_e = (b_e.to(tl.float32) + b_y).to(b_e.dtype)
                tl.store(p_row[:, None] + o_c[None, :], b_e, mask=(o_i < N)[:, None] & (o_c < d)[None, :])


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_bwd_hidden_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
    p_w1, p_b1, p_w2, p_seed, p_z, p_dh,
    B, N, S, d, r, scale, drop_below, keep,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Compute z = relu(h) and dh of BT tokens and RP hidden units, [B * N, r] float32."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    there = o_t < B * N
    o_id = load_ids(p_ids, stride_ids_b, stride_ids_n, o_t, there, N)
    o_dy = (o_t // N).to(tl.int64) * stride_dy_b + (S + o_t % N).to(tl.int64) * stride_dy_n
    o_j = tl.program_id(1) * RP + tl.arange(0, RP)
    b_h = tl.zeros((BT, RP), tl.float32)
    b_dz = tl.zeros((BT, RP), tl.float32)
    for c in range(0, d, BD):
        o_c = c + tl.arange(0, BD)
        b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
        b_h = tl.dot(b_e, load_w1(p_w1, o_c, o_j, d, r), b_h, input_precision="ieee")
        b_dy = load_tile(p_dy, o_dy, 1, stride_dy_d, o_c, there, d)
        b_dz = tl.dot(b_dy, tl.trans(load_w2(p_w2, o_j, o_c, d, r)), b_dz, input_precision="ieee")
    b_h += tl.load(p_b1 + o_j, mask=o_j < r, other=0.0).to(tl.float32)[None, :]
    b_dh = scale * b_dz
    if p_seed is not None:
        b_keep = draw_factors(p_seed, o_t, o_j, N, drop_below, keep)
        b_h *= b_keep
        b_dh *= b_keep
    b_dh = tl.where(b_h > 0.0, b_dh, 0.0)
    b_z = tl.where(b_h < 0.0, 0.0, b_h)
    o_z = o_t.to(tl.int64)[:, None] * r + o_j[None, :]
    b_there = there[:, None] & (o_j < r)[None, :]
    tl.store(p_z + o_z, b_z, mask=b_there)
    tl.store(p_dh + o_z, b_dh, mask=b_there)


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_bwd_weights_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
    p_z, p_dh, p_dw1, p_dw2, p_db2,
    B, N, S, d, r, blocks,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Compute dw1 [d, r], dw2 [d, r] (transposed) and db2 [d], less the scale, over ``blocks`` blocks of BT tokens.

    The result is a float32 part for each second index of the grid. The third index counts parts of the hidden units.
    """
    o_c = tl.program_id(0) * BD + tl.arange(0, BD)
    part = tl.program_id(1).to(tl.int64)
    o_j = tl.program_id(2) * RP + tl.arange(0, RP)
    b_dw1 = tl.zeros((BD, RP), tl.float32)
    b_dw2 = tl.zeros((BD, RP), tl.float32)
    b_db2 = tl.zeros((BD,), tl.float32)
    for block in range(0, blocks):
        o_t = (tl.program_id(1) * blocks + block) * BT + tl.arange(0, BT)
        there = o_t < B * N
        o_z = o_t.to(tl.int64)[:, None] * r + o_j[None, :]
        b_there = there[:, None] & (o_j < r)[None, :]
        o_dy = (o_t // N).to(tl.int64) * stride_dy_b + (S + o_t % N).to(tl.int64) * stride_dy_n
        if p_dw1 is not None:
            o_id = load_ids(p_ids, stride_ids_b, stride_ids_n, o_t, there, N)
            b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
            b_dh = tl.load(p_dh + o_z, mask=b_there, other=0.0).to(b_e.dtype)
            b_dw1 = tl.dot(tl.trans(b_e), b_dh, b_dw1, input_precision="ieee")
        b_dy = load_tile(p_dy, o_dy, 1, stride_dy_d, o_c, there, d)
        if p_dw2 is not None:
            b_z = tl.load(p_z + o_z, mask=b_there, other=0.0).to(b_dy.dtype)
            b_dw2 = tl.dot(tl.trans(b_dy), b_z, b_dw2, input_precision="ieee")
        if p_db2 is not None:
            b_db2 += tl.sum(b_dy.to(tl.float32), 0)
    o_w = (part * d + o_c.to(tl.int64))[:, None] * r + o_j[None, :]
    b_inside = (o_c < d)[:, None] & (o_j < r)[None, :]
    if p_dw1 is not None:
        tl.store(p_dw1 + o_w, b_dw1, mask=b_inside)
    if p_dw2 is not None:
        tl.store(p_dw2 + o_w, b_dw2, mask=b_inside)
    if p_db2 is not None:
        tl.store(p_db2 + part * d + o_c, b_db2, mask=o_c < d)
