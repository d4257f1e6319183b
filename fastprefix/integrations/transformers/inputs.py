"""What a model of any kind is run on, to see what it does: a few tokens, an image, a second of sound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .calls import parameter_names

Inputs = Mapping[str, Any]
"""The keyword arguments of a model."""

_ROWS, _TOKENS, _PADDING = 2, 6, 2
_FRAMES = 64  # of sound, where a model takes any number
_IMAGE = 64  # pixels on a side, where a model takes any

_IMAGE_SIZES = ("image_size", "crop_size")
_VIDEO_LENGTHS = ("num_frames", "frames_per_clip")
_SPECTRUM_SIZES = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_feat_size")
"""What configurations call such a size."""


def is_of_text(model: PreTrainedModel) -> bool:
    """Whether a model's input is token ids."""
    return str(model.main_input_name) == "input_ids"


def is_plain_text(model: PreTrainedModel) -> bool:
    """Whether a model's input is token ids, all in one sequence."""
    return is_of_text(model) and not model.config.is_encoder_decoder


def text_inputs(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Any]:
    """Ids ``[B, N]`` for a model of text. In an encoder-decoder the decoder's are fewer than the encoder's, which tells
    cross-attention from self-attention.
    """
    ids = input_ids.to(model.device)
    if model.config.is_encoder_decoder:
        return {"input_ids": _ending(model, ids), **_decoder_inputs(model, len(ids))}
    return {"input_ids": ids, "use_cache": False}


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Small inputs on which a model may run, the most telling first: its main input alone, text with padding before
    text without; then everything that it takes and of which a size is known.
    """
    ids = _tokens(model)
    if is_of_text(model):
        inputs = text_inputs(model, ids)
        mask = torch.ones_like(inputs["input_ids"])
        mask[-1, :_PADDING] = 0
        yield {**inputs, "attention_mask": mask}
        yield inputs
    else:
        decoder = _decoder_inputs(model, 1) if model.config.is_encoder_decoder else {}
        main = str(model.main_input_name)
        for shape in _shapes(model, main):
            yield {main: _noise(model, (1, *shape)), **decoder}
    together: dict[str, Any] = {"input_ids": ids}
    for name in ("pixel_values", "pixel_values_videos", "input_features", "input_values"):
        first = next(_shapes(model, name), None)
        if first is not None and name in parameter_names(model.base_model):
            together[name] = _noise(model, (_ROWS, *first))
    if model.config.is_encoder_decoder:
        together |= _decoder_inputs(model, _ROWS)
    yield together


def _tokens(model: PreTrainedModel) -> Tensor:
    """Different ones, as far as there are so many."""
    text: Any = model.config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or _TOKENS
    return (torch.arange(_ROWS * _TOKENS, device=model.device) % vocabulary).view(_ROWS, _TOKENS)


def _decoder_inputs(model: PreTrainedModel, rows: int) -> dict[str, Any]:
    return {"decoder_input_ids": torch.zeros(rows, 2, dtype=torch.long, device=model.device), "use_cache": False}


def _ending(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The last token is the one that ends a sequence: BART's classifiers read its hidden state."""
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int):
        tokens = tokens.clone()
        tokens[:, -1] = end
    return tokens


def _noise(model: PreTrainedModel, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(model.device, model.dtype)


def _shapes(model: PreTrainedModel, name: str) -> Iterator[tuple[int, ...]]:
    """Shapes that a row of an input that is no text may have, by the configuration."""
    config = model.config
    if name.startswith("pixel_values"):
        size = _size(config, *_IMAGE_SIZES) or _IMAGE
        height, width = (size, size) if isinstance(size, int) else size
        image = (_size(config, "num_channels") or 3, height, width)
        frames = _size(config, *_VIDEO_LENGTHS)
        yield image if frames is None else (frames, *image)
        return
    spectrum, length = _size(config, *_SPECTRUM_SIZES), _size(config, "max_source_positions")
    if name == "input_features" and spectrum is not None:
        if length is not None:
            yield spectrum, 2 * length
        yield _FRAMES, spectrum
        yield spectrum, _FRAMES
    elif name == "input_values" and spectrum is not None:
        yield _size(config, "max_length") or _FRAMES, spectrum
    elif name == "input_values":
        yield (16000,)
        yield 1, 16000


def _size(config: Any, *names: str) -> Any:
    """The first of these sizes in a configuration, or in one inside it; None: it has none."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return tuple(value) if isinstance(value, list) else value
    inside = (getattr(config, name, None) for name in config.sub_configs)
    return next((s for part in inside if isinstance(part, PretrainedConfig) and (s := _size(part, *names))), None)
