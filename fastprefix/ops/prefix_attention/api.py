"""``prefix_attention``: what it means and what it takes."""

import torch
from torch import Tensor

from ..backends import choose
from .arguments import EAGER_ALONE, AttentionArguments
from .reference import attend
from .registration import OPERATION
from .validation import canonicalize, collect_arguments


def prefix_attention(
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
    backend: str | None = None,
) -> Tensor:
    r"""Attend to tokens and a learned, gated prefix, as if both had been concatenated, without concatenating.

    THE LAYOUT IS ``[B, H, N, D]``, heads before length, as PyTorch's: flash-attention's ``[B, N, H, D]`` has to be
    transposed (``x.transpose(1, 2)``, a view), and where its sizes happen to fit it goes unnoticed.

    With one softmax over prefix and tokens (prefix tuning, Li & Liang 2021; APT, Zhang et al. 2023), ``c`` the scale
    and ``g`` the prefix gate:

    ```math
    o_i = \operatorname{softmax}_{p, j}(c\, g_p \langle q_i, pk_p \rangle,\; c \langle q_i, k_j \rangle)
          \cdot (g_p\, pv_p,\; v_j)
    ```

    With an ``output_gate`` ``og``, two softmaxes (LLaMA-Adapter, Zhang et al. 2024):

    ```math
    o_i = \operatorname{softmax}_j(c \langle q_i, k_j \rangle)\, v
          + og_h \operatorname{softmax}_p(c\, g_p \langle q_i, pk_p \rangle)\, (g\, pv)
    ```

    Every query sees the whole prefix: masks, causality, windows and segments speak of the tokens only. A query that
    sees nothing at all has output 0. ``B``, ``N``, ``M`` and ``P`` may be 0. Gradients exist for all floating tensors,
    and only those asked for are computed; ``attn_mask`` and ``prefix_bias`` have theirs from the eager backend alone.

    Without ``prefix_key`` and ``prefix_value`` this is plain attention; the arguments of a prefix are then errors.

    With ``prefix_spans``, prefix keys and values are a store ``[Hkv, T, *]`` of many prefixes, one behind the other,
    and every row of the batch sees its own span of it. Nothing is gathered: a row costs what its own span is long.
    Gradients of the store are summed over the rows that see a key, in a fixed order. ``P`` is then the largest length,
    counted from the start of each row's span.

    Args:
        query: ``[B, Hq, N, D]``. All floating tensors have its dtype and device (under autocast: end up with it).
        key: ``[B, Hkv, M, D]``; ``Hq`` is a multiple of ``Hkv``.
        value: ``[B, Hkv, M, Dv]``.
        prefix_key: ``[Hkv, P, D]``, one prefix for the whole batch, or ``[B, Hkv, P, D]``, one a row; with
            ``prefix_spans``, ``[Hkv, T, D]``.
        prefix_value: ``[Hkv, P, Dv]`` or ``[B, Hkv, P, Dv]``, like ``prefix_key``; None with it.
        prefix_gate: up to three dimensions, broadcastable to ``[B, Hkv, P]``, or four, broadcastable to
            ``[B, Hq, N, P]`` (a gate for each query). Multiplies prefix keys and prefix values. A gate of 0 does not
            remove a prefix token: its score is 0, and it still takes part in the softmax.
        output_gate: broadcastable to ``[B, Hq]``; given, the prefix has a softmax of its own.
        attn_mask: bool (True: may attend) or float (added to the scores), broadcastable to ``[B, Hq, N, M]``; a bool
            mask of two dimensions is a key padding mask ``[B, M]``.
        prefix_bias: broadcastable to ``[B, Hq, N, P]``, added to the prefix scores; ``-inf`` hides a prefix key.
        prefix_key_bias: broadcastable to ``[B, Hkv, P]``, or with ``prefix_spans`` to ``[Hkv, T]``; added to the prefix
            scores, so that a key has the weight ``e^bias``.
        prefix_spans: int64 or int32 ``[B, 2]``: each row's start and length in the store. Spans may be equal or
            overlap, and a length of 0 is no prefix. On a GPU a span beyond the store is undefined: looking at the
            values would wait for the device, so that only ``FASTPREFIX_CHECK_IDS=1`` in the environment checks them.
        frozen_prefix: so many of the first prefix keys and values (of the store, with ``prefix_spans``) get gradients
            of 0, and no work is done for theirs. Gates and biases keep their gradients.
        is_causal: query ``i`` sees key ``j`` where ``j <= i + (M - N)`` (aligned to the end).
        window_size: ``w`` > 0: only keys with ``i + (M - N) - j < w`` where causal, else ``|i + (M - N) - j| < w``.
        segment_ids: integer ``([B, N], [B, M])``: a query sees the keys of its own segment (packed sequences).
        softcap: ``t`` > 0: each score ``s``, the prefix's too, becomes ``t tanh(s / t)`` before masks and biases.
        sinks: ``[Hq]``, logits that join the tokens' softmax and add nothing to the output.
        scale: default ``1 / sqrt(D)``.
        dropout_p: probability of dropping an attention probability, from 0 to 1, whatever the module's mode. What is
            dropped follows from a seed drawn from the device's generator, and is the same on every backend.
        backend: None, the best for the device and shape, or "eager", "triton", "composed", "cpu": that one or an error.

    Returns:
        ``[B, Hq, N, Dv]`` in the dtype of query, with heads and length in memory in query's order.

    Raises:
        TypeError: an argument of the wrong type or dtype; the message names it.
        ValueError: an argument of the wrong shape, device or value, or a backend that is not usable; it says why.
    """
    given = collect_arguments(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        prefix_gate=prefix_gate,
        output_gate=output_gate,
        attn_mask=attn_mask,
        prefix_bias=prefix_bias,
        prefix_key_bias=prefix_key_bias,
        prefix_spans=prefix_spans,
        frozen_prefix=frozen_prefix,
        is_causal=is_causal,
        window_size=window_size,
        segment_ids=segment_ids,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        dropout_p=dropout_p,
    )
    arguments = canonicalize(given)
    name = choose(
        backend, query.device, OPERATION.refusals, arguments, _explain_eager_only(given), OPERATION.preferences
    )
    if backend is None and torch.onnx.is_in_onnx_export():  # which has no translation of this package's operators
        return attend(arguments)
    output: Tensor = OPERATION.call(name, arguments)[0]
    return output


def _explain_eager_only(given: AttentionArguments) -> str | None:
    """Explain why only the eager backend supports a call, or return None."""
    for name in EAGER_ALONE:
        tensor = getattr(given, name)
        if tensor is not None and tensor.requires_grad:
            return f"{name} requires a gradient, which the eager backend alone computes"
    return None
