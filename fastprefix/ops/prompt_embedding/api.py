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
    offset_scale: float = 1.0,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""Embed tokens with an offset, behind a soft prompt, in one pass.

    With ``e_t`` the table's row for token t at position i, and ``s`` the scale, the token's row is ``e_t`` (prompt
    tuning, Lester et al. 2021), or

    ```math
    e_t + s\,(a b)_i \quad\text{(DePT, Shi and Lipani 2024)} \qquad
    e_t + s\,(\operatorname{relu}(e_t w_1 + b_1)\, w_2 + b_2) \quad\text{(ADePT, Tang et al. 2025)}
    ```

    Padding tokens get the offset like any other. ``B``, ``N`` and ``S`` may be 0. For the backward pass nothing is
    kept but the ids: rows are gathered again.

    Args:
        input_ids: int64 or int32 ``[B, N]``, from 0 to V - 1. On a CPU ids outside are an error; on a GPU they are
            looked at only with ``FASTPREFIX_CHECK_IDS=1`` in the environment. They are never clamped.
        weight: ``[V, d]``, the embedding table. All floating tensors have its dtype and device (under autocast the
            others are brought to its dtype).
        prompt: ``[S, d]``, placed before the tokens of every row.
        ffn: ``(w1 [d, r], b1 [r], w2 [r, d], b2 [d])``, ADePT's token-wise network.
        low_rank: ``(a [T, r], b [r, d])``, ``T >= N``, DePT's pair: row i of ``a b`` for position i.
        offset_scale: multiplies the offset.
        dropout_p: probability of dropping a hidden unit of the network, before the ReLU, from 0 to 1, whatever the
            module's mode. What is dropped follows from a seed drawn from the device's generator.
        backend: None, the best for the device, or "eager", "triton", "cpu": that one or an error.

    Returns:
        ``[B, S + N, d]`` in the dtype of weight.

    Raises:
        TypeError: an argument of the wrong type or dtype; the message names it.
        ValueError: an argument of the wrong shape, device or value, both offsets at once, or a backend that is not
            usable; it says why.
    """
    arguments = canonical_arguments(
        input_ids, weight, prompt, ffn=ffn, low_rank=low_rank, offset_scale=offset_scale, dropout_p=dropout_p
    )
    name = choose(backend, weight.device, OPERATION.refusals, arguments)
    if backend is None and torch.onnx.is_in_onnx_export():  # which has no translation of this package's operators
        return embed(arguments)
    output: Tensor = OPERATION.operator(name)(*arguments)
    return output
