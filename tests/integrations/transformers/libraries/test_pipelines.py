"""Test pipelines of ``transformers`` with an adapter: the same results alone and in batches."""

from typing import Any

import pytest
import torch
from transformers import ViTImageProcessor, pipeline

import fastprefix

from .... import models, vision_models
from ..test_attach import METHODS

TEXTS = ["w5 w6 w7 w8", "w9 w10", "w11 w12 w13"]
EVERY_ROW = "prompt in every row"


def attached(model: Any, method: str) -> Any:
    """Return the model with a random adapter."""
    config = fastprefix.PromptTuningConfig(4, shared_prompt=False) if method == EVERY_ROW else METHODS[method]()
    fastprefix.attach(model, config, check=False)
    models.randomize(model, 1.0)
    return model


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("method", ["prefix", "apt", "prompt_tuning", "adept", EVERY_ROW])
def test_text_generation(method: str, batch_size: int) -> None:
    model, tokenizer = attached(models.decoder(), method), models.tokenizer(padding_side="left")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    rows = generator(TEXTS, batch_size=batch_size, return_tensors=True, **options)
    for text, row in zip(TEXTS, rows, strict=True):
        expected = model.generate(**tokenizer(text, return_tensors="pt"), **options)[0].tolist()
        assert row[0]["generated_token_ids"][-len(expected) :] == expected  # behind the padding


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("method", ["prefix", "apt", "dept", "adept"])
def test_text_classification(method: str, batch_size: int) -> None:
    model, tokenizer = attached(models.encoder(), method), models.tokenizer()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for text, row in zip(TEXTS, classify(TEXTS, batch_size=batch_size), strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        actual = {entry["label"]: entry["score"] for entry in row}
        for index, score in enumerate(expected.tolist()):
            assert actual[model.config.id2label[index]] == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("method", ["prefix", "prompt_tuning", "adept"])
def test_feature_extraction(method: str, shape: str) -> None:
    """Each token has a row of features, and the prompt has none."""
    base: Any = models.encoder().bert if shape == "encoder" else models.decoder().model
    model, tokenizer = attached(base, method), models.tokenizer()
    extract = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    for text, row in zip(TEXTS, extract(TEXTS, return_tensors=True), strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["visual_prompt", "ship"])
def test_image_classification(method: str) -> None:
    image = pytest.importorskip("PIL.Image")
    configs = {
        "visual_prompt": fastprefix.VisualPromptConfig(4, depth="deep"),
        "ship": fastprefix.SHIPConfig(4, layers=[0, 1]),
    }
    model = fastprefix.attach(vision_models.vit(), configs[method], check=False)
    models.randomize(model, 1.0)
    size = {"height": vision_models.SIDE, "width": vision_models.SIDE}
    processor = ViTImageProcessor(size=size)
    numbers = torch.randint(256, (3, vision_models.SIDE, vision_models.SIDE, 3), dtype=torch.uint8)
    pictures = [image.fromarray(each.numpy()) for each in numbers]
    classify = pipeline("image-classification", model=model, image_processor=processor, top_k=3)
    for picture, row in zip(pictures, classify(pictures, batch_size=2), strict=True):
        with torch.no_grad():
            pixels = processor(picture, return_tensors="pt")["pixel_values"].double()
            expected = model(pixel_values=pixels).logits.softmax(-1)[0]
        actual = [entry["score"] for entry in row]
        torch.testing.assert_close(
            torch.tensor(actual).double(), expected.sort(descending=True).values, rtol=1e-5, atol=1e-6
        )
