"""Measure prefixes of many keys, and stores of many prefixes with a span for each row.

"long" has causal tokens and one prefix of 512 to 8,192 keys. The floor is SDPA over as many keys without a mask.
``masked`` is SDPA with the necessary causal mask. Both concatenate their keys before the timed part.
"spans" has 16 rows. In the floor, all rows share one prefix. ``fused`` is a store of 16 prefixes with a span for each
row. ``copied`` has a separate prefix tensor for each row.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastprefix

from .attention import BACKENDS, build_dense_mask
from .measure import Work
from .suite import DTYPES, Problem, add_common, build_kernel_work, draw, run_suite

HEADS, KV_HEADS, D = 8, 4, 64
TOKENS, LENGTHS = 1024, (512, 2048, 8192)
ROWS, SPAN, ROW_TOKENS = 16, 100, ((128, 128), (512, 512), (1, 512))


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    tokens, lengths, row_tokens = (32, (64,), ((8, 8),)) if options.quick else (TOKENS, LENGTHS, ROW_TOKENS)
    for name in options.dtype:
        draw_one = partial(draw, dtype=DTYPES[name], device=device)
        for length in lengths:
            case = {"kind": "long", "N": tokens, "M": tokens, "P": length, "dtype": name}
            yield case, attend_long(draw_one, tokens, length, device)
        for N, M in row_tokens:
            yield {"kind": "spans", "N": N, "M": M, "P": SPAN, "dtype": name}, attend_spans(draw_one, N, M, device)


def attend_long(draw: Any, tokens: int, length: int, device: torch.device) -> dict[str, Work]:
    q, k, v = (draw(1, heads, tokens, D) for heads in (HEADS, KV_HEADS, KV_HEADS))
    prefix = [draw(KV_HEADS, length, D) for _ in range(2)]
    grad = draw(1, HEADS, tokens, D).detach()
    joined = [torch.cat([p[None], x], 2).detach().requires_grad_() for p, x in zip(prefix, (k, v), strict=True)]
    fused = partial(fastprefix.prefix_attention, q, k, v, *prefix, is_causal=True, backend=BACKENDS[device.type])
    keys, values = joined
    sdpa = partial(F.scaled_dot_product_attention, q, keys, values, enable_gqa=True)
    mask = build_dense_mask(tokens, tokens, length, device)
    return {
        "fused": build_kernel_work("ours", fused, (q, k, v, *prefix), grad),
        "unmasked": build_kernel_work("floor", sdpa, (q, *joined), grad),
        "masked": build_kernel_work("theirs", partial(sdpa, attn_mask=mask), (q, *joined), grad),
    }


def attend_spans(draw: Any, N: int, M: int, device: torch.device) -> dict[str, Work]:
    q, k, v = draw(ROWS, HEADS, N, D), draw(ROWS, KV_HEADS, M, D), draw(ROWS, KV_HEADS, M, D)
    grad = draw(ROWS, HEADS, N, D).detach()
    shared = [draw(KV_HEADS, SPAN, D) for _ in range(2)]
    store = [draw(KV_HEADS, ROWS * SPAN, D) for _ in range(2)]
    copies = [x.detach().unflatten(1, (ROWS, SPAN)).transpose(0, 1).contiguous().requires_grad_() for x in store]
    spans = torch.tensor([(row * SPAN, SPAN) for row in range(ROWS)], device=device)
    attend = partial(fastprefix.prefix_attention, q, k, v, is_causal=True, backend=BACKENDS[device.type])
    return {
        "shared": build_kernel_work("floor", partial(attend, *shared), (q, k, v, *shared), grad),
        "fused": build_kernel_work("ours", partial(attend, *store, prefix_spans=spans), (q, k, v, *store), grad),
        "copied": build_kernel_work("theirs", partial(attend, *copies), (q, k, v, *copies), grad),
    }


add_arguments = partial(add_common, rounds=10, seconds=2.0, dtypes=["float32", "bfloat16"])
run = partial(run_suite, "stores", list_problems)
