"""Test merging: the same values for inference with less work, restoration by ``detach``, and errors."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import fastprefix
from fastprefix.integrations.transformers import merging
from fastprefix.integrations.transformers.attachment import get_attachment, get_method
from fastprefix.integrations.transformers.models.switching import Implementation
from fastprefix.integrations.transformers.prefixes.prefix import PrefixHooks
from fastprefix.integrations.transformers.prompts.prompt import PromptHooks

from ... import models
from ...float64 import Float64
from .prompts.test_shared_prompt import EAGER, NO_DROPOUT, SHARING, WINDOWED
from .test_attach import FAMILIES, METHODS, attached

MERGEABLE = {
    "decoder": [
        *("prompt_tuning", "dept", "accept", "accept-prompt", "adept", "p-tuning-lstm", "ulpt"),
        *("prefix", "prefix-mlp", "prefix-shift", "apt", "apt-own", "residual"),
    ],
    "encoder": ["adept", "p-tuning", "ulpt", "prefix", "prefix-mlp", "prefix-own", "apt", "apt-cls", "residual"],
}
CASES = [(family, method) for family, methods in MERGEABLE.items() for method in methods]
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def logits(model: Any, padding: str = "left") -> Tensor:
    """Return the logits of all tokens except padding."""
    inputs = models.batch(padding)
    output: Tensor = model(**inputs).logits
    return output[inputs["attention_mask"].bool()] if output.ndim == 3 else output


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("family", "method"), CASES)
def test_merging_changes_no_value(family: str, method: str, padding: str) -> None:
    model = attached(family, method)
    expected = logits(model, padding)
    assert fastprefix.merge(model) is model
    torch.testing.assert_close(logits(model, padding), expected, rtol=1e-10, atol=1e-10)
    assert not any(p.requires_grad for p in model.parameters())
    assert not logits(model).requires_grad


@pytest.mark.parametrize("method", MERGEABLE["decoder"])
def test_generation(method: str) -> None:
    model, inputs = attached("decoder", method), models.batch("left")
    expected = [model.generate(**inputs, **GENERATE, num_beams=beams) for beams in (1, 3)]
    fastprefix.merge(model)
    for beams, tokens in zip((1, 3), expected, strict=True):
        for use_cache in (True, False):
            assert torch.equal(model.generate(**inputs, **GENERATE, num_beams=beams, use_cache=use_cache), tokens)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_detach_after_merging_restores_the_model(family: str, method: str) -> None:
    model = FAMILIES[family]()
    model.requires_grad_(True).get_input_embeddings().weight.requires_grad_(False)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    embedding, expected = model.get_input_embeddings(), logits(model)
    fastprefix.merge(fastprefix.attach(model, METHODS[method]()))
    fastprefix.detach(model)
    assert model.get_input_embeddings() is embedding
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def tied() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, initializer_range=0.2, **NO_DROPOUT)
    return GPT2LMHeadModel(config).double().eval()


def test_a_tied_head_keeps_the_old_table() -> None:
    model = tied()
    table = model.lm_head.weight
    assert model.get_input_embeddings().weight is table
    bits = table.detach().clone()
    fastprefix.attach(model, fastprefix.ADePTConfig(5, bottleneck_dim=3))
    models.randomize(model)
    expected = logits(model)
    fastprefix.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    assert model.lm_head.weight is table
    assert torch.equal(table, bits)
    assert model.get_input_embeddings().weight is not table
    fastprefix.detach(model.float())
    assert model.get_input_embeddings().weight is table
    assert table.dtype is torch.float32


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(
    "make", [*SHARING.values(), *WINDOWED.values()], ids=[*SHARING, *(f"window-{n}" for n in WINDOWED)]
)
@pytest.mark.parametrize("method", ["adept", "dept", "prompt_tuning"])
def test_families(make: Callable[[], Any], method: str) -> None:
    """Scaled embeddings, sliding windows, tied heads."""
    torch.manual_seed(0)
    inputs = models.batch("left")
    with Float64(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(make(), **EAGER).double().eval()
        fastprefix.attach(model, METHODS[method](), check=False)  # test_shared_prompt attaches to these with the check
        models.randomize(model)
        expected = logits(model), model.generate(**inputs, **GENERATE, eos_token_id=None)
        fastprefix.merge(model)
        torch.testing.assert_close(logits(model), expected[0], rtol=1e-10, atol=1e-10)
        assert torch.equal(model.generate(**inputs, **GENERATE, eos_token_id=None), expected[1])


def test_no_trace_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastprefix.merge(attached("decoder", "adept"))
    assert sorted(name.partition(".")[0] for name, _ in get_method(model).named_parameters()) == ["prefix"] * 4
    monkeypatch.setattr("fastprefix.methods.base.prompt_embedding", lambda *args, **options: pytest.fail("an offset"))
    logits(model)


def test_the_table_is_written_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("decoder", "adept")
    expected, sizes = logits(model), []
    embed = type(get_method(model)).embed
    monkeypatch.setattr("fastprefix.integrations.transformers.merging._ROWS", 32)
    monkeypatch.setattr(
        type(get_method(model)),
        "embed",
        lambda self, ids, *rest: (sizes.append(ids.numel()), embed(self, ids, *rest))[1],
    )
    fastprefix.merge(model)
    assert sizes == [32, 32, 32, 4]
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_merging_twice_changes_nothing(family: str, method: str) -> None:
    model = fastprefix.merge(attached(family, method))
    once, parameters = logits(model), get_method(model)
    fastprefix.merge(model)
    assert get_method(model) is parameters
    assert torch.equal(logits(model), once)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("method", ["adept", "dept", "prefix-mlp"])
def test_copies_are_whole_and_their_own(method: str, copied: Callable[[Any], Any]) -> None:
    model = fastprefix.merge(attached("decoder", method))
    expected, other = logits(model), copied(model)
    assert torch.equal(logits(other), expected)
    fastprefix.detach(other)
    assert torch.equal(logits(other), logits(models.decoder()))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix-mlp", "apt", "residual"])
def test_what_is_a_prefix_alone_is_saved_as_one(method: str, tmp_path: Path) -> None:
    model = fastprefix.merge(attached("decoder", method))
    fastprefix.save_adapter(model, tmp_path)
    other = fastprefix.load_adapter(models.decoder(), tmp_path)
    torch.testing.assert_close(logits(other), logits(model), rtol=0.0, atol=0.0)
    assert "reparam" not in str([name for name, _ in get_method(other).named_modules()])


@pytest.mark.parametrize(("family", "method"), [("decoder", "adept"), ("decoder", "dept"), ("encoder", "adept")])
def test_what_is_not_is_not_saved(family: str, method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Save it before you merge it"):
        fastprefix.save_adapter(fastprefix.merge(attached(family, method)), tmp_path)


PLACES = {
    "layers": (merging, "find_layers"),
    "method layers": (merging, "find_method_layers"),
    "prefix": (PrefixHooks, "install"),
    "attention": (Implementation, "_switch"),
    "prompt": (PromptHooks, "install"),
}


@pytest.mark.parametrize(
    ("family", "method", "place"),
    [
        *(("decoder", "prefix-mlp", place) for place in ("method layers", "prefix", "attention")),
        *(
            ("decoder", method, place)
            for method in ("prompt_tuning", "adept", "dept")
            for place in ("layers", "prefix")
        ),
        ("decoder", "adept", "attention"),
        *(("encoder", method, "prompt") for method in ("adept", "p-tuning")),
    ],
)
def test_an_error_leaves_the_adapter_on_the_model(
    family: str, method: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(family, method)
    expected, own, trained = logits(model), get_method(model), {p for p in model.parameters() if p.requires_grad}
    config, modules = get_attachment(model).config, [name for name, _ in model.named_modules()]
    models.fail_once(monkeypatch, *PLACES[place])
    with pytest.raises(models.InjectedError):
        fastprefix.merge(model)
    assert torch.equal(logits(model), expected)
    assert get_method(model) is own
    assert get_attachment(model).config is config
    assert {p for p in model.parameters() if p.requires_grad} == trained
    assert [name for name, _ in model.named_modules()] == modules
    fastprefix.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("method", "says"), [("prompt_tuning", "not causal"), ("dept", "not causal")])
def test_a_prompt_that_sees_the_input_cannot_be_merged(method: str, says: str) -> None:
    model = attached("encoder", method)
    expected = logits(model)
    with pytest.raises(ValueError, match=says):
        fastprefix.merge(model)
    assert torch.equal(logits(model), expected)


def test_a_gate_that_depends_on_the_input_stays() -> None:
    model = fastprefix.merge(attached("decoder", "apt"))
    assert isinstance(get_method(model).config, fastprefix.APTConfig)
    assert not get_method(model).config.layer_gate
    with pytest.raises(ValueError, match="token gate depends on the input"):
        fastprefix.merge(fastprefix.attach(models.decoder(), fastprefix.APTConfig(5, layer_gate=False)))


def test_merging_takes_an_attached_model() -> None:
    with pytest.raises(ValueError, match="method attached"):
        fastprefix.merge(models.decoder())


def exported(model: PreTrainedModel, plain: nn.Module, padding: str) -> tuple[Tensor, Tensor]:
    """Return the logits of the plain model with the exported cache, and those of the exported model."""
    inputs, rows = models.batch(padding), models.batch(padding)["attention_mask"].bool()
    mask = torch.cat([inputs["attention_mask"].new_ones(3, 5), inputs["attention_mask"]], dim=1)
    cache = fastprefix.export_cache(model, batch_size=3)
    output = plain(input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache)
    return output.logits[rows], model(**inputs).logits[rows]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["prefix", "prefix-mlp", "residual", "prompt_tuning"])
def test_an_exported_cache_continues_on_the_plain_model(name: str, padding: str) -> None:
    config = METHODS[name]()
    if hasattr(config, "prefix_position"):
        config.prefix_position = "shift"
    model = fastprefix.attach(models.decoder(), config)
    models.randomize(model)
    if name == "prompt_tuning":
        fastprefix.merge(model)
    torch.testing.assert_close(*exported(model, models.decoder(), padding), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", WINDOWED)
def test_an_exported_cache_with_sliding_windows(name: str) -> None:
    with Float64(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(WINDOWED[name](), **EAGER).double().eval()
        plain = copy.deepcopy(model)
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(5, prefix_position="shift"))
        models.randomize(model)
        torch.testing.assert_close(*exported(model, plain, "left"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("prefix", "prefix_position"),
        ("prompt_tuning", "merge"),
        ("adept", "merge"),
        ("apt", "prefix_position"),
    ],
)
def test_what_is_no_cache_is_not_exported(method: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fastprefix.export_cache(attached("decoder", method))


def test_what_is_more_than_a_cache_is_not_exported() -> None:
    with pytest.raises(ValueError, match="embedding table"):
        fastprefix.export_cache(fastprefix.merge(attached("decoder", "adept")))
    gated = fastprefix.attach(models.decoder(), fastprefix.APTConfig(5, prefix_position="shift"))
    with pytest.raises(ValueError, match="depend on the input"):
        fastprefix.export_cache(gated)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_layers_that_share_keys_and_values_are_exported_once(family: str) -> None:
    """The last two layers read keys and values, also a prefix's, of the first two layers from the cache."""
    sizes = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 100)
    sizes |= {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "sliding_window": 16}
    options: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2, "initializer_range": 0.2}
    if family == "gemma3n":
        options |= {"intermediate_size": [64] * 4, "laurel_rank": 4, "altup_num_inputs": 2}
        options |= {"activation_sparsity_pattern": [0.0] * 4}
    else:
        options |= {"intermediate_size": 64, "global_head_dim": 8}
    torch.manual_seed(0)
    with Float64():
        config = AutoConfig.for_model(f"{family}_text", **sizes, **options)
        plain = AutoModelForCausalLM.from_config(config).double().eval()
        model = fastprefix.attach(copy.deepcopy(plain), fastprefix.PrefixTuningConfig(5, prefix_position="shift"))
        models.randomize(model)
        with pytest.raises(ValueError, match=r"layer 2 of Gemma.* reads those of layer 0 from a cache"):
            fastprefix.export_cache(model)
        prefixes = model.fastprefix.prefixes()
        model.fastprefix.set_prefixes([*prefixes[:2], *prefixes[:2]])
        torch.testing.assert_close(*exported(model, plain, "left"), rtol=1e-10, atol=1e-10)
