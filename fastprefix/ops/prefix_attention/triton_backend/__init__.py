"""The Triton backend: kernels for CUDA devices. Triton is imported with them, at the first call.

With ``TRITON_INTERPRET=1`` in the environment, Triton runs its kernels on the CPU, slowly; so they are tested.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...targets import target_of
from ..arguments import Arguments
from .tiles import WIDEST


def refusal(a: Arguments) -> str | None:
    """Why these kernels cannot serve a call; None: they can."""
    if a.query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {a.query.dtype}"
    if max(a.query.shape[3], a.value.shape[3]) > WIDEST:
        return f"it takes head sizes up to {WIDEST}, not D = {a.query.shape[3]}, Dv = {a.value.shape[3]}"
    return None


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The kernel of the forward operator."""
    from . import launch

    a = Arguments(*arguments)
    return launch.forward(a, target_of(a.query.device))


def backward(
    grad_output: Tensor, output: Tensor, normalizers: Tensor, needs_grad: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    """The kernel of the backward operator."""
    from . import launch

    a = Arguments(*arguments)
    return launch.backward(grad_output, output, normalizers, a, needs_grad, target_of(a.query.device))
