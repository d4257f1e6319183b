"""The operators of ``prefix_attention``: their schema, and the rules that hold for every backend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import checks
from ..registration import Kernel, Operation
from . import eager, triton
from .arguments import DIFFERENTIABLE, Arguments
from .layout import empty_gradient, empty_heads

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, Tensor? prefix_gate, "
    "Tensor? output_gate, Tensor? attn_mask, Tensor? prefix_bias, Tensor? sinks, Tensor? query_segments, "
    "Tensor? key_segments, Tensor? dropout_seed, bool is_causal, SymInt? window_size, float? softcap, float scale, "
    "float dropout_p"
)
_TENSORS = 13  # the first of the arguments


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*arguments)
    normalizers = a.query.new_empty(a.normalizers_shape, dtype=a.accumulator)
    return empty_heads(a.query, a.value.shape[3]), normalizers


def _backward_fake(
    grad_output: Tensor, output: Tensor, normalizers: Tensor, needs_grad: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    return [empty_gradient(tensor) for tensor, needed in zip(arguments, needs_grad, strict=False) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _call_backward(ctx: Any, operator: Kernel, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    nothing: list[Tensor | None] = [None] * (_TENSORS + len(ctx.options))
    if grads[0] is None:
        return tuple(nothing)
    output, normalizers, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
    gradients = iter(operator(grads[0], output, normalizers, needs, *tensors, *ctx.options))
    return tuple([next(gradients) if needed else None for needed in needs] + nothing[len(needs) :])


def _autocast(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Cast every floating tensor, as PyTorch's own attention does."""
    return tuple(
        x.to(checks.after_autocast(x.dtype, dtype)) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in arguments
    )


OPERATION = Operation(
    "prefix_attention",
    schema=f"({_ARGUMENTS}) -> (Tensor output, Tensor normalizers)",
    backward_schema="(Tensor grad_output, Tensor output, Tensor normalizers, bool[] needs_grad, "
    f"{_ARGUMENTS}) -> Tensor[]",
    fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    call_backward=_call_backward,
    autocast=_autocast,
)


def _eager_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return eager.forward(Arguments(*arguments))


def _eager_backward(
    grad_output: Tensor, output: Tensor, normalizers: Tensor, needs_grad: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    return eager.backward(grad_output, output, normalizers, Arguments(*arguments), needs_grad)


OPERATION.define("eager")
OPERATION.implement("eager", _eager_forward, _eager_backward)

if _native.load() is None:  # its kernels are registered in C++ (csrc/prefix_attention/register.cpp)
    OPERATION.define("cpu")

OPERATION.define("triton")
for _key in ("CUDA", "CPU"):  # on the CPU: in Triton's interpreter
    OPERATION.implement("triton", triton.forward, triton.backward, _key)
