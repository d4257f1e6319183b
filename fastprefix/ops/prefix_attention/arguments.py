"""Declare what every backend gets: the arguments of ``prefix_attention`` in one canonical form.

``B`` batch, ``N`` queries, ``M`` keys, ``P`` prefix keys, ``Hq``/``Hkv`` query and key-value heads, ``D``/``Dv`` head
sizes. ``1|X`` is a dimension that is either 1 (and then broadcast, never expanded) or X.

With ``prefix_spans``, prefix keys and values are a store ``[1, Hkv, T, *]`` of many prefixes, and a row of the batch
sees a span of it. ``P`` is then the largest length in the shapes of what belongs to rows, and ``T`` takes its place in
the shapes of what belongs to the store.
"""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..declaration import Declaration, Rule

_GATE = "up to three dimensions that broadcast to [B, Hkv, P], or four that broadcast to [B, Hq, N, P]"
_MASK = "a bool [B, M] key padding mask, or a bool or float mask that broadcasts to [B, Hq, N, M]"
_KEY_BIAS = "a tensor that broadcasts to [B, Hkv, P], or with prefix_spans to [Hkv, T]"
SPANS = "an integer tensor [B, 2] of each row's start and length in the store of prefixes"
SEGMENTS = "a pair of integer tensors ([B, N] for the queries, [B, M] for the keys)"


class AttentionArguments(NamedTuple):
    """The declaration. C++ has the same list in ``csrc/prefix_attention/arguments.h``."""

    query: Annotated[Tensor, Rule("[B, Hq, N, D]", gradient="every backend")]
    key: Annotated[Tensor, Rule("[B, Hkv, M, D]", gradient="every backend")]
    value: Annotated[Tensor, Rule("[B, Hkv, M, Dv]", gradient="every backend")]
    prefix_key: Annotated[Tensor, Rule("[1|B, Hkv, P, D]", gradient="every backend")]
    prefix_value: Annotated[Tensor, Rule("[1|B, Hkv, P, Dv]", gradient="every backend")]
    # A gate for each prefix key, or one for each query too.
    prefix_gate: Annotated[
        Tensor | None, Rule("[1|B, 1|Hkv, 1|P]", "[1|B, 1|Hq, 1|N, 1|P]", gradient="every backend", takes=_GATE)
    ]
    output_gate: Annotated[Tensor | None, Rule("[1|B, 1|Hq]", gradient="every backend")]  # given: two softmaxes
    attn_mask: Annotated[
        Tensor | None, Rule("[1|B, 1|Hq, 1|N, 1|M]", gradient="eager alone", dtype="mask", takes=_MASK)
    ]
    prefix_bias: Annotated[Tensor | None, Rule("[1|B, 1|Hq, 1|N, 1|P]", gradient="eager alone")]
    prefix_key_bias: Annotated[Tensor | None, Rule("[1|B, 1|Hkv, 1|P]", gradient="every backend", takes=_KEY_BIAS)]
    sinks: Annotated[Tensor | None, Rule("[Hq]", gradient="every backend")]
    query_segments: Annotated[
        Tensor | None, Rule("[1|B, 1|N]", dtype="integer", label="segment_ids[0]", takes=SEGMENTS)
    ]
    key_segments: Annotated[Tensor | None, Rule("[1|B, 1|M]", dtype="integer", label="segment_ids[1]", takes=SEGMENTS)]
    prefix_spans: Annotated[Tensor | None, Rule("[B, 2]", dtype="integer", takes=SPANS)]
    dropout_seed: Annotated[Tensor | None, Rule("[1]", dtype="integer")]
    is_causal: bool
    window_size: int | None
    softcap: float | None
    scale: float
    dropout_p: float
    frozen_prefix: int  # so many of the first prefix keys and values (of the store, with spans) have gradients of 0

    @property
    def groups(self) -> int:
        """Query heads for each key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums and scores: float32, and float64 for float64."""
        return torch.float64 if self.query.dtype is torch.float64 else torch.float32

    @property
    def normalizers_shape(self) -> tuple[int, ...]:
        """The shape of what the forward pass leaves to a backend's own backward pass: for each softmax and row, the
        largest score ``m`` and ``l``, the sum of ``e^(s - m)``; where a row sees nothing, ``l`` is 0, ``m`` any number.

        With an output gate the first softmax is the tokens', the second the prefix's. Not the log-sum-exp,
        ``m + log l``: rounded to one number, it would cost all probabilities of a row their last digits.
        """
        return (1 if self.output_gate is None else 2, 2, *self.query.shape[:3])


DECLARATION = Declaration(AttentionArguments)
DIFFERENTIABLE = DECLARATION.differentiable
"""The arguments that can have a gradient, in order."""
EAGER_ALONE = DECLARATION.eager_alone
"""Those among them whose gradient the eager backend alone computes."""
