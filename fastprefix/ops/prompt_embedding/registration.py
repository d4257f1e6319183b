"""The operators of ``prompt_embedding``: their schema, and the rules that hold for every backend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from ..registration import Kernel, Operation
from . import eager, triton
from .arguments import DIFFERENTIABLE, Arguments

_ARGUMENTS = (
    "Tensor input_ids, Tensor weight, Tensor? prompt, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, "
    "Tensor? low_rank_a, Tensor? low_rank_b, Tensor? dropout_seed, float offset_scale, float dropout_p"
)
_TENSORS = 10  # the first of the arguments


def _forward_fake(*arguments: Any) -> Tensor:
    a = Arguments(*arguments)
    batch, tokens = a.input_ids.shape
    return a.weight.new_empty(batch, a.prompt_length + tokens, a.weight.shape[1])


def _backward_fake(grad_output: Tensor, needs_grad: Sequence[bool], *arguments: Any) -> list[Tensor]:
    differentiable = arguments[1 : 1 + len(DIFFERENTIABLE)]
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor, needed in zip(differentiable, needs_grad, strict=True)
        if needed
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _call_backward(ctx: Any, operator: Kernel, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    nothing: list[Tensor | None] = [None] * (_TENSORS + len(ctx.options))
    if grads[0] is None:
        return tuple(nothing)
    needs = list(ctx.needs_input_grad[1 : 1 + len(DIFFERENTIABLE)])
    gradients = iter(operator(grads[0], needs, *ctx.saved_tensors, *ctx.options))
    wanted = [next(gradients) if needed else None for needed in needs]
    return (None, *wanted, *nothing[1 + len(wanted) :])


def _autocast(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Bring the parameters to the table's dtype; like PyTorch's own lookup, the table keeps its own."""
    table = Arguments(*arguments).weight.dtype
    return tuple(x.to(table) if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


OPERATION = Operation(
    "prompt_embedding",
    schema=f"({_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad_output, bool[] needs_grad, {_ARGUMENTS}) -> Tensor[]",
    fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    call_backward=_call_backward,
    autocast=_autocast,
)


def _eager_forward(*arguments: Any) -> Tensor:
    return eager.forward(Arguments(*arguments))


def _eager_backward(grad_output: Tensor, needs_grad: Sequence[bool], *arguments: Any) -> list[Tensor]:
    return eager.backward(grad_output, Arguments(*arguments), needs_grad)


OPERATION.define("eager")
OPERATION.implement("eager", _eager_forward, _eager_backward)

if _native.load() is None:  # its kernels are registered in C++ (csrc/prompt_embedding/register.cpp)
    OPERATION.define("cpu")

OPERATION.define("triton")
for _key in ("CUDA", "CPU"):  # on the CPU: in Triton's interpreter
    OPERATION.implement("triton", triton.forward, triton.backward, _key)
