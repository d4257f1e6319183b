"""Call PyTorch's cuDNN attention, with its log-sum-exp, on CUDA devices."""

import torch
from torch import Tensor

from .problem import Known, Problem


def attend(x: Problem) -> tuple[Tensor, Tensor]:
    """Return the output and the natural log-sum-exp of the scores, float32 ``[B, Hq, N]``."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    output, logsumexp = operator(*x[:3], None, True, 0.0, x.is_causal, scale=x.scale)[:2]
    return output, logsumexp.squeeze(-1)


def differentiate(x: Problem, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    random = x.query.new_empty((), dtype=torch.int64)  # the random state of dropout, which is unused
    rest = (random, random, None, None, None, x.query.shape[2], x.key.shape[2])  # no bias and no packed rows
    tensors = (known.grad_output, *x[:3], known.output, known.logsumexp.unsqueeze(-1))
    dq, dk, dv = operator(*tensors, *rest, 0.0, x.is_causal, scale=x.scale)
    return dq, dk, dv
