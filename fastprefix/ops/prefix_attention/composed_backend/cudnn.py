"""PyTorch's attention by cuDNN with its log-sum-exp, on CUDA devices."""

import torch
from torch import Tensor

from .problem import Known, Problem


def attend(x: Problem) -> tuple[Tensor, Tensor]:
    """Return the output, and the log-sum-exp of the scores ``[B, Hq, N]``, natural and float32."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    output, logsumexp = operator(*x[:3], None, True, 0.0, x.is_causal, scale=x.scale)[:2]
    return output, logsumexp.squeeze(-1)


def differentiate(x: Problem, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    random = x.query.new_empty((), dtype=torch.int64)  # of dropout, of which there is none
    rest = (random, random, None, None, None, x.query.shape[2], x.key.shape[2])  # neither bias nor packed rows
    tensors = (known.grad_output, *x[:3], known.output, known.logsumexp.unsqueeze(-1))
    dq, dk, dv = operator(*tensors, *rest, 0.0, x.is_causal, scale=x.scale)
    return dq, dk, dv
