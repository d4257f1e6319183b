"""The Triton backend: kernels for CUDA devices. Triton and the kernels are imported at the first call.

With ``TRITON_INTERPRET=1`` in the environment, Triton interprets the kernels on the CPU. This is slow and meant for
tests.
"""

import torch

from ..arguments import EmbeddingArguments

WIDEST = 512  # the largest bottleneck r of the network, since one program holds all hidden units


def refusal(a: EmbeddingArguments) -> str | None:
    """Explain why these kernels cannot run a call, or return None if they can."""
    if a.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it supports float16, bfloat16 and float32, not {a.weight.dtype}"
    if a.w1 is not None and a.w1.shape[-1] > WIDEST:
        return f"it supports bottlenecks up to r = {WIDEST}, not r = {a.w1.shape[-1]}"
    return None
