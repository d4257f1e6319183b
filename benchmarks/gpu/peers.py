"""Prefix attention and its peers: concatenation and SDPA on each of its kernels; the tokens alone, the floor."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

import fastprefix

from .inputs import Call
from .workers import usable

PEERS = {
    "concat + flash": SDPBackend.FLASH_ATTENTION,
    "concat + cudnn": SDPBackend.CUDNN_ATTENTION,
    "concat + efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def ours(**arguments: Any) -> Tensor:
    return fastprefix.prefix_attention(**arguments, backend="triton")


def concatenated(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prefix and tokens as one, the gate folded in: what a user without these kernels writes."""
    B = x["query"].shape[0]
    pk, pv = (x[name].expand(B, -1, -1, -1) for name in ("prefix_key", "prefix_value"))
    if "prefix_gate" in x:
        pk, pv = pk * x["prefix_gate"][..., None], pv * x["prefix_gate"][..., None]
    return torch.cat([pk, x["key"]], 2), torch.cat([pv, x["value"]], 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and backend is SDPBackend.EFFICIENT_ATTENTION:  # it has no grouped heads
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        grouped = False
    same = q.shape[2] == k.shape[2]
    mask: Any = causal_lower_right(q.shape[2], k.shape[2]) if causal and not same else None
    if mask is not None and backend is SDPBackend.CUDNN_ATTENTION:  # which aligns to the upper left alone
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    with sdpa_kernel(backend):
        output: Tensor = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and same, enable_gqa=grouped
        )
    return output


def peer_calls(x: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """Those that can do this at all: a gate for each query fits no concatenation."""
    q, k, v, causal = x["query"], x["key"], x["value"], x["is_causal"]
    calls: dict[str, Callable[[], Tensor]] = {"fastprefix": lambda: ours(**x)}
    calls |= {
        f"floor, tokens alone: {name.split()[-1]}": functools.partial(sdpa, q, k, v, causal, backend)
        for name, backend in PEERS.items()
        if name != "concat + efficient"
    }
    if "output_gate" in x:
        B, og = q.shape[0], x["output_gate"][..., None, None]

        def two(backend: SDPBackend) -> Tensor:
            pk, pv = (x[name].expand(B, -1, -1, -1) for name in ("prefix_key", "prefix_value"))
            both: Tensor = sdpa(q, k, v, causal, backend) + og * sdpa(q, pk, pv, False, backend)
            return both

        return calls | {name: functools.partial(two, backend) for name, backend in PEERS.items()}
    if "prefix_gate" in x and x["prefix_gate"].ndim == 4:
        return calls

    def one(backend: SDPBackend) -> Tensor:
        return sdpa(q, *concatenated(x), causal, backend)

    dense = causal and x["prefix_key"].shape[-2] > 0
    return calls | {
        name + (", dense mask" if dense and backend is SDPBackend.CUDNN_ATTENTION else ""): functools.partial(
            one, backend
        )
        for name, backend in PEERS.items()
    }


def working(
    calls: dict[str, Callable[[], Tensor]], prepare: Callable[[Any], Call]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that run here, and why the others do not."""
    good: dict[str, Call] = {}
    bad: dict[str, str] = {}
    for name, call in calls.items():
        try:
            prepare(call)()
            torch.cuda.synchronize()
            good[name] = prepare(call)
        except Exception as error:  # a peer that cannot is a result too
            bad[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"
            if not usable():
                raise
    return good, bad
