"""Test LLaMA-Adapter on models: the projections that it finds, the first step, and refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

import fastprefix
from fastprefix.integrations.transformers.attachment import get_method
from fastprefix.integrations.transformers.models.attention import BINDING
from fastprefix.integrations.transformers.prefixes.prefix import LayerBinding

from .... import models
from ..prompts.test_shared_prompt import GROUPED, NO_DROPOUT, SMALL

States = Tensor  # [m, d]


def heads(projected: Tensor) -> Tensor:
    """Return ``[m, Hkv D]`` as ``[Hkv, m, D]``, with D = 8."""
    return projected.unflatten(-1, (-1, 8)).transpose(0, 1)


def of_qwen3(attention: Any, states: States) -> list[Tensor]:
    return [attention.k_norm(heads(attention.k_proj(states))), heads(attention.v_proj(states))]


def of_gpt2(attention: Any, states: States) -> list[Tensor]:
    return [heads(part) for part in attention.c_attn(states).split(32, dim=-1)[1:]]


def of_phi3(attention: Any, states: States) -> list[Tensor]:
    return [heads(part) for part in attention.qkv_proj(states).split([32, 16, 16], dim=-1)[1:]]


def of_gpt_neox(attention: Any, states: States) -> list[Tensor]:
    return list(attention.query_key_value(states).unflatten(-1, (4, 3, 8)).permute(2, 1, 0, 3)[1:])


FAMILIES: dict[str, tuple[Callable[[], PretrainedConfig], Callable[[Any, States], list[Tensor]]]] = {
    "qwen3": (lambda: Qwen3Config(**GROUPED), of_qwen3),
    "phi3": (lambda: Phi3Config(**GROUPED, pad_token_id=0), of_phi3),
    "gpt2": (lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, **NO_DROPOUT), of_gpt2),
    "gpt_neox": (lambda: GPTNeoXConfig(**SMALL), of_gpt_neox),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_are_the_layers_own_projections(family: str) -> None:
    """Norms of keys, fused projections in several orders, rotary positions on a part of each head."""
    torch.manual_seed(0)
    config, expected = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config()).eval()
    fastprefix.attach(model, fastprefix.LlamaAdapterConfig(5, layers=1))
    (attention,) = [module for module in model.modules() if hasattr(module, BINDING)]
    states = get_method(model).projected_states(0)
    actual = getattr(attention, BINDING).get_prefix(*[torch.empty(0)] * 3)
    torch.testing.assert_close(list(actual), expected(attention, states))
    model(**models.batch()).logits.sum().backward()


@pytest.mark.parametrize("make", [models.encoder, models.decoder])
def test_the_first_step_changes_nothing(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is bit for bit that of the frozen model, and only the gates have gradients."""
    model, inputs = make(), models.batch("right")
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(1))
    with monkeypatch.context() as patch:  # the same kernel without a prefix
        patch.setattr(LayerBinding, "get_prefix", lambda *args: None)
        frozen = model(**inputs).logits
    fastprefix.detach(model)
    fastprefix.attach(model, fastprefix.LlamaAdapterConfig(5))
    logits = model(**inputs).logits
    assert torch.equal(logits, frozen)
    logits.square().sum().backward()
    method = get_method(model)
    assert all(gate.grad.any() for gate in method.gates)
    assert not any(states.grad.any() for states in method.states)


def test_only_the_last_layers_have_one() -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.LlamaAdapterConfig(5, layers=1))
    bound = [name for name, module in model.named_modules() if hasattr(module, BINDING)]
    assert bound == ["model.layers.1.self_attn"]


def test_the_model_may_move_and_change_its_dtype() -> None:
    model, inputs = fastprefix.attach(models.decoder(), fastprefix.LlamaAdapterConfig(5)), models.batch()
    models.randomize(model)
    exact = model(**inputs).logits
    rounded = model.bfloat16()(**inputs).logits
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_merging_is_refused() -> None:
    """A plain prefix has no separate softmax."""
    model = fastprefix.attach(models.decoder(), fastprefix.LlamaAdapterConfig(5))
    with pytest.raises(ValueError, match="LlamaAdapter has nothing"):
        fastprefix.merge(model)
    model(**models.batch()).logits.sum().backward()


def test_layers_that_do_not_project_their_input_are_refused() -> None:
    class SameForAll(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.new_ones(*hidden.shape[:-1], 16)

    model = models.decoder()
    model.model.layers[1].self_attn.k_proj = SameForAll()
    with pytest.raises(ValueError, match=r"`model` must .* keys and values .* not: \['model.layers.1.self_attn'\]"):
        fastprefix.attach(model, fastprefix.LlamaAdapterConfig(5))
    assert not any(hasattr(module, BINDING) for module in model.modules())
