"""The problem that PyTorch's kernels solve: attention over one set of keys."""

from typing import NamedTuple

from torch import Tensor


class Packing(NamedTuple):
    """The sequences of all rows, one behind the other: where each begins among queries and keys, and, last, the end."""

    queries: Tensor  # int32, on the device
    keys: Tensor
    starts: tuple[tuple[int, int], ...]  # the same as numbers


class Problem(NamedTuple):
    """Queries ``[B, Hq, N, D]``, and keys and values ``[B, Hkv, M, D]`` that they see."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool
    scale: float
    packing: Packing | None = None  # of rows with several sequences


class Known(NamedTuple):
    """The upstream gradient ``[B, Hq, N, D]``, the output, and the natural log-sum-exp of the scores ``[B, Hq, N]``.

    Output and log-sum-exp may be those of more keys than the problem has.
    """

    grad_output: Tensor
    output: Tensor
    logsumexp: Tensor
