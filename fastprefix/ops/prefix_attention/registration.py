"""Register the operators of ``prefix_attention``: the rules that all backends share, and the backends' kernels."""

from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import checks
from ..registration import Operation
from . import composed_backend, cpu, eager, sdpa, triton_backend
from .arguments import DECLARATION, AttentionArguments
from .composed_backend import launch as composed_launch
from .layout import allocate_gradient, allocate_heads
from .triton_backend import launch


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = AttentionArguments(*arguments)
    normalizers = a.query.new_empty(a.normalizers_shape, dtype=a.accumulator)
    return allocate_heads(a.query, a.value.shape[3]), normalizers


def _autocast(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Cast every floating-point tensor, as PyTorch's attention does under autocast."""
    return tuple(
        x.to(checks.apply_autocast(x.dtype, dtype)) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in arguments
    )


OPERATION = Operation(
    "prefix_attention",
    DECLARATION,
    saved=("output", "normalizers"),
    fake=_fake,
    allocate_gradient=allocate_gradient,
    autocast=_autocast,
)

OPERATION.define("eager")
OPERATION.implement("eager", eager.forward, eager.backward)

OPERATION.define_composite("sdpa", sdpa.forward, sdpa.refusal)

if _native.load() is None:  # the kernels are registered in C++ (csrc/prefix_attention/register.cpp)
    OPERATION.define("cpu", is_preferred=cpu.is_preferred if cpu.lacks_fast_products() else None)

OPERATION.define("triton", triton_backend.refusal)
for _key in ("CUDA", "CPU"):  # on the CPU, the kernels run in Triton's interpreter
    OPERATION.implement("triton", launch.forward, launch.backward, _key)

OPERATION.define("composed", composed_backend.refusal, composed_backend.is_preferred)
for _key in ("CUDA", "CPU"):
    OPERATION.implement("composed", composed_launch.forward, composed_launch.backward, _key)
