"""What a model of any kind is run on, to see what it does: two tokens, an image, a second of sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def is_of_text(model: PreTrainedModel) -> bool:
    """Whether a model's input is token ids."""
    return str(model.main_input_name) == "input_ids"


def is_plain_text(model: PreTrainedModel) -> bool:
    """Whether a model's input is token ids, all in one sequence."""
    return is_of_text(model) and not model.config.is_encoder_decoder


def example_inputs(model: PreTrainedModel, input_ids: Tensor | None = None) -> dict[str, Any]:
    """The smallest input that a model runs on. In an encoder-decoder the decoder's is shorter than the encoder's, which
    tells cross-attention from self-attention.

    Args:
        model: any.
        input_ids: ``[1, N]``, to run a model of text on; None: zeros.

    Raises:
        ValueError: it is not known what the model takes.
    """
    inputs: dict[str, Any] = {}
    halves = model.config.is_encoder_decoder
    if not is_of_text(model):
        inputs[model.main_input_name] = torch.zeros(_shape(model), dtype=model.dtype, device=model.device)
    else:
        tokens = torch.zeros(1, 3 if halves else 2, dtype=torch.long) if input_ids is None else input_ids
        inputs["input_ids"] = _ending(model, tokens.to(model.device)) if halves else tokens.to(model.device)
    if halves:
        inputs["decoder_input_ids"] = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    if halves or is_of_text(model):
        inputs["use_cache"] = False
    return inputs


def _ending(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The last token is the one that ends a sequence: BART's classifiers read its hidden state."""
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int):
        tokens = tokens.clone()
        tokens[:, -1] = end
    return tokens


def _shape(model: PreTrainedModel) -> tuple[int, ...]:
    """The shape of an input that is no text, by the configuration."""
    config: Any = model.config
    name = model.main_input_name
    mel, size = getattr(config, "num_mel_bins", None), getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return 1, getattr(config, "num_channels", 3), height, width
    if name == "input_features" and mel is not None and hasattr(config, "max_source_positions"):
        return 1, mel, 2 * config.max_source_positions
    if name == "input_values":
        return (1, 16000) if mel is None else (1, config.max_length, mel)
    raise ValueError(
        "model takes one whose input is input_ids, or pixel_values, input_features or input_values of sizes that its "
        f"configuration says; got {type(model).__name__} with {name}"
    )
