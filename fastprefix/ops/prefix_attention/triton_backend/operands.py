"""Define the named tuples that kernels and their functions receive: tensors with strides, options, tiles and sizes.

``None`` represents an absent operand. It is a constant at compile time, so an absent operand costs nothing at run time.
The stride of a dimension that broadcasts is also ``None``, and addresses do not depend on its index.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import random
from ..arguments import AttentionArguments

ROWS_PADDING = 128
"""The backward pass pads the queries of a head to a multiple of this. Padding queries attend to nothing.

Every block size of queries divides it.
"""


class Strided(NamedTuple):
    """A tensor indexed by row of the batch, head, position (query or key) and column (head dimension or key).

    Triton recompiles a kernel if an integer argument becomes, or stops being, a multiple of 16. The strides of rows,
    heads and positions are therefore always passed as multiples of 16. If all three strides are multiples of 16, they
    are passed unchanged, which allows wide loads. Otherwise they are passed multiplied by 16.
    """

    pointer: Tensor | None
    b: int | None
    h: int | None
    n: int | None
    c: int | None
    aligned: int | None  # 1: unchanged strides; None: b, h and n are multiplied by 16


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
    planes16: int  # 16 * B * Hq, a multiple of 16 for every B, so that a new B does not require recompilation
    scale: float
    softcap: float | None
    seed: Tensor | None
    drop_below: int | None  # an element is dropped if its random word is below this
    keep_scale: float | None  # the factor of kept elements
    linear: int | None  # 1: the inputs are 16-bit, and a visible score is the product <q, k> times a positive scale
    linear_prefix: int | None  # 1: this is true of the prefix too, and it has no gates
    exact: int | None  # 1: the backward pass uses the maximum and sum of a query, not their log-sum-exp
    nothing: None = None  # Triton 3.6 drops the Nones of inner tuples, unless the outer tuple also has a None


class KernelShape(NamedTuple):
    """The head dimensions, block sizes and precision of products that a kernel is compiled for."""

    D: int  # head dimension of queries and keys
    DV: int  # head dimension of values
    DP: int  # D, rounded up to a power of two, at least 16
    DVP: int  # DV, rounded up to a power of two, at least 16
    BM: int  # queries per block
    BN: int  # token keys per block
    BP: int  # prefix keys per block
    PRECISION: str  # "ieee" or "tf32"


class Lengths(NamedTuple):
    """The numbers of queries and keys of a row of the batch."""

    N: Any  # queries
    M: Any  # token keys
    P: Any  # prefix keys that the row attends to
    start: Any  # index of its first prefix key in the store; 0 without spans


class Pairs(NamedTuple):
    """The coordinates of pairs of queries ``b, h, i`` and keys ``j``, in shapes that broadcast together.

    The same functions therefore support tiles of queries x keys and of keys x queries.
    """

    b: Any
    h: Any
    i: Any
    j: Any


class Queries(NamedTuple):
    """A tile of queries, their coordinates (numbers or columns [BM, 1]), and the row and head of their keys."""

    q: Any  # [BM, DP]
    b: Any
    h: Any
    i: Any
    key_b: Any
    key_h: Any


class Keys(NamedTuple):
    """A tile of keys and values, their row and head, and their positions. ``keys`` is BN or BP."""

    k: Any  # [keys, DP]
    v: Any  # [keys, DVP]
    b: Any
    h: Any
    j: Any  # [keys, 1]


class Sums(NamedTuple):
    """The running state of an online softmax."""

    acc: Any  # weighted values [BM, DVP]
    m: Any  # largest score [BM]
    l: Any  # sum of exponentials [BM]


class KeySums(NamedTuple):
    """The running sums of the gradients of a tile of keys, their values and their biases. ``keys`` is BN or BP."""

    dk: Any  # [keys, DP]
    dv: Any  # [keys, DVP]
    dbias: Any  # [keys]


class Rows(NamedTuple):
    """The numbers that the backward pass needs for each query.

    A probability is ``e^(s - reference) * inverse``. The gradient of its score is the probability times (the gradient
    of the probability - ``delta``).
    """

    reference: Any  # the largest score or the log-sum-exp
    inverse: Any  # 1 / sum of exponentials, or 1
    delta: Any  # <do, o>, where o is the output of the softmax


_OF_PAIRS = (
    *("k", "v", "pk", "pv", "gate", "query_gate", "visible", "mask", "bias", "key_bias"),
    *("query_segments", "key_segments"),
)


_new = tuple.__new__  # makes a named tuple from a tuple without the overhead of the class's ``__new__``


def describe(tensor: Tensor | None, dimensions: str) -> Strided:
    """Return a tensor with its strides, or ``ABSENT``.

    ``dimensions`` has the letter of each dimension. A dimension of size 1 broadcasts.
    """
    if tensor is None:
        return ABSENT
    strides: dict[str, Any] = {
        name: None if size == 1 else stride
        for name, size, stride in zip(dimensions, tensor.shape, tensor.stride(), strict=True)
    }
    return _align(tensor, *(strides.get(name) for name in "bhnc"))


def _describe_tokens(tensor: Tensor | None, dimensions: str) -> Strided:
    """Return a tensor whose strides depend on the number of tokens, like a mask, with its strides multiplied by 16.

    Such strides never count as aligned, so that a new length does not require recompilation. In a batch of one row, the
    row's stride is 0 instead of None for the same reason.
    """
    described = describe(tensor, dimensions)
    if tensor is None:
        return ABSENT
    b, h, n = (x if x is None or described.aligned is None else 16 * x for x in described[1:4])
    return described._replace(b=0 if b is None else b, h=h, n=n, aligned=None)


def _align(tensor: Tensor, b: int | None, h: int | None, n: int | None, c: int | None) -> Strided:
    return Strided(tensor, *_align_strides(b, h, n, c))


def _align_strides(b: int | None, h: int | None, n: int | None, c: int | None) -> tuple[int | None, ...]:
    """Return the four strides and ``aligned``, as in ``Strided``."""
    for stride in (b, h, n):
        if stride is not None and stride % 16 != 0:
            b, h, n = (x if x is None else 16 * x for x in (b, h, n))
            return b, h, n, c, None
    return b, h, n, c, 1


def build_operands(a: AttentionArguments) -> Operands:
    """Return the canonical arguments in the form that the kernels read. No tensor is copied."""
    visible, mask = _split_mask(a.attn_mask)
    near, far = _find_band(a)
    gate = a.prefix_gate
    batch, heads = a.query.shape[:2]
    dropped, below = a.dropout_seed is not None, random.find_threshold(a.dropout_p)
    single = a.query.dtype is torch.float32
    is_positive = a.scale >= torch.finfo(torch.float32).tiny  # smaller scales may be 0 in the kernels
    linear = a.softcap is None and mask.pointer is None and is_positive and not single
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
        linear_prefix=1 if linear and gate is None and a.prefix_bias is None and a.prefix_key_bias is None else None,
        exact=1 if single or biased else None,
    )


def describe_matrix(tensor: Tensor) -> Strided:
    """Return queries, keys, values or a result with strides. Dimensions of size 1 also have a stride."""
    batch, heads = tensor.shape[:2]
    return _new(Strided, (tensor, *_align_matrix(tensor.stride(), batch == 1, heads == 1)))


@functools.lru_cache(4096)
def _align_matrix(strides: tuple[int, ...], is_single_row: bool, is_single_head: bool) -> tuple[int | None, ...]:
    b, h, n, c = strides
    return _align_strides(0 if is_single_row else b, 0 if is_single_head else h, n, c)


def describe_rows(numbers: Tensor) -> Strided:
    """Return a tensor with one number per query, ``[B, H, N]``, with its strides. A single query also has a stride."""
    described = _describe_tokens(numbers, "bhn")
    return described._replace(n=0) if described.n is None else described


def _describe_prefix(tensor: Tensor) -> Strided:
    """Return prefix keys or values with strides. The row's stride is None if the batch shares one prefix."""
    described = describe_matrix(tensor)
    return described._replace(b=None) if tensor.shape[0] == 1 else described


def keep_rows(operands: Operands) -> Operands:
    """Return the operands of a kernel that reads sinks, output gates and spans, but neither keys nor masks.

    Operands that the kernel does not read would only require recompilation for every kind of call.
    """
    left: dict[str, Any] = dict.fromkeys(_OF_PAIRS, ABSENT)
    left["q"] = ABSENT._replace(pointer=operands.q.pointer)  # for its dtype
    left |= dict.fromkeys(("near", "far", "softcap", "seed", "drop_below", "keep_scale", "linear", "linear_prefix"))
    return operands._replace(**left, group=1, scale=1.0)


def _split_mask(mask: Tensor | None) -> tuple[Strided, Strided]:
    """Return the bool mask and the float mask, at most one of which is present."""
    if mask is not None and mask.dtype is torch.bool:
        return _describe_tokens(mask.view(torch.uint8), "bhnc"), ABSENT
    return ABSENT, _describe_tokens(mask, "bhnc")


def _find_band(a: AttentionArguments) -> tuple[int | None, int | None]:
    """Return causality and window as one band ``near, far`` of distances between a query and a key."""
    far = None if a.window_size is None else a.window_size - 1
    if a.is_causal:
        return 0, far
    return None if far is None else -far, far
