"""The Triton backend: kernels for CUDA devices. Triton is imported with them, at the first call.

With ``TRITON_INTERPRET=1`` in the environment, Triton runs its kernels on the CPU, slowly; so they are tested.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..arguments import Arguments


def forward(*arguments: Any) -> Tensor:
    """The kernel of the forward operator."""
    from . import launch

    return launch.forward(Arguments(*arguments))


def backward(grad_output: Tensor, needs_grad: Sequence[bool], *arguments: Any) -> list[Tensor]:
    """The kernel of the backward operator."""
    from . import launch

    return launch.backward(grad_output, Arguments(*arguments), needs_grad)
