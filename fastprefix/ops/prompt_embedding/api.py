"""``prompt_embedding``: what it means and what it takes."""

import torch
from torch import Tensor

from ..backends import choose
from .reference import embed
from .registration import OPERATION
from .validation import canonical_arguments


def prompt_embedding(
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
    backend: str | None = None,
) -> Tensor:
    r"""Embed tokens with an offset, behind a soft prompt, in one pass.

    With ``e_t`` the table's row for token t at position i, and ``s`` the scale, the token's row is ``e_t`` (prompt
    tuning, Lester et al. 2021), or

    ```math
    e_t + s\,(a b)_i \quad\text{(DePT, Shi and Lipani 2024)} \qquad
    e_t + s\,o_i \quad\text{(ACCEPT, Lin et al. 2024)} \qquad
    e_t + s\,(\operatorname{relu}(e_t w_1 + b_1)\, w_2 + b_2) \quad\text{(ADePT, Tang et al. 2025)}
    ```

    Padding tokens get the offset like any other. ``B``, ``N`` and ``S`` may be 0. For the backward pass nothing is
    kept but the ids: rows are gathered again.

    Rows of a batch may have prompts and offsets of their own. With ``prompt_spans``, ``prompt`` is a store that holds
    many prompts one behind the other, and each row names its part. With ``index``, the tensors of the offset have a
    leading dimension K, a bank of K offsets, and each row names its entry. Gradients have the shape of the store and of
    the bank, summed over the rows that use a part in a fixed order; what no row uses gets a gradient of 0.

    Args:
        input_ids: int64 or int32 ``[B, N]``, from 0 to V - 1. On a CPU ids outside are an error; on a GPU they are
            looked at only with ``FASTPREFIX_CHECK_IDS=1`` in the environment. They are never clamped. The same holds
            for the values of ``prompt_spans`` and ``index``.
        weight: ``[V, d]``, the embedding table. All floating tensors have its dtype and device (under autocast the
            others are brought to its dtype).
        prompt: ``[S, d]``, placed before the tokens of every row; with ``prompt_spans`` a packed store ``[T, d]``.
        ffn: ``(w1 [d, r], b1 [r], w2 [r, d], b2 [d])``, ADePT's token-wise network. With ``index``, each of the four
            has a leading dimension K.
        low_rank: ``(a [T, r], b [r, d])``, ``T >= N``, DePT's pair: row i of ``a b`` for position i. With ``index``,
            ``(a [K, T, r], b [K, r, d])``.
        position_offset: ``[T, d]``, ``T >= N``, a dense offset: row i for position i. With ``index``, ``[K, T, d]``.
        prompt_spans: int64 or int32 ``[B, 2]``, for each row the start and the length of its prompt in the store. Spans
            may be equal or overlap, and a length may be 0. A prompt shorter than S stands right before its tokens. The
            rows on its left are 0 and pass no gradient on; mask them.
        prompt_length: S with ``prompt_spans``, at least their largest length. None: the largest length, which is read
            on the host. On a GPU that waits for the device, and under ``torch.compile`` it makes the shape of the
            result depend on data, so give the length there.
        index: int64 or int32 ``[B]``, the entry of the bank for each row, from 0 to K - 1; -1: no offset. The eager
            backend reads it on the host, which on a GPU waits for the device.
        offset_scale: multiplies the offset.
        dropout_p: probability of dropping a hidden unit of the network, before the ReLU, from 0 to 1, whatever the
            module's mode. What is dropped follows from a seed drawn from the device's generator.
        backend: None, the best for the device, or "eager", "triton", "cpu": that one or an error.

    Returns:
        ``[B, S + N, d]`` in the dtype of weight.

    Raises:
        TypeError: an argument of the wrong type or dtype; the message names it.
        ValueError: an argument of the wrong shape, device or value, more than one offset, or a backend that is not
            usable; it says why.
    """
    arguments = canonical_arguments(
        input_ids,
        weight,
        prompt,
        ffn=ffn,
        low_rank=low_rank,
        position_offset=position_offset,
        prompt_spans=prompt_spans,
        prompt_length=prompt_length,
        index=index,
        offset_scale=offset_scale,
        dropout_p=dropout_p,
    )
    name = choose(backend, weight.device, OPERATION.refusals, arguments)
    if backend is None and torch.onnx.is_in_onnx_export():  # which has no translation of this package's operators
        return embed(arguments)
    output: Tensor = OPERATION.call(name, arguments)
    return output
