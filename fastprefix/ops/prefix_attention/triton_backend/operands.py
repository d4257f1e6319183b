"""What the kernels are handed: tensors with their strides, and the options of a call, as named tuples.

``None`` stands for what is not there. It is known when a kernel is compiled, so what is not there costs nothing. The
stride of a dimension that broadcasts is ``None`` too: its index never enters an address.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import random
from ..arguments import Arguments


class Strided(NamedTuple):
    """A tensor indexed by batch row, head, position (query or key) and column (head dimension or key)."""

    p: Tensor | None
    b: int | None
    h: int | None
    n: int | None
    c: int | None


ABSENT = Strided(None, None, None, None, None)


class Problem(NamedTuple):
    """The inputs of ``prefix_attention``, as the kernels read them."""

    q: Strided
    k: Strided
    v: Strided
    pk: Strided
    pv: Strided
    gate: Strided  # a gate for each prefix key: [b, hkv, -, p]
    query_gate: Strided  # a gate for each query: [b, hq, i, p]
    og: Strided  # [b, hq, -, -]
    visible: Strided  # bool mask, as bytes [b, hq, i, j]
    mask: Strided  # float mask [b, hq, i, j]
    bias: Strided  # [b, hq, i, p]
    sinks: Strided  # [-, hq, -, -]
    query_segments: Strided  # [b, -, i, -]
    key_segments: Strided  # [b, -, j, -]
    near: int | None  # a query sees a key where near <= i + (M - N) - j <= far
    far: int | None
    heads: int  # Hq
    group: int  # Hq // Hkv
    planes16: int  # 16 * B * Hq: a multiple of 16 whatever B is, so that Triton compiles nothing anew for another one
    scale: float
    softcap: float | None
    seed: Tensor | None
    drop_below: int | None  # dropped where the random word lies below
    keep_scale: float | None
    linear: int | None  # 1: a score that is not hidden is the product times a positive scale, in 16 bits
    exact: int | None  # 1: maximum and sum of a row are kept apart in the backward pass too
    nothing: None = None  # Triton 3.6 loses what inner tuples lack, unless the outer one lacks something itself


def strided(tensor: Tensor, dimensions: str = "bhnc") -> Strided:
    """Name the dimensions of a tensor; those of size 1 broadcast, but for rows and columns that are there."""
    strides: dict[str, Any] = {
        name: None if size == 1 else stride
        for name, size, stride in zip(dimensions, tensor.shape, tensor.stride(), strict=True)
    }
    return Strided(tensor, *(strides.get(name) for name in "bhnc"))


def problem(a: Arguments) -> Problem:
    """The canonical arguments as the kernels read them; no tensor is copied."""
    visible, mask = _masks(a.attn_mask)
    near, far = _band(a)
    gate = a.prefix_gate
    batch, heads = a.query.shape[:2]
    dropped, below = a.dropout_seed is not None, random.threshold(a.dropout_p)
    single = a.query.dtype is torch.float32
    linear = a.softcap is None and mask.p is None and a.scale > 0 and not single
    biased = mask.p is not None or a.prefix_bias is not None
    return Problem(
        matrix(a.query),
        matrix(a.key),
        matrix(a.value),
        matrix(a.prefix_key),
        matrix(a.prefix_value),
        ABSENT if gate is None or gate.ndim == 4 else strided(gate, "bhc"),
        ABSENT if gate is None or gate.ndim == 3 else strided(gate),
        _optional(a.output_gate, "bh"),
        visible,
        mask,
        _optional(a.prefix_bias, "bhnc"),
        _optional(a.sinks, "h"),
        _optional(a.query_segments, "bn"),
        _optional(a.key_segments, "bn"),
        near,
        far,
        heads,
        a.groups,
        16 * batch * heads,
        a.scale,
        a.softcap,
        a.dropout_seed,
        below % 2**32 if dropped else None,
        (0.0 if below == 2**32 else 1.0 / (1.0 - a.dropout_p)) if dropped else None,
        1 if linear else None,
        1 if single or biased else None,
    )


def matrix(tensor: Tensor) -> Strided:
    """Queries, keys, values or a result: rows and columns are there even where there is but one."""
    batch, heads, _, _ = tensor.shape
    b, h, n, c = tensor.stride()
    return Strided(tensor, None if batch == 1 else b, None if heads == 1 else h, n, c)


def _optional(tensor: Tensor | None, dimensions: str) -> Strided:
    return ABSENT if tensor is None else strided(tensor, dimensions)


def _masks(mask: Tensor | None) -> tuple[Strided, Strided]:
    if mask is None:
        return ABSENT, ABSENT
    if mask.dtype is torch.bool:
        return strided(mask.view(torch.uint8)), ABSENT
    return ABSENT, strided(mask)


def _band(a: Arguments) -> tuple[int | None, int | None]:
    """Causality and window as one band of distances between a query and a key."""
    far = None if a.window_size is None else a.window_size - 1
    if a.is_causal:
        return 0, far
    return None if far is None else -far, far
