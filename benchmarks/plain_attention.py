"""Compare attention without a prefix in this package (``fused``) and in PyTorch (``sdpa``).

``sdpa`` gets an equivalent mask, or only ``is_causal`` if that is sufficient. ``--flex`` adds ``flex``, which is
compiled FlexAttention with an equivalent block mask. It has no backward pass on a CPU.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastprefix

from .attention import BACKENDS
from .measure import Role
from .suite import DTYPES, Problem, add_common, build_kernel_work, draw, run_suite

SHAPES = ((8, 12, 12, 128, 64), (4, 8, 8, 512, 64), (1, 8, 2, 2048, 64))
QUICK = ((2, 4, 2, 32, 16),)
ROLES: dict[str, Role] = {"fused": "ours", "sdpa": "floor", "flex": "theirs"}


class Mask(NamedTuple):
    """A mask as options of ``prefix_attention``, as a mask of SDPA, and as a mask function of FlexAttention."""

    options: dict[str, Any]
    mask: Tensor | None
    sees: Callable[..., Any] | None


def make_masks(B: int, H: int, N: int, dtype: torch.dtype, device: torch.device) -> dict[str, Mask]:
    """Return a mask of each kind: a quarter of the keys is padding, a window is an eighth, a row has four segments."""
    i = torch.arange(N, device=device)
    causal, window, segment = i[:, None] >= i, N // 8, i * 4 // N
    inside, same = i[:, None] - i < window, segment[:, None] == segment
    padding = (i < 3 * N // 4).expand(B, N)
    ids = segment.expand(B, N)
    bias = torch.randn(1, H, N, N, device=device).to(dtype)
    return {
        "none": Mask({}, None, None),
        "causal": Mask({"is_causal": True}, None, lambda b, h, i, j: i >= j),
        "padding": Mask({"attn_mask": padding}, padding[:, None, None], lambda b, h, i, j: padding[b, j]),
        "bool": Mask({"attn_mask": causal[None, None]}, causal, lambda b, h, i, j: i >= j),
        "float": Mask({"attn_mask": bias}, bias, None),
        "window": Mask(
            {"is_causal": True, "window_size": window}, causal & inside, lambda b, h, i, j: (i >= j) & (i - j < window)
        ),
        "segments": Mask(
            {"is_causal": True, "segment_ids": (ids, ids)},
            causal & same,
            lambda b, h, i, j: (i >= j) & (segment[i] == segment[j]),
        ),
    }


def list_problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    for B, Hq, Hkv, N, D in QUICK if options.quick else SHAPES:
        for name in options.dtype:
            sizes = ((B, Hq, N, D), (B, Hkv, N, D), (B, Hkv, N, D), (B, Hq, N, D))
            q, k, v, grad = (draw(*size, dtype=DTYPES[name], device=device) for size in sizes)
            for kind, mask in make_masks(B, Hq, N, DTYPES[name], device).items():
                works = {}
                for peer, call in build_calls((q, k, v), mask, kind, options.flex).items():
                    leaves = () if peer == "flex" and device.type == "cpu" else (q, k, v)
                    works[peer] = build_kernel_work(ROLES[peer], call, leaves, grad.detach())
                yield {"B": B, "Hq": Hq, "Hkv": Hkv, "N": N, "D": D, "dtype": name, "mask": kind}, works


def build_calls(
    leaves: tuple[Tensor, Tensor, Tensor], mask: Mask, kind: str, flex: bool
) -> dict[str, Callable[[], Any]]:
    """Return the call of each peer."""
    q, k, _ = leaves
    backend, gqa = BACKENDS[q.device.type], q.shape[1] != k.shape[1]
    sdpa: dict[str, Any] = {"is_causal": True} if kind == "causal" else {"attn_mask": mask.mask}
    calls: dict[str, Callable[[], Any]] = {
        "fused": partial(fastprefix.prefix_attention, *leaves, **mask.options, backend=backend),
        "sdpa": partial(F.scaled_dot_product_attention, *leaves, **sdpa, enable_gqa=gqa),
    }
    if flex and kind != "float":
        torch.compiler.reset()  # remove the code compiled for another case
        compiled, (B, _, N, _) = torch.compile(flex_attention, dynamic=False), q.shape
        blocks = mask.sees and create_block_mask(mask.sees, B, None, N, N, str(q.device))
        q, k, v = leaves if q.is_cuda else (x.detach() for x in leaves)
        calls["flex"] = partial(compiled, q, k, v, block_mask=blocks, enable_gqa=gqa)
    return calls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, rounds=10, seconds=1.0, dtypes=["float32", "bfloat16"])
    parser.add_argument("--flex", action="store_true", help="also measure FlexAttention, which compiles for each case")


run = partial(run_suite, "plain-attention", list_problems)
