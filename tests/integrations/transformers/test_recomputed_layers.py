"""Test that gradient checkpointing recomputes the layers of a call with the state of that call."""

import functools
import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import fastprefix

from ... import models

IDS = torch.arange(3, 75).view(2, 36)
SHORT, LONG = IDS[:, :5], IDS[:, 5:17]
METHODS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: fastprefix.PromptTuningConfig(3),
    "dept": lambda: fastprefix.DePTConfig(3, rank=2, max_length=64),
    "prefix": lambda: fastprefix.PrefixTuningConfig(3, prefix_position="shift"),
    "prefix-mlp": lambda: fastprefix.PrefixTuningConfig(3, reparameterization="mlp", hidden_dim=8),
    "apt": lambda: fastprefix.APTConfig(3, prefix_position="shift"),
}


def windowed(**options: Any) -> MistralForCausalLM:
    """Return a decoder with sliding windows."""
    torch.manual_seed(0)
    return models.replace_norms(MistralForCausalLM(MistralConfig(**models.SIZES, sliding_window=4, **options))).double()


def rotated(**rope: Any) -> LlamaForCausalLM:
    """Return a decoder whose rotary frequencies depend on the length of a row."""
    torch.manual_seed(0)
    config = LlamaConfig(**models.SIZES, max_position_embeddings=12, rope_parameters={"rope_theta": 1e4, **rope})
    return models.replace_norms(LlamaForCausalLM(config)).double()


def attached(method: str, build: Callable[[], Any] = windowed) -> Any:
    """Return a model in training mode with a method."""
    model = fastprefix.attach(build(), METHODS[method](), check=False).train()
    models.randomize(model)
    return model


def set_checkpointing(model: Any, reentrant: bool | None) -> None:
    """Turn gradient checkpointing on, or off with None."""
    if reentrant is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def wrap_layers(model: Any, reentrant: bool | None) -> None:
    """Turn PyTorch's checkpoint wrapper on."""
    if reentrant is not None:
        kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        wrapper = functools.partial(CheckpointWrapper, checkpoint_impl=kind)
        layers = set(model.model.layers)
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: module in layers)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, use_cache=False).logits.pow(2).sum()
    return loss


def differentiate(parameters: Iterable[Tensor], loss: Tensor) -> list[Tensor]:
    """Return the gradients of parameters."""
    given = list(parameters)
    for parameter in given:
        parameter.grad = None
    loss.backward()
    return [parameter.grad for parameter in given]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_calls_of_different_lengths(method: str, reentrant: bool) -> None:
    """The sliding window cuts the prompt differently in the two calls and in the evaluation after them."""
    model, found = attached(method), []
    for each in (None, reentrant):
        set_checkpointing(model, each)
        loss = loss_of(model, SHORT) + 3 * loss_of(model, LONG)
        with torch.no_grad():
            model.eval()(input_ids=IDS)
        found.append(differentiate(model.train().fastprefix.parameters(), loss))
    assert_same(*found)


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope"}])
def test_calls_with_different_rotary_frequencies(rope: dict[str, Any]) -> None:
    """Only the second call is so long that the prompt's keys are rotated with other frequencies."""
    if rope["rope_type"] == "longrope":
        size = models.WIDTH // models.HEADS // 2
        rope = {**rope, "short_factor": [1.0] * size, "long_factor": [3.0] * size, "factor": 2.0}
        rope["original_max_position_embeddings"] = 12
    model, found = attached("prompt", functools.partial(rotated, **rope)), []
    for each in (None, False):
        set_checkpointing(model, each)
        found.append(differentiate(model.fastprefix.parameters(), loss_of(model, SHORT) + loss_of(model, LONG)))
        assert model.fastprefix.prompt_path == "shared"
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_another_adapter_is_in_use_by_then(method: str, reentrant: bool) -> None:
    model, found = attached(method), []
    fastprefix.attach(model, METHODS[method](), name="other", check=False)
    models.randomize(model, 0.7)
    for each in (None, reentrant):
        set_checkpointing(model, each)
        fastprefix.set_adapter(model, "default")
        loss, parameters = loss_of(model, SHORT), list(model.fastprefix.parameters())
        fastprefix.set_adapter(model, "other")
        loss = loss + loss_of(model, SHORT)
        found.append(differentiate([*parameters, *model.fastprefix.parameters()], loss))
    assert_same(*found)


def test_a_call_with_the_prompt_in_every_row() -> None:
    """Dropout puts the prompt into every row. The evaluation shares it."""
    model, found = attached("prompt", functools.partial(windowed, attention_dropout=1e-14)), []
    set_checkpointing(model, False)
    for evaluates in (False, True):
        loss = loss_of(model, SHORT)
        assert model.fastprefix.prompt_path == "textbook: dropout in the model differs by row"
        with torch.no_grad():
            model.train(not evaluates)(input_ids=LONG)
        found.append(differentiate(model.train().fastprefix.parameters(), loss))
    assert_same(*found)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("method", ["prefix", "prefix-mlp", "apt"])
def test_the_leaves_belong_to_a_call(method: str, evaluates: bool) -> None:
    """Reentrant checkpointing replaces the prefixes of a call by leaves, also if a later call has none."""
    model, found = attached(method), []
    for each in (None, True):
        set_checkpointing(model, each)
        loss = loss_of(model, SHORT)
        loss = loss + loss_of(model.train(not evaluates), LONG)
        found.append(differentiate(model.train().fastprefix.parameters(), loss))
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["prompt", "prefix", "apt"])
def test_the_wrapper_of_pytorch(method: str, reentrant: bool) -> None:
    """The wrapper also recomputes the layers of a prompt that runs alone."""
    found = []
    for each in (None, reentrant):
        model = attached(method)
        wrap_layers(model, each)
        if each:
            model.enable_input_require_grads()
        found.append(differentiate(model.fastprefix.parameters(), loss_of(model, SHORT) + loss_of(model, LONG)))
    assert_same(*found)


@pytest.mark.parametrize(("method", "reentrant"), [("prompt", False), ("prefix", False), ("prefix", True)])
def test_a_backward_pass_without_the_adapter_is_refused(method: str, reentrant: bool) -> None:
    model = attached(method)
    set_checkpointing(model, reentrant)
    loss = loss_of(model, SHORT)
    with fastprefix.disable_adapter(model), pytest.raises(RuntimeError, match="disabled or detached before the backwa"):
        loss.backward()


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_checkpointing_that_is_not_known_is_refused(method: str) -> None:
    model = attached(method)
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda hidden, **kwargs: checkpoint(
        functools.partial(forward, **kwargs), hidden, use_reentrant=False
    )
    loss = loss_of(model, SHORT)
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        loss.backward()


@pytest.mark.parametrize("checkpoints", [set_checkpointing, wrap_layers])
@pytest.mark.parametrize("method", METHODS)
def test_a_call_without_a_backward_pass_is_freed(method: str, checkpoints: Callable[..., None]) -> None:
    """Check that a call carries no graph to its recomputed layers."""
    model, states = attached(method), []
    checkpoints(model, False)
    model.model.layers[-1].register_forward_hook(lambda module, args, output: states.append(weakref.ref(output)))
    loss_of(model, SHORT)
    gc.collect()
    assert len(states) >= 1
    assert all(state() is None for state in states)


def test_detaching_restores_the_checkpointing_functions() -> None:
    model = windowed()
    set_checkpointing(model, False)
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    fastprefix.attach(model, METHODS["prefix"](), check=False)
    fastprefix.attach(model, METHODS["prompt"](), name="other", check=False)
    loss_of(model.train(), SHORT)
    fastprefix.detach(model, "other")
    fastprefix.detach(model)
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == functions
    assert not any(hasattr(module, "_fastprefix_watched") for module in model.modules())
