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

_HEAD_SIZE = 8
_HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    *("decoder_attention_heads", "encoder_attention_heads", "num_encoder_attention_heads"),
)
_WIDTHS = {"hidden_size", "n_embd", "d_model", "embed_dim"}
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "decoder_layers", "encoder_layers"}
_SMALL = {
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner"), 32),
    **dict.fromkeys(
        ("ffn_dim", "d_ff", "ffn_hidden_size", "expert_ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 32
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 16),
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"qk_rope_head_dim": _HEAD_SIZE, "qk_head_dim": 16 + _HEAD_SIZE},
    "rotary_dim": 4,
    **{"vocab_size": 128, "vocab_size_per_layer_input": 128},
}
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
    for variant in (shrunk, copy.deepcopy):
        try:
            candidate = variant(config)
            with torch.device("meta"):
                size = build(candidate).num_parameters()
            if size > _MOST_PARAMETERS:
                continue
            model: PreTrainedModel = build(candidate).eval()
            with torch.no_grad():
                model.base_model(**ids, use_cache=False)
        except Exception:  # whatever a family makes of sizes that it was not made for
            continue
        return model
    return None


def build(config: Any) -> PreTrainedModel:
    """A model with random weights, of the class that the configuration names, or else the one that it belongs to."""
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


def shrunk(config: PretrainedConfig, layers: int | None = None) -> PretrainedConfig:
    """All heads, each of them narrow; few words, experts and hidden neurons.

    Args:
        config: of a model, with those of its parts; it is left alone.
        layers: how many there are at least, and one of every kind; None: all.
    """
    small = copy.deepcopy(config)
    for part in parts(small):
        _narrow(part)
        if layers is not None:
            _shorten(part, layers)
    return small


def parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for name in config.sub_configs:
        if isinstance(getattr(config, name, None), PretrainedConfig):
            yield from parts(getattr(config, name))


def _narrow(config: Any) -> None:
    sizes = {name: value for name, value in vars(config).items() if type(value) is int}
    heads = next((sizes[name] for name in _HEADS if name in sizes), 1)
    for name in _WIDTHS & sizes.keys():
        setattr(config, name, heads * _HEAD_SIZE)
    for name, size in _SMALL.items():
        if name in sizes:
            setattr(config, name, min(size, sizes[name]))
    if "head_dim" in vars(config):
        config.head_dim = _HEAD_SIZE
    if sizes.get("pad_token_id", 0) >= _SMALL["vocab_size"]:
        config.pad_token_id = 0
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        config.rope_parameters = _narrow_rope(rope)


def _narrow_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Lists are as long as heads are wide; sections of a position in time and space add up to half of that."""
    half = int(_HEAD_SIZE * rope.get("partial_rotary_factor", 1.0)) // 2
    kept = {name: value for name, value in rope.items() if not isinstance(value, list)}
    scaled = {"rope_type": "default"} if len(kept) < len(rope) else {}
    return {**kept, **scaled, "mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}


def _shorten(config: Any, layers: int) -> None:
    for name in _LAYERS & vars(config).keys():
        setattr(config, name, layers)
    types = list(dict.fromkeys(vars(config).get("layer_types") or ()))
    if types:
        config.num_hidden_layers = max(layers, len(types))
        config.layer_types = (types * layers)[: config.num_hidden_layers]
