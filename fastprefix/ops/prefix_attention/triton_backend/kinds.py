"""What kernels pass to their functions: named tuples of tensors, and, compiled in, the sizes."""

from typing import Any, NamedTuple


class Shape(NamedTuple):
    """What a kernel is compiled for: widths of the heads, as they are and as powers of two, and blocks; and the
    precision of its products.
    """

    D: int
    DV: int
    DP: int
    DVP: int
    BM: int  # queries
    BN: int  # token keys
    BP: int  # prefix keys
    PRECISION: str


class Lengths(NamedTuple):
    """Queries, token keys, prefix keys of a call."""

    N: Any
    M: Any
    P: Any


class Pairs(NamedTuple):
    """Coordinates of pairs of queries ``b, h, i`` and keys ``j``, in any shapes that broadcast together: one function
    serves tiles of queries x keys and of keys x queries.
    """

    b: Any
    h: Any
    i: Any
    j: Any


class Queries(NamedTuple):
    """A tile of queries, their coordinates (columns [BM, 1], or numbers), and the row and head of the keys they see."""

    q: Any
    b: Any
    h: Any
    i: Any
    key_b: Any
    key_h: Any


class Keys(NamedTuple):
    """A tile of keys and values, their row and head, and their positions (a column)."""

    k: Any
    v: Any
    b: Any
    h: Any
    j: Any


class Sums(NamedTuple):
    """An online softmax so far: weighted values [BM, DVP], the largest score [BM], the sum of exponentials [BM]."""

    acc: Any
    m: Any
    l: Any


class KeySums(NamedTuple):
    """Gradients of a tile of keys and values so far."""

    dk: Any
    dv: Any


class Rows(NamedTuple):
    """What the backward pass knows of a row: probabilities are ``e^(s - reference) * inverse``, and ``delta`` is what
    softmax subtracts.
    """

    reference: Any
    inverse: Any
    delta: Any
