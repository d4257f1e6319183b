# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The Triton kernels. ``t`` indexes tokens (b * N + i), ``c`` columns of the model width, ``j`` hidden units.

A tile has ``BT`` tokens, ``BD`` columns or ``RP`` hidden units. RP covers all hidden units in the forward pass of ADePT
and a part of them in the other kernels. Small parameters and the output are contiguous. The table and the ids may have
any strides. A new batch size or length does not require recompilation (``VARYING``).

With ``p_entries``, parameters have a leading dimension K. A program then processes tokens of a single row of the batch,
or the tokens that use one entry. The code for entries and spans is compiled only for calls that use them.
"""

import triton
import triton.language as tl

from ...products import add_exact_product

VARYING = ["stride_ids_b", "B", "N", "S", "P", "T", "length", "last", "rows", "blocks"]


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
def copy_prompt(p_prompt, p_spans, p_out, block, B, N, S, d, BT: tl.constexpr, BD: tl.constexpr):
    """Copy prompt vectors to the front of every row of the batch. ``block`` counts blocks of the B * S positions."""
    o_row = block * BT + tl.arange(0, BT)
    there = o_row < B * S
    o_from = (o_row % S).to(tl.int64)
    o_to = (o_row // S).to(tl.int64) * (S + N) + o_from
    seen = there
    if p_spans is not None:
        p_span = p_spans + o_row // S * 2
        o_from -= S - tl.load(p_span + 1, mask=there, other=0).to(tl.int64)  # index in the row's prompt
        seen = there & (o_from >= 0)
        o_from += tl.load(p_span, mask=there, other=0).to(tl.int64)
    for c in range(0, d, BD):
        o_c = c + tl.arange(0, BD)
        # [BT, BD]
        b_x = load_tile(p_prompt, o_from, d, 1, o_c, seen, d)
        tl.store(p_out + (o_to * d)[:, None] + o_c[None, :], b_x, mask=there[:, None] & (o_c < d)[None, :])


@triton.jit
def copy_tokens(p_weight, stride_v, stride_d, p_row, o_id, there, d, BD: tl.constexpr):
    """Copy the table's entries of BT tokens to the addresses ``p_row`` [BT]."""
    for c in range(0, d, BD):
        o_c = c + tl.arange(0, BD)
        # [BT, BD]
        b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
        tl.store(p_row[:, None] + o_c[None, :], b_e, mask=there[:, None] & (o_c < d)[None, :])


@triton.jit
def embed_tokens(
    p_weight, stride_v, stride_d, p_w1, p_b1, p_w2, p_b2, p_seed, p_row,
    o_t, o_id, there, N, d, r, scale, drop_below, keep,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Write the embeddings of BT tokens, with the network's offset, to the addresses ``p_row`` [BT].

    The first loop over columns computes all hidden units. The second loop loads the embeddings again, so that a program
    never holds all d columns, and adds the offset.
    """
    o_j = tl.arange(0, RP)
    b_h = tl.zeros((BT, RP), tl.float32)
    for c in range(0, d, BD):
        o_c = c + tl.arange(0, BD)
        # [BT, BD]
        b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
        b_h = add_exact_product(b_e, load_matrix(p_w1, o_c, o_j, d, r), b_h)
    b_h += tl.load(p_b1 + o_j, mask=o_j < r, other=0.0).to(tl.float32)[None, :]
    if p_seed is not None:
        b_h *= draw_factors(p_seed, o_t, o_j, N, drop_below, keep)
    # [BT, RP]
    b_z = tl.where(b_h < 0.0, 0.0, b_h).to(p_w2.dtype.element_ty)
    for c in range(0, d, BD):
        o_c = c + tl.arange(0, BD)
        # [BT, BD]
        b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
        b_y = tl.dot(b_z, load_matrix(p_w2, o_j, o_c, r, d), input_precision="ieee")
        b_y += tl.load(p_b2 + o_c, mask=o_c < d, other=0.0).to(tl.float32)[None, :]
        b_e = (b_e.to(tl.float32) + scale * b_y).to(b_e.dtype)
        tl.store(p_row[:, None] + o_c[None, :], b_e, mask=there[:, None] & (o_c < d)[None, :])


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_fwd_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_prompt, p_spans, p_entries,
    p_w1, p_b1, p_w2, p_b2, p_seed, p_out,
    B, N, S, d, r, scale, drop_below, keep,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Embed tokens for PT (no w1) and ADePT.

    Each of the first programs processes BT tokens. Each of the remaining programs copies BT prompt vectors.
    """
    block = tl.program_id(0)
    token_blocks = tl.cdiv(B * N, BT) if p_entries is None else B * tl.cdiv(N, BT)
    if block >= token_blocks:
        if p_prompt is not None:
            copy_prompt(p_prompt, p_spans, p_out, block - token_blocks, B, N, S, d, BT, BD)
    else:
        o_t, there, entry = find_tokens(p_entries, block, B, N, BT)
        o_id = load_ids(p_ids, stride_ids_b, stride_ids_n, o_t, there, N)
        p_row = p_out + ((o_t // N).to(tl.int64) * (S + N) + S + o_t % N) * d
        if p_w1 is None:
            copy_tokens(p_weight, stride_v, stride_d, p_row, o_id, there, d, BD)
        elif p_entries is None:
            embed_tokens(
                p_weight, stride_v, stride_d, p_w1, p_b1, p_w2, p_b2, p_seed, p_row,
                o_t, o_id, there, N, d, r, scale, drop_below, keep, BT, BD, RP,
            )  # fmt: skip
        elif entry < 0:
            copy_tokens(p_weight, stride_v, stride_d, p_row, o_id, there, d, BD)
        else:
            embed_tokens(
                p_weight, stride_v, stride_d,
                p_w1 + entry * d * r, p_b1 + entry * r, p_w2 + entry * r * d, p_b2 + entry * d, p_seed, p_row,
                o_t, o_id, there, N, d, r, scale, drop_below, keep, BT, BD, RP,
            )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_low_rank_fwd_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_prompt, p_spans, p_entries, p_a, p_b, p_out,
    B, N, S, T, d, r, scale, rows,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Embed tokens for DePT and ACCEPT.

    Each of the first programs processes BT positions of ``rows`` rows of the batch, and computes their common offset
    once. Each of the remaining programs copies BT prompt vectors. Without ``p_b``, the offset is dense (ACCEPT), and
    ``p_a`` is [T, d].
    """
    block = tl.program_id(0)
    position_blocks = tl.cdiv(N, BT)
    token_blocks = position_blocks * tl.cdiv(B, rows)
    if block >= token_blocks:
        if p_prompt is not None:
            copy_prompt(p_prompt, p_spans, p_out, block - token_blocks, B, N, S, d, BT, BD)
    else:
        o_i = block % position_blocks * BT + tl.arange(0, BT)
        first = block // position_blocks * rows
        positions, steps = N, r
        if p_entries is not None:
            entry = tl.load(p_entries + first).to(tl.int64)
            positions, steps = tl.where(entry < 0, 0, N), tl.where(entry < 0, 0, r)  # entry -1 reads nothing
            if p_b is None:
                p_a += entry * T * d
            else:
                p_a += entry * T * r
                p_b += entry * r * d
        for c in range(0, d, BD):
            o_c = c + tl.arange(0, BD)
            if p_b is None:
                # [BT, BD]
                b_y = load_tile(p_a, o_i.to(tl.int64), d, 1, o_c, o_i < positions, d).to(tl.float32)
            else:
                b_y = tl.zeros((BT, BD), tl.float32)
                for j in range(0, steps, RP):
                    o_j = j + tl.arange(0, RP)
                    # [BT, RP]
                    b_a = load_matrix(p_a, o_i, o_j, positions, r)
                    b_y = add_exact_product(b_a, load_matrix(p_b, o_j, o_c, r, d), b_y)
            b_y *= scale
            for b in range(first, tl.minimum(first + rows, B)):
                o_id = load_ids(p_ids, stride_ids_b, stride_ids_n, b * N + o_i, o_i < N, N)
                # [BT, BD]
                b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, o_i < N, d)
                p_row = p_out + (b * (S + N) + S + o_i).to(tl.int64) * d
                b_e = (b_e.to(tl.float32) + b_y).to(b_e.dtype)
                tl.store(p_row[:, None] + o_c[None, :], b_e, mask=(o_i < N)[:, None] & (o_c < d)[None, :])


@triton.jit
def differentiate_hidden(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
    p_w1, p_b1, p_w2, p_seed, p_z, p_dh,
    o_t, there, N, S, d, r, scale, drop_below, keep,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Compute and store z and dh [BT, RP] of BT tokens and RP hidden units."""
    o_dy = (o_t // N).to(tl.int64) * stride_dy_b + (S + o_t % N).to(tl.int64) * stride_dy_n
    o_j = tl.program_id(1) * RP + tl.arange(0, RP)
    b_dz = tl.zeros((BT, RP), tl.float32)
    if p_w1 is not None:
        o_id = load_ids(p_ids, stride_ids_b, stride_ids_n, o_t, there, N)
        b_h = tl.zeros((BT, RP), tl.float32)
    for c in range(0, d, BD):
        o_c = c + tl.arange(0, BD)
        if p_w1 is not None:
            # [BT, BD]
            b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
            b_h = add_exact_product(b_e, load_matrix(p_w1, o_c, o_j, d, r), b_h)
        # [BT, BD]
        b_dy = load_tile(p_dy, o_dy, 1, stride_dy_d, o_c, there, d)
        b_dz = add_exact_product(b_dy, tl.trans(load_matrix(p_w2, o_j, o_c, r, d)), b_dz)
    # [BT, RP]
    b_dh = scale * b_dz
    o_z = o_t.to(tl.int64)[:, None] * r + o_j[None, :]
    b_there = there[:, None] & (o_j < r)[None, :]
    if p_w1 is not None:
        b_h += tl.load(p_b1 + o_j, mask=o_j < r, other=0.0).to(tl.float32)[None, :]
        if p_seed is not None:
            # [BT, RP]
            b_keep = draw_factors(p_seed, o_t, o_j, N, drop_below, keep)
            b_h *= b_keep
            b_dh *= b_keep
        b_dh = tl.where(b_h > 0.0, b_dh, 0.0)
        tl.store(p_z + o_z, tl.where(b_h < 0.0, 0.0, b_h), mask=b_there)
    tl.store(p_dh + o_z, b_dh, mask=b_there)


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_bwd_hidden_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
    p_entries, p_w1, p_b1, p_w2, p_seed, p_z, p_dh,
    B, N, S, d, r, scale, drop_below, keep,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Compute z = relu(h) and dh, [B * N, r] float32, for BT tokens and RP hidden units.

    Without ``p_w1``, ``p_w2`` is DePT's b, dh is the gradient of the rows of a, and z is not computed. Rows of the
    batch without an offset are skipped.
    """
    o_t, there, entry = find_tokens(p_entries, tl.program_id(0), B, N, BT)
    if p_entries is None:
        differentiate_hidden(
            p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d,
            p_dy, stride_dy_b, stride_dy_n, stride_dy_d, p_w1, p_b1, p_w2, p_seed, p_z, p_dh,
            o_t, there, N, S, d, r, scale, drop_below, keep, BT, BD, RP,
        )  # fmt: skip
    elif entry >= 0:
        if p_w1 is not None:
            p_w1 += entry * d * r
            p_b1 += entry * r
        differentiate_hidden(
            p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d,
            p_dy, stride_dy_b, stride_dy_n, stride_dy_d, p_w1, p_b1, p_w2 + entry * r * d, p_seed, p_z, p_dh,
            o_t, there, N, S, d, r, scale, drop_below, keep, BT, BD, RP,
        )  # fmt: skip


@triton.jit
def add_weights(
    b_dw1, b_dw2, b_db2,
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
    p_z, p_dh, p_dw1, p_dw2, p_db2, o_t, there, o_c, o_j, N, S, d, r,
):  # fmt: skip
    """Add the contribution of a block of tokens to dw1 and dw2 [BD, RP] and db2 [BD]."""
    o_z = o_t.to(tl.int64)[:, None] * r + o_j[None, :]
    b_there = there[:, None] & (o_j < r)[None, :]
    o_dy = (o_t // N).to(tl.int64) * stride_dy_b + (S + o_t % N).to(tl.int64) * stride_dy_n
    if p_dw1 is not None:
        o_id = load_ids(p_ids, stride_ids_b, stride_ids_n, o_t, there, N)
        # [BT, BD]
        b_e = load_tile(p_weight, o_id, stride_v, stride_d, o_c, there, d)
        # [BT, RP]
        b_dh = tl.load(p_dh + o_z, mask=b_there, other=0.0).to(b_e.dtype)
        b_dw1 = add_exact_product(tl.trans(b_e), b_dh, b_dw1)
    # [BT, BD]
    b_dy = load_tile(p_dy, o_dy, 1, stride_dy_d, o_c, there, d)
    if p_dw2 is not None:
        # [BT, RP]
        b_z = tl.load(p_z + o_z, mask=b_there, other=0.0).to(b_dy.dtype)
        b_dw2 = add_exact_product(tl.trans(b_dy), b_z, b_dw2)
    if p_db2 is not None:
        b_db2 += tl.sum(b_dy.to(tl.float32), 0)
    return b_dw1, b_dw2, b_db2


@triton.jit(do_not_specialize=VARYING)
def prompt_embedding_bwd_weights_kernel(
    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d, p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
    p_entries, p_z, p_dh, p_dw1, p_dw2, p_db2,
    B, N, S, d, r, blocks,
    BT: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Compute dw1 [d, r], dw2 [d, r] (transposed) and db2 [d] over ``blocks`` blocks of BT tokens.

    dw2 and db2 do not yet include the offset scale. Each second index of the grid stores a separate float32 part of the
    sums. The third index selects a part of the hidden units. With ``p_entries``, the first index also selects the entry
    of the bank. Every entry has its own parts, and they cover the blocks of all rows that use the entry.
    """
    column_blocks = tl.cdiv(d, BD)
    o_c = tl.program_id(0) % column_blocks * BD + tl.arange(0, BD)
    o_j = tl.program_id(2) * RP + tl.arange(0, RP)
    b_dw1 = tl.zeros((BD, RP), tl.float32)
    b_dw2 = tl.zeros((BD, RP), tl.float32)
    b_db2 = tl.zeros((BD,), tl.float32)
    if p_entries is None:
        for block in range(0, blocks):
            o_t = (tl.program_id(1) * blocks + block) * BT + tl.arange(0, BT)
            b_dw1, b_dw2, b_db2 = add_weights(
                b_dw1, b_dw2, b_db2,
                p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d,
                p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
                p_z, p_dh, p_dw1, p_dw2, p_db2, o_t, o_t < B * N, o_c, o_j, N, S, d, r,
            )  # fmt: skip
    else:
        entry = tl.program_id(0) // column_blocks
        for b in range(0, B):
            used = tl.where(tl.load(p_entries + b) == entry, blocks, 0)
            for block in range(0, used):
                o_i = (tl.program_id(1) * blocks + block) * BT + tl.arange(0, BT)
                b_dw1, b_dw2, b_db2 = add_weights(
                    b_dw1, b_dw2, b_db2,
                    p_ids, stride_ids_b, stride_ids_n, p_weight, stride_v, stride_d,
                    p_dy, stride_dy_b, stride_dy_n, stride_dy_d,
                    p_z, p_dh, p_dw1, p_dw2, p_db2, b * N + o_i, o_i < N, o_c, o_j, N, S, d, r,
                )  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    if p_entries is not None:
        part += (tl.program_id(0) // column_blocks).to(tl.int64) * tl.num_programs(1)
    o_w = (part * d + o_c.to(tl.int64))[:, None] * r + o_j[None, :]
    b_inside = (o_c < d)[:, None] & (o_j < r)[None, :]
    if p_dw1 is not None:
        tl.store(p_dw1 + o_w, b_dw1, mask=b_inside)
    if p_dw2 is not None:
        tl.store(p_dw2 + o_w, b_dw2, mask=b_inside)
    if p_db2 is not None:
        first = tl.program_id(2) == 0  # db2 is the same for all parts of the hidden units, so only one stores it
        tl.store(p_db2 + part * d + o_c, b_db2, mask=(o_c < d) & first)


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
