"""Test that trainable modules of a float16 or bfloat16 model are trained in float32."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastprefix

from ... import models

LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def classifier(dtype: torch.dtype) -> Any:
    return models.encoder().to(dtype)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@LOW
def test_what_is_trained_is_float32_and_outputs_keep_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    plain = classifier(dtype)
    model = fastprefix.attach(copy.deepcopy(plain), fastprefix.PrefixTuningConfig(3))
    assert {name for name in trained(model) if "classifier" in name} == {"classifier.weight", "classifier.bias"}
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert model(**models.batch()).logits.dtype is dtype
    with torch.no_grad():
        model.classifier.weight += 1.0
    fastprefix.detach(model)
    for (name, weight), (_, former) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert weight.dtype is former.dtype is dtype, name
        assert torch.equal(weight, former), name
    assert torch.equal(model(**models.batch()).logits, plain(**models.batch()).logits)


@LOW
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_with_a_scaler(dtype: torch.dtype, autocast: bool) -> None:
    model = fastprefix.attach(classifier(dtype), fastprefix.PrefixTuningConfig(3))
    optimizer, scaler = torch.optim.AdamW(trained(model).values(), lr=0.01), torch.amp.GradScaler("cpu", 16.0)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = model(**models.batch(), labels=torch.tensor([0, 1, 1])).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(trained(model).values(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert all((p != before[name]).any() for name, p in trained(model).items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Any) -> None:
    model = fastprefix.attach(classifier(torch.bfloat16), fastprefix.PrefixTuningConfig(3))
    models.randomize(model)
    expected, other = model(**models.batch()).logits, copied(model)
    fastprefix.detach(model)
    assert torch.equal(other(**models.batch()).logits, expected)
    fastprefix.detach(other)
    assert torch.equal(other(**models.batch()).logits, model(**models.batch()).logits)


@pytest.mark.parametrize("whole", [False, True])
def test_saved_and_loaded(tmp_path: Path, whole: bool) -> None:
    model = fastprefix.attach(classifier(torch.bfloat16), fastprefix.PrefixTuningConfig(3))
    models.randomize(model)
    model.save_pretrained(tmp_path) if whole else fastprefix.save_adapter(model, tmp_path)
    other = fastprefix.load_adapter(classifier(torch.bfloat16), tmp_path)
    assert torch.equal(other.classifier.weight, model.classifier.weight)
    assert torch.equal(other(**models.batch()).logits, model(**models.batch()).logits)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("names", [["model.norm"], ["model.embed_tokens"], ["lm_head"], ["model.layers"]])
@pytest.mark.parametrize("tied", [False, True])
def test_modules_anywhere_in_a_model(names: list[str], tied: bool) -> None:
    """Inside it, at its ends, tied to each other, and a list of layers, which is never called itself."""
    plain = models.decoder(tie_word_embeddings=tied)
    low = copy.deepcopy(plain).to(torch.bfloat16)
    for model in (plain, low):
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(3, init="zero", modules_to_save=names))
    output = low(**models.batch())
    assert output.logits.dtype is torch.bfloat16
    assert {p.dtype for p in trained(low).values()} == {torch.float32}
    expected = plain(**models.batch()).logits
    assert (output.logits - expected).abs().max() < 0.1 * expected.abs().max()
    output.logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in trained(low).values())


def test_a_model_that_changes_its_precision() -> None:
    """The adapter is in use or inactive at that time."""
    model = fastprefix.attach(classifier(torch.bfloat16), fastprefix.PrefixTuningConfig(3)).double()
    assert model(**models.batch()).logits.dtype is torch.float64
    with fastprefix.disable_adapter(model):
        assert model(**models.batch()).logits.dtype is torch.float64
        model.to(torch.bfloat16)
        assert model(**models.batch()).logits.dtype is torch.bfloat16
    assert model(**models.batch()).logits.dtype is torch.bfloat16
    assert {p.dtype for name, p in trained(model).items() if "classifier" in name} == {torch.float32}
    assert fastprefix.detach(model.double())(**models.batch()).logits.dtype is torch.float64


@pytest.mark.parametrize(
    ("names", "tied"), [(["model.embed_tokens"], False), (["lm_head"], True), (["model.embed_tokens"], True)]
)
@pytest.mark.parametrize("config", [fastprefix.PromptTuningConfig, fastprefix.ADePTConfig])
def test_a_shared_prompt_beside_a_trained_table(config: Any, names: list[str], tied: bool) -> None:
    """The prompt enters where the embeddings of the tokens do, which are cast. Merging may replace the table."""
    plain = models.decoder(tie_word_embeddings=tied).to(torch.bfloat16)
    model = fastprefix.attach(copy.deepcopy(plain), config(3, modules_to_save=names), check=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.25)
    logits = model(**models.batch()).logits
    assert model.fastprefix.prompt_path == "shared"
    assert logits.dtype is torch.bfloat16
    logits.float().square().sum().backward()
    assert all(p.grad is not None for p in trained(model).values())
    fastprefix.merge(model)
    assert model.get_input_embeddings()(models.batch()["input_ids"]).dtype is torch.bfloat16
    unit = torch.finfo(torch.bfloat16).eps  # merging computes the same sums, so at most a last digit differs
    for _ in range(2):
        torch.testing.assert_close(model(**models.batch()).logits, logits, rtol=unit, atol=unit)
        with fastprefix.disable_adapter(model):
            assert torch.equal(model(**models.batch()).logits, plain(**models.batch()).logits)
    fastprefix.detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(**models.batch()).logits, plain(**models.batch()).logits)
