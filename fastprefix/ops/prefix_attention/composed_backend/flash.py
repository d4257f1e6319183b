"""PyTorch's flash attention with its log-sum-exp, on CUDA devices and on the CPU."""

from typing import Any

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, Hq, N, D]`` and the log-sum-exp of the scores ``[B, Hq, N]``, natural and float32."""
    tensors = [_lay_out_columns(x) for x in (query, key, value)]
    operator: Any = torch.ops.aten._scaled_dot_product_flash_attention
    if query.device.type == "cpu":
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, logsumexp = operator(*tensors, 0.0, is_causal, scale=scale)[:2]
    return output, logsumexp


def differentiate(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value. Output and log-sum-exp may be those of more keys than these."""
    tensors = [_lay_out_columns(x) for x in (grad_output, query, key, value, output)]
    if query.device.type == "cpu":
        backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = backward(*tensors, logsumexp, 0.0, is_causal, scale=scale)
        return dq, dk, dv
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    lengths = (None, None, query.shape[2], key.shape[2])  # no packed rows
    random = query.new_empty(0, dtype=torch.uint64)  # of dropout, of which there is none
    dq, dk, dv = backward(*tensors, logsumexp, *lengths, 0.0, is_causal, random, random, scale=scale)
    return dq, dk, dv


def _lay_out_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
