"""The Triton backend: kernels for CUDA devices. Triton is imported with them, at the first call.

With ``TRITON_INTERPRET=1`` in the environment, Triton runs its kernels on the CPU, slowly; so they are tested.
"""

import torch

from ..arguments import EmbeddingArguments

WIDEST = 512  # r, of the network, which a program holds at once


def refusal(a: EmbeddingArguments) -> str | None:
    """Explain why these kernels cannot run a call, or return None if they can."""
    if a.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {a.weight.dtype}"
    if a.w1 is not None and a.w1.shape[-1] > WIDEST:
        return f"it takes a bottleneck up to {WIDEST}, not r = {a.w1.shape[-1]}"
    return None
