"""Attend with one of PyTorch's kernels, which read rows in aligned units of 16 bytes."""

from typing import Any

import torch
from torch import Tensor

from . import cudnn, flash, packed
from .problem import Known, Problem

_KERNELS: dict[str, Any] = {"flash": flash, "cudnn": cudnn}
_UNIT = 16
"""The bytes that the kernels load at once."""


def attend(kernel: str, x: Problem) -> tuple[Tensor, Tensor]:
    """Return the output and the natural log-sum-exp of the scores, float32 ``[B, Hq, N]``."""
    output, logsumexp = _find_kernel(kernel, x).attend(_lay_out_inputs(x))
    return output, logsumexp


def differentiate(kernel: str, x: Problem, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    given = Known(_align_rows(known.grad_output), _align_rows(known.output), known.logsumexp)
    dq, dk, dv = _find_kernel(kernel, x).differentiate(_lay_out_inputs(x), given)
    return dq, dk, dv


def _find_kernel(name: str, x: Problem) -> Any:
    if x.packing is not None:
        return packed
    return flash if x.query.device.type == "cpu" else _KERNELS[name]  # the only kernel for CPUs


def _lay_out_inputs(x: Problem) -> Problem:
    query, key, value = map(_align_rows, x[:3])
    return x._replace(query=query, key=key, value=value)


def _align_rows(x: Tensor) -> Tensor:
    """Return a tensor with contiguous columns whose rows begin at multiples of 16 bytes, a copy only if necessary.

    The kernels do not check this. PyTorch's own attention copies or refuses such tensors before it calls them.
    """
    unit = _UNIT // x.element_size()
    aligned = x.data_ptr() % _UNIT == 0 and all(
        stride % unit == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1
    )
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
