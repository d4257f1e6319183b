"""Test the trial of a model's attention that precedes attaching a prefix."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import fastprefix
from fastprefix.integrations.transformers.checking import conformance
from fastprefix.integrations.transformers.checking.textbook import PrefixTextbook
from fastprefix.integrations.transformers.models import switching
from fastprefix.integrations.transformers.models.attention import FULL_MASKS, NAME
from fastprefix.integrations.transformers.models.discovery import find_layers
from fastprefix.integrations.transformers.models.switching import run_trial

from .... import models
from .. import test_families

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Forget all results of models whose code a test changes."""
    conformance.forget_reports()
    yield
    conformance.forget_reports()


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=40)).to(dtype).eval()


def clip() -> Any:
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 40, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("build", [models.decoder, models.encoder])
def test_usual_models_pass_in_every_dtype(build: Any, dtype: torch.dtype) -> None:
    assert run_trial(build().to(dtype)).attention == NAME


def test_a_model_is_converted_after_its_trial() -> None:
    model, batch = test_families.wav2vec2().eval(), torch.randn(2, 120)
    config = fastprefix.PrefixTuningConfig(2, reparameterization="mlp", hidden_dim=8)
    fastprefix.attach(model, config, check=False)
    model.bfloat16()
    expected = model(batch.bfloat16()).last_hidden_state
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2), name="b", check=False)
    fastprefix.merge(fastprefix.set_adapter(model, "default"))
    torch.testing.assert_close(model(batch.bfloat16()).last_hidden_state, expected)
    inputs = run_trial(model.to("meta", torch.float16)).inputs
    assert {(tensor.device.type, tensor.dtype) for tensor in inputs.values()} == {("meta", torch.float16)}
    inputs = run_trial(llama(torch.bfloat16).float()).inputs
    assert {value.dtype for value in inputs.values() if isinstance(value, Tensor)} == {torch.int64}


def test_a_hook_that_attaches_to_another_model_during_a_trial() -> None:
    model, others = llama(), [llama() for _ in range(3)]

    def hook(*_: Any) -> None:
        if others:
            fastprefix.attach(others.pop(), fastprefix.PrefixTuningConfig(2), check=False)

    model.model.layers[0].register_forward_hook(hook)
    thread = threading.Thread(target=find_layers, args=(model,), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert not others
    assert run_trial(model).attention == NAME
    assert not any("trial" in name for name in AttentionInterface._global_mapping)


def test_an_argument_that_only_the_own_attention_knows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.eager_attention_forward

    def halved(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(module, query / 2, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", halved)
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="depends on its arguments alone, but LlamaForCausalLM"):
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (RuntimeError("broken"), ValueError, "must run on this package's attention, but .* RuntimeError: broken"),
        (MemoryError("no memory"), MemoryError, "no memory"),
    ],
)
def test_a_failure_is_not_taken_for_a_difference(
    error: Exception, raised: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            raise error

        return run

    monkeypatch.setattr(switching, "_compare_calls", fail)
    with pytest.raises(raised, match=message):
        fastprefix.attach(llama(), fastprefix.PrefixTuningConfig(2))


def test_a_model_that_joins_masks_gets_them_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    make = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **kwargs: make(**kwargs) * 1.0)
    model = llama(torch.float64)
    assert run_trial(model).attention == FULL_MASKS
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2))
    ids = torch.arange(14).view(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    actual = model(ids, attention_mask=mask).logits
    plain = llama(torch.float64)
    book = PrefixTextbook(plain, model.fastprefix, find_layers(plain))
    expected = book(input_ids=ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(actual[seen], expected[seen])


def test_images_and_text_both_get_prefixes() -> None:
    model = clip()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2))
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 2]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    model(**inputs).logits_per_image.sum().backward()
    gradients = [parameter.grad for parameter in model.fastprefix.parameters()]
    assert len(gradients) > 0
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    with pytest.raises(ValueError, match='`prefix_position` must be "none"'):
        fastprefix.attach(clip(), fastprefix.PrefixTuningConfig(2, prefix_position="shift"))


def test_example_inputs_say_what_to_run_on() -> None:
    model = clip().vision_model
    images = torch.randn(2, 3, 8, 8)
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2), example_inputs={"pixel_values": images})
    model(pixel_values=images).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.fastprefix.parameters())


def test_example_inputs_that_do_not_run() -> None:
    model = llama()
    with pytest.raises(ValueError, match="`example_inputs` must be keyword arguments on which LlamaForCausalLM runs"):
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(2), example_inputs={"input_ids": "text"})
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2))
