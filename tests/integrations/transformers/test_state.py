"""Test everything that changes a model's state, and that the last adapter to leave restores the former state."""

import copy
import functools
import itertools
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.models.clip.configuration_clip import CLIPVisionConfig

import fastprefix
from fastprefix.integrations.transformers.models.switching import list_configurations, preserve_state

from ... import models

METHODS: dict[str, Callable[..., Any]] = {
    "prefix": functools.partial(fastprefix.PrefixTuningConfig, 4),
    "apt": functools.partial(fastprefix.APTConfig, 4),
    "prompt": functools.partial(fastprefix.PromptTuningConfig, 3),
    "prompt-in-every-row": functools.partial(fastprefix.PromptTuningConfig, 3, shared_prompt=False),
    "adept": functools.partial(fastprefix.ADePTConfig, 3, bottleneck_dim=4),
}


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**(inputs or models.batch("right"))).logits
    return output


def same(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two results differ only by rounding in float64."""
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= 1e-10 * expected.abs().max())


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything that an adapter may change about a model. Parameters are compared by identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}": value for key, value in vars(module).items() if not isinstance(value, dict)}
        hooks = {key: list(value.values()) for key, value in vars(module).items() if "hooks" in key and value}
        found |= {f"{name}.{key}": value for key, value in hooks.items()}
    found |= {f"{name}: requires_grad": p.requires_grad for name, p in model.named_parameters()}
    found |= {f"{name}: data": p.detach().clone() for name, p in model.named_parameters()}
    found["configurations"] = [id(config) for config in list_configurations(model)]
    found["attention"] = [config._attn_implementation for config in list_configurations(model)]
    found["configured"] = [copy.deepcopy(vars(config)) for config in list_configurations(model)]
    return found


def check_state(model: nn.Module, former: dict[str, Any]) -> None:
    now = state(model)
    assert now.keys() == former.keys()
    for name, value in former.items():
        if isinstance(value, Tensor):
            assert torch.equal(now[name], value), name
        else:
            assert now[name] is value or now[name] == value, name


def peft_model(base: PreTrainedModel, config: Any = None) -> Any:
    """Return a PEFT model with random parameters around a base model."""
    made = peft.get_peft_model(base, config or peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    models.randomize(made)
    return made.eval()


def attached(model: Any, method: str, **options: Any) -> Any:
    fastprefix.attach(model, METHODS[method](), **options)
    models.randomize(model)
    return model


def composite() -> LlavaForConditionalGeneration:
    """Return a model whose configuration contains others."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**models.SIZES, pad_token_id=0)
    torch.manual_seed(0)
    return (
        LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=99))
        .double()
        .eval()
    )


# Users that come and go in any order


USERS: dict[str, Any] = {
    "prefix": None,
    "longer prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
def test_accelerated_models_around_one_base_leave_in_any_order(order: tuple[int, ...]) -> None:
    base = models.decoder()
    made = [peft_model(base, copy.deepcopy(config)) for config in USERS.values()]
    expected, bare, former = [logits(each) for each in made], logits(base), state(base)
    for each in made:
        fastprefix.accelerate(each)
    for place, index in enumerate(order):
        fastprefix.decelerate(made[index])
        for left in order[place + 1 :]:
            assert type(made[left].fastprefix).__name__ == "Acceleration"
            assert same(logits(made[left]), expected[left])
        assert same(logits(base), bare)
    check_state(base, former)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("part", ["whole", "inner"])
@pytest.mark.parametrize("first", ["attached", "accelerated"])
@pytest.mark.parametrize("method", METHODS)
def test_attached_and_accelerated_leave_in_either_order(method: str, first: str, part: str) -> None:
    base = models.decoder()
    around = peft_model(base)
    expected, former = logits(around), state(base)
    fastprefix.accelerate(around)
    adapted: Any = base if part == "whole" else base.model
    attached(adapted, method)
    own = logits(base)
    with pytest.raises(ValueError, match="cannot act in the same call as an accelerated PEFT adapter"):
        around(**models.batch())
    if first == "accelerated":
        fastprefix.decelerate(around)
        assert same(logits(base), own)
        fastprefix.detach(adapted)
    else:
        fastprefix.detach(adapted)
        assert same(logits(around), expected)
        fastprefix.decelerate(around)
    assert same(logits(around), expected)
    check_state(base, former)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_around_an_accelerated_part(method: str) -> None:
    model = models.decoder()
    inner: Any = model.model
    inner.config.task_type = None
    around = peft.get_peft_model(inner, peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5))
    models.randomize(around.eval())
    with torch.no_grad():
        expected = around(**models.batch()).last_hidden_state
    former = state(model)
    fastprefix.accelerate(around)
    attached(model, method)
    own = logits(model)
    fastprefix.decelerate(around)
    assert same(logits(model), own)
    fastprefix.detach(model)
    with torch.no_grad():
        assert same(around(**models.batch()).last_hidden_state, expected)
    check_state(model, former)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [models.decoder, models.encoder])
def test_adapters_inside_and_around_one_another_are_refused(family: Any, method: str) -> None:
    model = family()
    inner = model.base_model
    head = next(p for n, p in model.named_parameters() if not n.startswith(model.base_model_prefix))
    former, bare = state(model), logits(model)
    attached(inner, method)
    own = logits(model)
    with pytest.raises(ValueError, match=f"has an adapter inside already, on its {model.base_model_prefix!r}"):
        fastprefix.attach(model, METHODS[method]())
    assert head.requires_grad
    assert same(logits(model), own)
    fastprefix.detach(inner)
    check_state(model, former)
    attached(model, method)
    trained = head.requires_grad
    own = logits(model)
    with pytest.raises(ValueError, match=f"shares modules with a {type(model).__name__} that has an adapter"):
        fastprefix.attach(inner, METHODS[method]())
    assert head.requires_grad is trained
    assert same(logits(model), own)
    fastprefix.detach(model)
    assert head.requires_grad
    assert same(logits(model), bare)
    check_state(model, former)


def test_two_models_with_one_backbone() -> None:
    first, second = models.decoder(), models.decoder()
    second.model = first.model
    attached(first, "prefix")
    with pytest.raises(ValueError, match="shares modules with a LlamaForCausalLM that has an adapter"):
        fastprefix.attach(second, METHODS["prefix"]())
    fastprefix.detach(first)
    attached(second, "prefix")
    with pytest.raises(ValueError, match="Detach it first"):
        fastprefix.accelerate(peft_model(first))


# Copies


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("pair", [("prefix", "adept"), ("apt", "prompt"), ("prompt-in-every-row", "prefix")])
def test_copies_of_a_model_with_two_adapters_are_independent(pair: tuple[str, str], copied: Any) -> None:
    model = models.decoder()
    former, bare = state(model), logits(model)
    for name, method in zip("ab", pair, strict=True):
        attached(model, method, name=name)
    expected = logits(model)
    other = copied(model)
    assert same(logits(other), expected)
    fastprefix.detach(other, "b")
    fastprefix.set_adapter(other, "a")
    assert same(logits(model), expected)
    fastprefix.set_adapter(model, "a")
    assert same(logits(other), logits(model))
    fastprefix.detach(other)
    assert same(logits(other), bare)
    assert {config._attn_implementation for config in list_configurations(other)} == {"sdpa"}
    assert not any(name.startswith("_fastprefix") for m in other.modules() for name in vars(m))
    fastprefix.set_adapter(model, "b")
    assert same(logits(model), expected)
    fastprefix.detach(model)
    check_state(model, former)


def test_copies_of_accelerated_models_are_independent() -> None:
    base = models.decoder()
    first, second = fastprefix.accelerate(peft_model(base)), fastprefix.accelerate(peft_model(base))
    expected = logits(first), logits(second)
    copies = copy.deepcopy([first, second])
    for index, each in enumerate(copies):
        fastprefix.decelerate(each)
        assert same(logits(each), expected[index])
        assert same(logits(copies[1]), expected[1])
    assert {c._attn_implementation for c in list_configurations(copies[0])} == {"sdpa"}
    assert (same(logits(first), expected[0]), same(logits(second), expected[1])) == (True, True)
    fastprefix.decelerate(first)
    assert same(logits(second), expected[1])


# What the user changes stays


def check_saved(model: PreTrainedModel, folder: Path) -> None:
    """Check that a checkpoint of the model loads as the same model."""
    model.save_pretrained(folder)
    other = type(model).from_pretrained(folder, dtype=model.dtype)
    weights = other.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", [*METHODS, "merged-adept", "merged-adept-in-every-row"])
def test_a_vocabulary_that_is_resized_stays_resized(method: str, tied: bool, tmp_path: Path) -> None:
    model = models.decoder(tie_word_embeddings=tied)
    former: Any = model.get_input_embeddings()
    rows = former.weight.detach().clone()
    config = model.config
    options: dict[str, Any] = {"shared_prompt": False} if method.endswith("every-row") else {}
    fastprefix.attach(model, METHODS[method.removeprefix("merged-").removesuffix("-in-every-row")](**options))
    models.randomize(model)
    if method.startswith("merged"):
        fastprefix.merge(model)
    model.resize_token_embeddings(108, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[100:] = 2.0
    ids = torch.tensor([[1, 5, 107, 7]])
    own = logits(model, input_ids=ids)
    assert own.shape[-1] == 108
    with fastprefix.disable_adapter(model):
        assert model.get_input_embeddings().weight.shape[0] == 108
    # A head that was tied to the table before merging gets the new rows when the table is put back.
    assert same(logits(model, input_ids=ids)[..., :100], own[..., :100])
    fastprefix.detach(model)
    table: Any = model.get_input_embeddings()
    assert table is former
    assert table.num_embeddings == len(table.weight) == config.vocab_size == 108
    assert model.config is config
    assert torch.equal(table.weight[:100], rows)
    assert (table.weight[100:] == 2.0).all()
    assert config.tie_word_embeddings is tied
    assert (model.lm_head.weight is table.weight) is tied
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(ids, labels=ids).loss.backward()
    check_saved(model, tmp_path)


def test_tying_weights_again_does_not_tie_the_head_to_a_merged_table() -> None:
    model = attached(models.decoder(tie_word_embeddings=True), "adept")
    own = logits(model)
    fastprefix.merge(model)
    model.tie_weights()
    assert same(logits(model), own)
    fastprefix.detach(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def test_a_trained_head_is_resized_too() -> None:
    model = models.decoder()
    head = model.lm_head.weight.detach().clone()
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(2, modules_to_save=["lm_head"]))
    models.randomize(model)
    trained = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(108, mean_resizing=False)
    with fastprefix.disable_adapter(model):
        assert torch.equal(model.lm_head.weight[:100], head)
    assert torch.equal(model.lm_head.weight[:100], trained)
    fastprefix.detach(model)
    assert model.lm_head.weight.shape[0] == 108
    assert torch.equal(model.lm_head.weight[:100], head)


@pytest.mark.parametrize("method", METHODS)
def test_changes_of_a_configuration_outlast_the_adapter(method: str) -> None:
    model = models.decoder()
    config, attention = model.config, model.config._attn_implementation
    attached(model, method)
    present: Any = model.config
    present.pad_token_id = 7
    present.my_own = {"a": [1]}
    present.rope_parameters["rope_theta"] = 5.0
    del present.pretraining_tp
    fastprefix.attach(model, METHODS[method](), name="b")
    present.my_own["a"].append(2)
    assert model.config is present
    assert fastprefix.detach(model).config is config
    assert (config.pad_token_id, config.my_own, config.rope_parameters["rope_theta"]) == (7, {"a": [1, 2]}, 5.0)
    assert "pretraining_tp" not in vars(config)
    assert config._attn_implementation == attention
    assert "fastprefix" not in str(config.to_dict())
    assert all(m.config is config for m in model.modules() if hasattr(m, "config"))


def test_configurations_inside_a_configuration() -> None:
    model = composite()
    former = state(model)
    config: Any = model.config
    text = config.text_config
    fastprefix.attach(model, METHODS["prefix"]())
    fastprefix.detach(model)
    check_state(model, former)
    fastprefix.attach(model, METHODS["prefix"]())
    assert model.config.text_config is not text
    model.resize_token_embeddings(108, mean_resizing=False)
    model.config.vision_config.mine = 1
    fastprefix.detach(model)
    assert model.config is config
    assert config.text_config is text is model.get_decoder().config
    assert (text.vocab_size, config.vision_config.mine) == (108, 1)
    assert {each._attn_implementation for each in list_configurations(model)} == {"sdpa"}


def test_the_changes_of_one_of_two_users_reach_the_former_configuration() -> None:
    model = models.decoder()
    config, inner = model.config, model.model
    around = fastprefix.accelerate(peft_model(model))
    attached(inner, "prefix")
    model.config.mine = 1
    fastprefix.decelerate(around)
    assert (model.config is config, config.mine) == (True, 1)
    assert config._attn_implementation == "sdpa"
    assert "fastprefix" not in str(config.to_dict())
    inner.config.other = 2
    fastprefix.detach(inner)
    assert (inner.config is config, config.other, config._attn_implementation) == (True, 2, "sdpa")


def test_another_attention_that_is_chosen_stays() -> None:
    model = attached(models.decoder(), "prompt-in-every-row")
    model.set_attn_implementation("eager")
    logits(model)
    fastprefix.detach(model)
    assert model.config._attn_implementation == "eager"


# Trials leave nothing behind


def capturing() -> Iterator[PreTrainedModel]:
    yield LlamaModel(LlamaConfig(**models.SIZES, output_hidden_states=True))
    yield MixtralForCausalLM(MixtralConfig(**models.SIZES, num_local_experts=4, output_router_logits=True))
    bert = {name: value for name, value in models.SIZES.items() if name != "num_key_value_heads"}
    yield BertModel(BertConfig(**bert, output_hidden_states=True))
    yield transformers.GemmaForCausalLM(GemmaConfig(**models.SIZES, head_dim=8, output_hidden_states=True))


@pytest.mark.parametrize("method", ["prefix", "prompt", "prompt-in-every-row"])
@pytest.mark.parametrize("index", range(4))
def test_outputs_are_captured_once(index: int, method: str) -> None:
    model = next(itertools.islice(capturing(), index, None)).eval()
    inputs = {"input_ids": models.batch()["input_ids"]}
    names = "hidden_states", "router_logits"

    def lengths() -> list[int]:
        with torch.no_grad():
            output = model(**inputs)
        return [len(getattr(output, name, None) or ()) for name in names]

    expected = lengths()
    other = type(model)(copy.deepcopy(model.config)).eval()
    for model in (model, other):  # noqa: B020 (one has been called before, the other has not)
        fastprefix.attach(model, METHODS[method]())
        assert lengths() == expected
        fastprefix.detach(model)
        assert lengths() == expected


def test_all_that_calls_leave_on_modules_is_undone() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(1))
            self.seen: dict[str, list[int]] = {"calls": [0]}
            self.inner = nn.Linear(1, 1)

        def forward(self) -> None:
            self.seen["calls"].append(1)
            self.new = 1
            self.scale = torch.zeros(1)
            self.inner = nn.Linear(1, 1)
            self.register_forward_hook(print)
            self.register_forward_pre_hook(print, with_kwargs=True)

    module = Remembers()
    inner, scale, seen = module.inner, module.scale, module.seen
    handle = module.register_forward_pre_hook(lambda *args: None)
    with preserve_state(module):
        module()
    assert (module.inner is inner, module.scale is scale, module.seen is seen) == (True, True, True)
    assert (seen, hasattr(module, "new"), len(module._forward_hooks)) == ({"calls": [0]}, False, 0)
    assert (len(module._forward_pre_hooks), len(module._forward_pre_hooks_with_kwargs)) == (1, 0)
    handle.remove()
    assert not module._forward_pre_hooks


# Weights that accelerate loads in time


def offloaded(kind: str, folder: str, **options: Any) -> LlamaForCausalLM:
    model = models.decoder(**options)
    if kind == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif kind == "disk_offload":
        accelerate.disk_offload(model, folder, execution_device="cpu")
    elif kind == "preloaded":
        accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaModel"])
    else:
        places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
        places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)
    return model


OFFLOADED = ["cpu_offload", "disk_offload", "dispatched", "preloaded"]


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        yield path


@pytest.mark.parametrize("kind", OFFLOADED)
@pytest.mark.parametrize("method", ["prefix", "apt"])
def test_prefixes_of_offloaded_models_are_trained(method: str, kind: str, folder: str, tmp_path: Path) -> None:
    plain, model = models.decoder(), offloaded(kind, folder)
    inputs = models.batch("left")
    former, bare = state(model), logits(model, **inputs)
    for each in (plain, model):
        attached(each, method)
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    for p, expected in zip(model.fastprefix.parameters(), plain.fastprefix.parameters(), strict=True):
        assert same(p.grad, expected.grad)
    expected = logits(plain, **inputs)
    assert same(logits(model, **inputs), expected)
    fastprefix.save_adapter(model, tmp_path)
    fastprefix.detach(model)
    assert same(logits(model, **inputs), bare)
    assert state(model).keys() == former.keys()
    fastprefix.load_adapter(model, tmp_path)
    assert same(logits(model, **inputs), expected)
    fastprefix.detach(model)


@pytest.mark.parametrize("kind", OFFLOADED)
@pytest.mark.parametrize("method", ["prompt", "prompt-in-every-row", "adept"])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_prompts_of_offloaded_models_are_trained(given: str, method: str, kind: str, folder: str) -> None:
    plain, model = models.decoder(), offloaded(kind, folder)
    inputs = models.batch("left")
    ids = inputs["input_ids"]
    if given == "inputs_embeds":
        inputs = {given: plain.get_input_embeddings()(ids).detach(), "attention_mask": inputs["attention_mask"]}
    bare = logits(model, **inputs)
    for each in (plain, model):
        attached(each, method)
        each(**inputs, labels=ids).loss.backward()
    assert model.fastprefix.prompt_path == plain.fastprefix.prompt_path
    for p, expected in zip(model.fastprefix.parameters(), plain.fastprefix.parameters(), strict=True):
        assert same(p.grad, expected.grad)
    assert same(logits(model, **inputs), logits(plain, **inputs))
    fastprefix.detach(model)
    assert same(logits(model, **inputs), bare)


@pytest.mark.parametrize("kind", OFFLOADED)
@pytest.mark.parametrize("method", METHODS)
def test_offloaded_models_generate(method: str, kind: str, folder: str) -> None:
    ids = models.batch()["input_ids"]
    plain, model = (attached(each, method).eval() for each in (models.decoder(), offloaded(kind, folder)))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        expected = plain.generate(ids, num_beams=beams, **options)
        assert same(model.generate(ids, num_beams=beams, **options), expected)


@pytest.mark.parametrize("method", METHODS)
def test_layers_on_two_devices(method: str) -> None:
    """The second device is "meta", so the test covers everything except values."""
    model = attached(models.decoder(), method)
    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        accelerate.hooks.add_hook_to_module(module.to("meta"), accelerate.hooks.AlignDevicesHook("meta"))
    for cache in (False, True):
        assert model(**models.batch(), use_cache=cache).logits.device.type == "meta"


class Tokenizer:
    """A tokenizer that returns the same three ids for every text."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [5, 6, 7]}


@pytest.mark.parametrize("kind", OFFLOADED)
@pytest.mark.parametrize(
    "config",
    [
        fastprefix.PromptTuningConfig(3),
        fastprefix.PromptTuningConfig(3, init="vocab"),
        fastprefix.PromptTuningConfig(3, init="text", init_text="a"),
        fastprefix.PrefixTuningConfig(3, init="text", init_text="a", prefix_position="shift"),
        fastprefix.ADePTConfig(3, bottleneck_dim=2),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.init}",
)
def test_offloaded_weights_are_what_an_adapter_starts_from(config: Any, kind: str, folder: str) -> None:
    plain, model = models.decoder(), offloaded(kind, folder)
    for each in (plain, model):
        torch.manual_seed(0)
        fastprefix.attach(each, copy.deepcopy(config), tokenizer=Tokenizer())
    for p, expected in zip(model.fastprefix.parameters(), plain.fastprefix.parameters(), strict=True):
        assert p.device.type == "cpu"
        assert same(p, expected) or bool((p == expected).all())
    bare = [p.device.type for p in model.model.layers.parameters()]
    fastprefix.detach(model)
    assert "meta" in bare
    assert same(logits(model), logits(fastprefix.detach(plain)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", OFFLOADED)
@pytest.mark.parametrize("shared", [None, False])
def test_a_table_that_is_offloaded_is_merged(shared: bool | None, kind: str, tied: bool, folder: str) -> None:
    plain, model = models.decoder(tie_word_embeddings=tied), offloaded(kind, folder, tie_word_embeddings=tied)
    bare = logits(plain)
    for each in (plain, model):
        fastprefix.attach(each, METHODS["adept"](shared_prompt=shared))
        models.randomize(each)
    fastprefix.merge(plain)
    if kind == "preloaded":
        with pytest.raises(ValueError, match="is offloaded with preload_module_classes"):
            fastprefix.merge(model)
    else:
        fastprefix.merge(model)
        assert same(logits(model), logits(plain))
    fastprefix.detach(model)
    assert same(logits(model), bare)


def test_a_model_whose_weights_are_loaded_at_once_is_refused() -> None:
    model = models.decoder()
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="`model` is offloaded with its own class in preload_module_classes"):
        fastprefix.attach(model, METHODS["prefix"]())


def test_a_trained_module_that_is_offloaded_is_refused(folder: str) -> None:
    model = offloaded("cpu_offload", folder)
    with pytest.raises(ValueError, match="`modules_to_save` names modules that stay trainable, and accelerate has off"):
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(2, modules_to_save=["lm_head"]))


# Merged adapters


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["prefix", "prompt", "adept"])
def test_training_a_merged_model_says_what_to_do(method: str, training: bool) -> None:
    model, inputs = attached(models.decoder(), method), models.batch()
    model = fastprefix.merge(model).train(training)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    with pytest.raises(RuntimeError, match="is merged"):
        loss.backward()
    output = model(**inputs, return_dict=False)[0]
    loss *= 2  # as Trainer does
    if training:
        with pytest.raises(RuntimeError, match="is merged"):
            output.sum().backward()
    else:
        output.numpy()
    with torch.no_grad():
        assert not model(**inputs, labels=inputs["input_ids"]).loss.requires_grad
    assert not copy.deepcopy(model).eval().generate(inputs["input_ids"][:1], max_new_tokens=2).requires_grad
    fastprefix.detach(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


# Hooks of accelerate, compiled and sharded models


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "order", ["attach hook detach unhook", "attach hook unhook detach", "hook attach unhook detach"]
)
def test_hooks_of_accelerate_come_and_go_in_any_order(order: str, method: str) -> None:
    model = models.decoder()
    former, bare = state(model), logits(model)
    expected = logits(attached(models.decoder(), method))
    calls: list[int] = []

    class Counts(accelerate.hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    there: set[str] = set()
    for step in order.split():
        if step == "attach":
            attached(model, method)
        elif step == "detach":
            fastprefix.detach(model)
        elif step == "hook":
            for each in (model, model.model, *model.model.layers):
                accelerate.hooks.add_hook_to_module(each, Counts())
        else:
            accelerate.hooks.remove_hook_from_module(model, recurse=True)
        there ^= {step.removeprefix("de").removeprefix("un").replace("tach", "attach").replace("atattach", "attach")}
        calls.clear()
        assert same(logits(model), expected if "attach" in there else bare)
        assert bool(calls) is ("hook" in there)
    now = state(model)
    for each in (now, former):  # accelerate leaves the methods of the class on the modules
        for name in [name for name in each if name.rpartition(".")[2] == "forward"]:
            del each[name]
    assert now.keys() == former.keys()


@pytest.mark.parametrize("method", ["prompt-in-every-row"])
def test_compiled_models_are_detached_and_attached_again(method: str) -> None:
    model = models.decoder()
    bare = logits(model)
    compiled = torch.compile(model, backend="eager")
    expected = logits(attached(model, method))
    assert same(logits(compiled), expected)
    fastprefix.detach(model)
    assert same(logits(compiled), bare)
    attached(model, method)
    assert same(logits(compiled), expected)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("method", ["prefix", "prompt-in-every-row"])
def test_sharded_models_keep_their_adapter(method: str) -> None:
    model, plain = attached(models.decoder(), method), attached(models.decoder(), method)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for each in (*model.model.layers, model):
        torch.distributed.fsdp.fully_shard(each, mesh=mesh)
    inputs = models.batch("right")
    for each in (model, plain):
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    for p, expected in zip(model.fastprefix.parameters(), plain.fastprefix.parameters(), strict=True):
        assert same(p.grad.full_tensor(), expected.grad)
    assert same(logits(model), logits(plain))
    with fastprefix.disable_adapter(model):
        assert same(logits(model), logits(models.decoder()))
    assert same(logits(model), logits(plain))
    assert same(logits(fastprefix.detach(model)), logits(models.decoder()))


LOADED = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
print(float(model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum()))
"""


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_pickled_model_runs_in_another_process(method: str, tmp_path: Path) -> None:
    model = attached(models.decoder(), method)
    torch.save(model, tmp_path / "model.pt")
    expected = float(logits(model, input_ids=torch.tensor([[5, 6, 7]])).sum())
    command = [sys.executable, "-c", LOADED, str(tmp_path / "model.pt")]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert float(found.stdout) == pytest.approx(expected, rel=1e-9)


def test_other_code_may_keep_generate_beyond_the_adapter() -> None:
    model, inputs, options = models.decoder(), models.batch(), {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, **options)
    fastprefix.attach(model, METHODS["prefix"]())
    kept: Any = model.generate
    vars(model)["generate"] = lambda *args, **kwargs: kept(*args, **kwargs)
    fastprefix.detach(model)
    assert torch.equal(kept(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_a_configuration_that_the_caller_changes_afterwards_changes_no_adapter() -> None:
    config = fastprefix.PrefixTuningConfig(4, prefix_position="shift")
    model = fastprefix.attach(models.decoder(), config)
    expected = logits(model)
    config.num_virtual_tokens = 8
    config.prefix_position = "none"
    assert torch.equal(logits(model), expected)
    assert model.fastprefix.config.num_virtual_tokens == 4
