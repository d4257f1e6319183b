"""Build tiny random vision transformers, in float64 and without dropout."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

WIDTH, LAYERS, SIDE, PATCH = 32, 3, 12, 4
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _build(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def vit() -> Any:
    return _build(ViTForImageClassification, ViTConfig(**SIZES, num_labels=3))


def deit() -> Any:
    return _build(DeiTForImageClassification, DeiTConfig(**SIZES, num_labels=3))


def dinov2() -> Any:
    return _build(Dinov2ForImageClassification, Dinov2Config(**SIZES, mlp_ratio=2, num_labels=3))


def siglip() -> Any:
    return _build(SiglipVisionModel, SiglipVisionConfig(**SIZES))


def clip() -> Any:
    return _build(CLIPModel, CLIPConfig(text_config=TEXT, vision_config=SIZES, projection_dim=16))


FAMILIES: dict[str, Callable[[], Any]] = {
    "vit": vit,
    "deit": deit,
    "dinov2": dinov2,
    "siglip": siglip,
    "clip": clip,
}


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def inputs(model: Any) -> dict[str, Tensor]:
    """Return three images, and a text for each if the model also reads text."""
    given = {"pixel_values": images()}
    if isinstance(model, CLIPModel):
        given["input_ids"] = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 2], [10, 11, 12, 2]])
    return given
