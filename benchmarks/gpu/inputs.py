"""The inputs of what is timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Tensor]
Shape = tuple[int, int, int, int, int]  # B, Hq, Hkv, N, D


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def attention_inputs(
    shape: Shape, P: int, gate: str, causal: bool, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    B, Hq, Hkv, N, D = shape
    x: dict[str, Any] = {
        "query": randn(B, Hq, N, D, dtype=dtype),
        "key": randn(B, Hkv, N, D, dtype=dtype),
        "value": randn(B, Hkv, N, D, dtype=dtype),
        "prefix_key": randn(Hkv, P, D, dtype=dtype),
        "prefix_value": randn(Hkv, P, D, dtype=dtype),
        "is_causal": causal,
    }
    if gate == "row":
        x["prefix_gate"] = randn(B, Hkv, P, dtype=dtype)
    if gate == "query":
        x["prefix_gate"] = randn(B, Hq, N, P, dtype=dtype)
    if gate == "separate":
        x["output_gate"] = randn(B, Hq, dtype=dtype)
    return {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in x.items()}
