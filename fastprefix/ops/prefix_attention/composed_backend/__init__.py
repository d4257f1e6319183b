"""The composed backend: PyTorch's flash attention or cuDNN for the tokens, and the same or a Triton kernel for the
prefix.

Attention over two sets of keys is a weighted mean of the attention over each set (``launch.py``). For many tokens, a
vendor's kernel is faster than a Triton kernel, and the prefix adds one more pass over queries and outputs. This backend
runs on the devices of the Triton backend and supports the calls that flash attention supports. ``plans.py`` chooses the
kernels of a call.
"""

import torch

from ..arguments import AttentionArguments, explain_unsupported
from ..triton_backend import refusal as explain_triton_refusal
from . import packed, plans
from .problem import MOST_SEQUENCES

_DTYPES = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float32,)}  # CPU: Triton's interpreter
_ABSENT = ("output_gate", "attn_mask", "sinks", "window_size", "softcap", "dropout_seed")


def refusal(a: AttentionArguments) -> str | None:
    """Explain why a call cannot be composed, or return None if it can. It reads the values of segments."""
    if reason := explain_unsupported(a, _ABSENT):
        return reason
    if a.query.dtype not in _DTYPES.get(a.query.device.type, ()):
        return f"it supports float16 and bfloat16, not {a.query.dtype}"
    batch, _, queries, size = a.query.shape
    keys = a.key.shape[2]
    if a.value.shape[3] != size:
        return f"it requires values with the head dimension of the keys, not D = {size} and Dv = {a.value.shape[3]}"
    if not a.scale > 0.0:  # the kernels hide scores before they multiply them by the scale
        return f"it supports scales above 0, not {a.scale}"
    if size % 8 != 0:
        return f"it supports head dimensions that are multiples of 8, not {size}"
    if batch == 0 or queries == 0 or keys == 0:
        return "it requires at least one row, one query and one key"
    if batch > MOST_SEQUENCES:
        return f"it supports up to {MOST_SEQUENCES:,} rows, not {batch:,}"
    if a.is_causal and queries != keys:
        return f"with `is_causal` it requires as many queries as keys, not {queries} and {keys}"
    reason = explain_triton_refusal(a)
    if reason is None and packed.can_read(a):
        reason = packed.explain_segments(a)
    return reason


def is_preferred(a: AttentionArguments) -> bool:
    """Return whether composition was measured to be faster than the Triton backend for a call.

    Return False if PyTorch must use deterministic algorithms, because vendors' kernels sum the gradients of queries in
    any order. Return False for segments in a trace, where their values cannot be read.
    """
    if torch.are_deterministic_algorithms_enabled() or not plans.is_faster(a):
        return False
    return a.query_segments is None or packed.can_read(a)
