"""Test that ``attach`` refuses unsupported models with the reason and does not change them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomModel, T5Config, T5ForConditionalGeneration

import fastprefix

from .... import models

PREFIX = fastprefix.PrefixTuningConfig(3)
PROMPT = fastprefix.PromptTuningConfig(3)


def bloom() -> BloomModel:
    return BloomModel(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=100))


def t5() -> T5ForConditionalGeneration:
    config = T5Config(d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=100, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def tensor_parallel() -> Any:
    model = models.decoder()
    model._tp_size = 2
    return model


@pytest.mark.parametrize(
    ("make", "config", "error", "says"),
    [
        (tensor_parallel, PREFIX, ValueError, "device mesh with a dimension 'tp' for tp_size=2"),
        (lambda: nn.Linear(2, 2), PREFIX, TypeError, "`model` must be a transformers model"),
        (lambda: torch.compile(models.decoder()), PREFIX, TypeError, "OptimizedModule. Attach first, then compile"),
        (lambda: models.decoder().to("meta"), PREFIX, ValueError, "weights loaded"),
        (models.decoder, {"num_virtual_tokens": 3}, TypeError, r"`config` must.*is builtins\.dict"),
        (models.decoder, fastprefix.PrefixTuningConfig, TypeError, "is the class fastprefix.PrefixTuningConfig"),
        (
            models.decoder,
            torch.nn.Linear(1, 1),
            TypeError,
            r"such as fastprefix.PrefixTuningConfig\(20\), but is torch.L",
        ),
        (bloom, PREFIX, ValueError, "attention interface"),
        (t5, fastprefix.LlamaAdapterConfig(3), ValueError, "encoder-decoder"),
        (models.encoder, fastprefix.PromptTuningConfig(3, shared_prompt=True), ValueError, "shared_prompt.*not causal"),
        (models.decoder, fastprefix.PrefixTuningConfig(3, modules_to_save=["head"]), ValueError, "modules_to_save"),
        (models.decoder, fastprefix.APTConfig(3, pooling="mean"), ValueError, "pooling"),
        (models.decoder, fastprefix.PromptTuningConfig(200, init="vocab"), ValueError, "vocab"),
        (models.decoder, fastprefix.PromptTuningConfig(3, init="text", init_text="a"), ValueError, "tokenizer"),
    ],
)
def test_refused(make: Callable[[], Any], config: Any, error: type[Exception], says: str) -> None:
    model = make()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=says):
        fastprefix.attach(model, config)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if hasattr(model, "config"):
        assert model.config._attn_implementation in ("sdpa", "eager")


def test_a_text_without_tokens() -> None:
    config = fastprefix.PromptTuningConfig(3, init="text", init_text="")
    with pytest.raises(ValueError, match="init_text"):
        fastprefix.attach(models.decoder(), config, tokenizer=lambda text, **_: {"input_ids": []})


def test_attached_twice() -> None:
    model = fastprefix.attach(models.decoder(), PREFIX)
    with pytest.raises(ValueError, match="attached already"):
        fastprefix.attach(model, PROMPT)


@pytest.mark.parametrize("function", [fastprefix.detach, lambda model: fastprefix.save_adapter(model, "nowhere")])
def test_nothing_attached(function: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="method attached"):
        function(models.decoder())


def test_attention_weights_are_refused() -> None:
    model = fastprefix.attach(models.decoder(), PREFIX)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**models.batch(), output_attentions=True)


def test_inputs_too_long_for_absolute_positions() -> None:
    model = fastprefix.attach(models.encoder(), PROMPT)
    with pytest.raises(ValueError, match=r"by 3 positions .* 64 positions, but has 62\."):
        model(input_ids=torch.zeros(1, 62, dtype=torch.long))
    model(input_ids=torch.zeros(1, 61, dtype=torch.long))


def test_dept_input_longer_than_its_positions() -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.DePTConfig(3, rank=2, max_length=6))
    with pytest.raises(ValueError, match=r"6.*7"):
        model(**models.batch())


def test_three_dimensional_masks_with_a_prompt() -> None:
    model = fastprefix.attach(models.decoder(), PROMPT)
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4, 4))


def test_ids_and_embeddings_at_once() -> None:
    model = fastprefix.attach(models.decoder(), PROMPT)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.model(input_ids=torch.zeros(1, 4, dtype=torch.long), inputs_embeds=torch.zeros(1, 4, 32))


def test_ids_out_of_range() -> None:
    """The fused lookup explains the error. If the model looks up its tokens itself, PyTorch does."""
    model = fastprefix.attach(models.decoder(), fastprefix.ADePTConfig(5))
    with pytest.raises(ValueError, match="input_ids"):
        model(input_ids=torch.full((1, 4), 100))
    model = fastprefix.attach(models.decoder(), PROMPT)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 100))


@pytest.mark.parametrize(
    ("rates", "error", "says"),
    [
        ({"lr": -1.0}, ValueError, "`lr` must be a finite number of at least 0"),
        ({"prompt_lr": "0.3"}, TypeError, "`prompt_lr` must be a number, got '0.3'"),
        ({"gate_lr": -1e-3}, ValueError, "`gate_lr` must be a finite number of at least 0"),
        ({"peft_lr": [0.1]}, TypeError, "`peft_lr` must be a number"),
    ],
)
def test_rates_that_no_optimizer_can_use(rates: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fastprefix.parameter_groups(fastprefix.attach(models.decoder(), PREFIX), **rates)


def test_modules_are_suggested_by_their_last_name() -> None:
    config = fastprefix.PrefixTuningConfig(3, modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"has no \['norm'\]\. Did you mean model\.norm\?"):
        fastprefix.attach(models.decoder(), config)


@pytest.mark.parametrize(
    ("name", "error", "what"),
    [
        (None, TypeError, "`name` must be a string, but is NoneType"),
        (5, TypeError, "`name` must be a string, but is int"),
        ("", ValueError, "`name` must have 1 to 200 characters, .* but has 0"),
        ("a" * 201, ValueError, "`name` must have 1 to 200 characters, .* but has 201"),
        ("é" * 40, ValueError, "`name` must have 1 to 200 characters, .* but has 40.* count several times"),
    ],
)
def test_names_that_are_no_names(name: Any, error: type[Exception], what: str) -> None:
    model = models.decoder()
    with pytest.raises(error, match=what):
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(2), name=name)
    with pytest.raises(error, match=what):
        fastprefix.load_adapter(model, "nowhere", name=name)
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2))
    with pytest.raises(error, match=what):
        fastprefix.compose(model, ["default"], name=name)
