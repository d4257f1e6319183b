"""From a caller's arguments to the canonical ones, or to an error that names the argument."""

import math
import os

import torch
from torch import Tensor

from .. import checks, random
from .arguments import EmbeddingArguments

_FFN = "a tuple (w1 [d, r], b1 [r], w2 [r, d], b2 [d])"
_LOW_RANK = "a tuple (a [T, r], b [r, d])"


def canonical_arguments(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor | None = None,
    *,
    ffn: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    offset_scale: float = 1.0,
    dropout_p: float = 0.0,
) -> EmbeddingArguments:
    """Check every argument, then bring them to the declared form."""
    checks.check_floating("weight", weight, "an embedding table [V, d]")
    checks.check_shape("weight", weight, (None, None), "an embedding table [V, d]")
    checks.check_integer("input_ids", input_ids, "token ids [B, N]")
    checks.check_shape("input_ids", input_ids, (None, None), "token ids [B, N]")
    checks.check_device("input_ids", input_ids, weight.device, "weight")
    if prompt is not None:
        _check_parameter("prompt", prompt, weight, (None, weight.shape[1]), "[S, d]")
    if ffn is not None and low_rank is not None:
        raise ValueError("ffn and low_rank exclude one another: give one offset, got both")
    w1, b1, w2, b2 = (None, None, None, None) if ffn is None else _check_ffn(ffn, weight)
    low_rank_a, low_rank_b = (None, None) if low_rank is None else _check_low_rank(low_rank, input_ids, weight)
    checks.check_number("offset_scale", offset_scale, "a finite number")
    if not -math.inf < offset_scale < math.inf:
        raise checks.wrong_value("offset_scale", offset_scale, "a finite number")
    checks.check_probability("dropout_p", dropout_p)
    if dropout_p > 0.0 and ffn is None:
        raise checks.wrong_value("dropout_p", dropout_p, "0 where there is no ffn, whose hidden layer it drops")
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
        dropout_seed=random.draw_seed(weight.device) if dropout_p > 0.0 else None,
        offset_scale=float(offset_scale),
        dropout_p=float(dropout_p),
    )


def check_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Raise for token ids outside the table: on a CPU always; elsewhere, where looking would wait for the device,
    only with ``FASTPREFIX_CHECK_IDS=1`` in the environment. Ids are never clamped.
    """
    if input_ids.device.type != "cpu" and os.environ.get("FASTPREFIX_CHECK_IDS") != "1":
        return
    if input_ids.numel() == 0 or torch.onnx.is_in_onnx_export():  # a trace cannot look at them
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids takes ids from 0 to V - 1 = {vocabulary - 1}, got {wrong}")


def _check_parameter(
    name: str, value: Tensor, weight: Tensor, shape: tuple[checks.Size | None, ...], takes: str
) -> None:
    """Check that a parameter is floating, of the expected shape, and on the device and of the dtype of weight."""
    checks.check_floating(name, value, takes)
    checks.check_shape(name, value, shape, f"{takes} with d = {weight.shape[1]} of weight")
    checks.check_device(name, value, weight.device, "weight")
    autocast = checks.autocast_dtype(weight.device) is not None
    if not autocast:  # it brings the parameters to weight's dtype
        checks.check_dtype(name, value, weight.dtype, "weight")


def _check_ffn(ffn: tuple[Tensor, Tensor, Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_tuple("ffn", ffn, 4, _FFN)
    w1, b1, w2, b2 = ffn
    d = weight.shape[1]
    _check_parameter("ffn[0] (w1)", w1, weight, (d, None), "[d, r]")
    r = w1.shape[1]
    if r == 0:
        raise checks.wrong_value("ffn[0] (w1)", w1, "a bottleneck r of at least 1")
    _check_parameter("ffn[1] (b1)", b1, weight, (r,), f"[r], r = {r} of w1,")
    _check_parameter("ffn[2] (w2)", w2, weight, (r, d), f"[r, d], r = {r} of w1,")
    _check_parameter("ffn[3] (b2)", b2, weight, (d,), "[d]")
    return w1, b1, w2, b2


def _check_low_rank(low_rank: tuple[Tensor, Tensor], input_ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_tuple("low_rank", low_rank, 2, _LOW_RANK)
    a, b = low_rank
    _check_parameter("low_rank[0] (a)", a, weight, (None, None), "[T, r]")
    if a.shape[1] == 0:
        raise checks.wrong_value("low_rank[0] (a)", a, "a rank r of at least 1")
    _check_parameter("low_rank[1] (b)", b, weight, (a.shape[1], weight.shape[1]), f"[r, d], r = {a.shape[1]} of a,")
    if a.shape[0] < input_ids.shape[1]:
        raise ValueError(
            f"low_rank[0] (a) has offsets for T = {a.shape[0]} positions, got input_ids of N = {input_ids.shape[1]} "
            f"tokens: it takes T >= N"
        )
    return a, b


def _check_tuple(name: str, value: object, length: int, takes: str) -> None:
    if not isinstance(value, tuple | list):
        raise checks.wrong_type(name, value, takes)
    if len(value) != length:
        raise ValueError(f"{name} takes {takes}, got {len(value)} entries")
