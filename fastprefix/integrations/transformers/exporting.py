"""Export trained prompts to serving engines that do not support prompt tuning."""

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
from .files.saving import CONFIG_FILE
from .merging import NewTable, refuse_saved_modules, rewrite_table
from .models.switching import evaluating
from .models.tuners import find_base_model, has_tuner_layers
from .prompts.prompt import PromptHooks, needs_ids
from .sharding.tensor_parallel import refuse_sharded


@torch.no_grad()
def export_prompt_embeds(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> list[Tensor]:
    """Return the input embeddings of each row, the prompt followed by the tokens, for a serving engine.

    Pass a row to vLLM as ``{"prompt_embeds": row}``, to an engine with ``enable_prompt_embeds=True``. Pass
    ``row.tolist()`` to SGLang's ``/generate`` as ``input_embeds``. The model without fastprefix gives the same logits
    and the same greedy generation with these ``inputs_embeds``, with two exceptions, because an engine embeds generated
    tokens with its own table. ADePT requires the checkpoint of ``export_merged_base``. DePT's offset on generated
    tokens is lost.

    Args:
        model: a decoder with a prompt method in use that is not merged.
        input_ids: int64 ``[B, N]``.
        attention_mask: ``[B, N]``, 0 for padding, which is left out. None if no token is padding.

    Returns:
        Embeddings ``[S + n, d]`` for each row with n tokens and S virtual tokens, in the dtype of the model's
        embeddings.

    Raises:
        ValueError: if the model has no prompt, or its layers need more than embeddings, or a shape is wrong.
    """
    hooks = _get_prompt_hooks(model)
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError("`input_ids` must be an integer tensor [B, N].")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must be {list(input_ids.shape)} like `input_ids`, but is {list(attention_mask.shape)}."
        )
    rows = []
    with evaluating(model):
        for row, ids in enumerate(input_ids):
            kept = ids if attention_mask is None else ids[attention_mask[row].bool()]
            embedded = hooks.embedding(kept[None])
            rows.append(hooks.embed_rows(embedded, 0, with_prompt=True)[0])
    return rows


def encode_prompt_embeds(embeds: Tensor) -> str:
    """Return a tensor as base64 text for the key ``prompt_embeds`` of a request to vLLM's server."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def export_merged_base(model: PreTrainedModel, directory: str | os.PathLike[str], **options: Any) -> None:
    """Write a ``transformers`` checkpoint of the base model with ADePT's network in its embedding table.

    A serving engine needs this checkpoint in addition to ``export_prompt_embeds``, because the engine embeds generated
    tokens with its own table. An output head that is tied to the table keeps the old table, and the checkpoint marks
    them as not tied.

    Args:
        model: a decoder with ADePT in use that is not merged. It is not changed.
        directory: the folder to write to. It must not contain an adapter.
        options: keyword arguments of ``save_pretrained``.

    Raises:
        ValueError: if another method is in use, if the model is not a decoder whose layers read only embeddings, or if
            the folder contains an adapter. Nothing is written.
    """
    hooks, folder = _get_prompt_hooks(model), Path(directory)
    if (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"`directory` must be a separate folder, but '{directory}' contains an adapter, which from_pretrained "
            "would read instead of the checkpoint. Pass another one."
        )
    if not isinstance(hooks.method, ADePT):
        raise ValueError(
            f"`model` must have ADePT in use, but has {type(hooks.method).__name__}, which does not change the "
            "embedding table. Serve the base model without changes."
        )
    if has_tuner_layers(model):
        raise ValueError("`model` must not have layers of PEFT, which the checkpoint would contain. Merge them first.")
    model = find_base_model(model)
    with evaluating(model), torch.no_grad():
        table = NewTable(hooks, rewrite_table(hooks))
    with use_adapter(model, None):
        table.install(model)
        try:
            model.save_pretrained(folder, **options)
        finally:
            table.remove()


def _get_prompt_hooks(model: PreTrainedModel) -> PromptHooks:
    """Return the hooks of a prompt on a decoder whose layers read only embeddings."""
    refuse_sharded(model, "export its prompt")
    adapter = get_attachment(model).adapter
    hooks, method = adapter.hooks, adapter.method
    if not isinstance(method, PromptMethod):
        raise ValueError(
            f"`model` must have a prompt, but has {type(method).__name__}. Use fastprefix.export_cache for prefixes."
        )
    refuse_saved_modules(adapter, "a serving engine")
    if adapter.merged or not isinstance(hooks, PromptHooks):
        raise ValueError("`model` must have an adapter that is not merged. Detach it and load it again.")
    if hooks.model.config.is_encoder_decoder or not hooks.entry_is_embedding or needs_ids(model.config):
        raise ValueError(
            f"`model` must be a decoder whose layers read only embeddings, but {type(model).__name__} is not "
            "such a model."
        )
    return hooks
