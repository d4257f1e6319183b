"""Attend to the prefix with PyTorch's kernels.

The gate is multiplied into keys and values, and the rows that share a prefix are folded into one row. A long prefix is
then a large matrix product that runs at the same speed as the tokens'. The copies of gated keys and values are small in
comparison.
"""

import torch
from torch import Tensor

from ..arguments import AttentionArguments
from . import kernels
from .problem import Known, Problem


def attend(a: AttentionArguments, kernel: str) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, Hq, N, D]`` over the prefix alone and its log-sum-exp ``[B, Hq, N]``."""
    key, value = _apply_gate(a)
    output, logsumexp = kernels.attend(kernel, Problem(_fold(a.query, key), key, value, False, a.scale))
    return _unfold(output, a.query), _unfold(logsumexp, a.query)


def differentiate(a: AttentionArguments, kernel: str, known: Known) -> dict[str, Tensor]:
    """Return the gradients of the prefix and its gate, and the prefix's part of the gradient of the queries."""
    key, value = _apply_gate(a)
    folded = Known(_fold(known.grad_output, key), _fold(known.output, key), _fold(known.logsumexp, key).contiguous())
    problem = Problem(_fold(a.query, key), key, value, False, a.scale)
    dq, dk, dv = kernels.differentiate(kernel, problem, folded)
    return {"query": _unfold(dq, a.query), **_differentiate_gate(a, dk, dv)}


def concatenate(a: AttentionArguments) -> Problem:
    """Return the problem of full attention over the gated prefix and the tokens, ``[B, Hkv, P + M, D]``."""
    pairs = zip(_apply_gate(a), (a.key, a.value), strict=True)
    key, value = (torch.cat([prefix.expand(len(tokens), -1, -1, -1), tokens], 2) for prefix, tokens in pairs)
    return Problem(a.query, key, value, False, a.scale)


def split_gradients(a: AttentionArguments, dq: Tensor, dk: Tensor, dv: Tensor) -> dict[str, Tensor]:
    """Return the gradients of tokens, prefix and gate from the gradients of the concatenated problem."""
    length = a.prefix_key.shape[2]
    tokens = {"query": dq, "key": dk[:, :, length:], "value": dv[:, :, length:]}
    return tokens | _differentiate_gate(a, dk[:, :, :length], dv[:, :, :length])


def _apply_gate(a: AttentionArguments) -> tuple[Tensor, Tensor]:
    """Return prefix keys and values multiplied by the gate, ``[1|B, Hkv, P, D]``."""
    if a.prefix_gate is None:
        return a.prefix_key, a.prefix_value
    gate = a.prefix_gate[..., None]
    return a.prefix_key * gate, a.prefix_value * gate


def _differentiate_gate(a: AttentionArguments, dk: Tensor, dv: Tensor) -> dict[str, Tensor]:
    """Return the gradients of prefix and gate from the gradients of gated keys and values, summed in float32."""
    gradients: dict[str, Tensor] = {}
    gate = None if a.prefix_gate is None else a.prefix_gate[..., None].float()
    for name, found in (("prefix_key", dk), ("prefix_value", dv)):
        given = getattr(a, name)
        if gate is not None or found.shape != given.shape:
            total = found.float() if gate is None else found.float() * gate
            found = total.sum_to_size(given.shape).to(given.dtype)
        if a.frozen_prefix > 0:
            found[:, :, : a.frozen_prefix] = 0.0
        gradients[name] = found
    if a.prefix_gate is not None:
        sums = (dk.float() * a.prefix_key + dv.float() * a.prefix_value).sum(3)
        gradients["prefix_gate"] = sums.sum_to_size(a.prefix_gate.shape).to(a.prefix_gate.dtype)
    return gradients


def _fold(x: Tensor, key: Tensor) -> Tensor:
    """Return ``[B, H, N, ...]`` as ``[1, H, B * N, ...]`` if the rows share the prefix.

    It is a view if the memory order is ``[B, N, H, D]``, as it is in transformers models.
    """
    return x.transpose(0, 1).flatten(1, 2)[None] if key.shape[0] == 1 else x


def _unfold(x: Tensor, query: Tensor) -> Tensor:
    """Undo ``_fold``."""
    batch = query.shape[0]
    return x[0].unflatten(1, (batch, -1)).transpose(0, 1) if x.shape[0] != batch else x
