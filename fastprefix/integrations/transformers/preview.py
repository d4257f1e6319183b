"""What methods would do on a model, told from its configuration alone: on a small copy of it with random weights."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ...methods import PromptTuningConfig
from .attachment import attach, detach, method_of
from .probe import find_layers

_SMALL = {"vocab_size": 128, "intermediate_size": 32, "moe_intermediate_size": 32, "ffn_dim": 32, "n_inner": 32}
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_HEAD_SIZE = 8
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MOST_PARAMETERS = 300_000_000
"""A model is built as it is, where its small copy cannot be, up to here."""


def preview(name: str) -> Iterator[str]:
    """What is printed of a model: a local folder's, or a name's that the hub or its local cache knows.

    Only the configuration is read, and no code but this library's is run.

    Raises:
        OSError: no configuration there.
        ValueError: the configuration is of a model that ``transformers`` itself does not have.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    model = _random_model(config)
    if model is None:
        yield "model         cannot be built small; attach a method to the model itself: model.fastprefix.prompt_path"
        return
    yield f"model         {type(model).__name__} ({config.model_type}), tried with random weights"
    yield f"prompts       {_prompts(model)}"
    yield f"prefixes      {_prefixes(model)}"


def _prompts(model: PreTrainedModel) -> str:
    try:
        attach(model, PromptTuningConfig(1))
    except ValueError as error:
        return f"none: {error}"
    path = method_of(model).prompt_path
    detach(model)
    return "shared: run once for the whole batch" if path == "shared" else f"in every row ({path})"


def _prefixes(model: PreTrainedModel) -> str:
    try:
        layers = find_layers(model)
    except ValueError as error:
        return f"none: {error}"
    windows = Counter(layer.window for layer in layers if layer.window is not None)
    windowed = "".join(f", {count} with a sliding window of {window}" for window, count in windows.items())
    return f"{len(layers)} attention layers{windowed}"


def _random_model(config: Any) -> PreTrainedModel | None:
    """A small copy of a model that runs; else the model itself, if it is small; else None."""
    ids = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
    if config.is_encoder_decoder:
        ids["decoder_input_ids"] = ids["input_ids"]
    for variant in (_shrunk, copy.deepcopy):
        try:
            candidate = variant(config)
            with torch.device("meta"):
                size = _build(candidate).num_parameters()
            if size > _MOST_PARAMETERS:
                continue
            model: PreTrainedModel = _build(candidate).eval()
            with torch.no_grad():
                model.base_model(**ids)
        except Exception:  # whatever a family makes of sizes that it was not made for
            continue
        return model
    return None


def _build(config: Any) -> PreTrainedModel:
    """By the class that the configuration names, or else the one that it has in ``transformers``."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    torch.manual_seed(0)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named(config)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError:
        model = AutoModel.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model


def _shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """All layers and heads, each of them narrow; few words, experts and hidden neurons."""
    small = copy.deepcopy(config)
    text: Any = small.get_text_config()
    heads = next((getattr(text, name) for name in _HEADS if isinstance(getattr(text, name, None), int)), 1)
    for name in _WIDTHS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, heads * _HEAD_SIZE)
    if isinstance(vars(text).get("head_dim"), int) and not hasattr(text, "kv_lora_rank"):
        text.head_dim = _HEAD_SIZE
    for name, size in _SMALL.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, size)
    for name in _EXPERTS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(16, getattr(text, name)))
    text.pad_token_id = None
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope:  # lists of scales are as long as the heads are wide
        kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        text.rope_parameters = {"rope_type": "default", **kept}
    return small
