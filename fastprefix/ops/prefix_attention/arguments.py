"""Declare the canonical form of the arguments of ``prefix_attention``, which every backend receives.

``B`` is the batch size, ``N`` the number of queries, ``M`` of token keys, ``P`` of prefix keys, ``Hq``/``Hkv`` of query
and key/value heads. ``D`` and ``Dv`` are the head dimensions of keys and values. ``1|X`` is a dimension of size X, or
of size 1, which is broadcast and never expanded.

With ``prefix_spans``, prefix keys and values are a store ``[1, Hkv, T, *]`` of many prefixes, and each row of the batch
attends to a span of it. ``P`` is then the length of the longest span in the shapes of tensors that belong to rows.
``T`` replaces ``P`` in the shapes of tensors that belong to the store.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..declaration import Declaration, Rule

_GATE = "up to three dimensions that broadcast to [B, Hkv, P], or four that broadcast to [B, Hq, N, P]"
_MASK = "a bool [B, M] key padding mask, or a bool or float mask that broadcasts to [B, Hq, N, M]"
_KEY_BIAS = "a tensor that broadcasts to [B, Hkv, P], or with prefix_spans to [Hkv, T]"
SPANS = "an integer tensor [B, 2] with the start and length of each row's span in the store of prefixes"
SEGMENTS = "a pair of integer tensors ([B, N] for the queries, [B, M] for the keys)"
_OF_QUERIES = "an integer tensor [B, N] with the segment of each query"
_OF_KEYS = "an integer tensor [B, M] with the segment of each token key"


class AttentionArguments(NamedTuple):
    """The canonical arguments. ``csrc/prefix_attention/arguments.h`` declares the same list in C++."""

    query: Annotated[Tensor, Rule("[B, Hq, N, D]", gradient="every backend")]
    key: Annotated[Tensor, Rule("[B, Hkv, M, D]", gradient="every backend")]
    value: Annotated[Tensor, Rule("[B, Hkv, M, Dv]", gradient="every backend")]
    prefix_key: Annotated[Tensor, Rule("[1|B, Hkv, P, D]", gradient="every backend")]
    prefix_value: Annotated[Tensor, Rule("[1|B, Hkv, P, Dv]", gradient="every backend")]
    # A gate for each prefix key, or with four dimensions a gate for each pair of query and prefix key.
    prefix_gate: Annotated[
        Tensor | None, Rule("[1|B, 1|Hkv, 1|P]", "[1|B, 1|Hq, 1|N, 1|P]", gradient="every backend", requirement=_GATE)
    ]
    output_gate: Annotated[Tensor | None, Rule("[1|B, 1|Hq]", gradient="every backend")]  # if given, two softmaxes
    attn_mask: Annotated[
        Tensor | None, Rule("[1|B, 1|Hq, 1|N, 1|M]", gradient="eager alone", dtype="mask", requirement=_MASK)
    ]
    prefix_bias: Annotated[Tensor | None, Rule("[1|B, 1|Hq, 1|N, 1|P]", gradient="eager alone")]
    prefix_key_bias: Annotated[
        Tensor | None, Rule("[1|B, 1|Hkv, 1|P]", gradient="every backend", requirement=_KEY_BIAS)
    ]
    sinks: Annotated[Tensor | None, Rule("[Hq]", gradient="every backend")]
    query_segments: Annotated[
        Tensor | None,
        Rule("[1|B, 1|N]", dtype="integer", label="segment_ids[0]", requirement=_OF_QUERIES),
    ]
    key_segments: Annotated[
        Tensor | None,
        Rule("[1|B, 1|M]", dtype="integer", label="segment_ids[1]", requirement=_OF_KEYS),
    ]
    prefix_spans: Annotated[Tensor | None, Rule("[B, 2]", dtype="integer", requirement=SPANS)]
    dropout_seed: Annotated[Tensor | None, Rule("[1]", dtype="integer")]
    is_causal: bool
    window_size: int | None
    softcap: float | None
    scale: float
    dropout_p: float
    frozen_prefix: int  # the number of leading prefix keys and values (with spans: of the store) with gradients of 0

    @property
    def groups(self) -> int:
        """The number of query heads per key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums and scores: float64 for float64 inputs, float32 for all other dtypes."""
        return torch.float64 if self.query.dtype is torch.float64 else torch.float32

    @property
    def normalizers_shape(self) -> tuple[int, ...]:
        """The shape of the normalizers, which the forward pass saves for the backward pass of the same backend.

        They are, for each softmax and query, the largest score ``m`` and the sum ``l`` of ``e^(s - m)``. If a query
        attends to nothing, ``l`` is 0 and ``m`` is arbitrary. With an output gate, the first softmax is the tokens' and
        the second one is the prefix's. The two numbers are not stored as one log-sum-exp ``m + log l``, because its
        rounding would make all probabilities of the query less accurate.
        """
        return (1 if self.output_gate is None else 2, 2, *self.query.shape[:3])


def explain_unsupported(a: AttentionArguments, names: Sequence[str]) -> str | None:
    """Explain that a backend does not support one of these arguments, or return None if none of them is given."""
    for name in names:
        if getattr(a, name) is not None:
            return f"it does not support `{'dropout_p' if name == 'dropout_seed' else name}`"
    return None


DECLARATION = Declaration(AttentionArguments)
DIFFERENTIABLE = DECLARATION.differentiable
"""The arguments that can have a gradient, in order."""
EAGER_ALONE = DECLARATION.eager_alone
"""The differentiable arguments whose gradients only the eager backend computes."""
