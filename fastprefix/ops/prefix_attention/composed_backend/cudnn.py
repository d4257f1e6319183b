"""Call PyTorch's cuDNN attention, with its log-sum-exp, on CUDA devices.

PyTorch keeps a graph for each layout of queries, keys and values. Some versions use it again if the output or its
gradient have other strides, and read wrong elements. So the output and its gradient always have the layout of the
queries. Expanded tensors are copied, because cuDNN refuses strides of 0.
"""

import torch
from torch import Tensor

from .problem import Known, Problem


def attend(x: Problem) -> tuple[Tensor, Tensor]:
    """Return the output and the natural log-sum-exp of the scores, float32 ``[B, Hq, N]``."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    output, logsumexp = operator(*map(_copy_expanded, x[:3]), None, True, 0.0, x.is_causal, scale=x.scale)[:2]
    return output, logsumexp.squeeze(-1)


def differentiate(x: Problem, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    random = x.query.new_empty((), dtype=torch.int64)  # the random state of dropout, which is unused
    rest = (random, random, None, None, None, x.query.shape[2], x.key.shape[2])  # no bias and no packed rows
    query, key, value = map(_copy_expanded, x[:3])
    grad_output, output = (_lay_out_like(of, query) for of in known[:2])
    tensors = (grad_output, query, key, value, output, known.logsumexp.unsqueeze(-1))
    dq, dk, dv = operator(*tensors, *rest, 0.0, x.is_causal, scale=x.scale)
    return dq, dk, dv


def _copy_expanded(x: Tensor) -> Tensor:
    """Return a tensor without strides of 0."""
    expanded = any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.contiguous() if expanded else x


def _lay_out_like(x: Tensor, query: Tensor) -> Tensor:
    """Return a tensor whose dense memory has the order of the queries, as the output of PyTorch's cuDNN attention."""
    strides, step = [1] * x.ndim, 1
    for dim in sorted(range(x.ndim - 1, -1, -1), key=query.stride):
        strides[dim], step = step, step * x.shape[dim]
    if all(size == 1 or of == wanted for size, of, wanted in zip(x.shape, x.stride(), strides, strict=True)):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
