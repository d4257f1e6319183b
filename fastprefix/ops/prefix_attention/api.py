"""The public function ``prefix_attention`` and the documentation of its arguments."""

import torch
from torch import Tensor

from ..backends import choose
from ..checks import needs_plain_operations
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
    r"""Compute attention over tokens and a learned, gated prefix without concatenating them.

    The layout is ``[B, H, N, D]``, heads before sequence length, as in PyTorch's ``scaled_dot_product_attention``.
    Transpose tensors in flash-attention's layout ``[B, N, H, D]`` first (``x.transpose(1, 2)``, a view). If their sizes
    happen to fit, the mistake raises no error.

    By default, prefix and tokens share one softmax (prefix tuning, Li & Liang 2021; APT, Zhang et al. 2023). With ``c``
    the scale and ``g`` the prefix gate:

    ```math
    o_i = \operatorname{softmax}_{p, j}(c\, g_p \langle q_i, pk_p \rangle,\; c \langle q_i, k_j \rangle)
          \cdot (g_p\, pv_p,\; v_j)
    ```

    With an ``output_gate`` ``og``, prefix and tokens have separate softmaxes (LLaMA-Adapter, Zhang et al. 2024):

    ```math
    o_i = \operatorname{softmax}_j(c \langle q_i, k_j \rangle)\, v
          + og_h \operatorname{softmax}_p(c\, g_p \langle q_i, pk_p \rangle)\, (g\, pv)
    ```

    Every query attends to the whole prefix. Masks, causality, windows and segments apply to the tokens only. The output
    of a query that attends to nothing is 0. ``B``, ``N``, ``M`` and ``P`` may be 0. All floating-point tensors have
    gradients, and only the requested ones are computed. Only the eager backend computes the gradients of ``attn_mask``
    and ``prefix_bias``.

    Without ``prefix_key`` and ``prefix_value``, this function is plain attention, and the other prefix arguments raise
    ValueError.

    With ``prefix_spans``, prefix keys and values are a store ``[Hkv, T, *]`` that holds many prefixes back to back, and
    each row of the batch attends to its own span. Nothing is gathered, and the cost of a row depends on the length of
    its own span. The store's gradients are summed over the rows that attend to a key, in a fixed order. ``P`` is then
    the length of the longest span, and index ``p`` counts from the start of each row's span.

    Args:
        query: ``[B, Hq, N, D]``. All other floating-point tensors must have its dtype and device. Under autocast they
            must have its dtype after the cast.
        key: ``[B, Hkv, M, D]``. ``Hq`` must be a multiple of ``Hkv``.
        value: ``[B, Hkv, M, Dv]``.
        prefix_key: ``[Hkv, P, D]``, one prefix for the whole batch, or ``[B, Hkv, P, D]``, one prefix per row. With
            ``prefix_spans``, a store ``[Hkv, T, D]``.
        prefix_value: ``[Hkv, P, Dv]``, ``[B, Hkv, P, Dv]`` or ``[Hkv, T, Dv]``, with as many dimensions as
            ``prefix_key``. Pass both or neither.
        prefix_gate: a factor of prefix keys and values. Up to three dimensions must broadcast to ``[B, Hkv, P]``. Four
            dimensions must broadcast to ``[B, Hq, N, P]`` (a gate for each query). A gate of 0 does not remove a prefix
            token. Its score is 0, and it still takes part in the softmax.
        output_gate: a factor of the prefix's output, broadcastable to ``[B, Hq]``. If it is given, the prefix has a
            separate softmax.
        attn_mask: bool (True: may attend) or float (added to the scores), broadcastable to ``[B, Hq, N, M]``. A bool
            mask with two dimensions is a key padding mask ``[B, M]``.
        prefix_bias: broadcastable to ``[B, Hq, N, P]``, added to the prefix scores. ``-inf`` hides a prefix key.
        prefix_key_bias: broadcastable to ``[B, Hkv, P]``, or with ``prefix_spans`` to ``[Hkv, T]``. Added to the prefix
            scores, so that a key's softmax weight is multiplied by ``e^bias``.
        prefix_spans: int64 or int32 ``[B, 2]``, the start and length of each row's span in the store. Spans may be
            equal or overlap. A length of 0 means that the row has no prefix. On a GPU, a span outside the store is
            undefined behavior. Checking the values waits for the device, so it is done only with
            ``FASTPREFIX_CHECK_IDS=1`` in the environment.
        frozen_prefix: the number of leading prefix keys and values (of the store, with ``prefix_spans``) whose
            gradients are 0 and are not computed. Gates and biases keep their gradients. Default: 0.
        is_causal: query ``i`` attends to key ``j`` only if ``j <= i + (M - N)`` (aligned to the end). Default: False.
        window_size: ``w`` >= 1. A query attends only to keys with ``i + (M - N) - j < w`` if ``is_causal``, otherwise
            to keys with ``|i + (M - N) - j| < w``. Default: no window.
        segment_ids: int64 or int32 ``([B, N], [B, M])`` for packed sequences. A query attends only to the keys of its
            own segment.
        softcap: ``t`` > 0. Each score ``s``, of tokens and prefix, becomes ``t tanh(s / t)`` before masks and biases.
            Default: no cap.
        sinks: ``[Hq]``, logits that join the tokens' softmax and add nothing to the output.
        scale: the factor of the scores, finite. Default: ``1 / sqrt(D)``.
        dropout_p: the probability, from 0 to 1, of dropping an attention probability. Dropout is applied even if the
            module is in evaluation mode. The dropped elements depend on a seed drawn from the device's generator. For
            the same seed they are the same on every backend. Default: 0.
        backend: None selects the first of "triton", "cpu", "sdpa" and "eager" that supports the call. The support page
            lists the exceptions. A name, also "composed", selects that backend or raises an error.

    Returns:
        ``[B, Hq, N, Dv]`` in the dtype of ``query``, with heads and length in the same memory order as in ``query``.

    Raises:
        TypeError: if an argument has the wrong type or dtype. The message names the argument.
        ValueError: if an argument has the wrong shape, device or value, or if the backend is not usable. The message
            explains why.
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
    if backend is None and needs_plain_operations():
        return OPERATION.run_formulas(_attend_as_accurately, arguments)
    name = choose(
        backend, query.device, OPERATION.refusals, arguments, _explain_eager_only(given), OPERATION.preferences
    )
    output: Tensor = OPERATION.call(name, arguments)[0]
    return output


def _attend_as_accurately(a: AttentionArguments) -> Tensor:
    """Compute the formula in the dtype of the kernels' sums, and round the output to that of ``query``."""
    wide = (x.to(a.accumulator) if isinstance(x, Tensor) and x.is_floating_point() else x for x in a)
    return attend(AttentionArguments._make(wide)).to(a.query.dtype)


def _explain_eager_only(given: AttentionArguments) -> str | None:
    """Return why only the eager backend supports a call, or None if the other backends may support it."""
    for name in EAGER_ALONE:
        tensor = getattr(given, name)
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return f"{name} requires a gradient, which only the eager backend computes"
    return None
