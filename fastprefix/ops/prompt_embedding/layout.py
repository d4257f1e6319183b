"""Allocate results."""

import torch
from torch import Tensor


def allocate_gradient(like: Tensor) -> Tensor:
    """Return an uninitialized, contiguous gradient of an input."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
