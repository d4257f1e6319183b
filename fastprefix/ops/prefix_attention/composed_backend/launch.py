"""Combine attention over the tokens with attention over the prefix.

Let ``o_t`` and ``lse_t`` be the output and log-sum-exp of the tokens, and ``o_p`` and ``lse_p`` those of the prefix.

    lse = log(e^lse_t + e^lse_p),    o = e^(lse_t - lse) o_t + e^(lse_p - lse) o_p.

The merged ``lse`` determines the probabilities of tokens and prefix. The merged ``o`` determines the term that the
softmax subtracts in the backward pass. Given both, the backward pass over the tokens alone returns the tokens' exact
gradients, and so does the backward pass over the prefix alone. The gradient of the queries is the sum of both parts.
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
from . import kernels, prefixes
from .packed import find_packing
from .plans import choose_plan
from .problem import Known, Problem

_TOKENS = ("query", "key", "value")


def forward(*arguments: Any, target: Target | None = None) -> tuple[Tensor, Tensor]:
    """Return the output [B, Hq, N, Dv] and the normalizers in the same form as the Triton backend."""
    a = AttentionArguments(*arguments)
    kernel, prefix = choose_plan(a, "forward")
    if prefix == "concatenated":
        output, logsumexp = kernels.attend(kernel, prefixes.concatenate(a))
        return _lay_out(output, a.query), _split_logsumexp(logsumexp, a.query.dtype)
    of_tokens = kernels.attend(kernel, _take_tokens(a))
    rest = _leave_out_tokens(a)
    if prefix == "own":
        return launch.extend(rest, *of_tokens, target=target)
    return launch.merge(rest, *of_tokens, *prefixes.attend(a, kernel), target=target)


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
    kernel, prefix = choose_plan(a, "backward")
    known = Known(grad_output, output, _join_normalizers(normalizers, a.query.dtype))
    gradients: dict[str, Tensor] = {}
    if prefix == "concatenated" and needs.intersection(_TOKENS):
        found = kernels.differentiate(kernel, prefixes.concatenate(a), known)
        gradients = prefixes.split_gradients(a, *found)
        return _lay_out_all(gradients, a, needs)
    if needs.intersection(_TOKENS):
        gradients = dict(zip(_TOKENS, kernels.differentiate(kernel, _take_tokens(a), known), strict=True))
    names = [name for name in DIFFERENTIABLE if name in needs - {"key", "value"}]
    if prefix == "own":
        given = gradients.pop("query", None) if "query" in needs else None
        rest, wanted = _leave_out_tokens(a), [name in names for name in DIFFERENTIABLE]
        of_prefix = launch.backward(grad_output, output, normalizers, wanted, *rest, given=given, target=target)
        gradients |= dict(zip(names, of_prefix, strict=True))
    elif names:
        parts = prefixes.differentiate(a, kernel, known)
        for name in names:
            gradients[name] = parts[name].add_(gradients[name]) if name in gradients else parts[name]
    return _lay_out_all(gradients, a, needs)


def _take_tokens(a: AttentionArguments) -> Problem:
    return Problem(a.query, a.key, a.value, a.is_causal, a.scale, find_packing(a))


def _leave_out_tokens(a: AttentionArguments) -> AttentionArguments:
    none: dict[str, Any] = {"is_causal": False, "query_segments": None, "key_segments": None}
    return a._replace(key=a.key[:, :, :0], value=a.value[:, :, :0], **none)


def _find_unit(dtype: torch.dtype) -> float:
    """Return the unit of stored maxima, which are natural for float32 and in units of log2 for 16-bit dtypes."""
    return 1.0 if dtype is torch.float32 else math.log(2.0)


def _join_normalizers(normalizers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the natural log-sum-exp [B, Hq, N] from stored maxima and sums."""
    m, l = normalizers[0]
    logsumexp: Tensor = l.log().add_(m, alpha=_find_unit(dtype))
    return logsumexp


def _split_logsumexp(logsumexp: Tensor, dtype: torch.dtype) -> Tensor:
    """Return maxima and sums from which ``_join_normalizers`` computes the same log-sum-exp."""
    m = logsumexp / _find_unit(dtype)
    return torch.stack([m, torch.ones_like(m)])[None]


def _lay_out_all(gradients: dict[str, Tensor], a: AttentionArguments, needs: set[str]) -> list[Tensor]:
    return [_lay_out(gradients[name], getattr(a, name)) for name in DIFFERENTIABLE if name in needs]


def _lay_out(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient or an output in the memory layout of the gradient of ``like``."""
    wanted = allocate_gradient(like)
    return gradient if gradient.stride() == wanted.stride() else wanted.copy_(gradient)
