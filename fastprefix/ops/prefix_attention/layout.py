"""Allocate results in the memory layout of the inputs.

Public shapes are [B, H, N, D]. transformers stores tensors as [B, N, H, D] and passes transposed views. A result has
the memory layout of the input that it belongs to, so that transposing it back needs no copy.
"""

import torch
from torch import Tensor


def allocate_heads(like: Tensor, size: int) -> Tensor:
    """Return an uninitialized ``[B, H, N, size]`` tensor with the sizes, dtype, device and stride order of ``like``."""
    batch, heads, length, _ = like.shape
    strides = (heads * length * size, length * size, size, 1)
    if like.stride(1) < like.stride(2):  # [B, N, H, D] in memory
        strides = (heads * length * size, size, heads * size, 1)
    return torch.empty_strided((batch, heads, length, size), strides, dtype=like.dtype, device=like.device)


def allocate_gradient(like: Tensor) -> Tensor:
    """Return an uninitialized dense gradient of an input, with heads and length in the input's memory order."""
    if like.ndim == 4:
        return allocate_heads(like, like.shape[3])
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
