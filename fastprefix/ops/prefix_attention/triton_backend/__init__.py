"""The Triton backend: kernels for CUDA devices. Triton and the kernels are imported at the first call.

With ``TRITON_INTERPRET=1`` in the environment, Triton interprets the kernels on the CPU. This is slow and meant for
tests.
"""

import torch

from ..arguments import AttentionArguments
from .tiles import WIDEST


def refusal(a: AttentionArguments) -> str | None:
    """Explain why these kernels cannot run a call, or return None if they can."""
    if a.query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it supports float16, bfloat16 and float32, not {a.query.dtype}"
    if max(a.query.shape[3], a.value.shape[3]) > WIDEST:
        return f"it supports head dimensions up to {WIDEST}, not D = {a.query.shape[3]} and Dv = {a.value.shape[3]}"
    return None
