"""Test the state of trained modules: shared and nested ones, buffers, and modules that other code replaces."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForQuestionAnswering,
)

import fastprefix

from ... import models, vision_models

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


# The backward pass of a call needs the weights of that call


TRAINED = [None, ["score", "model.norm"], ["score", "model.layers.1.mlp"], ["score", "model.embed_tokens"]]
CHECKPOINTING = [None, False, True]
"""The argument ``use_reentrant`` of gradient checkpointing, or None without it."""


def classifiers(modules: list[str] | None, reentrant: bool | None = None) -> Any:
    """Return a classifier in training mode with the adapters "b" and "a", of which "a" is in use."""
    torch.manual_seed(0)
    model: Any = models.replace_norms(LlamaForSequenceClassification(LlamaConfig(**models.SIZES, pad_token_id=0)))
    model.double().train()
    for name, std in (("b", 0.3), ("a", 0.4)):
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(2, modules_to_save=modules), name=name, check=False)
        models.randomize(model, std)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(**models.batch(), labels=torch.tensor([0, 1, 0])).loss
    return loss


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
@pytest.mark.parametrize("modules", TRAINED, ids=str)
def test_a_backward_pass_with_the_weights_of_another_adapter_is_refused(
    modules: list[str] | None, reentrant: bool | None
) -> None:
    model = classifiers(modules, reentrant)
    loss_of(model).backward()
    expected = gradients_of(model)
    model.zero_grad()
    loss = loss_of(model)
    fastprefix.set_adapter(model, "b")
    with pytest.raises(RuntimeError, match="must run with adapter 'a' in use"):
        loss.backward()
    assert not gradients_of(model)
    fastprefix.set_adapter(model, "a")
    loss = loss_of(model)
    fastprefix.set_adapter(model, "b")
    with fastprefix.disable_adapter(model), torch.no_grad():
        loss_of(model)
    fastprefix.set_adapter(model, "a")
    loss.backward()
    torch.testing.assert_close(gradients_of(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
def test_a_reference_runs_between_the_passes(reentrant: bool | None) -> None:
    found = []
    for compares in (False, True):
        model = classifiers(None, reentrant)
        loss = loss_of(model)
        if compares:
            with fastprefix.disable_adapter(model), torch.no_grad():
                loss_of(model)
        loss.backward()
        found.append(gradients_of(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_backward_pass_of_the_base_model_with_the_weights_of_an_adapter_is_refused() -> None:
    model = classifiers(None)
    rows = model.get_input_embeddings()(models.batch()["input_ids"]).detach().requires_grad_()
    with fastprefix.disable_adapter(model):
        loss = model(inputs_embeds=rows).logits.sum()
    with pytest.raises(RuntimeError, match="must run with the base model's weights"):
        loss.backward()
    with fastprefix.disable_adapter(model):
        loss.backward()
    assert rows.grad is not None


def test_a_backward_pass_of_the_backbone_is_refused() -> None:
    model = classifiers(["score", "model.norm"])
    states = model.model(**models.batch()).last_hidden_state
    fastprefix.set_adapter(model, "b")
    with pytest.raises(RuntimeError, match="must run with adapter 'a' in use"):
        states.sum().backward()


def test_graphs_without_trained_modules_stay_valid() -> None:
    model = classifiers([])
    loss, parameters = loss_of(model), list(model.fastprefix.parameters())
    fastprefix.set_adapter(model, "b")
    loss.backward()
    assert all(parameter.grad is not None for parameter in parameters)
    assert not any(module._forward_hooks for module in (model, model.model))


def test_guards_leave_with_the_last_adapter_and_are_copied_with_their_model() -> None:
    model = classifiers(None)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    loss = loss_of(copied)
    fastprefix.set_adapter(model, "b")
    loss.backward()
    loss = loss_of(copied)
    fastprefix.set_adapter(copied, "b")
    with pytest.raises(RuntimeError, match="must run with adapter 'a' in use"):
        loss.backward()
    fastprefix.detach(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_trained_modules_are_compiled_without_graph_breaks() -> None:
    model = classifiers(None)
    inputs = {**models.batch(), "labels": torch.tensor([0, 1, 0]), "use_cache": False}
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
    torch.testing.assert_close(loss, model(**inputs).loss)
    loss.backward()
    assert gradients_of(model).keys() >= {"score.weight"}


def t5_for_answers() -> Any:
    return T5ForQuestionAnswering(T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=100))


def clip_for_images() -> Any:
    vision = {**vision_models.SIZES, "num_channels": 3}
    return CLIPForImageClassification(CLIPConfig(vision_config=vision, num_labels=2))


@pytest.mark.parametrize(("make", "head"), [(t5_for_answers, "qa_outputs"), (clip_for_images, "classifier")])
def test_only_the_head_of_a_model_that_is_its_own_base_model_is_trained(make: Callable[[], Any], head: str) -> None:
    model = make().eval()
    assert model.base_model is model
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2), check=False)
    assert set(fastprefix.count_parameters(model).groups) == {"fastprefix", head}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.startswith(("fastprefix.", f"{head}.")) for name in trained)
