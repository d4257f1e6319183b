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
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

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
IN_EVERY_ROW = {"row": lambda: fastprefix.PromptTuningConfig(3, shared_prompt=False)}
CHANGED = "switched, disabled or detached before the backward pass of a call"


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
    model = fastprefix.attach(build(), {**METHODS, **IN_EVERY_ROW}[method](), check=False).train()
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
@pytest.mark.parametrize(
    ("first", "then"),
    [(method, method) for method in METHODS]
    + [("apt", "prefix"), ("apt", "prompt"), ("prefix", "apt"), ("row", "apt"), ("row", "prompt")],
)
def test_another_adapter_is_in_use_by_then(first: str, then: str, reentrant: bool) -> None:
    """The layers run with the hooks and on the attention of their call, even if the model's own are others by then."""
    model, found = attached(first), []
    fastprefix.attach(model, METHODS[then](), name="other", check=False)
    models.randomize(model, 0.7)
    for each in (None, reentrant):
        set_checkpointing(model, each)
        fastprefix.set_adapter(model, "default")
        loss, parameters = loss_of(model, SHORT), list(model.fastprefix.parameters())
        fastprefix.set_adapter(model, "other")
        loss = loss + loss_of(model, SHORT)
        found.append(differentiate([*parameters, *model.fastprefix.parameters()], loss))
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", ["prompt", "apt"])
def test_a_call_without_the_adapter_is_differentiated_with_it(method: str, attention: str, reentrant: bool) -> None:
    """Preference optimization differentiates calls of the base model."""
    model, found = attached(method, functools.partial(windowed, attn_implementation=attention)), []
    for each in (None, reentrant):
        set_checkpointing(model, each)
        rows = model.get_input_embeddings()(SHORT).detach().requires_grad_()
        with fastprefix.disable_adapter(model):
            loss = model(inputs_embeds=rows, use_cache=False).logits.pow(2).sum()
        found.append(differentiate([rows], loss))
    assert_same(*found)


def test_an_attention_without_a_prefix_gets_none_from_a_later_adapter() -> None:
    """The encoder's layers have no prefix in the call, and the prefix of the later adapter in the model."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=100, **sizes, **heads, dropout=0.0, max_position_embeddings=16)
    model, found = BartForConditionalGeneration(config).double(), []
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(3, attentions=("decoder",)), check=False)
    models.randomize(model)
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(3), name="other", check=False)
    models.randomize(model.train(), 0.7)
    for each in (None, False):
        set_checkpointing(model, each)
        fastprefix.set_adapter(model, "default")
        loss, parameters = loss_of(model, SHORT), list(model.fastprefix.parameters())
        fastprefix.set_adapter(model, "other")
        found.append(differentiate(parameters, loss))
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_attention_weights_are_requested(reentrant: bool) -> None:
    """Layers that return attention weights run on the model's own attention, with the same dropout."""
    options = {"attn_implementation": "eager", "attention_dropout": 0.5}
    model, found = attached("prompt", functools.partial(windowed, **options)), []
    for each in (None, reentrant):
        set_checkpointing(model, each)
        torch.manual_seed(0)
        output = model(input_ids=SHORT, use_cache=False, output_attentions=True)
        assert [weights.shape[-1] for weights in output.attentions] == [3 + SHORT.shape[1]] * len(model.model.layers)
        found.append(differentiate(model.fastprefix.parameters(), output.logits.pow(2).sum()))
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
    with fastprefix.disable_adapter(model), pytest.raises(RuntimeError, match=f"{CHANGED}.*'sdpa'"):
        loss.backward()


def test_a_backward_pass_with_a_prompt_in_every_row_is_refused() -> None:
    """The call ran on this package's attention, but the prompt in every row needs the model's own."""
    model = attached("prefix")
    set_checkpointing(model, False)
    loss = loss_of(model, SHORT)
    fastprefix.attach(model, IN_EVERY_ROW["row"](), name="other", check=False)
    with pytest.raises(RuntimeError, match=f"{CHANGED}.*'sdpa'"):
        loss.backward()


def test_a_backward_pass_after_detaching_is_refused() -> None:
    """Detaching unfreezes the model, whose layers would then save other tensors."""
    model = attached("row")
    set_checkpointing(model, False)
    loss = loss_of(model, SHORT)
    fastprefix.detach(model)
    with pytest.raises(RuntimeError, match=f"{CHANGED}.*parameters of the layers"):
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


def test_a_compiled_model_with_gates() -> None:
    """Keeping the layer's input breaks the graph, so that the checkpoint runs, and is recomputed, uncompiled."""
    model = models.decoder(layers=1).double()
    set_checkpointing(model, False)
    fastprefix.attach(model, METHODS["apt"](), check=False)
    models.randomize(model.train())
    torch.compiler.reset()
    losses = [loss_of(torch.compile(model, backend="eager"), SHORT), loss_of(model, SHORT)]
    assert_same(*(differentiate(model.fastprefix.parameters(), loss) for loss in losses))


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
