"""Register the operators of ``prompt_embedding``: the rules that all backends share, and the backends' kernels."""

from typing import Any

import torch
from torch import Tensor

from ... import _native
from ..registration import Operation
from . import eager, triton_backend
from .arguments import DECLARATION, EmbeddingArguments
from .layout import allocate_gradient
from .triton_backend import launch


def _fake(*arguments: Any) -> Tensor:
    a = EmbeddingArguments(*arguments)
    batch, tokens = a.input_ids.shape
    return a.weight.new_empty(batch, a.prompt_length + tokens, a.weight.shape[1])


def _autocast(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Cast the parameters to the table's dtype. The table keeps its dtype, as in PyTorch's embedding lookup."""
    table = EmbeddingArguments(*arguments).weight.dtype
    return tuple(x.to(table) if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


OPERATION = Operation(
    "prompt_embedding", DECLARATION, fake=_fake, allocate_gradient=allocate_gradient, autocast=_autocast
)

OPERATION.define("eager")
OPERATION.implement("eager", eager.forward, eager.backward)

if _native.load() is None:  # the kernels are registered in C++ (csrc/prompt_embedding/register.cpp)
    OPERATION.define("cpu")

OPERATION.define("triton", triton_backend.refusal)
for _key in ("CUDA", "CPU"):  # on the CPU, the kernels run in Triton's interpreter
    OPERATION.implement("triton", launch.forward, launch.backward, _key)
