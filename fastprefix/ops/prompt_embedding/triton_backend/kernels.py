# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernels. ``t`` indexes tokens (b * N + i), ``c`` columns of the model width, ``j`` hidden units.

A tile has ``BT`` tokens, ``BD`` columns or ``RP`` hidden units. RP covers all hidden units in the forward pass of ADePT
and a part of them in the other kernels. Small parameters and the output are contiguous. The table and the ids may have
any strides. A new batch size or length does not require recompilation (``VARYING``). The number ``R`` of hidden units
is a constant, so that the addresses of the rows of w1 are constant offsets.

With ``p_entries``, parameters have a leading dimension K. A program then processes tokens of a single row of the batch,
or the tokens that use one entry. The code for entries and spans is compiled only for calls that use them.
"""

import triton
import triton.language as tl

from ...products import add_exact_product

VARYING = ["stride_ids_b", "B", "N", "S", "P", "T", "length", "last", "rows", "blocks", "parts", "token_parts"]


@triton.jit
def load_ids(p_ids, stride_ids_b, stride_ids_n, o_t, there, N):
    """Load ids [BT] as 64-bit integers, with 0 beyond the last token."""
    p = p_ids + (o_t // N).to(tl.int64) * stride_ids_b + (o_t % N).to(tl.int64) * stride_ids_n
    return tl.load(p, mask=there, other=0).to(tl.int64)


@triton.jit
def load_tile(p, o_row, stride_row, stride_column, o_c, there, d):
    """Load a tile [BT, BD] of rows ``o_row`` (64 bits) and columns ``o_c``, with 0 outside the matrix."""
    p_tile = p + (o_row * stride_row)[:, None] + o_c.to(tl.int64)[None, :] * stride_column
    return tl.load(p_tile, mask=there[:, None] & (o_c < d)[None, :], other=0.0)


@triton.jit
def load_matrix(p_x, o_i, o_j, rows, columns):
    """Load a tile [o_i, o_j] of a contiguous matrix [rows, columns], with 0 outside the matrix."""
    there = (o_i < rows)[:, None] & (o_j < columns)[None, :]
    return tl.load(p_x + o_i.to(tl.int64)[:, None] * columns + o_j[None, :], mask=there, other=0.0)


@triton.jit
def load_rows(p_x, first, o_j, rows, columns: tl.constexpr, BD: tl.constexpr):
    """Load BD rows from ``first`` on of a contiguous matrix [rows, columns], with 0 outside the matrix.

    The addresses of the rows are constant offsets from that of the first row.
    """
    o_i = tl.arange(0, BD)
    there = (o_i < rows - first)[:, None] & (o_j < columns)[None, :]
    return tl.load(p_x + tl.cast(first, tl.int64) * columns + (o_i[:, None] * columns + o_j[None, :]), there, other=0.0)


@triton.jit
def store_tile(p, o_row, stride_row, o_c, there, d, b_x):
    """Store a tile [BT, BD] to rows ``o_row`` (64 bits) and columns ``o_c`` of a matrix with contiguous rows."""
    p_tile = p + (o_row * stride_row)[:, None] + o_c[None, :]
    tl.store(p_tile, b_x, mask=there[:, None] & (o_c < d)[None, :])


@triton.jit
def draw_factors(p_seed, o_t, o_j, N, drop_below, keep):
    """Draw the dropout factors [BT, RP] of hidden units. The counter is (hidden unit, position, row of the batch)."""
    zero = tl.zeros((o_t.shape[0], o_j.shape[0]), tl.int32)
    word, _, _, _ = tl.philox(
        tl.load(p_seed), o_j[None, :] + zero, (o_t % N)[:, None] + zero, (o_t // N)[:, None] + zero, zero
    )
    return tl.where(word.to(tl.int64) >= drop_below, keep, 0.0)


@triton.jit
def find_tokens(p_entries, block, B, N, BT: tl.constexpr):
    """Return the token indices [BT] of a block, the mask [BT] of existing tokens, and the entry of the bank.

    Without ``p_entries``, a block may span several rows of the batch, and the entry is 0.
    """
    if p_entries is None:
        o_t = block * BT + tl.arange(0, BT)
        there = o_t < B * N
        entry = tl.zeros((), tl.int64)
    else:
        row_blocks = tl.cdiv(N, BT)
        b = block // row_blocks
        o_i = block % row_blocks * BT + tl.arange(0, BT)
        o_t = b * N + o_i
        there = o_i < N
        entry = tl.load(p_entries + b).to(tl.int64)
    return o_t, there, entry


@triton.jit
def copy_prompt(p_prompt, p_spans, p_out, program, B, N, S, d, BT: tl.constexpr, BD: tl.constexpr):
    """Copy a tile [BT, BD] of prompt vectors to the front of every row of the batch.

    ``program`` counts the tiles of the matrix [B * S, d], row by row.
    """
    column_blocks = tl.cdiv(d, BD)
    o_row = program // column_blocks * BT + tl.arange(0, BT)
    o_c = program % column_blocks * BD + tl.arange(0, BD)
    there = o_row < B * S
    o_from = (o_row % S).to(tl.int64)
    o_to = (o_row // S).to(tl.int64) * (S + N) + o_from
    seen = there
    if p_spans is not None:
        p_span = p_spans + o_row // S * 2
        o_from -= S - tl.load(p_span + 1, mask=there, other=0).to(tl.int64)  # index in the row's prompt
        seen = there & (o_from >= 0)
        o_from += tl.load(p_span, mask=there, other=0).to(tl.int64)
    store_tile(p_out, o_to, d, o_c, there, d, load_tile(p_prompt, o_from, d, 1, o_c, seen, d))


@triton.jit
def embed_tokens(
    p_weight, stride_v, stride_d, p_w1, p_b1, p_w2, p_b2, p_seed, p_out,
    o_t, o_id, there, o_row, N, d, scale, drop_below, keep,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write the embeddings of BT tokens, with the network's offset, to the rows ``o_row`` [BT] of the output.

    The first loop over columns computes all hidden units. The second loop loads the embeddings again, so that a program
    never holds all d columns, and adds the offset. It begins with the last columns, which are still in the cache, and
    loads one step ahead.
    """
    o_j = tl.arange(0, RP)
    blocks = tl.cdiv(d, BD)
    b_h = tl.zeros((BT, RP), tl.float32)
    b_next = load_rows(p_w1, 0, o_j, d, R, BD) if AHEAD else 0
    for block in range(0, blocks):
        o_c = block * BD + tl.arange(0, BD)
        # [BT, BD]
        b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
        if AHEAD:
            b_w1 = b_next
            b_next = load_rows(p_w1, (block + 1) * BD, o_j, d, R, BD)
        else:
            b_w1 = load_rows(p_w1, block * BD, o_j, d, R, BD)
        b_h = add_exact_product(b_e, b_w1, b_h)
    b_h += tl.load(p_b1 + o_j, mask=o_j < R, other=0.0).to(tl.float32)[None, :]
    if p_seed is not None:
        b_h *= draw_factors(p_seed, o_t, o_j, N, drop_below, keep)
    # [BT, RP]
    b_z = tl.where(b_h < 0.0, 0.0, b_h).to(p_w2.dtype.element_ty)
    o_c = (blocks - 1) * BD + tl.arange(0, BD)
    # [BT, BD]
    b_later = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
    for step in range(0, blocks):
        first = (blocks - 1 - step) * BD
        o_c = first + tl.arange(0, BD)
        b_e = b_later
        b_later = load_tile(p_weight, o_id, stride_v, stride_d, o_c - BD, there & (first > 0), d)
        b_y = tl.dot(b_z, load_matrix(p_w2, o_j, o_c, R, d), input_precision="ieee")
        b_y += tl.load(p_b2 + o_c, mask=o_c < d, other=0.0).to(tl.float32)[None, :]
        store_tile(p_out, o_row, d, o_c, there, d, (b_e.to(tl.float32) + scale * b_y).to(b_e.dtype))


@triton.jit
def copy_tokens(p_weight, stride_v, stride_d, p_out, o_id, there, o_row, d, BD: tl.constexpr):
    """Copy the table's entries of BT tokens to the rows ``o_row`` [BT] of the output."""
    for c in range(0, d, BD):
        o_c = c + tl.arange(0, BD)
        store_tile(p_out, o_row, d, o_c, there, d, load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d))


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_fwd_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_prompt, p_spans, p_entries,
    p_w1, p_b1, p_w2, p_b2, p_seed, p_out,
    B, N, S, d, scale, drop_below, keep,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Embed tokens for PT (no w1) and ADePT.

    Each of the first programs processes BT tokens, for PT only BD of their columns. Each of the remaining programs
    copies a tile of prompt vectors.
    """
    program = tl.program_id(0)
    token_blocks = tl.cdiv(B * N, BT) if p_entries is None else B * tl.cdiv(N, BT)
    splits = tl.cdiv(d, BD) if p_w1 is None else 1
    if program >= token_blocks * splits:
        if p_prompt is not None:
            copy_prompt(p_prompt, p_spans, p_out, program - token_blocks * splits, B, N, S, d, BT, BD)
    else:
        o_t, there, entry = find_tokens(p_entries, program // splits, B, N, BT)
        o_id = load_ids(p_ids, stride_ids_b, stride_ids_n, o_t, there, N)
        o_row = (o_t // N).to(tl.int64) * (S + N) + S + o_t % N
        if p_w1 is None:
            o_c = program % splits * BD + tl.arange(0, BD)
            store_tile(p_out, o_row, d, o_c, there, d, load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d))
        elif p_entries is None:
            embed_tokens(
                p_weight, stride_v, stride_d, p_w1, p_b1, p_w2, p_b2, p_seed, p_out,
                o_t, o_id, there, o_row, N, d, scale, drop_below, keep, BT, BD, RP, R, AHEAD,
            )  # fmt: skip
        elif entry < 0:
            copy_tokens(p_weight, stride_v, stride_d, p_out, o_id, there, o_row, d, BD)
        else:
            embed_tokens(
                p_weight, stride_v, stride_d,
                p_w1 + entry * d * R, p_b1 + entry * R, p_w2 + entry * R * d, p_b2 + entry * d, p_seed, p_out,
                o_t, o_id, there, o_row, N, d, scale, drop_below, keep, BT, BD, RP, R, AHEAD,
            )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_low_rank_fwd_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_prompt, p_spans, p_entries, p_a, p_b, p_out,
    B, N, S, T, d, scale, rows,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Embed tokens for DePT and ACCEPT.

    Each of the first programs processes BT positions and BD columns of ``rows`` rows of the batch. It computes their
    common offset once, and loads the embeddings one row ahead. Each of the remaining programs copies a tile of prompt
    vectors. Without ``p_b``, the offset is dense (ACCEPT), and ``p_a`` is [T, d].
    """
    program = tl.program_id(0)
    column_blocks = tl.cdiv(d, BD)
    position_blocks = tl.cdiv(N, BT)
    token_programs = position_blocks * tl.cdiv(B, rows) * column_blocks
    if program >= token_programs:
        if p_prompt is not None:
            copy_prompt(p_prompt, p_spans, p_out, program - token_programs, B, N, S, d, BT, BD)
    else:
        block = program // column_blocks
        o_c = program % column_blocks * BD + tl.arange(0, BD)
        o_i = block % position_blocks * BT + tl.arange(0, BT)
        there = o_i < N
        first = block // position_blocks * rows
        stop = tl.minimum(first + rows, B)
        p_id = p_ids + o_i.to(tl.int64) * stride_ids_n
        o_id = tl.load(p_id + tl.cast(first, tl.int64) * stride_ids_b, mask=there, other=0).to(tl.int64)
        # [BT, BD]
        b_next = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
        seen = there & (first + 1 < stop)
        o_id = tl.load(p_id + tl.cast(first + 1, tl.int64) * stride_ids_b, mask=seen, other=0).to(tl.int64)
        positions, ranks = N, R
        if p_entries is not None:
            entry = tl.load(p_entries + first).to(tl.int64)
            positions, ranks = tl.where(entry < 0, 0, N), tl.where(entry < 0, 0, R)  # entry -1 reads nothing
            if p_b is None:
                p_a += entry * T * d
            else:
                p_a += entry * T * R
                p_b += entry * R * d
        if p_b is None:
            # [BT, BD]
            b_y = load_tile(p_a, o_i.to(tl.int64), d, 1, o_c, o_i < positions, d).to(tl.float32)
        else:
            b_y = tl.zeros((BT, BD), tl.float32)
            for j in range(0, R, RP):
                o_j = j + tl.arange(0, RP)
                # [BT, RP]
                b_a = load_matrix(p_a, o_i, o_j, positions, R)
                b_y = add_exact_product(b_a, load_matrix(p_b, o_j, o_c, ranks, d), b_y)
        b_y *= scale
        for b in range(first, stop):
            b_e = b_next
            b_next = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there & (b + 1 < stop), d)
            seen = there & (b + 2 < stop)
            o_id = tl.load(p_id + tl.cast(b + 2, tl.int64) * stride_ids_b, mask=seen, other=0).to(tl.int64)
            o_row = (b * (S + N) + S + o_i).to(tl.int64)
            store_tile(p_out, o_row, d, o_c, there, d, (b_e.to(tl.float32) + b_y).to(b_e.dtype))


@triton.jit
def find_rows(p_ids, stride_ids_b, stride_ids_n, stride_dy_b, stride_dy_n, o_t, there, N, S):
    """Return the ids [BT] of tokens, and the offsets [BT] of their rows in the gradient of the output."""
    o_dy = (o_t // N).to(tl.int64) * stride_dy_b + (S + o_t % N).to(tl.int64) * stride_dy_n
    return load_ids(p_ids, stride_ids_b, stride_ids_n, o_t, there, N), o_dy


@triton.jit
def differentiate_hidden(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
    p_w1, p_b1, p_w2, p_seed, p_z, p_dh, p_exact, p_db1,
    o_t, there, N, S, d, scale, drop_below, keep,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, R: tl.constexpr, RS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute and store z and dh [BT, RP] of BT tokens and RP hidden units, and the sum of dh over the tokens."""
    o_id, o_dy = find_rows(p_ids, stride_ids_b, stride_ids_n, stride_dy_b, stride_dy_n, o_t, there, N, S)
    o_j = tl.program_id(1) * RP + tl.arange(0, RP)
    b_dz = tl.zeros((BT, RP), tl.float32)
    if p_w1 is not None:
        b_h = tl.zeros((BT, RP), tl.float32)
        b_next = load_rows(p_w1, 0, o_j, d, R, BD) if AHEAD else 0
    for c in range(0, d, BD):
        o_c = c + tl.arange(0, BD)
        if p_w1 is not None:
            # [BT, BD]
            b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
            if AHEAD:
                b_w1 = b_next
                b_next = load_rows(p_w1, c + BD, o_j, d, R, BD)
            else:
                b_w1 = load_rows(p_w1, c, o_j, d, R, BD)
            b_h = add_exact_product(b_e, b_w1, b_h)
        # [BT, BD]
        b_dy = load_tile(p_dy, o_dy, 1, stride_dy_d, o_c, there, d)
        b_dz = add_exact_product(b_dy, tl.trans(load_matrix(p_w2, o_j, o_c, R, d)), b_dz)
    # [BT, RP]
    b_dh = scale * b_dz
    o_z = o_t.to(tl.int64)[:, None] * RS + o_j[None, :]
    b_stored = there[:, None] & (o_j < RS)[None, :]
    if p_w1 is not None:
        b_h += tl.load(p_b1 + o_j, mask=o_j < R, other=0.0).to(tl.float32)[None, :]
        if p_seed is not None:
            # [BT, RP]
            b_keep = draw_factors(p_seed, o_t, o_j, N, drop_below, keep)
            b_h *= b_keep
            b_dh *= b_keep
        b_dh = tl.where(b_h > 0.0, b_dh, 0.0)
    if p_z is not None:
        b_z = tl.where((o_j == R)[None, :], 1.0, tl.where(b_h < 0.0, 0.0, b_h))
        tl.store(p_z + o_z, b_z.to(p_z.dtype.element_ty), mask=b_stored)
    if p_dh is not None:
        tl.store(p_dh + o_z, b_dh.to(p_dh.dtype.element_ty), mask=b_stored)
    if p_exact is not None:
        o_exact = o_t.to(tl.int64)[:, None] * R + o_j[None, :]
        tl.store(p_exact + o_exact, b_dh, mask=there[:, None] & (o_j < R)[None, :])
    if p_db1 is not None:
        tl.store(p_db1 + tl.program_id(0).to(tl.int64) * R + o_j, tl.sum(b_dh, 0), mask=o_j < R)


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_bwd_hidden_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
    p_entries, p_w1, p_b1, p_w2, p_seed, p_z, p_dh, p_exact, p_db1,
    B, N, S, d, scale, drop_below, keep,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, R: tl.constexpr, RS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute z = relu(h) and dh, for BT tokens and RP hidden units.

    z and dh have the dtype of the table and RS >= R columns, so that their rows can be read by wide loads. Column R has
    1 in z, and all other padding is 0. ``p_exact`` is dh in float32, [B * N, R], and ``p_db1`` the sum of dh over each
    block of tokens. Without ``p_w1``, ``p_w2`` is DePT's b, dh is the gradient of the rows of a, and z is not computed.
    Rows of the batch without an offset are skipped.
    """
    o_t, there, entry = find_tokens(p_entries, tl.program_id(0), B, N, BT)
    if p_entries is None:
        differentiate_hidden(
            p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d,
            p_dy, stride_dy_b, stride_dy_n, stride_dy_d, p_w1, p_b1, p_w2, p_seed, p_z, p_dh, p_exact, p_db1,
            o_t, there, N, S, d, scale, drop_below, keep, BT, BD, RP, R, RS, AHEAD,
        )  # fmt: skip
    elif entry >= 0:
        if p_w1 is not None:
            p_w1 += entry * d * R
            p_b1 += entry * R
        differentiate_hidden(
            p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d,
            p_dy, stride_dy_b, stride_dy_n, stride_dy_d, p_w1, p_b1, p_w2 + entry * R * d, p_seed,
            p_z, p_dh, p_exact, p_db1,
            o_t, there, N, S, d, scale, drop_below, keep, BT, BD, RP, R, RS, AHEAD,
        )  # fmt: skip


@triton.jit
def add_weights(
    b_dw1, b_dw2, b_db2, p_weight, stride_v, stride_d, p_dy, stride_dy_d,
    p_z, p_dh, p_dw1, p_db2, o_id, o_dy, o_t, there, o_c, o_j, d, RS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Add the contribution of a block of tokens to dw1 and dw2 [BD, RP] and db2 (``add_tokens``).

    If z has padding, column R of dw2 is db2, because column R of z is 1.
    """
    o_z = o_t.to(tl.int64)
    if p_dw1 is not None:
        # [BT, BD]
        b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
        # [BT, RP]
        b_dh = load_tile(p_dh, o_z, RS, 1, o_j, there, RS)
        b_dw1 = add_exact_product(tl.trans(b_e), b_dh, b_dw1)
    # [BT, BD]
    b_dy = load_tile(p_dy, o_dy, 1, stride_dy_d, o_c, there, d)
    if p_z is not None:
        # [BT, RP]
        b_z = load_tile(p_z, o_z, RS, 1, o_j, there, RS)
        b_dw2 = add_exact_product(tl.trans(b_dy), b_z, b_dw2)
    if p_db2 is not None and RS == R:
        b_db2 = add_tokens(b_dy, b_db2)
    return b_dw1, b_dw2, b_db2


@triton.jit
def add_tokens(b_dy, b_db2):
    """Add a tile [BT, BD] to sums over tokens, [BT, BD] in float32, or in 16 bits [BD, 16] with equal columns.

    In 16 bits this is a product with ones. Otherwise the tile would also be read into registers, and Triton 3.6 and 3.7
    would give its pipelined load one buffer too few: the next load could overwrite it while the matrix units read it.
    """
    if b_dy.dtype == tl.float32:
        return b_db2 + b_dy
    else:
        return add_exact_product(tl.trans(b_dy), tl.full((b_dy.shape[0], 16), 1.0, b_dy.dtype), b_db2)


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_bwd_weights_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
    p_entries, p_z, p_dh, p_dw1, p_dw2, p_db2,
    B, N, S, d, blocks,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, R: tl.constexpr, RS: tl.constexpr,
):  # fmt: skip
    """Compute dw1 [d, R], dw2 [R, d] and db2 [d] over ``blocks`` blocks of BT tokens.

    dw2 and db2 do not yet include the offset scale. Each second index of the grid stores a separate float32 part of the
    sums. The third index selects a part of the hidden units. With ``p_entries``, the first index also selects the entry
    of the bank. Every entry has its own parts, and they cover the blocks of all rows that use the entry. The ids are
    loaded one block ahead, so that Triton can pipeline the loads of the embeddings.
    """
    column_blocks = tl.cdiv(d, BD)
    o_c = tl.program_id(0) % column_blocks * BD + tl.arange(0, BD)
    o_j = tl.program_id(2) * RP + tl.arange(0, RP)
    o_first = tl.program_id(1) * blocks * BT + tl.arange(0, BT)
    b_dw1 = tl.zeros((BD, RP), tl.float32)
    b_dw2 = tl.zeros((BD, RP), tl.float32)  # the transpose of a block of dw2
    b_db2 = tl.zeros((BT, BD), tl.float32) if p_dy.dtype.element_ty == tl.float32 else tl.zeros((BD, 16), tl.float32)
    if p_entries is None:
        o_next_id, o_next_dy = find_rows(
            p_ids, stride_ids_b, stride_ids_n, stride_dy_b, stride_dy_n, o_first, o_first < B * N, N, S
        )
        for block in range(0, blocks):
            o_t = o_first + block * BT
            o_id, o_dy = o_next_id, o_next_dy
            o_next_id, o_next_dy = find_rows(
                p_ids, stride_ids_b, stride_ids_n, stride_dy_b, stride_dy_n, o_t + BT, o_t + BT < B * N, N, S
            )
            b_dw1, b_dw2, b_db2 = add_weights(
                b_dw1, b_dw2, b_db2, p_weight, stride_v, stride_d, p_dy, stride_dy_d,
                p_z, p_dh, p_dw1, p_db2, o_id, o_dy, o_t, o_t < B * N, o_c, o_j, d, RS, R,
            )  # fmt: skip
    else:
        entry = tl.program_id(0) // column_blocks
        for b in range(0, B):
            used = tl.where(tl.load(p_entries + b) == entry, blocks, 0)
            for block in range(0, used):
                o_i = o_first + block * BT
                o_t = b * N + o_i
                o_id, o_dy = find_rows(p_ids, stride_ids_b, stride_ids_n, stride_dy_b, stride_dy_n, o_t, o_i < N, N, S)
                b_dw1, b_dw2, b_db2 = add_weights(
                    b_dw1, b_dw2, b_db2, p_weight, stride_v, stride_d, p_dy, stride_dy_d,
                    p_z, p_dh, p_dw1, p_db2, o_id, o_dy, o_t, o_i < N, o_c, o_j, d, RS, R,
                )  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    if p_entries is not None:
        part += (tl.program_id(0) // column_blocks).to(tl.int64) * tl.num_programs(1)
    b_inside = (o_c < d)[:, None] & (o_j < R)[None, :]
    if p_dw1 is not None:
        tl.store(p_dw1 + (part * d + o_c.to(tl.int64))[:, None] * R + o_j[None, :], b_dw1, mask=b_inside)
    if p_dw2 is not None:
        tl.store(p_dw2 + (part * R + o_j.to(tl.int64))[None, :] * d + o_c[:, None], b_dw2, mask=b_inside)
    if p_db2 is not None:
        # Only one part of the hidden units has column R, and without padding, only the first one stores db2.
        if RS > R:
            b_x = tl.sum(tl.where((o_j == R)[None, :], b_dw2, 0.0), 1)
        elif p_dy.dtype.element_ty == tl.float32:
            b_x = tl.sum(b_db2, 0)
        else:
            b_x = tl.max(b_db2, 1)  # all columns are equal
        only = tl.program_id(2) == (R // RP if RS > R else 0)
        tl.store(p_db2 + part * d + o_c, b_x, mask=(o_c < d) & only)


@triton.jit
def sum_parts(p_parts, p_sum, block, entry, parts, size, scale, BP: tl.constexpr, BD: tl.constexpr):
    """Sum a block of BD elements over the parts [K, parts, size] of an entry, in steps of BP parts."""
    o_e = block * BD + tl.arange(0, BD)
    o_part = entry.to(tl.int64) * parts
    b_sum = tl.zeros((BP, BD), tl.float32)
    for p in range(0, parts, BP):
        o_p = p + tl.arange(0, BP)
        b_sum += load_tile(p_parts, o_part + o_p.to(tl.int64), size, 1, o_e, o_p < parts, size)
    b_x = scale * tl.sum(b_sum, 0)
    tl.store(p_sum + entry.to(tl.int64) * size + o_e, b_x.to(p_sum.dtype.element_ty), mask=o_e < size)


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_bwd_sum_kernel(
    p_dy, stride_dy_b, stride_dy_n, stride_dy_d, p_prompt, p_dw1, p_w1, p_dw2, p_w2, p_db2, p_b2, p_db1, p_b1,
    B, S, d, parts, token_parts, scale,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of the prompt over the rows of the batch, and the parts of the network's gradients.

    The grid counts blocks of the gradient of the prompt, then for each entry of the bank blocks of the gradients of w1,
    w2, b2 and b1, in this order. Without a bank, there is a single entry. The sum of a block has BT partial sums.
    """
    program = tl.program_id(0)
    column_blocks = tl.cdiv(d, BD)
    matrix_blocks = tl.cdiv(d * R, BD)
    if p_prompt is not None:
        if program < S * column_blocks:
            o_s = (program // column_blocks).to(tl.int64)
            o_c = program % column_blocks * BD + tl.arange(0, BD)
            b_sum = tl.zeros((BT, BD), tl.float32)
            for b in range(0, B, BT):
                o_b = b + tl.arange(0, BT)
                o_dy = o_b.to(tl.int64) * stride_dy_b + o_s * stride_dy_n
                b_sum += load_tile(p_dy, o_dy, 1, stride_dy_d, o_c, o_b < B, d).to(tl.float32)
            b_x = tl.sum(b_sum, 0).to(p_prompt.dtype.element_ty)
            tl.store(p_prompt + o_s * d + o_c, b_x, mask=o_c < d)
        program -= S * column_blocks
    each = 0 * column_blocks  # blocks of an entry
    if p_w1 is not None:
        each += matrix_blocks
    if p_w2 is not None:
        each += matrix_blocks
    if p_b2 is not None:
        each += column_blocks
    if p_b1 is not None:
        each += tl.cdiv(R, RP)
    entry = tl.maximum(program, 0) // tl.maximum(each, 1)
    program -= entry * each
    if p_w1 is not None:
        if (program >= 0) & (program < matrix_blocks):
            sum_parts(p_dw1, p_w1, program, entry, parts, d * R, 1.0, BT, BD)
        program -= matrix_blocks
    if p_w2 is not None:
        if (program >= 0) & (program < matrix_blocks):
            sum_parts(p_dw2, p_w2, program, entry, parts, d * R, scale, BT, BD)
        program -= matrix_blocks
    if p_b2 is not None:
        if (program >= 0) & (program < column_blocks):
            sum_parts(p_db2, p_b2, program, entry, parts, d, scale, BT, BD)
        program -= column_blocks
    if p_b1 is not None:  # noqa: SIM102 (known at compile time, unlike the next condition)
        if (program >= 0) & (program < tl.cdiv(R, RP)):
            sum_parts(p_db1, p_b1, program, entry, token_parts, R, 1.0, BT * BD // RP, RP)


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_bwd_spans_kernel(
    p_dy, p_spans, p_sum,
    B, P, length, last, d, scale,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of all copies of each vector of a store, [P, d], and multiply by the scale.

    ``p_dy`` is [B, length, d]. The copies of span b end right before position ``last`` of row b.
    """
    first = tl.program_id(0) * BT
    o_row = first + tl.arange(0, BT)
    o_c = tl.program_id(1) * BD + tl.arange(0, BD)
    b_sum = tl.zeros((BT, BD), tl.float32)
    for b in range(0, B):
        start = tl.load(p_spans + 2 * b).to(tl.int64)
        stop = start + tl.load(p_spans + 2 * b + 1).to(tl.int64)
        if (start < first + BT) & (stop > first):
            o_dy = tl.cast(b, tl.int64) * length + last - stop + o_row
            seen = (o_row >= start) & (o_row < stop)
            b_sum += load_tile(p_dy, o_dy, d, 1, o_c, seen, d).to(tl.float32)
    o_sum = o_row.to(tl.int64)[:, None] * d + o_c[None, :]
    tl.store(p_sum + o_sum, scale * b_sum, mask=(o_row < P)[:, None] & (o_c < d)[None, :])
