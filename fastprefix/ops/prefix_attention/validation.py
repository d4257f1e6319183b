"""From a caller's arguments to the canonical ones, or to an error that names the argument."""

import math
from collections.abc import Hashable

import torch
from torch import Tensor

from .. import checks, random
from .arguments import Arguments

_PREFIX = "[Hkv, P, {d}] (one prefix for the batch) or [B, Hkv, P, {d}] (one a row)"
_GATE = "up to three dimensions that broadcast to [B, Hkv, P], or four that broadcast to [B, Hq, N, P]"
_MASK = "a bool [B, M] key padding mask, or a bool or float mask that broadcasts to [B, Hq, N, M]"
_SEGMENTS = "a pair of integer tensors ([B, N] for the queries, [B, M] for the keys)"

_WINDOW = "a whole number of at least 1 and less than 2**63, or None"
_FURTHEST = 2**30  # positions and their distances fit into 32 bits, in which Triton kernels compute them

_CHECKED: set[Hashable] = set()
_MOST_CHECKED = 4096


def canonical_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    prefix_gate: Tensor | None,
    output_gate: Tensor | None,
    attn_mask: Tensor | None,
    prefix_bias: Tensor | None,
    is_causal: bool,
    window_size: int | None,
    segment_ids: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Arguments:
    """Check every argument, then bring them to the form of :class:`Arguments`, by views alone."""
    options = (is_causal, window_size, softcap, scale, dropout_p)
    tensors = (query, key, value, prefix_key, prefix_value, prefix_gate, output_gate, attn_mask, prefix_bias, sinks)
    signature = _signature(tensors, segment_ids, options)
    if signature is None or signature not in _CHECKED:
        _check_tokens(query, key, value)
        _check_prefix(query, key, value, prefix_key, prefix_value)
        _check_options(*options)
        _check_gates(query, key, prefix_key, prefix_gate, output_gate)
        _check_masks(query, key, prefix_key, attn_mask, prefix_bias)
        _check_segments(query, key, segment_ids)
        _check_sinks(query, sinks)
        _remember(signature)
    query_segments, key_segments = (None, None) if segment_ids is None else segment_ids
    return Arguments(
        query,
        key,
        value,
        prefix_key if prefix_key.ndim == 4 else prefix_key[None],
        prefix_value if prefix_value.ndim == 4 else prefix_value[None],
        prefix_gate if prefix_gate is None or prefix_gate.ndim == 4 else _leading_ones(prefix_gate, 3),
        _leading_ones(output_gate, 2),
        _canonical_mask(attn_mask),
        _leading_ones(prefix_bias, 4),
        sinks,
        query_segments,
        key_segments,
        random.draw_seed(query.device) if dropout_p > 0.0 else None,
        is_causal,
        _canonical_window(window_size, query.shape[2], key.shape[2]),
        None if softcap is None else float(softcap),
        1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        float(dropout_p),
    )


def _signature(
    tensors: tuple[Tensor | None, ...], segment_ids: tuple[Tensor, Tensor] | None, options: tuple[object, ...]
) -> Hashable | None:
    """All that the checks look at; None where that cannot be told, as in a trace and of what is no tensor.

    A model calls with the same shapes in every layer, and what was checked once need not be again: in a decoding step
    of a small model the checks would take as long as the rest of the call.
    """
    if torch.compiler.is_compiling() or not isinstance(segment_ids, tuple | list | None):
        return None
    try:
        everything = tensors if segment_ids is None else tensors + tuple(segment_ids)
        seen = tuple([None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in everything])
        signature = (seen, options, tuple(map(type, options)), checks.autocast_dtype(tensors[0].device))  # type: ignore[union-attr]
        hash(signature)
    except (AttributeError, TypeError):
        return None
    return signature


def _remember(signature: Hashable | None) -> None:
    if signature is not None:
        if len(_CHECKED) >= _MOST_CHECKED:
            _CHECKED.clear()
        _CHECKED.add(signature)


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
        raise checks.wrong_value("query", query, "a head size D of at least 1")
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
        raise checks.wrong_value("value", value, "a head size Dv of at least 1")
    if kv_heads == 0 or heads == 0 or heads % kv_heads != 0:
        raise checks.wrong_value("query", query, f"a number of heads Hq that is a multiple of key's Hkv = {kv_heads}")
    for name, tensor in (("key", key), ("value", value)):
        _check_companion(name, tensor, query, "a tensor")


def _check_companion(name: str, tensor: Tensor, query: Tensor, takes: str) -> None:
    """Floating, and on the device and of the dtype of query."""
    checks.check_floating(name, tensor, takes)
    checks.check_device(name, tensor, query.device, "query")
    checks.check_dtype(name, tensor, query.dtype, "query", checks.autocast_dtype(query.device))


def _check_prefix(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> None:
    for name, tensor, tokens, letter in (
        ("prefix_key", prefix_key, key, "D"),
        ("prefix_value", prefix_value, value, "Dv"),
    ):
        takes = _PREFIX.format(d=letter)
        _check_companion(name, tensor, query, takes)
        batch, heads, size = tokens.shape[0], tokens.shape[1], tokens.shape[3]
        takes = f"{takes} with B, Hkv, {letter} = {batch}, {heads}, {size}"
        shape = (heads, None, size) if tensor.ndim == 3 else (batch, heads, None, size)
        checks.check_shape(name, tensor, shape, takes)
    if prefix_value.ndim != prefix_key.ndim:
        raise checks.wrong_value("prefix_value", prefix_value, f"as many dimensions as prefix_key ({prefix_key.ndim})")
    if prefix_value.shape[-2] != prefix_key.shape[-2]:
        raise checks.wrong_value(
            "prefix_value", prefix_value, f"the prefix length of prefix_key (P = {prefix_key.shape[-2]})"
        )


def _check_options(
    is_causal: bool, window_size: int | None, softcap: float | None, scale: float | None, dropout_p: float
) -> None:
    checks.check_flag("is_causal", is_causal)
    if window_size is not None:
        if isinstance(window_size, bool) or not isinstance(window_size, int | torch.SymInt):
            raise checks.wrong_type("window_size", window_size, _WINDOW)
        if not 1 <= window_size < 2**63:
            raise checks.wrong_value("window_size", window_size, _WINDOW)
    if softcap is not None:
        checks.check_number("softcap", softcap, "a number above 0, or None")
        if not 0.0 < softcap < math.inf:
            raise checks.wrong_value("softcap", softcap, "a number above 0, or None")
    if scale is not None:
        checks.check_number("scale", scale, "a finite number, or None for 1/sqrt(D)")
        if not -math.inf < scale < math.inf:
            raise checks.wrong_value("scale", scale, "a finite number, or None for 1/sqrt(D)")
    checks.check_probability("dropout_p", dropout_p)


def _check_gates(
    query: Tensor, key: Tensor, prefix_key: Tensor, prefix_gate: Tensor | None, output_gate: Tensor | None
) -> None:
    batch, heads, queries, _ = query.shape
    if prefix_gate is not None:
        _check_companion("prefix_gate", prefix_gate, query, _GATE)
        length = prefix_key.shape[-2]
        full = (batch, heads, queries, length) if prefix_gate.ndim == 4 else (batch, key.shape[1], length)
        checks.check_broadcastable("prefix_gate", prefix_gate, full, f"{_GATE}; here {full}")
    if output_gate is not None:
        takes = f"a tensor that broadcasts to [B, Hq] = {(batch, heads)}"
        _check_companion("output_gate", output_gate, query, takes)
        checks.check_broadcastable("output_gate", output_gate, (batch, heads), takes)


def _check_masks(
    query: Tensor, key: Tensor, prefix_key: Tensor, mask: Tensor | None, prefix_bias: Tensor | None
) -> None:
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if mask is not None:
        checks.check_tensor("attn_mask", mask, _MASK)
        checks.check_device("attn_mask", mask, query.device, "query")
        if mask.dtype is not torch.bool and not mask.is_floating_point():
            raise checks.wrong_type("attn_mask", mask, f"{_MASK} (attn_mask.bool() of one of zeros and ones)")
        if mask.dtype is not torch.bool:
            _check_companion("attn_mask", mask, query, _MASK)
        if _is_padding(mask):
            takes = f"{_MASK}; a bool mask of two dimensions is [B, M] = {(batch, keys)}"
            checks.check_broadcastable("attn_mask", mask, (batch, keys), takes)
        else:
            full = (batch, heads, queries, keys)
            checks.check_broadcastable("attn_mask", mask, full, f"{_MASK}; here {full}")
    if prefix_bias is not None:
        full = (batch, heads, queries, prefix_key.shape[-2])
        takes = f"a tensor that broadcasts to [B, Hq, N, P] = {full}"
        _check_companion("prefix_bias", prefix_bias, query, takes)
        checks.check_broadcastable("prefix_bias", prefix_bias, full, takes)


def _check_segments(query: Tensor, key: Tensor, segment_ids: tuple[Tensor, Tensor] | None) -> None:
    if segment_ids is None:
        return
    if not isinstance(segment_ids, tuple | list):
        raise checks.wrong_type("segment_ids", segment_ids, _SEGMENTS)
    if len(segment_ids) != 2:
        raise checks.wrong_value("segment_ids", len(segment_ids), _SEGMENTS)
    for name, segments, tokens in (("segment_ids[0]", segment_ids[0], query), ("segment_ids[1]", segment_ids[1], key)):
        checks.check_integer(name, segments, _SEGMENTS)
        checks.check_device(name, segments, query.device, "query")
        shape = (tokens.shape[0], tokens.shape[2])
        checks.check_shape(name, segments, (None, None), f"{_SEGMENTS}; here {shape}")
        checks.check_broadcastable(name, segments, shape, f"{_SEGMENTS}; here {shape}")


def _check_sinks(query: Tensor, sinks: Tensor | None) -> None:
    if sinks is not None:
        heads = query.shape[1]
        _check_companion("sinks", sinks, query, "[Hq]")
        checks.check_shape("sinks", sinks, (heads,), f"[Hq] = [{heads}]")


def _is_padding(mask: Tensor) -> bool:
    return mask.dtype is torch.bool and mask.ndim == 2


def _canonical_mask(mask: Tensor | None) -> Tensor | None:
    if mask is not None and _is_padding(mask):
        return mask[:, None, None, :]
    return _leading_ones(mask, 4)


def _canonical_window(window_size: int | None, queries: int, keys: int) -> int | None:
    """No wider than what no distance exceeds, so that no kernel's sum of a position and a window overflows.

    Sizes are looked at only where the window is huge: a trace of dynamic shapes gets no guards from ordinary ones.
    """
    if window_size is None or window_size <= _FURTHEST:
        return window_size
    return min(window_size, max(queries, keys, _FURTHEST))


def _leading_ones(tensor: Tensor | None, ndim: int) -> Tensor | None:
    return tensor if tensor is None or tensor.ndim >= ndim else tensor[(None,) * (ndim - tensor.ndim)]
