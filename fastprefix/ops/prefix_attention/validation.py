"""Convert a caller's arguments to canonical form, or raise an error that names the argument."""

import contextlib
import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks, random
from ..declaration import Rule, accept
from .arguments import DECLARATION, SEGMENTS, AttentionArguments
from .spans import list_columns

_PREFIX = "[Hkv, P, {d}] (one prefix for the batch) or [B, Hkv, P, {d}] (one prefix per row)"
_STORE = "[Hkv, T, {d}] (with prefix_spans: a store of prefixes)"
_FROZEN = "a whole number from 0 to the number of prefix keys"
_OF_PREFIX = ("prefix_gate", "output_gate", "prefix_bias", "prefix_key_bias", "prefix_spans")
_WINDOW = "a whole number of at least 1 and less than 2**63, or None"
_FURTHEST = 2**30  # Triton kernels compute positions and their distances in 32 bits

_STORE_BIAS = ("Hkv", "T")

Missing = tuple[tuple[int, int], ...]
_CHECKED: dict[Hashable, Missing] = {}
"""The checked signatures, each with the indices of tensors that lack leading dimensions and the numbers of these."""
_MOST_CHECKED = 4096

_TENSORS = DECLARATION.tensors
_LEADING = [(index, rule.ndim) for index, rule in enumerate(DECLARATION.rules.values()) if rule.broadcasts]
_PREFIX_KEY, _PREFIX_VALUE, _MASK, _SEED, _WINDOW_SIZE, _SOFTCAP, _SCALE, _DROPOUT = map(
    AttentionArguments._fields.index,
    ("prefix_key", "prefix_value", "attn_mask", "dropout_seed", "window_size", "softcap", "scale", "dropout_p"),
)


def collect_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    *,
    prefix_gate: Tensor | None = None,
    output_gate: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    prefix_key_bias: Tensor | None = None,
    prefix_spans: Tensor | None = None,
    frozen_prefix: int = 0,
    is_causal: bool = False,
    window_size: int | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> AttentionArguments:
    """Collect a caller's arguments under their canonical names, without changing or checking them."""
    if segment_ids is not None:
        checks.check_tuple("segment_ids", segment_ids, 2, SEGMENTS)
    query_segments, key_segments = (None, None) if segment_ids is None else segment_ids
    return AttentionArguments(
        query=query,
        key=key,
        value=value,
        prefix_key=prefix_key,  # type: ignore[arg-type]  # may be None until it is canonical
        prefix_value=prefix_value,  # type: ignore[arg-type]  # may be None until it is canonical
        prefix_gate=prefix_gate,
        output_gate=output_gate,
        attn_mask=attn_mask,
        prefix_bias=prefix_bias,
        prefix_key_bias=prefix_key_bias,
        sinks=sinks,
        query_segments=query_segments,
        key_segments=key_segments,
        prefix_spans=prefix_spans,
        dropout_seed=None,
        is_causal=is_causal,
        window_size=window_size,
        softcap=softcap,
        scale=scale,  # type: ignore[arg-type]  # may be None until it is canonical
        dropout_p=dropout_p,
        frozen_prefix=frozen_prefix,
    )


def canonicalize(given: AttentionArguments) -> AttentionArguments:
    """Check every argument and convert them to canonical form. Tensors are viewed, not copied."""
    signature = _read_signature(given)
    missing = _recall(signature)
    if missing is None:
        _check_arguments(given)
        missing = _list_missing(given)
        _remember(signature, missing)
    values: list[Any] = list(given)
    mask = given.attn_mask
    if mask is not None and _is_padding(mask):
        values[_MASK] = mask[:, None, None, :]
    if values[_PREFIX_KEY] is None:
        for index, tokens in ((_PREFIX_KEY, given.key), (_PREFIX_VALUE, given.value)):
            values[index] = tokens.new_empty((1, tokens.shape[1], 0, tokens.shape[3]))
    for index, count in missing:
        for _ in range(count):
            values[index] = values[index].unsqueeze(0)
    if given.dropout_p > 0.0:
        values[_SEED] = random.draw_seed(given.query.device)
    if given.window_size is not None:
        values[_WINDOW_SIZE] = _limit_window(given.window_size, given.query.shape[2], given.key.shape[2])
    if given.softcap is not None:
        values[_SOFTCAP] = float(given.softcap)
    values[_SCALE] = 1.0 / math.sqrt(given.query.shape[-1]) if given.scale is None else float(given.scale)
    values[_DROPOUT] = float(given.dropout_p)
    return AttentionArguments._make(values)


canonical_arguments = accept(collect_arguments)(canonicalize)
"""Return the canonical form of the arguments of ``prefix_attention`` without ``backend``."""


def _read_signature(given: AttentionArguments) -> Hashable | None:
    """Return everything that the checks depend on, or None while tracing or if an argument is not a tensor.

    All layers of a model call with the same shapes, so each signature is checked only once. In a short call, the
    checks would take much of the time.
    """
    if torch.compiler.is_compiling():
        return None
    tensors: tuple[Any, ...] = given[:_TENSORS]
    options = given[_TENSORS:]
    try:
        seen = tuple([None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in tensors])
        return (seen, options, tuple(map(type, options)), checks.autocast_dtype(given.query.device))
    except AttributeError:
        return None


def _list_missing(given: AttentionArguments) -> Missing:
    """Return the indices of tensors that lack leading dimensions, and how many each one lacks.

    ``canonicalize`` handles a padding mask and a missing prefix separately.
    """
    missing = []
    for index, ndim in _LEADING:
        tensor: Any = given[index]
        if tensor is None or tensor.ndim >= ndim or (index == _MASK and _is_padding(tensor)):
            continue
        missing.append((index, ndim - tensor.ndim))
    return tuple(missing)


def _recall(signature: Hashable | None) -> Missing | None:
    if signature is None:  # a trace that read the dictionary would be recompiled for each new signature
        return None
    try:
        return _CHECKED.get(signature)
    except TypeError:  # symbolic sizes and invalid options may not be hashable
        return None


def _remember(signature: Hashable | None, missing: Missing) -> None:
    if signature is None:
        return
    if len(_CHECKED) >= _MOST_CHECKED:
        _CHECKED.clear()
    with contextlib.suppress(TypeError):
        _CHECKED[signature] = missing


def _check_arguments(given: AttentionArguments) -> None:
    _check_tokens(given.query, given.key, given.value)
    _check_options(given)
    length = _check_prefix(given)
    sizes: dict[str, checks.Size] = dict(zip(("B", "Hq", "N", "D"), given.query.shape, strict=True))
    sizes |= {"Hkv": given.key.shape[1], "M": given.key.shape[2], "P": length, "T": length, "2": 2}
    if given.prefix_spans is not None:
        sizes["P"] = next(iter(list_columns(given).values()), 1)  # only the values show the longest span
    for name, rule in DECLARATION.optional.items():
        tensor = getattr(given, name)
        if tensor is not None:
            letters = _STORE_BIAS if name == "prefix_key_bias" and given.prefix_spans is not None else None
            _check_optional(rule.label or name, tensor, rule, sizes, given.query, letters)


def _check_optional(
    name: str,
    tensor: Tensor,
    rule: Rule,
    sizes: Mapping[str, checks.Size],
    query: Tensor,
    letters: tuple[str, ...] | None = None,
) -> None:
    """Check an optional tensor against its rule. ``letters``, if given, replace the rule's shape."""
    checks.check_tensor(name, tensor, rule.requirement or rule.shape.replace("1|", ""))
    if letters is None:
        letters = ("B", "M") if rule.dtype == "mask" and _is_padding(tensor) else rule.letters(tensor.ndim)
    full = tuple([sizes[letter] for letter in letters])
    if rule.requirement is not None:
        requirement = f"{rule.requirement}; here {full}"
    else:
        shape = f"[{', '.join(letters)}]"
        requirement = f"a tensor that broadcasts to {shape} = {full}" if rule.broadcasts else f"{shape} = {list(full)}"
    if rule.dtype == "integer":
        checks.check_integer(name, tensor, requirement)
        checks.check_device(name, tensor, query.device, "query")
        checks.check_shape(name, tensor, (None,) * len(full), requirement)
    elif rule.dtype == "mask" and tensor.dtype is torch.bool:
        checks.check_device(name, tensor, query.device, "query")
    elif rule.dtype == "mask" and not tensor.is_floating_point():
        raise checks.wrong_type(
            name, tensor, f"{rule.requirement} (convert a mask of zeros and ones with {name}.bool())"
        )
    else:
        _check_companion(name, tensor, query, requirement)
    if rule.broadcasts:
        checks.check_broadcastable(name, tensor, full, requirement)
    else:
        checks.check_shape(name, tensor, full, requirement)


def _check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor, shape in (
        ("query", query, "[B, Hq, N, D]"),
        ("key", key, "[B, Hkv, M, D]"),
        ("value", value, "[B, Hkv, M, Dv]"),
    ):
        checks.check_floating(name, tensor, shape)
        checks.check_shape(name, tensor, (None, None, None, None), shape)
    batch, heads, _, size = query.shape
    if size == 0:
        raise checks.wrong_value("query", query, "a tensor with a head dimension D of at least 1")
    checks.check_shape(
        "key", key, (batch, None, None, size), f"[B, Hkv, M, D] with B = {batch} and D = {size} of query"
    )
    _, kv_heads, length, _ = key.shape
    checks.check_shape(
        "value",
        value,
        (batch, kv_heads, length, None),
        f"[B, Hkv, M, Dv] with B, Hkv, M = {batch}, {kv_heads}, {length} of key",
    )
    if value.shape[3] == 0:
        raise checks.wrong_value("value", value, "a tensor with a head dimension Dv of at least 1")
    if kv_heads == 0 or heads == 0 or heads % kv_heads != 0:
        raise checks.wrong_value("query", query, f"a tensor whose heads Hq are a multiple of key's Hkv = {kv_heads}")
    for name, tensor in (("key", key), ("value", value)):
        _check_companion(name, tensor, query, "a tensor")


def _check_companion(name: str, tensor: Tensor, query: Tensor, requirement: str) -> None:
    """Check that an argument is floating point and has the device and dtype of ``query``."""
    checks.check_floating(name, tensor, requirement)
    checks.check_device(name, tensor, query.device, "query")
    checks.check_dtype(name, tensor, query.dtype, "query", checks.autocast_dtype(query.device))


def _check_prefix(given: AttentionArguments) -> checks.Size:
    """Check the prefix's keys and values, and return their number. With spans it is the length of the whole store."""
    if any(x is None for x in given[_PREFIX_KEY : _PREFIX_VALUE + 1]):
        return _check_no_prefix(given)
    prefix_key, prefix_value = given.prefix_key, given.prefix_value
    kind = _PREFIX if given.prefix_spans is None else _STORE
    for name, tensor, tokens, letter in (
        ("prefix_key", prefix_key, given.key, "D"),
        ("prefix_value", prefix_value, given.value, "Dv"),
    ):
        requirement = kind.format(d=letter)
        _check_companion(name, tensor, given.query, requirement)
        batch, heads, size = tokens.shape[0], tokens.shape[1], tokens.shape[3]
        requirement = f"{requirement} with B, Hkv, {letter} = {batch}, {heads}, {size}"
        own = tensor.ndim != 3 and given.prefix_spans is None
        checks.check_shape(name, tensor, (batch, heads, None, size) if own else (heads, None, size), requirement)
    if prefix_value.ndim != prefix_key.ndim:
        raise checks.wrong_value(
            "prefix_value", prefix_value, f"a tensor with as many dimensions as prefix_key ({prefix_key.ndim})"
        )
    if prefix_value.shape[-2] != prefix_key.shape[-2]:
        raise checks.wrong_value(
            "prefix_value", prefix_value, f"a tensor with the prefix length of prefix_key (P = {prefix_key.shape[-2]})"
        )
    if given.frozen_prefix > prefix_key.shape[-2]:
        raise checks.wrong_value("frozen_prefix", given.frozen_prefix, f"{_FROZEN} ({prefix_key.shape[-2]})")
    return prefix_key.shape[-2]


def _check_no_prefix(given: AttentionArguments) -> int:
    """Check that a call without a prefix has no other argument of a prefix."""
    for name, other in (("prefix_key", "prefix_value"), ("prefix_value", "prefix_key")):
        if getattr(given, other) is not None:
            raise checks.wrong_type(name, getattr(given, name), f"a tensor because `{other}` is given")
    for name in _OF_PREFIX:
        if getattr(given, name) is not None:
            raise checks.wrong_value(name, getattr(given, name), "None without `prefix_key`")
    if given.frozen_prefix != 0:
        raise checks.wrong_value("frozen_prefix", given.frozen_prefix, "0 without `prefix_key`")
    return 0


def _check_options(given: AttentionArguments) -> None:
    window_size, softcap, scale = given.window_size, given.softcap, given.scale
    limits = torch.finfo(given.accumulator)
    checks.check_flag("is_causal", given.is_causal)
    if window_size is not None:
        if isinstance(window_size, bool) or not isinstance(window_size, int | torch.SymInt):
            raise checks.wrong_type("window_size", window_size, _WINDOW)
        if not 1 <= window_size < 2**63:
            raise checks.wrong_value("window_size", window_size, _WINDOW)
    if softcap is not None:
        checks.check_number("softcap", softcap, "a number above 0, or None")
        if not limits.tiny <= softcap <= limits.max:
            requirement = f"a number from {limits.tiny:.2g} to {limits.max:.2g}, or None"
            raise checks.wrong_value("softcap", softcap, requirement)
    if scale is not None:
        checks.check_number("scale", scale, "a finite number, or None for 1/sqrt(D)")
        if not -limits.max <= scale <= limits.max:
            requirement = f"a number from {-limits.max:.2g} to {limits.max:.2g}, or None for 1/sqrt(D)"
            raise checks.wrong_value("scale", scale, requirement)
    checks.check_probability("dropout_p", given.dropout_p)
    frozen = given.frozen_prefix
    if isinstance(frozen, bool) or not isinstance(frozen, int | torch.SymInt):
        raise checks.wrong_type("frozen_prefix", frozen, _FROZEN)
    if frozen < 0:
        raise checks.wrong_value("frozen_prefix", frozen, _FROZEN)


def _is_padding(mask: Tensor) -> bool:
    return mask.ndim == 2 and mask.dtype is torch.bool


def _limit_window(window_size: int, queries: int, keys: int) -> int:
    """Limit a window to the largest possible distance, so that kernels can add it to a position without overflow.

    Sizes are compared only if the window is huge, so that other windows add no guards to a trace with dynamic shapes.
    """
    if window_size <= _FURTHEST:
        return window_size
    return min(window_size, max(queries, keys, _FURTHEST))
