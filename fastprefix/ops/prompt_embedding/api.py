"""The public function ``prompt_embedding`` and the documentation of its arguments."""

from torch import Tensor

from ..backends import choose
from ..checks import needs_plain_operations
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
    r"""Look up token embeddings, add an offset and prepend a soft prompt in one pass.

    Let ``e_t`` be the table's entry for token t at position i, and ``s`` the offset scale. The embedding of the token
    is ``e_t`` (prompt tuning, Lester et al. 2021), or

    ```math
    e_t + s\,(a b)_i \quad\text{(DePT, Shi and Lipani 2024)}
    ```

    ```math
    e_t + s\,o_i \quad\text{(ACCEPT, Lin et al. 2024)}
    ```

    ```math
    e_t + s\,(\operatorname{relu}(e_t w_1 + b_1)\, w_2 + b_2) \quad\text{(ADePT, Tang et al. 2025)}
    ```

    Padding tokens also get the offset. ``B``, ``N`` and ``S`` may be 0. The forward pass saves its inputs and, with
    dropout, a seed, but no intermediate results. The backward pass gathers the embeddings again.

    Rows of the batch may have different prompts and offsets. With ``prompt_spans``, ``prompt`` is a store that holds
    many prompts back to back, and each row selects a span of it. With ``index``, the tensors of the offset have a
    leading dimension K, which makes them a bank of K offsets, and each row selects an entry. The gradients have the
    shapes of the store and the bank. They are summed over the rows in a fixed order, and unused parts get 0.

    Args:
        input_ids: int64 or int32 ``[B, N]``, token ids from 0 to V - 1. On a CPU, other ids raise ValueError. On a GPU,
            they are checked only with ``FASTPREFIX_CHECK_IDS=1`` in the environment. Ids are never clamped. The same
            applies to the values of ``prompt_spans`` and ``index``.
        weight: ``[V, d]``, the embedding table. All other floating-point tensors must have its dtype and device. Under
            autocast they are cast to its dtype.
        prompt: ``[S, d]``, placed before the tokens of every row. With ``prompt_spans``, a packed store ``[T, d]``.
        ffn: ``(w1 [d, r], b1 [r], w2 [r, d], b2 [d])``, ADePT's token-wise network. With ``index``, each of the four
            has a leading dimension K.
        low_rank: ``(a [T, r], b [r, d])`` with ``T >= N``, DePT's pair. Row i of ``a b`` is added at position i. With
            ``index``, ``(a [K, T, r], b [K, r, d])``.
        position_offset: ``[T, d]`` with ``T >= N``, a dense offset. Row i is added at position i. With ``index``,
            ``[K, T, d]``.
        prompt_spans: int64 or int32 ``[B, 2]``, the start and length of each row's prompt in the store. Spans may be
            equal or overlap, and a length may be 0. A prompt shorter than S is placed directly before the tokens. The
            positions to its left are 0 and pass no gradient to the store. Mask them in the model.
        prompt_length: S with ``prompt_spans``, at least their largest length. None uses the largest length, which is
            read on the host. On a GPU this waits for the device, and under ``torch.compile`` it makes the shape of the
            result depend on data, so pass the length in these cases.
        index: int64 or int32 ``[B]``, the entry of the bank for each row, from 0 to K - 1, or -1 for no offset. The
            eager backend reads it on the host, which waits for the device on a GPU.
        offset_scale: the factor of the offset, finite. Default: 1.
        dropout_p: the probability, from 0 to 1, of dropping a hidden unit of the network before the ReLU. Dropout is
            applied even if the module is in evaluation mode. The dropped units depend on a seed drawn from the device's
            generator. Requires ``ffn`` if it is not 0. Default: 0.
        backend: None selects the first of "triton", "cpu" and "eager" that supports the call. A name selects that
            backend or raises an error.

    Returns:
        ``[B, S + N, d]`` in the dtype of ``weight``.

    Raises:
        TypeError: if an argument has the wrong type or dtype. The message names the argument.
        ValueError: if an argument has the wrong shape, device or value, if more than one offset is given, or if the
            backend is not usable. The message explains why.
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
    if backend is None and needs_plain_operations():
        return OPERATION.run_formulas(embed, arguments)
    name = choose(backend, weight.device, OPERATION.refusals, arguments)
    output: Tensor = OPERATION.call(name, arguments)
    return output
