"""Hand trained prompts to serving engines that know nothing of them."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...methods import ADePT, PromptMethod
from .attachment import get_attachment, use_adapter
from .merging import NewTable, rewrite_table
from .models.switching import evaluating
from .prompts.prompt import PromptHooks, needs_ids
from .sharding.tensor_parallel import refuse_sharded


@torch.no_grad()
def export_prompt_embeds(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> list[Tensor]:
    """Return what enters the model for each row, its prompt and its tokens, for an engine that embeds nothing itself.

    vLLM takes such a tensor as ``{"prompt_embeds": row}`` from an engine with ``enable_prompt_embeds=True``; SGLang's
    ``/generate`` takes ``row.tolist()`` as ``input_embeds``. As ``inputs_embeds`` of the model without this package
    they give the same logits and the same greedy generation, with two limits: an engine embeds the tokens that it
    generates by its own table. ADePT's network must be in that (``export_merged_base``), and DePT's offset on generated
    tokens is lost.

    Args:
        model: a decoder with a prompt method in use, not merged.
        input_ids: int64 ``[B, N]``.
        attention_mask: ``[B, N]``, 0 for padding, which is left out; None: there is none.

    Returns:
        For each row embeddings ``[S + n, d]`` of its n tokens, in the dtype of the model's embeddings.

    Raises:
        ValueError: the model has no prompt, or what enters its layers is more than embeddings.
    """
    hooks = _get_prompt_hooks(model)
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError("`input_ids` must be an integer tensor [B, N].")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must be {list(input_ids.shape)} as `input_ids`, but is {list(attention_mask.shape)}."
        )
    rows = []
    with evaluating(model):
        for row, ids in enumerate(input_ids):
            kept = ids if attention_mask is None else ids[attention_mask[row].bool()]
            embedded = hooks.embedding(kept[None])
            rows.append(hooks.embed_rows(embedded, 0, with_prompt=True)[0])
    return rows


def encode_prompt_embeds(embeds: Tensor) -> str:
    """Return a tensor as text, as the key ``prompt_embeds`` of a request to vLLM's server has it."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def export_merged_base(model: PreTrainedModel, directory: str | os.PathLike[str], **options: Any) -> None:
    """Write the base model with ADePT's network in its embedding table, as a checkpoint of ``transformers``.

    A serving engine needs it beside ``export_prompt_embeds``: it embeds the tokens that it generates by itself. An
    output head that is tied to the table keeps the old one, and the checkpoint says that they are not tied.

    Args:
        model: a decoder with ADePT in use, not merged. It is left as it is.
        directory: where to.
        options: of ``save_pretrained``.

    Raises:
        ValueError: another method is in use, which leaves the embedding table as it is.
    """
    hooks = _get_prompt_hooks(model)
    if not isinstance(hooks.method, ADePT):
        raise ValueError(
            f"`model` must have ADePT in use, but has {type(hooks.method).__name__}, which does not change the "
            "embedding table: serve the base model as it is."
        )
    with evaluating(model), torch.no_grad():
        table = NewTable(hooks, rewrite_table(hooks))
    with use_adapter(model, None):
        table.install(model)
        try:
            model.save_pretrained(Path(directory), **options)
        finally:
            table.remove()


def _get_prompt_hooks(model: PreTrainedModel) -> PromptHooks:
    """Return the hooks of a prompt on a decoder that gets nothing but embeddings."""
    refuse_sharded(model, "export its prompt")
    adapter = get_attachment(model).adapter
    hooks, method = adapter.hooks, adapter.method
    if not isinstance(method, PromptMethod):
        raise ValueError(
            f"`model` must have a prompt, but has {type(method).__name__}: see fastprefix.export_cache for prefixes."
        )
    if adapter.merged or not isinstance(hooks, PromptHooks):
        raise ValueError("`model` must have an adapter that is not merged: detach it, and load it again.")
    if model.config.is_encoder_decoder or not hooks.entry_is_embedding or needs_ids(model.config):
        raise ValueError(
            f"`model` must be a decoder whose layers get its embeddings and nothing else, but {type(model).__name__} "
            "makes more of its ids."
        )
    return hooks
