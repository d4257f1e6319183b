"""Attend with one of PyTorch's kernels, which require contiguous columns."""

from typing import Any

from torch import Tensor

from . import cudnn, flash, packed
from .problem import Known, Problem

_KERNELS: dict[str, Any] = {"flash": flash, "cudnn": cudnn}


def attend(kernel: str, x: Problem) -> tuple[Tensor, Tensor]:
    """Return the output and the natural log-sum-exp of the scores, float32 ``[B, Hq, N]``."""
    output, logsumexp = _find_kernel(kernel, x).attend(_lay_out_inputs(x))
    return output, logsumexp


def differentiate(kernel: str, x: Problem, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    given = Known(_lay_out_columns(known.grad_output), _lay_out_columns(known.output), known.logsumexp)
    dq, dk, dv = _find_kernel(kernel, x).differentiate(_lay_out_inputs(x), given)
    return dq, dk, dv


def _find_kernel(name: str, x: Problem) -> Any:
    if x.packing is not None:
        return packed
    return flash if x.query.device.type == "cpu" else _KERNELS[name]  # the only kernel for CPUs


def _lay_out_inputs(x: Problem) -> Problem:
    query, key, value = map(_lay_out_columns, x[:3])
    return x._replace(query=query, key=key, value=value)


def _lay_out_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
