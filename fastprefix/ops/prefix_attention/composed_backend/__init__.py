"""The composed backend: PyTorch's flash attention or cuDNN for the tokens, and a Triton kernel or these for the prefix.

Attention over two sets of keys is a weighted mean of the attention over each (``launch.py``). A vendor's kernel is
faster for many tokens than one in Triton; the prefix then costs one more pass over queries and outputs. It runs where
the Triton backend does, for what flash attention supports. ``plans.py`` says how a call is run.
"""

import torch

from ..arguments import AttentionArguments
from ..triton_backend import refusal as explain_triton_refusal
from . import packed, plans

_DTYPES = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float32,)}  # on the CPU: in Triton's interpreter
_ABSENT = ("output_gate", "attn_mask", "sinks", "window_size", "softcap", "dropout_seed")
_LABELS = {"dropout_seed": "dropout_p"}


def refusal(a: AttentionArguments) -> str | None:
    """Explain why a call cannot be composed, or return None if it can. The values of segments are read."""
    for name in _ABSENT:
        if getattr(a, name) is not None:
            return f"it takes no {_LABELS.get(name, name)}"
    if a.query.dtype not in _DTYPES.get(a.query.device.type, ()):
        return f"it takes float16 and bfloat16, not {a.query.dtype}"
    batch, _, queries, size = a.query.shape
    keys = a.key.shape[2]
    if a.value.shape[3] != size:
        return f"it takes values of the keys' width, not D = {size}, Dv = {a.value.shape[3]}"
    if size % 8 != 0:
        return f"it takes head sizes that are multiples of 8, not {size}"
    if batch == 0 or queries == 0 or keys == 0:
        return "it takes batches with rows, queries and keys"
    if a.is_causal and queries != keys:
        return f"with is_causal it takes as many queries as keys, not {queries} and {keys}"
    reason = explain_triton_refusal(a)
    if reason is None and packed.can_read(a):
        reason = packed.explain_segments(a)
    return reason


def is_preferred(a: AttentionArguments) -> bool:
    """Return whether a measurement says that composition is faster than the Triton backend for a call.

    Vendors' kernels add gradients of queries in any order. Where PyTorch is asked for deterministic algorithms,
    composition is not the default. Nor is it in a trace with segments, whose values cannot be read.
    """
    if not plans.read_choices() or torch.are_deterministic_algorithms_enabled() or not plans.is_faster(a):
        return False
    return a.query_segments is None or packed.can_read(a)
