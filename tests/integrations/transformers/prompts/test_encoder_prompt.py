"""Test prompt methods on encoder-decoders against a prompt that is concatenated to the encoder's input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprefix
from fastprefix.integrations.transformers.attachment import get_method

from .... import models
from ....float64 import Float64
from ..test_attach import textbook_prompt
from ..test_families import build

LENGTH = 5
PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: fastprefix.PromptTuningConfig(LENGTH),
    "dept": lambda: fastprefix.DePTConfig(LENGTH, rank=3, max_length=16, alpha=8.0),
    "adept": lambda: fastprefix.ADePTConfig(LENGTH, bottleneck_dim=3),
}


def attached(family: str, method: str) -> Any:
    model = fastprefix.attach(build(family), PROMPTS[method]())
    models.randomize(model)
    return model


def batch(masked: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 100, (3, 7), generator=generator)}
    if masked:
        inputs["attention_mask"] = torch.ones(3, 7, dtype=torch.long)
        inputs["attention_mask"][1, 4:] = inputs["attention_mask"][2, :2] = 0
    return inputs


def with_prompt(plain: Any, inputs: dict[str, Tensor], method: Any) -> dict[str, Tensor]:
    """Return the same input for a model without an adapter."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    ones = torch.ones(3, LENGTH, dtype=torch.long)
    embeds = textbook_prompt(plain, inputs["input_ids"], method)
    return {"inputs_embeds": embeds, "attention_mask": torch.cat([ones, mask], dim=1)}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_matches_the_textbook(family: str, method: str, masked: bool) -> None:
    model, plain, inputs = attached(family, method), build(family).requires_grad_(False), batch(masked)
    labels = torch.randint(3, 100, (3, 4), generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*get_method(model).named_parameters(), strict=True)
    with Float64():
        actual = model(**inputs, labels=labels)
        gradients = torch.autograd.grad(actual.loss, parameters)
        expected = plain(**with_prompt(plain, inputs, get_method(model)), labels=labels)
        textbook = torch.autograd.grad(expected.loss, parameters)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-10, atol=1e-10)
    for name, gradient, other in zip(names, gradients, textbook, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_generation(family: str, beams: int) -> None:
    model, plain, inputs = attached(family, "adept"), build(family), batch()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    cached, uncached = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    expected = plain.generate(**with_prompt(plain, inputs, get_method(model)), **options)
    assert torch.equal(cached, expected)


def test_encoder_outputs_of_the_caller_are_taken_as_they_are() -> None:
    model, inputs = attached("t5", "prompt"), batch()
    ids = torch.ones(3, 2, dtype=torch.long)
    expected = model(**inputs, decoder_input_ids=ids)
    states = model.get_encoder()(**inputs)
    assert states[0].shape[1] == LENGTH + 7
    again = model(encoder_outputs=states, attention_mask=inputs["attention_mask"], decoder_input_ids=ids)
    assert torch.equal(again.logits, expected.logits)
    full = torch.cat([torch.ones(3, LENGTH, dtype=torch.long), inputs["attention_mask"]], dim=1)
    assert torch.equal(model(encoder_outputs=states, attention_mask=full, decoder_input_ids=ids).logits, again.logits)


def test_saved_and_taken_off(tmp_path: Path) -> None:
    model, inputs = attached("bart", "adept"), {**batch(), "decoder_input_ids": torch.ones(3, 2, dtype=torch.long)}
    fastprefix.save_adapter(model, tmp_path)
    other = fastprefix.load_adapter(build("bart"), tmp_path)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    assert torch.equal(fastprefix.detach(other)(**inputs).logits, build("bart")(**inputs).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match=r"shared_prompt=True` cannot be exact.*its encoder's prompt sees"):
        fastprefix.attach(build("t5"), fastprefix.PromptTuningConfig(3, shared_prompt=True))
    with pytest.raises(ValueError, match=r"`model` must have something to merge.*encoder"):
        fastprefix.merge(attached("t5", "adept"))
    with pytest.raises(ValueError, match=r"`model` must be a text model for PromptTuningConfig, but is .*Whisper"):
        fastprefix.attach(build("whisper"), fastprefix.PromptTuningConfig(3))
