"""Test the state of trained modules: shared and nested ones, buffers, and modules that other code replaces."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprefix

from ... import models

MODULES = {
    "tied": ["lm_head", "model.embed_tokens"],
    "nested": ["model.norm", "model"],
    "around": ["model", "model.layers.0"],
    "twice": ["model.norm", "model.norm"],
}


class Normalized(nn.Module):
    """A head with statistics, which are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(models.WIDTH)
        self.out = nn.Linear(models.WIDTH, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.out(self.norm(hidden))
        return output


def decoder(case: str) -> Any:
    return models.decoder(tie_word_embeddings=case == "tied")


def encoder(dtype: torch.dtype = torch.float64) -> Any:
    model = models.encoder()
    torch.manual_seed(3)
    model.classifier = Normalized()  # type: ignore[assignment]
    return model.to(dtype).eval()


def prefix(case: str) -> Any:
    return fastprefix.PrefixTuningConfig(2, modules_to_save=MODULES[case])


def is_same(model: Any, other: Any) -> bool:
    state, expected = model.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("case", MODULES)
def test_shared_modules_are_exchanged_once(case: str) -> None:
    model, plain, inputs = decoder(case), decoder(case), models.batch()
    fastprefix.attach(model, prefix(case), name="a", check=False)
    models.randomize(model)
    expected = model(**inputs).logits
    with fastprefix.disable_adapter(model):
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model(**inputs).logits, expected)
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2), name="b", check=False)
    fastprefix.set_adapter(model, "a")
    assert torch.equal(model(**inputs).logits, expected)
    assert is_same(fastprefix.detach(model), plain)


@pytest.mark.parametrize("case", MODULES)
def test_shared_modules_are_saved_once(case: str, tmp_path: Path) -> None:
    model, inputs = fastprefix.attach(decoder(case), prefix(case), check=False), models.batch()
    models.randomize(model)
    fastprefix.save_adapter(model, tmp_path)
    assert torch.equal(fastprefix.load_adapter(decoder(case), tmp_path)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("case", MODULES)
def test_shared_modules_are_counted_once(case: str) -> None:
    model = fastprefix.attach(decoder(case), prefix(case), check=False)
    assert fastprefix.count_parameters(model).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", MODULES)
def test_shared_modules_in_low_precision(case: str) -> None:
    model = decoder(case).to(torch.bfloat16)
    plain, inputs = copy.deepcopy(model), models.batch()
    fastprefix.attach(model, prefix(case), check=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(**inputs).logits.float().square().sum().backward()
    fastprefix.detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_buffers_belong_to_a_trained_module(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its running statistics change in training mode. They are exchanged, cast and saved like its parameters."""
    model, inputs = fastprefix.attach(encoder(dtype), fastprefix.PrefixTuningConfig(2), check=False), models.batch()
    model.train()(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
    expected = model.eval()(**inputs).logits
    with fastprefix.disable_adapter(model):
        assert torch.equal(model(**inputs).logits, encoder(dtype)(**inputs).logits)
    assert torch.equal(model(**inputs).logits, expected)
    fastprefix.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "whole")
    for folder in ("adapter", "whole"):
        other = fastprefix.load_adapter(encoder(dtype), tmp_path / folder)
        assert torch.equal(other.classifier.norm.running_mean, model.classifier.norm.running_mean)
        assert torch.equal(other(**inputs).logits, expected)
    assert is_same(fastprefix.detach(model), encoder(dtype))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_a_replaced_module_keeps_its_casts(name: str, tied: bool) -> None:
    """``resize_token_embeddings`` replaces a head that is not tied."""
    model, inputs = models.decoder(tie_word_embeddings=tied).to(torch.bfloat16), models.batch()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2, modules_to_save=[name]), check=False)
    expected = model(**inputs).logits
    head = model.lm_head
    model.resize_token_embeddings(108, mean_resizing=False)
    assert tied or model.lm_head is not head
    assert torch.equal(model(**inputs).logits[..., :100], expected)
    with fastprefix.disable_adapter(model):
        assert model(**inputs).logits.dtype is torch.bfloat16
    assert torch.equal(model(**inputs).logits[..., :100], expected)
    model.double()
    assert fastprefix.detach(model)(**inputs).logits.dtype is torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_modules_that_a_model_does_not_train_are_not_cast() -> None:
    """The head is replaced when another adapter is in use, and a frozen one shows no stale precision."""
    model, inputs = models.decoder().to(torch.bfloat16), models.batch()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2, modules_to_save=["lm_head"]), name="a", check=False)
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2), name="b", check=False)
    model.resize_token_embeddings(108, mean_resizing=False)
    assert model(**inputs).logits.dtype is torch.bfloat16
    assert fastprefix.set_adapter(model, "a")(**inputs).logits.dtype is torch.bfloat16
    assert model.lm_head.weight.dtype is torch.float32
