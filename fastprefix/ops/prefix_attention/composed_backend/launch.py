"""Attention over prefix and tokens from attention over the tokens alone.

With the tokens' output ``o_t`` and log-sum-exp ``lse_t``, and those of the prefix,

    lse = log(e^lse_t + e^lse_p),    o = e^(lse_t - lse) o_t + e^(lse_p - lse) o_p.

The probabilities of both halves follow from the merged ``lse``, and what softmax subtracts in the backward pass from
the merged ``o``. So given these, a backward pass of the tokens alone returns the gradients of the whole softmax, and so
does one of the prefix alone. The gradient of the queries is the sum of both.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...targets import Target
from ..arguments import DECLARATION, DIFFERENTIABLE, AttentionArguments
from ..layout import allocate_gradient
from ..triton_backend import launch
from . import flash

_TOKENS = ("query", "key", "value")


def forward(*arguments: Any, target: Target | None = None) -> tuple[Tensor, Tensor]:
    """Return the output [B, Hq, N, Dv] and the normalizers, as the Triton backend does."""
    a = AttentionArguments(*arguments)
    output, logsumexp = flash.attend(a.query, a.key, a.value, a.is_causal, a.scale)
    return launch.extend(_leave_out_tokens(a), output, logsumexp, target=target)


def backward(
    grad_output: Tensor,
    output: Tensor,
    normalizers: Tensor,
    needs_grad: Sequence[bool],
    *arguments: Any,
    target: Target | None = None,
) -> list[Tensor]:
    """Return the requested gradients in the order of ``DIFFERENTIABLE``."""
    a = AttentionArguments(*arguments)
    needs = DECLARATION.name_needs(needs_grad)
    gradients: dict[str, Tensor] = {}
    if needs.intersection(_TOKENS):
        logsumexp = _join_normalizers(normalizers, a.query.dtype)
        tensors = (a.query, a.key, a.value, output, logsumexp)
        gradients = dict(zip(_TOKENS, flash.differentiate(grad_output, *tensors, a.is_causal, a.scale), strict=True))
    names = [name for name in DIFFERENTIABLE if name in needs - {"key", "value"}]
    of_prefix = [name in names for name in DIFFERENTIABLE]
    halves = launch.backward(grad_output, output, normalizers, of_prefix, *_leave_out_tokens(a), target=target)
    for name, half in zip(names, halves, strict=True):
        gradients[name] = half.add_(gradients[name]) if name in gradients else half
    return [_lay_out(gradients[name], getattr(a, name)) for name in DIFFERENTIABLE if name in needs]


def _leave_out_tokens(a: AttentionArguments) -> AttentionArguments:
    return a._replace(key=a.key[:, :, :0], value=a.value[:, :, :0], is_causal=False)


def _join_normalizers(normalizers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the natural log-sum-exp [B, Hq, N] of stored maxima and sums: in 16 bits their unit is that of log2."""
    m, l = normalizers[0]
    unit = 1.0 if dtype is torch.float32 else math.log(2.0)
    logsumexp: Tensor = l.log().add_(m, alpha=unit)
    return logsumexp


def _lay_out(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient in the memory layout of gradients of ``like``."""
    wanted = allocate_gradient(like)
    return gradient if gradient.stride() == wanted.stride() else wanted.copy_(gradient)
