"""Test ``fastprefix.accelerate`` on encoder-decoders, whose decoder gets the prefix, against PEFT in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import fastprefix
from fastprefix.integrations.transformers.models import attention

from ... import models, peft_support
from .test_accelerate import LENGTH, PREFIXES, tuned

pytestmark = pytest.mark.peft
LAYERS = 3
BART = {
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": models.VOCABULARY,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "init_std": 0.2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": LAYERS,
    "num_heads": 4,
    "vocab_size": models.VOCABULARY,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "marian": lambda: MarianMTModel(MarianConfig(**BART)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
}


def family(name: str, kind: str = "prefix") -> Any:
    """Return a small PEFT model."""
    torch.manual_seed(0)
    return tuned(FAMILIES[name](), kind, "SEQ_2_SEQ_LM")


def results(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return loss, logits and every gradient, for labels that end with padding in one row."""
    labels = torch.randint(3, models.VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(5))
    labels[0, 4:] = -100
    model.zero_grad()
    output = model(**inputs, labels=labels)
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert gradients
    return [output.loss.detach(), output.logits.detach(), *gradients]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_loss_and_gradients_are_pefts(name: str, kind: str, padding: str) -> None:
    model, inputs = family(name, kind), models.batch(padding)
    expected = results(model, inputs)
    assert_close(results(fastprefix.accelerate(model), inputs), expected)
    assert_close(results(fastprefix.decelerate(model), inputs), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_of_the_decoder(name: str) -> None:
    model = family(name)
    inputs = {**models.batch("right"), "decoder_input_ids": models.batch()["input_ids"]}
    inputs["decoder_attention_mask"] = models.batch("left")["attention_mask"]
    seen = inputs["decoder_attention_mask"].bool()
    expected = model(**inputs).logits[seen]
    torch.testing.assert_close(fastprefix.accelerate(model)(**inputs).logits[seen], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """PEFT itself loses the prefix's gradient with checkpointing, or fails."""
    model, inputs = family(name).train(), models.batch("right")
    expected = results(model, inputs)
    base = fastprefix.accelerate(model).get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
    assert_close(results(model, inputs), expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_is_pefts(name: str, beams: int) -> None:
    peft_support.require(peft_support.generation)
    model, inputs = family(name), models.batch("right")
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    assert torch.equal(fastprefix.accelerate(model).generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_expanded_or_concatenated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the decoder's self-attention has a prefix, and the batch shares it."""
    shapes: list[tuple[int, ...]] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, pk: Tensor, pv: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(pk.shape))
        return fastprefix.prefix_attention(query, key, value, pk, pv, **options)

    model = fastprefix.accelerate(family(name))
    monkeypatch.setattr(attention, "prefix_attention", spy)
    results(model, models.batch("right"))
    assert shapes.count((4, LENGTH, 8)) == LAYERS
    assert len(shapes) == 3 * LAYERS
    assert all(shape[-2] == 0 for shape in shapes if shape != (4, LENGTH, 8))


def test_where_a_layer_makes_the_bias_of_its_keys_by_itself_pefts_numbers_stay() -> None:
    torch.manual_seed(0)
    model, inputs = tuned(UMT5ForConditionalGeneration(UMT5Config(**T5)), "prefix", "SEQ_2_SEQ_LM"), models.batch()
    expected = results(model, inputs)
    with pytest.raises(ValueError, match="would not give PEFT's results"):
        fastprefix.accelerate(model)
    assert_close(results(model, inputs), expected)
