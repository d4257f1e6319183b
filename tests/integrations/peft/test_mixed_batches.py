"""Test batches whose rows have different adapters of an accelerated PEFT model against each row alone."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fastprefix

from ... import models, peft_support

BASE = "__base__"
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
KINDS: dict[str, Callable[[int], Any]] = {
    "prefix": lambda m: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=m),
    "projected": lambda m: peft.PrefixTuningConfig(
        **CAUSAL, num_virtual_tokens=m, prefix_projection=True, encoder_hidden_size=8
    ),
    "cartridge": lambda m: peft.CartridgeConfig(**CAUSAL, num_virtual_tokens=m, num_frozen_tokens=1),
    "prompt": lambda m: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=m),
    "p-tuning": lambda m: peft.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=m, encoder_hidden_size=8),
}
NAMES = ["b", BASE, "a"]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def make_model(kind: str) -> Any:
    """Return an accelerated model with two adapters of different lengths."""
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(models.decoder(), KINDS[kind](3), adapter_name="a")
    model.add_adapter("b", KINDS[kind](5))
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
            parameter.requires_grad_(True)
    return fastprefix.accelerate(model, check=False)


def run_alone(model: Any, name: str, function: Callable[..., Any], inputs: dict[str, Tensor], row: int) -> Any:
    generates = function == model.generate
    alone = {**{key: value[row : row + 1] for key, value in inputs.items()}, **(GREEDY if generates else {})}
    if name == BASE:
        return (model.base_model.generate if generates else model.base_model)(**alone)
    model.active_adapter = name
    return function(**alone)


def collect(model: Any) -> dict[str, Tensor]:
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: gradient for name, gradient in gradients.items() if bool((gradient != 0).any())}


@pytest.mark.peft
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_they_are_alone(kind: str, padding: str) -> None:
    peft_support.require(peft_support.generation)
    model, inputs = make_model(kind), models.batch(padding)
    expected = []
    for row, name in enumerate(NAMES):
        logits = run_alone(model, name, model, inputs, row).logits[:, -7:]
        mask = inputs["attention_mask"][row : row + 1, :, None]
        if logits.requires_grad:
            (logits.square() * mask).sum().backward()
        expected.append(logits.detach())
    gradients = collect(model)
    mixed = model(**inputs, adapter_names=NAMES).logits
    assert mixed.shape == (3, 7, models.VOCABULARY)
    rows = inputs["attention_mask"].bool()
    torch.testing.assert_close(mixed[rows], torch.cat(expected)[rows], rtol=1e-10, atol=1e-10)
    (mixed.square() * inputs["attention_mask"][:, :, None]).sum().backward()
    actual = collect(model)
    assert actual.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-9)
    generated = model.generate(**inputs, adapter_names=NAMES, **GREEDY)
    beams = model.generate(**inputs, adapter_names=NAMES, num_beams=2, **GREEDY)
    for row, name in enumerate(NAMES):
        assert torch.equal(generated[row], run_alone(model, name, model.generate, inputs, row)[0])
    assert beams.shape == generated.shape


@pytest.mark.peft
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_labels_are_about_the_tokens(kind: str) -> None:
    model, inputs = make_model(kind), models.batch()
    loss = model(**inputs, labels=inputs["input_ids"], adapter_names=NAMES).loss
    losses = []
    for row, name in enumerate(NAMES):
        logits = run_alone(model, name, model, inputs, row).logits[0, -7:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, inputs["input_ids"][row, 1:]))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), check_dtype=False, rtol=1e-6, atol=1e-6)


@pytest.mark.peft
def test_calls_without_names_go_on_as_before() -> None:
    model, inputs = make_model("prefix"), models.batch()
    before = model(**inputs).logits
    model(**inputs, adapter_names=NAMES)
    assert torch.equal(model(**inputs).logits, before)
    fastprefix.decelerate(model)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-10, atol=1e-10)


@pytest.mark.peft
def test_errors() -> None:
    model, inputs = make_model("prefix"), models.batch()
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="`adapter_names`"):
            run(**inputs, adapter_names=["a", "b"])
        with pytest.raises(ValueError, match="'c'"):
            run(**inputs, adapter_names=["a", "b", "c"])
        with pytest.raises(TypeError, match="`adapter_names`"):
            run(**inputs, adapter_names="a")


@pytest.mark.peft
@pytest.mark.parametrize("kind", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_rows_cannot_share_one_of_several_heads(kind: Callable[..., Any]) -> None:
    if kind is peft.PrefixTuningConfig:
        peft_support.require(peft_support.prefixes_of_classifiers)
    options = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}
    model = peft.get_peft_model(models.encoder(), kind(**options), adapter_name="a")
    model.add_adapter("b", kind(**options))
    fastprefix.accelerate(model, check=False)
    with pytest.raises(ValueError, match="`adapter_names`"):
        model(**models.batch(), adapter_names=["a", "b", "a"])


@pytest.mark.peft
def test_adaption_prompts_have_no_names() -> None:
    config = peft.AdaptionPromptConfig(**CAUSAL, adapter_len=3, adapter_layers=1)
    model = fastprefix.accelerate(peft.get_peft_model(models.decoder(), config, adapter_name="a"), check=False)
    with pytest.raises(ValueError, match="`adapter_names`"):
        model(**models.batch(), adapter_names=["a", "a", "a"])
    expected = model(**models.batch(), adapter_names=None).logits
    torch.testing.assert_close(fastprefix.decelerate(model)(**models.batch()).logits, expected)


@pytest.mark.peft
def test_prompts_of_tasks_are_chosen_by_task() -> None:
    config = peft.MultitaskPromptTuningConfig(**CAUSAL, num_virtual_tokens=3, num_tasks=2)
    model = fastprefix.accelerate(peft.get_peft_model(models.decoder(), config, adapter_name="a"), check=False)
    with pytest.raises(ValueError, match="`task_ids`"):
        model(**models.batch(), task_ids=torch.tensor([0, 1, 1]), adapter_names=["a", "a", "a"])


@pytest.mark.peft
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_names_have_no_effect_while_adapters_are_disabled(kind: str) -> None:
    peft_support.require(peft_support.generation)
    model, inputs = make_model(kind), models.batch()
    assert not torch.equal(model.generate(**inputs, **GREEDY), model.base_model.generate(**inputs, **GREEDY))
    with model.disable_adapter():
        expected = model.base_model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, adapter_names=NAMES, **GREEDY), expected)
        assert torch.equal(model(**inputs, adapter_names=NAMES).logits, model.base_model(**inputs).logits)


@pytest.mark.parametrize("shared_prompt", [None, False])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_an_adapter_in_use_on_the_base_model_is_refused(kind: str, shared_prompt: bool | None) -> None:
    model, inputs = make_model(kind), models.batch()
    fastprefix.attach(
        model.get_base_model(), fastprefix.PromptTuningConfig(3, shared_prompt=shared_prompt), check=False
    )
    for options in ({}, {"adapter_names": ["a", "b", "__base__"]}):
        with pytest.raises(ValueError, match="`peft_model` has a base model with an adapter"):
            model(**inputs, **options)
