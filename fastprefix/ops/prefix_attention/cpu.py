"""Choose the cpu backend, whose kernels are in ``csrc/prefix_attention``, where it is usable and fast."""

import platform

import torch

from ... import _native
from . import sdpa
from .arguments import DIFFERENTIABLE, AttentionArguments

_FEW = 16
"""Up to this number of queries, the kernels read the prefix once for all rows of the batch."""


def is_preferred(a: AttentionArguments) -> bool:
    """Return whether the kernels without AVX2 are likely to be faster than the sdpa backend.

    Without AVX2, the matrix products of PyTorch's libraries are faster. The kernels are faster for few queries, if they
    skip hidden keys, or if PyTorch's backward pass is slow (in 16 bits).
    """
    if a.query.shape[2] <= _FEW or sdpa.refusal(a) is not None:
        return True
    if a.is_causal and a.query.shape[3] <= 64:
        return True
    differentiable = (getattr(a, name) for name in DIFFERENTIABLE)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    return trains and a.query.dtype in (torch.bfloat16, torch.float16)


def lacks_fast_products() -> bool:
    """Return whether the kernels of this machine are those for x86-64 without AVX2.

    On every other instruction set that was measured, the kernels are faster than concatenation or about as fast.
    """
    return _native.find_instruction_set() == "default" and platform.machine().lower() in ("x86_64", "amd64")
