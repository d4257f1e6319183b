"""Define the problem that PyTorch's kernels solve: attention over one set of keys."""

from typing import NamedTuple

from torch import Tensor

MOST_SEQUENCES = 65_535
"""The most rows, or sequences of packed rows, that a kernel's grid can count."""


class Packing(NamedTuple):
    """The cumulative lengths of the sequences of all flattened rows. The last entry is the end."""

    queries: Tensor  # where each sequence begins among the queries, int32 on the device
    keys: Tensor  # where each sequence begins among the keys, int32 on the device
    starts: tuple[tuple[int, int], ...]  # the same pairs (query, key) as numbers
    longest: tuple[int, int]  # the most queries and the most keys of a sequence


class Problem(NamedTuple):
    """Queries ``[B, Hq, N, D]`` and the keys and values ``[B, Hkv, M, D]`` that they attend to."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool
    scale: float
    packing: Packing | None = None  # the sequences of packed rows


class Known(NamedTuple):
    """The upstream gradient ``[B, Hq, N, D]``, the output, and the natural log-sum-exp of the scores ``[B, Hq, N]``.

    Output and log-sum-exp may cover more keys than the problem has.
    """

    grad_output: Tensor
    output: Tensor
    logsumexp: Tensor
