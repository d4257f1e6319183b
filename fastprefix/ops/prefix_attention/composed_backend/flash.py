"""Call PyTorch's flash attention, with its log-sum-exp, on CUDA devices and on the CPU."""

from typing import Any

import torch
from torch import Tensor

from .problem import Known, Problem


def attend(x: Problem) -> tuple[Tensor, Tensor]:
    """Return the output and the natural log-sum-exp of the scores, float32 ``[B, Hq, N]``."""
    operator: Any = torch.ops.aten._scaled_dot_product_flash_attention
    if x.query.device.type == "cpu":
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, logsumexp = operator(*x[:3], 0.0, x.is_causal, scale=x.scale)[:2]
    return output, logsumexp


def differentiate(x: Problem, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    tensors = (known.grad_output, *x[:3], known.output, known.logsumexp)
    if x.query.device.type == "cpu":
        backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = backward(*tensors, 0.0, x.is_causal, scale=x.scale)
        return dq, dk, dv
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    lengths = (None, None, x.query.shape[2], x.key.shape[2])  # no packed rows
    random = x.query.new_empty(0, dtype=torch.uint64)  # the random state of dropout, which is unused
    dq, dk, dv = backward(*tensors, *lengths, 0.0, x.is_causal, random, random, scale=x.scale)
    return dq, dk, dv
