"""What the kernels and their functions are handed, as named tuples: tensors with their strides, options, tiles, sizes.

``None`` stands for what is not there. It is known when a kernel is compiled, so what is not there costs nothing. The
stride of a dimension that broadcasts is ``None`` too: its index never enters an address.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import random
from ..arguments import AttentionArguments

ROWS_PADDING = 128
"""The rows of a head are padded to a multiple of this with rows that see nothing: every block of queries divides it."""


class Strided(NamedTuple):
    """A tensor indexed by batch row, head, position (query or key) and column (head dimension or key).

    Triton compiles anew where an integer becomes, or stops being, a multiple of 16. So the strides of rows, heads and
    positions are multiples of 16 for every length of a batch: either all of them are, which allows wide loads, or they
    are handed over times 16.
    """

    pointer: Tensor | None
    b: int | None
    h: int | None
    n: int | None
    c: int | None
    aligned: int | None  # 1: strides as they are; None: b, h and n are 16 times as large


ABSENT = Strided(None, None, None, None, None, None)


class Operands(NamedTuple):
    """The inputs of ``prefix_attention``, as the kernels read them."""

    q: Strided
    k: Strided
    v: Strided
    pk: Strided
    pv: Strided
    gate: Strided  # a gate for each prefix key: [b, hkv, -, p]
    query_gate: Strided  # a gate for each query: [b, hq, i, p]
    og: Strided  # [b, hq, -, -]
    visible: Strided  # bool mask, as bytes [b, hq, i, j]
    mask: Strided  # float mask [b, hq, i, j]
    bias: Strided  # [b, hq, i, p]
    key_bias: Strided  # [b, hkv, -, p], or with spans [-, hkv, -, key of the store]
    sinks: Strided  # [-, hq, -, -]
    query_segments: Strided  # [b, -, i, -]
    key_segments: Strided  # [b, -, j, -]
    spans: Strided  # [b, -, -, start or length]
    near: int | None  # a query sees a key where near <= i + (M - N) - j <= far
    far: int | None
    heads: int  # Hq
    group: int  # Hq // Hkv
    planes16: int  # 16 * B * Hq: a multiple of 16 whatever B is, so that Triton compiles nothing anew for another one
    scale: float
    softcap: float | None
    seed: Tensor | None
    drop_below: int | None  # dropped where the random word lies below
    keep_scale: float | None
    linear: int | None  # 1: a score that is not hidden is the product times a positive scale, in 16 bits
    exact: int | None  # 1: maximum and sum of a row are kept apart in the backward pass too
    nothing: None = None  # Triton 3.6 loses what inner tuples lack, unless the outer one lacks something itself


class KernelShape(NamedTuple):
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
    """Queries, token keys and prefix keys that a row of the batch sees, and the place of the first of its prefix keys:
    0, unless it sees a span of a store.
    """

    N: Any
    M: Any
    P: Any
    start: Any


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
    """Gradients of a tile of keys and values so far, and of the biases of its keys."""

    dk: Any
    dv: Any
    dbias: Any


class Rows(NamedTuple):
    """What the backward pass knows of a row: probabilities are ``e^(s - reference) * inverse``, and ``delta`` is what
    softmax subtracts.
    """

    reference: Any
    inverse: Any
    delta: Any


_OF_PAIRS = (
    *("k", "v", "pk", "pv", "gate", "query_gate", "visible", "mask", "bias", "key_bias"),
    *("query_segments", "key_segments"),
)


_new = tuple.__new__  # a named tuple of a tuple, without the function that the class has for it


def describe(tensor: Tensor | None, dimensions: str) -> Strided:
    """Return a tensor with its strides, or ``ABSENT``. Dimensions, named by their letters, broadcast where their size
    is 1.
    """
    if tensor is None:
        return ABSENT
    strides: dict[str, Any] = {
        name: None if size == 1 else stride
        for name, size, stride in zip(dimensions, tensor.shape, tensor.stride(), strict=True)
    }
    return _align(tensor, *(strides.get(name) for name in "bhnc"))


def _describe_tokens(tensor: Tensor | None, dimensions: str) -> Strided:
    """Return a tensor whose strides depend on how many tokens there are, like a mask, and thus are never aligned.

    A single row of the batch has a stride, of 0: a batch of one compiles nothing anew.
    """
    described = describe(tensor, dimensions)
    if tensor is None:
        return ABSENT
    b, h, n = (x if x is None or described.aligned is None else 16 * x for x in described[1:4])
    return described._replace(b=0 if b is None else b, h=h, n=n, aligned=None)


def _align(tensor: Tensor, b: int | None, h: int | None, n: int | None, c: int | None) -> Strided:
    return Strided(tensor, *_align_strides(b, h, n, c))


def _align_strides(b: int | None, h: int | None, n: int | None, c: int | None) -> tuple[int | None, ...]:
    """Return the strides, and whether they are as they are (``Strided``)."""
    for stride in (b, h, n):
        if stride is not None and stride % 16 != 0:
            b, h, n = (x if x is None else 16 * x for x in (b, h, n))
            return b, h, n, c, None
    return b, h, n, c, 1


def build_operands(a: AttentionArguments) -> Operands:
    """Return the canonical arguments as the kernels read them; no tensor is copied."""
    visible, mask = _split_mask(a.attn_mask)
    near, far = _find_band(a)
    gate = a.prefix_gate
    batch, heads = a.query.shape[:2]
    dropped, below = a.dropout_seed is not None, random.find_threshold(a.dropout_p)
    single = a.query.dtype is torch.float32
    linear = a.softcap is None and mask.pointer is None and a.scale > 0 and not single
    biased = mask.pointer is not None or a.prefix_bias is not None or a.prefix_key_bias is not None
    return Operands(
        q=describe_matrix(a.query),
        k=describe_matrix(a.key),
        v=describe_matrix(a.value),
        pk=_describe_prefix(a.prefix_key),
        pv=_describe_prefix(a.prefix_value),
        gate=ABSENT if gate is None or gate.ndim == 4 else describe(gate, "bhc"),
        query_gate=ABSENT if gate is None or gate.ndim == 3 else describe(gate, "bhnc"),
        og=describe(a.output_gate, "bh"),
        visible=visible,
        mask=mask,
        bias=describe(a.prefix_bias, "bhnc"),
        key_bias=describe(a.prefix_key_bias, "bhc"),
        sinks=describe(a.sinks, "h"),
        query_segments=_describe_tokens(a.query_segments, "bn"),
        key_segments=_describe_tokens(a.key_segments, "bn"),
        spans=describe(a.prefix_spans, "bc"),
        near=near,
        far=far,
        heads=heads,
        group=a.groups,
        planes16=16 * batch * heads,
        scale=a.scale,
        softcap=a.softcap,
        seed=a.dropout_seed,
        drop_below=below % 2**32 if dropped else None,
        keep_scale=(0.0 if below == 2**32 else 1.0 / (1.0 - a.dropout_p)) if dropped else None,
        linear=1 if linear else None,
        exact=1 if single or biased else None,
    )


_ARGUMENT_OF = {
    **{"q": "query", "k": "key", "v": "value", "pk": "prefix_key", "pv": "prefix_value", "gate": "prefix_gate"},
    **{"query_gate": "prefix_gate", "og": "output_gate", "visible": "attn_mask", "mask": "attn_mask"},
    **{"bias": "prefix_bias", "key_bias": "prefix_key_bias", "sinks": "sinks", "spans": "prefix_spans"},
    **{"query_segments": "query_segments", "key_segments": "key_segments"},
}


class OperandsTemplate:
    """The operands of all calls with arguments of the same shapes, strides, dtypes and options, less the tensors."""

    def __init__(self, operands: Operands) -> None:
        self._rest: list[Any] = list(operands)
        self._tensors: list[tuple[int, int, bool, tuple[Any, ...]]] = []
        for slot, (name, operand) in enumerate(zip(operands._fields, operands, strict=True)):
            if isinstance(operand, Strided) and operand.pointer is not None:
                argument = AttentionArguments._fields.index(_ARGUMENT_OF[name])
                self._tensors.append((slot, argument, name == "visible", operand[1:]))
                self._rest[slot] = None
        self._seed = operands._fields.index("seed")
        self._has_seed = operands.seed is not None
        self._rest[self._seed] = None

    def fill(self, a: AttentionArguments) -> Operands:
        """Return the operands of a call."""
        values = self._rest.copy()
        for slot, argument, is_bool, strides in self._tensors:
            tensor: Any = a[argument]
            values[slot] = _new(Strided, (tensor.view(torch.uint8) if is_bool else tensor, *strides))
        if self._has_seed:
            values[self._seed] = a.dropout_seed
        return _new(Operands, values)


def describe_matrix(tensor: Tensor) -> Strided:
    """Return queries, keys, values or a result: all dimensions are there, even where they have but one entry."""
    batch, heads = tensor.shape[:2]
    return _new(Strided, (tensor, *_align_matrix(tensor.stride(), batch == 1, heads == 1)))


@functools.lru_cache(4096)
def _align_matrix(strides: tuple[int, ...], is_single_row: bool, is_single_head: bool) -> tuple[int | None, ...]:
    b, h, n, c = strides
    return _align_strides(0 if is_single_row else b, 0 if is_single_head else h, n, c)


def describe_rows(numbers: Tensor) -> Strided:
    """Return a number for each row, ``[B, H, N]``."""
    return _describe_tokens(numbers, "bhn")


def _describe_prefix(tensor: Tensor) -> Strided:
    """Return prefix keys or values, which rows of the batch may share."""
    described = describe_matrix(tensor)
    return described._replace(b=None) if tensor.shape[0] == 1 else described


def keep_rows(operands: Operands) -> Operands:
    """Return the operands of a kernel that reads sinks, output gates and spans, but neither keys nor masks.

    What it does not read would only make it another kernel for every kind of call.
    """
    left: dict[str, Any] = dict.fromkeys(_OF_PAIRS, ABSENT)
    left["q"] = ABSENT._replace(pointer=operands.q.pointer)  # for its dtype
    left |= dict.fromkeys(("near", "far", "softcap", "seed", "drop_below", "keep_scale", "linear"))
    return operands._replace(**left, group=1, scale=1.0)


def _split_mask(mask: Tensor | None) -> tuple[Strided, Strided]:
    """Return a bool mask and a float mask, of which one at most is there."""
    if mask is not None and mask.dtype is torch.bool:
        return _describe_tokens(mask.view(torch.uint8), "bhnc"), ABSENT
    return ABSENT, _describe_tokens(mask, "bhnc")


def _find_band(a: AttentionArguments) -> tuple[int | None, int | None]:
    """Return causality and window as one band of distances between a query and a key."""
    far = None if a.window_size is None else a.window_size - 1
    if a.is_causal:
        return 0, far
    return None if far is None else -far, far
