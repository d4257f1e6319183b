"""Convert a caller's arguments to canonical form, or raise an error that names the argument."""

import math

import torch
from torch import Tensor

from .. import checks, random
from ..declaration import list_letters
from .arguments import EmbeddingArguments

_FFN = "a tuple (w1 [d, r], b1 [r], w2 [r, d], b2 [d])"
_LOW_RANK = "a tuple (a [T, r], b [r, d])"
_Shape = tuple[checks.Size | None, ...]


def canonical_arguments(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor | None = None,
    *,
    ffn: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    position_offset: Tensor | None = None,
    prompt_spans: Tensor | None = None,
    prompt_length: int | None = None,
    index: Tensor | None = None,
    offset_scale: float = 1.0,
    dropout_p: float = 0.0,
) -> EmbeddingArguments:
    """Check every argument and convert them to canonical form."""
    checks.check_floating("weight", weight, "an embedding table [V, d]")
    if weight.ndim != 2:
        raise checks.wrong_value("weight", weight, "an embedding table [V, d]")
    checks.check_integer("input_ids", input_ids, "token ids [B, N]")
    if input_ids.ndim != 2:
        raise checks.wrong_value("input_ids", input_ids, "token ids [B, N]")
    checks.check_device("input_ids", input_ids, weight.device, "weight")
    length: int = 0
    if prompt is not None:
        requirement = "[S, d]" if prompt_spans is None else "[T, d]"
        _check_parameter("prompt", prompt, weight, (None, weight.shape[1]), requirement)
        length = prompt.shape[0]
    if prompt_spans is not None or prompt_length is not None:
        length = _check_spans(prompt_spans, prompt_length, prompt, input_ids)
    offsets = (ffn is not None) + (low_rank is not None) + (position_offset is not None)
    if offsets > 1:
        named = {"ffn": ffn, "low_rank": low_rank, "position_offset": position_offset}
        given = " and ".join(f"`{name}`" for name, offset in named.items() if offset is not None)
        raise ValueError(f"{given} cannot be combined: pass only one of them")
    banked = index is not None
    if index is not None:
        _check_index(index, input_ids, offsets)
    w1, b1, w2, b2 = (None, None, None, None) if ffn is None else _check_ffn(ffn, weight, banked)
    low_rank_a, low_rank_b = (None, None) if low_rank is None else _check_low_rank(low_rank, input_ids, weight, banked)
    if position_offset is not None:
        _check_position_offset(position_offset, input_ids, weight, banked)
    checks.check_number("offset_scale", offset_scale, "a finite number")
    if not -math.inf < offset_scale < math.inf:
        raise checks.wrong_value("offset_scale", offset_scale, "a finite number")
    checks.check_probability("dropout_p", dropout_p)
    if dropout_p > 0.0 and ffn is None:
        raise checks.wrong_value("dropout_p", dropout_p, "0 without `ffn`, since it drops hidden units of the network")
    return EmbeddingArguments(
        input_ids=input_ids,
        weight=weight,
        prompt=prompt,
        w1=w1,
        b1=b1,
        w2=w2,
        b2=b2,
        low_rank_a=low_rank_a,
        low_rank_b=low_rank_b,
        position_offset=position_offset,
        prompt_spans=prompt_spans,
        entries=index,
        dropout_seed=random.draw_seed(weight.device) if dropout_p > 0.0 else None,
        offset_scale=float(offset_scale),
        dropout_p=float(dropout_p),
        prompt_length=length,
    )


def check_values(a: EmbeddingArguments) -> None:
    """Raise ValueError if token ids, spans or indices are out of range, where values can be read."""
    _check_range("input_ids", "ids from 0 to V - 1", a.input_ids, 0, a.weight.shape[0] - 1)
    if a.entries is not None:
        _check_range("index", "values from -1 (no offset) to K - 1", a.entries, -1, a.bank_size - 1)
    if a.prompt_spans is not None and a.prompt is not None and checks.can_read_values(a.prompt_spans):
        _check_span_values(a.prompt_spans, a.prompt.shape[0], a.prompt_length)


def _check_range(name: str, requirement: str, values: Tensor, lowest: int, highest: int) -> None:
    if values.numel() == 0 or not checks.can_read_values(values):
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low < lowest or high > highest:
        raise ValueError(f"`{name}` must hold {requirement} = {highest}, got {low if low < lowest else high}")


def _check_span_values(spans: Tensor, rows: int, longest: int) -> None:
    for row, (start, length) in enumerate(spans.tolist()):
        if start < 0 or length < 0 or start + length > rows:
            requirement = f"(start, length) within the prompt's {rows} rows"
        elif length > longest:
            requirement = f"lengths up to prompt_length = {longest}"
        else:
            continue
        raise ValueError(f"`prompt_spans` must hold {requirement}, got ({start}, {length}) in row {row}")


def _check_spans(spans: Tensor | None, longest: int | None, prompt: Tensor | None, input_ids: Tensor) -> int:
    """Check ``prompt_spans`` and ``prompt_length``, and return S. If it is not given, it is read from the spans."""
    if spans is None:
        raise checks.wrong_value("prompt_length", longest, "None without `prompt_spans`")
    requirement = "(start, length) of each row's prompt, int [B, 2]"
    checks.check_integer("prompt_spans", spans, requirement)
    batch = input_ids.shape[0]
    checks.check_shape("prompt_spans", spans, (batch, 2), f"{requirement} with B = {batch} of input_ids")
    checks.check_device("prompt_spans", spans, input_ids.device, "input_ids")
    if prompt is None:
        raise ValueError("`prompt_spans` requires `prompt`, the store that it selects from: pass both or neither")
    if longest is None:
        return max(0, int(spans[:, 1].max())) if batch > 0 else 0
    requirement = "a length S of at least 0"
    if isinstance(longest, bool) or not isinstance(longest, int | torch.SymInt):
        raise checks.wrong_type("prompt_length", longest, requirement)
    if longest < 0:
        raise checks.wrong_value("prompt_length", longest, requirement)
    return longest


def _check_index(index: Tensor, input_ids: Tensor, offsets: int) -> None:
    requirement = "the entry of each row, int [B]"
    checks.check_integer("index", index, requirement)
    batch = input_ids.shape[0]
    checks.check_shape("index", index, (batch,), f"{requirement} with B = {batch} of input_ids")
    checks.check_device("index", index, input_ids.device, "input_ids")
    if offsets == 0:
        raise ValueError("`index` requires `ffn`, `low_rank` or `position_offset`: pass one of them, or no `index`")


def _check_parameter(name: str, value: Tensor, weight: Tensor, shape: _Shape, requirement: str) -> None:
    """Check that a parameter is floating point, has the expected shape, and has the device and dtype of ``weight``.

    ``requirement`` has the letters of the shape. In ``shape``, None matches any size.
    """
    checks.check_floating(name, value, requirement)
    if value.shape != shape and not checks.has_shape(value, shape):
        known = [
            f"{letter} = {size}"
            for letter, size in zip(list_letters(requirement), shape, strict=True)
            if size is not None
        ]
        raise checks.wrong_value(name, value, f"{requirement} with {', '.join(known)}")
    checks.check_device(name, value, weight.device, "weight")
    if value.dtype is not weight.dtype:
        checks.check_dtype(name, value, weight.dtype, "weight", checks.autocast_dtype(weight.device))


def _check_offset(
    name: str, value: Tensor, weight: Tensor, shape: _Shape, letters: str, entries: checks.Size | None, banked: bool
) -> None:
    """Check a parameter of an offset. A bank has ``entries`` of them, or any number if ``entries`` is None."""
    if banked:
        _check_parameter(name, value, weight, (entries, *shape), f"[K, {letters}]")
    else:
        _check_parameter(name, value, weight, shape, f"[{letters}]")


def _check_ffn(
    ffn: tuple[Tensor, Tensor, Tensor, Tensor], weight: Tensor, banked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.check_tuple("ffn", ffn, 4, _FFN)
    w1, b1, w2, b2 = ffn
    d = weight.shape[1]
    _check_offset("ffn[0] (w1)", w1, weight, (d, None), "d, r", None, banked)
    K, r = w1.shape[0], w1.shape[-1]
    if r == 0:
        raise checks.wrong_value("ffn[0] (w1)", w1, "a bottleneck r of at least 1")
    _check_offset("ffn[1] (b1)", b1, weight, (r,), "r", K, banked)
    _check_offset("ffn[2] (w2)", w2, weight, (r, d), "r, d", K, banked)
    _check_offset("ffn[3] (b2)", b2, weight, (d,), "d", K, banked)
    return w1, b1, w2, b2


def _check_low_rank(
    low_rank: tuple[Tensor, Tensor], input_ids: Tensor, weight: Tensor, banked: bool
) -> tuple[Tensor, Tensor]:
    checks.check_tuple("low_rank", low_rank, 2, _LOW_RANK)
    a, b = low_rank
    _check_offset("low_rank[0] (a)", a, weight, (None, None), "T, r", None, banked)
    r = a.shape[-1]
    if r == 0:
        raise checks.wrong_value("low_rank[0] (a)", a, "a rank r of at least 1")
    _check_offset("low_rank[1] (b)", b, weight, (r, weight.shape[1]), "r, d", a.shape[0], banked)
    _check_positions("low_rank[0] (a)", a, input_ids)
    return a, b


def _check_position_offset(position_offset: Tensor, input_ids: Tensor, weight: Tensor, banked: bool) -> None:
    shape = (None, weight.shape[1])
    _check_offset("position_offset", position_offset, weight, shape, "T, d", None, banked)
    _check_positions("position_offset", position_offset, input_ids)


def _check_positions(name: str, offsets: Tensor, input_ids: Tensor) -> None:
    positions = offsets.shape[-2]
    if positions < input_ids.shape[1]:
        raise ValueError(
            f"`{name}` has T = {positions} positions, but `input_ids` has N = {input_ids.shape[1]} tokens: "
            f"T must be at least N"
        )
