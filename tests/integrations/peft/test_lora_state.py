"""Test training, saving, merging and switching with LoRA and an adapter of this package on one model."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import fastprefix
from fastprefix.integrations.transformers.attachment import get_method
from fastprefix.integrations.transformers.models.tuners import find_base_model

from ... import models, peft_support
from ..transformers.files.fake_hub import serve
from ..transformers.test_training import Stop, trained, trainer
from .test_lora import METHODS, attached, randomize, tuned

pytestmark = pytest.mark.peft

PREFIX, PROMPT = fastprefix.PrefixTuningConfig(4), fastprefix.PromptTuningConfig(4)


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=3, **{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options})


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**(inputs or models.batch("right"))).logits
    return output


def flags(model: torch.nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def names(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def mixed_in(**options: Any) -> Any:
    """Return a model of transformers with LoRA layers but without a PEFT model around it."""
    peft_support.require(peft_support.layers_in_models)
    torch.manual_seed(0)
    model = models.decoder()
    model.add_adapter(lora(**options))
    return model.double().eval()


MADE: dict[str, Callable[..., Any]] = {"PeftModel": tuned, "base": lambda: find_base_model(tuned()), "mixin": mixed_in}


@pytest.mark.filterwarnings("ignore:`model` is the LlamaForCausalLM inside a PEFT model")
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("method", ["prefix", "adept"])
def test_what_was_trained_is_trained_on(method: str, made: str) -> None:
    model = MADE[made]()
    before, plain, state = flags(model), logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    assert fastprefix.attach(model, METHODS[method](), check=False) is model
    own = {name for name in names(model) if "fastprefix." in name}
    assert names(model) == own | {name for name, trains in before.items() if trains}
    with fastprefix.disable_adapter(model):
        assert torch.equal(logits(model), plain)
    assert fastprefix.detach(model) is model
    assert flags(model) == before
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert made == "PeftModel" or not {"save_pretrained", "load_adapter"} & vars(model).keys()


def test_a_model_without_layers_of_peft_is_frozen() -> None:
    model = fastprefix.attach(models.decoder(), PREFIX)
    assert all(name.startswith("fastprefix.") for name in names(model))


def test_biases_that_peft_trains_are_trained_on() -> None:
    base = models.encoder()
    model = peft.get_peft_model(base, lora(target_modules=["query"], bias="all"))
    before = names(model)
    assert any(name.endswith("dense.bias") for name in before)
    fastprefix.attach(model, PREFIX)
    beside = {name for name in names(model) if "fastprefix." not in name and "classifier." not in name}
    assert beside == {name for name in before if "classifier." not in name}
    fastprefix.detach(model)
    assert names(model) == before


def test_lora_that_is_loaded_for_inference_stays_frozen(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    model = fastprefix.attach(peft.PeftModel.from_pretrained(models.decoder(), tmp_path), PREFIX)
    assert all("fastprefix." in name for name in names(model))


def test_lora_is_frozen_while_an_adapter_that_asks_for_it_is_in_use() -> None:
    model = tuned()
    before = names(model)
    fastprefix.attach(model, PREFIX, name="joint")
    fastprefix.attach(model, PROMPT, name="alone", freeze_peft=True)
    assert names(model) == {"base_model.model.fastprefix.prompt"}
    assert fastprefix.count_parameters(model).groups == {"fastprefix": 4 * models.WIDTH}
    fastprefix.set_adapter(model, "joint")
    assert before < names(model)
    fastprefix.set_adapter(model, "alone")
    with fastprefix.disable_adapter(model):
        assert names(model) == before
    fastprefix.detach(model)
    assert names(model) == before


def test_an_adapter_of_pefts_that_was_put_out_of_use_stays_so() -> None:
    model = tuned()
    model.add_adapter("b", lora())
    fastprefix.attach(model, PREFIX, freeze_peft=True)
    model.set_adapter("b")
    expected = {name for name in names(model) if "fastprefix." not in name}
    assert expected
    assert all(".b." in name for name in expected)
    fastprefix.detach(model)
    assert names(model) == expected


def test_both_are_counted_and_have_rates() -> None:
    model = tuned()
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fastprefix.attach(model, fastprefix.ADePTConfig(4, bottleneck_dim=3), check=False)
    count = fastprefix.count_parameters(model)
    assert count.groups == {"fastprefix": count.trainable - added, "peft": added}
    assert count.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert str(count).endswith(f"fastprefix {count.trainable - added}, peft {added:,}")
    for options, rates in (
        ({}, (0.3, 1e-4, 2e-4)),
        ({"lr": 0.1}, (0.1, 0.1, 2e-4)),
        ({"lr": 0.1, "prompt_lr": 0.2, "peft_lr": 1e-3}, (0.2, 0.1, 1e-3)),
    ):
        groups = fastprefix.parameter_groups(model, **options)
        assert [group["lr"] for group in groups] == list(rates)
        assert {p for group in groups for p in group["params"]} == {p for p in model.parameters() if p.requires_grad}
        assert all("lora" in name for name, p in model.named_parameters() if p in set(groups[2]["params"]))


@pytest.mark.parametrize("active", ["a", "b", "ab"])
@pytest.mark.parametrize("names", [["a", "b"], ["b", "a"], ["a", "ab"]])
def test_adapters_that_are_trained_together_have_each_parameter_once(names: list[str], active: str) -> None:
    model = tuned()
    added = {p for p in model.parameters() if p.requires_grad}
    for name in "ab":
        fastprefix.attach(model, PREFIX, name=name, check=False)
    fastprefix.compose(model, ["a", "b"], name="ab")
    own = set(model.get_base_model().fastprefix.parameters())
    fastprefix.set_adapter(model, active)
    groups = fastprefix.parameter_groups(model, adapter_names=names, peft_lr=0.5)
    torch.optim.AdamW(groups)
    assert {p for group in groups for p in group["params"]} == own | added
    assert [set(group["params"]) for group in groups if group["lr"] == 0.5] == [added]


@pytest.mark.filterwarnings("ignore:`model` is the LlamaForCausalLM inside a PEFT model")
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("method", ["prefix", "adept"])
def test_a_reference_model_is_the_base(method: str, made: str) -> None:
    expected = logits(models.decoder())
    model = MADE[made]()
    fastprefix.attach(model, METHODS[method](), freeze_peft=method == "adept", check=False)
    randomize(model.fastprefix)
    own, before = logits(model), flags(model)
    reference = fastprefix.ReferenceModel(model)
    assert not list(reference.parameters())
    for _ in range(2):
        assert torch.equal(logits(reference), expected)
        assert torch.equal(logits(model), own)
        assert flags(model) == before
    states = reference.base_model(**models.batch("right")).last_hidden_state
    torch.testing.assert_close(reference.get_output_embeddings()(states), expected)
    fastprefix.detach(model)
    with pytest.raises(ValueError, match="method attached"):
        fastprefix.ReferenceModel(model)


# Saved and loaded


@pytest.mark.parametrize("first", ["lora", "prefix"])
@pytest.mark.parametrize("method", ["prefix-mlp", "apt", "prompt"])
def test_each_part_is_saved_and_the_pair_restored_in_either_order(method: str, first: str, tmp_path: Path) -> None:
    model = attached(tuned(), METHODS[method]())
    expected = logits(model)
    fastprefix.save_adapter(model, tmp_path / "own")
    model.save_pretrained(tmp_path / "peft")
    assert not any("fastprefix" in name for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert not any("lora" in name for name in load_file(tmp_path / "own" / "adapter_model.safetensors"))
    other: Any = models.decoder()
    if first == "prefix":
        fastprefix.load_adapter(other, tmp_path / "own")
    other = peft.PeftModel.from_pretrained(other, tmp_path / "peft", is_trainable=True).double().eval()
    if first == "prefix":
        with pytest.raises(ValueError, match=r"PEFT freezes them .* Call fastprefix\.set_adapter"):
            fastprefix.parameter_groups(other)
        fastprefix.set_adapter(other, "default")
    else:
        assert fastprefix.load_adapter(other, tmp_path / "own") is other
    assert names(other) == names(model)
    torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)  # PEFT loads in float32
    fastprefix.parameter_groups(other)
    if first == "prefix":  # PEFT has frozen the base
        fastprefix.detach(other)
        assert all("lora" in name for name in names(other))


def test_the_directory_of_a_peft_model_has_both(tmp_path: Path) -> None:
    model = tuned()
    for name, config in (("a", PREFIX), ("b/c", PROMPT)):
        fastprefix.attach(model, config, name=name, check=False)
        randomize(model.fastprefix)
        model.save_pretrained(tmp_path)
    expected = logits(model)
    other = peft.PeftModel.from_pretrained(models.decoder(), tmp_path).double().eval()
    with pytest.raises(ValueError, match=r"`name` must be one of the adapters \['a', 'b/c'\] in .*, got 'default'"):
        fastprefix.load_adapter(other, tmp_path)
    fastprefix.load_adapter(other, tmp_path, name="b/c")
    torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "fastprefix" / "a.safetensors").unlink()
    fastprefix.load_adapter(other, tmp_path, name="other")
    torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)


def test_other_directories_of_pefts_leave_the_adapter_alone(tmp_path: Path) -> None:
    """Another LoRA may be loaded under the same prefix."""
    model = attached(tuned(), PREFIX)
    model.save_pretrained(tmp_path)
    randomize(model.fastprefix.double())
    with torch.no_grad():
        model.fastprefix.prefix.keys[0].mul_(2.0)
    keys = model.fastprefix.prefix.keys[0].clone()
    model.load_adapter(tmp_path, "again")
    assert torch.equal(model.fastprefix.prefix.keys[0], keys)


def test_a_peft_model_that_is_newer_than_the_adapter_saves_it(tmp_path: Path) -> None:
    base = attached(models.decoder(), PREFIX)
    with fastprefix.disable_adapter(base):
        model = peft.get_peft_model(base, lora())
    fastprefix.set_adapter(model, "default")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "fastprefix" / "default.safetensors")
    assert torch.equal(saved["prefix.keys.0"], base.fastprefix.prefix.keys[0])


INSIDE = "`model` is the LlamaForCausalLM inside a PEFT model, whose save_pretrained .* Pass the PEFT model"


def test_an_adapter_on_the_model_inside_a_peft_model_is_reported(tmp_path: Path) -> None:
    """The model inside has no reference to the PEFT model, which then saves only LoRA."""
    model = tuned()
    with pytest.warns(UserWarning, match=INSIDE):
        fastprefix.attach(model.get_base_model(), PREFIX, check=False)
    fastprefix.save_adapter(model.get_base_model(), tmp_path)
    with pytest.warns(UserWarning, match=INSIDE):
        fastprefix.load_adapter(model.get_base_model(), tmp_path, name="b")
    base = fastprefix.attach(models.decoder(), PREFIX)
    with fastprefix.disable_adapter(base):
        model = peft.get_peft_model(base, lora())
    with pytest.warns(UserWarning, match=INSIDE):
        fastprefix.set_adapter(base, "default")
    fastprefix.set_adapter(model, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fastprefix.attach(base, PREFIX, name="b")  # the PEFT model is known now
        fastprefix.AdapterStore(tuned()).load("stored", tmp_path)  # a store is for serving


def test_layers_that_transformers_added_are_saved_with_the_adapter(tmp_path: Path) -> None:
    model = mixed_in()
    for name in "ab":
        fastprefix.attach(model, PREFIX, name=name, check=False)
        randomize(model.fastprefix)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in (tmp_path / "fastprefix").iterdir()} == {"b.safetensors"}
    other: Any = models.decoder()
    other.load_adapter(tmp_path)
    fastprefix.load_adapter(other.double().eval(), tmp_path)
    torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)
    fastprefix.merge(model)
    with pytest.raises(ValueError, match="`save_pretrained` cannot save a model with a merged adapter"):
        model.save_pretrained(tmp_path / "merged")
    fastprefix.set_adapter(model, "a")
    fastprefix.detach(model, "b")
    model.save_pretrained(tmp_path)
    assert {path.name for path in (tmp_path / "fastprefix").iterdir()} == {"a.safetensors"}


@pytest.mark.parametrize("inside", [False, True])
def test_a_detached_adapter_is_removed_from_the_directory(inside: bool, tmp_path: Path) -> None:
    model = tuned()
    for name in "ab":
        fastprefix.attach(model, PREFIX, name=name, check=False)
        model.save_pretrained(tmp_path)
    folder = tmp_path / "fastprefix"
    assert {path.stem for path in folder.iterdir()} == {"a", "b"}
    fastprefix.detach(model, "a")
    with fastprefix.disable_adapter(model):
        model.save_pretrained(tmp_path)
    assert {path.stem for path in folder.iterdir()} == {"b"}
    fastprefix.detach(find_base_model(model) if inside else model)
    model.save_pretrained(tmp_path)
    assert not list(folder.iterdir())
    with pytest.raises(ValueError, match="is 'LORA'"):
        fastprefix.load_adapter(models.decoder(), tmp_path)


def test_an_adapter_of_pefts_that_is_called_like_the_subfolder(tmp_path: Path) -> None:
    model = peft.get_peft_model(models.decoder(), lora(), adapter_name="fastprefix")
    step(model)
    for name in ("default", "adapter_model"):
        fastprefix.attach(model, PREFIX, name=name, check=False)
        randomize(model.fastprefix)
        model.save_pretrained(tmp_path)
    expected = logits(model.double().eval())
    fastprefix.detach(model, "default")
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(models.decoder(), tmp_path / "fastprefix", "fastprefix").double().eval()
    fastprefix.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)


def test_peft_writes_nothing_if_the_adapter_cannot_be_saved(tmp_path: Path) -> None:
    model = fastprefix.merge(attached(tuned(), METHODS["adept"]()))
    with pytest.raises(ValueError, match=r"merged adapter of `model` cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_peft_does_not_overwrite_an_adapter_of_this_package(tmp_path: Path) -> None:
    model = attached(tuned(), PREFIX)
    fastprefix.save_adapter(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"`save_directory` must be a separate folder, .* PEFT would overwrite"):
        model.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_lora_from_a_checkpoint_leaves_the_adapter_alone(tmp_path: Path) -> None:
    """PEFT's ``load_adapter`` reads the adapter of a checkpoint only into the PEFT adapter that is trained."""
    attached(tuned(), PREFIX).save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}", encoding="utf-8")
    saved = load_file(tmp_path / "fastprefix" / "default.safetensors")["prefix.keys.0"]
    model = attached(tuned(), PREFIX)
    with torch.no_grad():
        model.fastprefix.prefix.keys[0].mul_(2.0)
    model.load_adapter(tmp_path, adapter_name="second")
    assert torch.equal(model.fastprefix.prefix.keys[0], 2.0 * saved)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model.fastprefix.prefix.keys[0], saved)


def test_a_checkpoint_without_the_adapter_is_refused_before_lora_is_loaded(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}", encoding="utf-8")
    model = attached(tuned(), PREFIX)
    step(model)
    model.load_adapter(tmp_path, "second")
    expected = logits(model)
    with pytest.raises(ValueError, match=r"has an adapter 'default', but .* contains no adapter of that name"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_themselves(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    model = attached(tuned(), PREFIX)
    other = copied(model)
    with torch.no_grad():
        other.fastprefix.prefix.keys[0].add_(1.0)
    other.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "fastprefix" / "default.safetensors")
    assert torch.equal(saved["prefix.keys.0"], other.fastprefix.prefix.keys[0])
    fastprefix.detach(other)
    assert torch.equal(saved["prefix.keys.0"], model.fastprefix.prefix.keys[0] + 1.0)


# Heads


def classifier(**options: Any) -> Any:
    torch.manual_seed(0)
    config = lora(task_type="SEQ_CLS", target_modules=["query", "value"], **options)
    return peft.get_peft_model(models.encoder(), config).double().eval()


def test_a_head_that_peft_trains_is_pefts(tmp_path: Path) -> None:
    model = classifier()
    before = names(model)
    attached(model, PREFIX)
    with torch.no_grad():
        model.base_model.model.classifier.weight.add_(1.0)
    expected = logits(model)
    assert {name for name in names(model) if "fastprefix." not in name} == before
    assert fastprefix.count_parameters(model).groups.keys() == {"fastprefix", "peft"}
    model.save_pretrained(tmp_path / "peft")
    fastprefix.save_adapter(model, tmp_path / "own")
    assert not any("classifier" in name for name in load_file(tmp_path / "own" / "adapter_model.safetensors"))
    for first in ("lora", "prefix"):
        other: Any = models.encoder()
        if first == "prefix":
            fastprefix.load_adapter(other, tmp_path / "own")
        other = peft.PeftModel.from_pretrained(other, tmp_path / "peft").double().eval()
        if first == "lora":
            fastprefix.load_adapter(other, tmp_path / "own")
        torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"`modules_to_save` must name modules that PEFT does not train"):
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(4, modules_to_save=["classifier"]), name="b")


def test_a_head_beside_lora_is_trained_and_saved(tmp_path: Path) -> None:
    """Without a task, PEFT leaves the head frozen."""
    model = tuned("bert", target_modules=["query"])
    attached(model, PREFIX)
    assert fastprefix.count_parameters(model).groups.keys() == {"fastprefix", "classifier", "peft"}
    fastprefix.save_adapter(model, tmp_path)
    other = tuned("bert", target_modules=["query"])
    assert torch.equal(logits(fastprefix.load_adapter(other, tmp_path, freeze_peft=True)), logits(model))
    assert not any("lora" in name for name in names(other))


def test_layers_of_pefts_in_what_an_adapter_trains_are_refused(tmp_path: Path) -> None:
    config = fastprefix.PrefixTuningConfig(4, reparameterization="mlp", hidden_dim=8)
    model = peft.get_peft_model(fastprefix.attach(models.decoder(), config), lora(target_modules="all-linear"))
    for use in (lambda: fastprefix.save_adapter(model, tmp_path), lambda: fastprefix.set_adapter(model, "default")):
        with pytest.raises(ValueError, match=r"has layers of PEFT in the adapter's own network\. Name other modules"):
            use()
    head = fastprefix.attach(models.encoder(), PREFIX)
    around = peft.get_peft_model(head, lora(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ValueError, match=r"has layers of PEFT in \['classifier'\], which the adapter trains"):
        fastprefix.set_adapter(around, "default")


# Merged, switched, disabled


def textbook_prompt(model: Any) -> Tensor:
    """Return the logits of a model without an adapter of this package, with a prompt in every row."""
    inputs = models.batch("right")
    base = find_base_model(model)
    with fastprefix.disable_adapter(model), torch.no_grad():
        rows = base.get_input_embeddings()(inputs["input_ids"])
        method = fastprefix_method(model)
        rows = torch.cat([method.prompt.expand(len(rows), -1, -1), rows], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (len(method.prompt), 0), value=1)
        output: Tensor = model(inputs_embeds=rows, attention_mask=mask).logits[:, len(method.prompt) :]
    return output


def fastprefix_method(model: Any) -> Any:
    """Return the prompt, even after merging."""
    hooks = find_base_model(model)._fastprefix_attachment.adapters["default"].hooks
    return getattr(hooks, "source", hooks).method


def two_loras() -> Any:
    model = tuned()
    torch.manual_seed(3)
    model.add_adapter("b", lora(target_modules=["k_proj", "v_proj", "up_proj"]))
    return model.double().eval()


def scale(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 2 * value for name, value in module.scaling.items()}


@torch.no_grad()
def step(model: Any) -> None:
    """Change parameters like some optimizers, in a way that PyTorch's version counters do not notice."""
    for name, parameter in model.named_parameters():
        if "lora" in name:
            (parameter.data if parameter.requires_grad else parameter).mul_(1.5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "merged": lambda model: model.merge_adapter(),
    "unmerged": lambda model: model.unmerge_adapter(),
    "switched": lambda model: model.set_adapter("b"),
    "switched and merged": lambda model: model.merge_adapter(),
    "switched while merged": lambda model: (model.unmerge_adapter(), model.set_adapter("default")),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "enabled": lambda model: model.base_model.enable_adapter_layers(),
    "scaled": scale,
    "trained": step,
    "deleted": lambda model: (model.set_adapter("b"), model.delete_adapter("default")),
    "unloaded": lambda model: model.merge_and_unload(),
}


@pytest.mark.parametrize("merged", [False, True], ids=["kept", "merged"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_prompt_that_is_kept_notices_changes_of_lora(frozen: bool, merged: bool) -> None:
    model = two_loras()
    fastprefix.attach(model, PROMPT, freeze_peft=frozen, check=False)
    randomize(model.fastprefix)
    if merged:
        fastprefix.merge(model)
    own = logits(model)
    for change, make in CHANGES.items():
        make(model)
        if frozen:
            find_base_model(model).requires_grad_(False)
        actual = logits(model)
        torch.testing.assert_close(actual, textbook_prompt(model), rtol=1e-9, atol=1e-9, msg=change)
        assert torch.equal(logits(model), actual), change
        torch.testing.assert_close(generate(model, True), generate(model, False), msg=change)
    assert not torch.allclose(own, actual)


@pytest.mark.parametrize("merged", [False, True], ids=["kept", "merged"])
def test_changes_of_lora_are_noticed_in_inference_mode(merged: bool) -> None:
    model, expected = attached(two_loras(), PROMPT, freeze_peft=True), {}
    for name in ("default", "b"):
        model.set_adapter(name, inference_mode=True)
        expected[name] = logits(model)
    if merged:
        fastprefix.merge(model)
    with torch.inference_mode():
        for name in ("default", "b", "default"):
            model.set_adapter(name, inference_mode=True)
            for _ in range(2):
                actual = model(**models.batch("right")).logits
                torch.testing.assert_close(actual, expected[name], rtol=1e-9, atol=1e-9)


def generate(model: Any, use_cache: bool) -> Tensor:
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    tokens: Tensor = find_base_model(model).generate(**models.batch("left"), **options)
    return tokens


def test_a_prompt_is_computed_once_while_lora_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned()
    fastprefix.attach(model, PROMPT, freeze_peft=True, check=False)
    hooks, runs = find_base_model(model)._fastprefix_attachment.hooks, []
    run = type(hooks).run_prompt
    monkeypatch.setattr(type(hooks), "run_prompt", lambda self, *call: (runs.append(1), run(self, *call))[1])
    for _ in range(3):
        logits(model)
    assert len(runs) == 1
    state = {name: tensor * 1.5 for name, tensor in peft.get_peft_model_state_dict(model).items()}
    peft.set_peft_model_state_dict(model, state)
    for _ in range(3):
        logits(model)
    assert len(runs) == 2


@pytest.mark.parametrize("method", ["dept", "adept"])
def test_an_offset_beside_a_merged_prompt_stays_where_it_is(method: str) -> None:
    model = attached(two_loras(), METHODS[method]())
    expected = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        expected[name] = logits(model)
    fastprefix.merge(model)
    for name in ("default", "b", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name], rtol=1e-9, atol=1e-9)
    fastprefix.detach(model)
    assert torch.equal(logits(model), logits(two_loras()))


@pytest.mark.parametrize("method", ["prefix-mlp", "apt", "prompt"])
def test_a_merged_adapter_lets_nothing_be_trained(method: str) -> None:
    model = attached(tuned(), METHODS[method]())
    inputs = {**models.batch(), "labels": models.batch()["input_ids"]}
    before, expected = names(model), logits(model)
    fastprefix.merge(model)
    assert not names(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError, match="the adapter on `model` is merged"):
        model(**inputs).loss.backward()
    with model.disable_adapter():
        logits(model)
    assert names(model)  # by PEFT, as it leaves that context
    with pytest.raises(RuntimeError, match="the adapter on `model` is merged"):
        model(**inputs).loss.backward()
    fastprefix.detach(model)
    assert names(model) == {name for name in before if "fastprefix." not in name}


@pytest.mark.parametrize("method", ["prefix", "apt", "prompt", "adept"])
def test_lora_is_merged_while_a_method_is_trained(method: str) -> None:
    model = attached(tuned(), METHODS[method]())
    inputs = {**models.batch("right"), "labels": models.batch("right")["input_ids"]}

    def find_gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: p.grad.clone() for name, p in model.fastprefix.named_parameters()}

    expected = find_gradients()
    model.merge_adapter()
    actual = find_gradients()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-9)
    whole = model.merge_and_unload()
    assert isinstance(whole, PreTrainedModel)
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-9, atol=1e-9)
    fastprefix.detach(whole)


def test_an_embedding_with_lora() -> None:
    model = tuned(target_modules=["q_proj", "embed_tokens"])
    attached(model, fastprefix.PromptTuningConfig(4))
    torch.testing.assert_close(logits(model), textbook_prompt(model), rtol=1e-9, atol=1e-9)
    fastprefix.detach(model)
    attached(model, fastprefix.ADePTConfig(4, bottleneck_dim=3))
    with pytest.raises(ValueError, match=r"input embeddings without layers of PEFT.*merge_and_unload"):
        fastprefix.merge(model)
    torch.testing.assert_close(logits(model), logits(model.merge_and_unload()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["prefix", "prompt", "adept"])
def test_adapters_of_pefts_by_row(method: str) -> None:
    """With ``adapter_names``, each row has its LoRA, and all rows have the prefix or the prompt."""
    model = attached(two_loras(), METHODS[method]())
    inputs, rows = models.batch("left"), ["b", "__base__", "default"]
    with torch.no_grad():
        actual = model(**inputs, adapter_names=rows).logits
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, **inputs)
        else:
            model.set_adapter(name)
            expected = logits(model, **inputs)
        torch.testing.assert_close(actual[row], expected[row], rtol=1e-9, atol=1e-9)
    if method != "prefix":
        model(**inputs, adapter_names=rows)
        assert get_method(model).prompt_path == "textbook: PEFT's adapters differ by row"


def test_peft_models_are_accepted_everywhere(tmp_path: Path) -> None:
    model = tuned()
    config = fastprefix.PrefixTuningConfig(3, prefix_position="shift")
    for name in "ab":
        fastprefix.attach(model, config, name=name)
    assert fastprefix.compose(model, ["a", "b"], name="ab") is model
    fastprefix.save_adapter(model, tmp_path, name="a")
    fastprefix.swap_prefix(model, fastprefix.read_prefix(model, tmp_path), name="b")
    expected = logits(model)
    assert fastprefix.merge(model) is model
    torch.testing.assert_close(logits(model), expected)
    cache = fastprefix.export_cache(model, batch_size=3)
    fastprefix.detach(model, "a")
    fastprefix.detach(model)
    inputs = models.batch()
    mask = torch.nn.functional.pad(inputs["attention_mask"], (6, 0), value=1)
    actual = logits(model, input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache)
    fastprefix.attach(model, config, name="a")
    fastprefix.attach(model, config, name="b")
    assert fastprefix.set_adapter(model, "a") is model
    assert actual.shape == expected.shape


def test_frozen_parts_of_a_composition_stay_frozen() -> None:
    """``set_adapter`` makes the trained parts trainable again after PEFT has frozen all of them."""
    model = models.decoder()
    for name in "ab":
        fastprefix.attach(model, fastprefix.PrefixTuningConfig(3, key_bias=True), name=name, check=False)
    fastprefix.compose(model, ["a", "b"], name="ab", trainable=["b"])
    expected = [name for name, parameter in model.fastprefix.named_parameters() if parameter.requires_grad]
    around = peft.get_peft_model(model, lora())
    assert not any(parameter.requires_grad for parameter in model.fastprefix.parameters())
    fastprefix.set_adapter(around, "ab")
    assert [name for name, parameter in model.fastprefix.named_parameters() if parameter.requires_grad] == expected
    assert all(name.startswith("parts.1.") for name in expected)
    fastprefix.set_adapter(model, "a")
    assert all(parameter.requires_grad for parameter in model.fastprefix.parameters())
    fastprefix.set_adapter(model, "ab")
    assert [name for name, parameter in model.fastprefix.named_parameters() if parameter.requires_grad] == expected


def test_peft_models_of_prompts_are_refused() -> None:
    made = peft.get_peft_model(models.decoder(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(
        TypeError, match=r"PeftModelForCausalLM. To speed up PEFT's prompts, .* use fastprefix\.accelerate"
    ):
        fastprefix.attach(made, PREFIX)


# Trainer


def fresh(method: str) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(models.decoder().float(), lora())
    return fastprefix.attach(model, METHODS[method](), check=False)


@pytest.mark.parametrize("method", ["prefix", "adept"])
def test_trainer_resumes_both(method: str, tmp_path: Path) -> None:
    whole = trainer(fresh(method), "decoder", tmp_path / "whole")
    whole.train()
    stopped = trainer(fresh(method), "decoder", tmp_path / "parts")
    stopped.add_callback(Stop())
    stopped.train()
    resumed = trainer(fresh(method), "decoder", tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    expected = trained(whole.model)
    assert {"lora" in name for name in expected} == {True, False}
    for name, value in trained(resumed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)
    other = fresh("prefix")
    with pytest.raises(ValueError, match=r"has an adapter 'b', but .*checkpoint-3 contains no adapter of that name"):
        trainer(fastprefix.attach(other, PREFIX, name="b"), "decoder", tmp_path / "parts").train(
            resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3")
        )


def test_trainer_goes_back_to_the_best(tmp_path: Path) -> None:
    of = trainer(
        fresh("prefix"),
        "decoder",
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, which is not the last
    )
    of.train()
    best = Path(str(of.state.best_model_checkpoint))
    assert best.name != "checkpoint-6"
    saved = load_file(best / "fastprefix" / "default.safetensors")
    assert torch.equal(of.model.fastprefix.prefix.keys[0], saved["prefix.keys.0"])
    loss = of.evaluate()["eval_loss"]
    assert loss == pytest.approx(max(entry["eval_loss"] for entry in of.state.log_history if "eval_loss" in entry))


def test_a_peft_model_publishes_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = attached(tuned(), PREFIX)
    with serve(monkeypatch, tmp_path) as hub:
        model.push_to_hub("org/both")
        found = hub.find("org/both", "main")
        assert found is not None
        assert {"adapter_config.json", "adapter_model.safetensors", "fastprefix/default.safetensors"} <= set(found[1])
        other = peft.PeftModel.from_pretrained(models.decoder(), "org/both").double().eval()
        fastprefix.load_adapter(other, "org/both")
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
        fastprefix.push_to_hub(model, "org/own")
        assert "together with LORA of PEFT" in hub.read("org/own", "README.md")
        options = {"max_steps": 1, "save_strategy": "no", "hub_model_id": "org/trained"}
        of = trainer(fresh("prefix"), "decoder", tmp_path / "out", **options)
        of.train()
        of.push_to_hub()
        other = peft.PeftModel.from_pretrained(models.decoder().float(), "org/trained").eval()
        fastprefix.load_adapter(other, "org/trained")
        torch.testing.assert_close(logits(other), logits(of.model.eval()), rtol=1e-5, atol=1e-5)


def test_rows_whose_activated_lora_begins_elsewhere() -> None:
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "k_proj", "v_proj"], alora_invocation_tokens=[5, 6]
    )
    model = peft.get_peft_model(models.decoder(), lora).double().eval()
    inputs = {"input_ids": torch.tensor([[9, 8, 5, 6, 7, 11, 12], [8, 9, 10, 7, 5, 6, 13]])}
    fastprefix.attach(model, fastprefix.PromptTuningConfig(4, shared_prompt=False))
    models.randomize(model)
    expected = logits(model, **inputs)
    fastprefix.detach(model)
    fastprefix.attach(model, fastprefix.PromptTuningConfig(4))
    models.randomize(model)
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=1e-9, atol=1e-9)
    assert get_method(model).prompt_path == "textbook: PEFT's adapters differ by row"


@pytest.mark.parametrize("method", ["llama-adapter", "merged prompt"])
def test_what_runs_once_through_lora_refuses_adapters_by_row(method: str) -> None:
    model = two_loras()
    prompt = fastprefix.PromptTuningConfig(4)
    attached(model, prompt if method == "merged prompt" else fastprefix.LlamaAdapterConfig(4))
    if method == "merged prompt":
        fastprefix.merge(model)
    inputs = models.batch()
    expected = logits(model, **inputs)
    with pytest.raises(ValueError, match=r"`adapter_names` and activated LoRA must not be used with"), torch.no_grad():
        model(**inputs, adapter_names=["b", "__base__", "default"])
    torch.testing.assert_close(logits(model, **inputs), expected)  # PEFT leaves its hooks after an error


def test_tasks_of_a_multitask_prompt_reach_it_through_peft() -> None:
    model = peft.get_peft_model(models.decoder(), lora(task_type="CAUSAL_LM"))
    fastprefix.attach(model, fastprefix.MultitaskPromptConfig(4, num_tasks=2, rank=2))
    models.randomize(model)
    inputs, tasks = models.batch(), torch.tensor([0, 1, 1])
    expected = logits(model.get_base_model(), **inputs, task_ids=tasks)
    assert torch.equal(logits(model, **inputs, task_ids=tasks), expected)
    assert not torch.equal(logits(model, **inputs, task_ids=1 - tasks), expected)
    model(**inputs, task_ids=tasks).logits.sum().backward()
    fastprefix.detach(model)
    assert logits(model, **inputs).isfinite().all()


def count_models() -> int:
    gc.collect()
    return sum(isinstance(each, LlamaForCausalLM) for each in gc.get_objects())


@pytest.mark.parametrize("method", ["prefix", "prompt", "adept"])
def test_pefts_copies_of_modules_do_not_copy_the_model(method: str) -> None:
    model = attached(models.decoder(), METHODS[method]())
    expected = logits(model)
    before = count_models()
    around = peft.get_peft_model(model, lora(modules_to_save=["embed_tokens"], init_lora_weights=True))
    fastprefix.set_adapter(around, "default")
    torch.testing.assert_close(logits(around), expected)
    assert count_models() == before


def test_reentrant_checkpointing_follows_an_embedding_that_peft_wraps() -> None:
    model = attached(models.decoder(), METHODS["prefix"]())
    around = peft.get_peft_model(model, lora(modules_to_save=["embed_tokens"]))
    fastprefix.set_adapter(around, "default")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    around.train()(**models.batch()).logits.sum().backward()
    assert all(p.grad is not None for p in model.fastprefix.parameters())


def test_a_merged_base_with_lora_is_refused(tmp_path: Path) -> None:
    model = attached(tuned(), METHODS["adept"]())
    for each in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="`model` must not have layers of PEFT"):
            fastprefix.export_merged_base(each, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_store_loads_the_named_adapter_of_a_peft_directory(tmp_path: Path) -> None:
    model = tuned()
    for name, value in (("default", 1.0), ("ben", 2.0)):
        fastprefix.attach(model, fastprefix.PromptTuningConfig(3), name=name, check=False)
        torch.nn.init.constant_(model.get_base_model().fastprefix.prompt, value)
        model.save_pretrained(tmp_path)
    expected = logits(model)
    fastprefix.detach(model)
    store = fastprefix.AdapterStore(model)
    store.load("ben", tmp_path)
    torch.testing.assert_close(
        logits(model.get_base_model(), **models.batch("right"), adapter_names=["ben"] * 3), expected
    )


@pytest.mark.parametrize("trained", [True, False])
def test_a_reference_model_in_evaluation_mode_has_no_dropout(trained: bool) -> None:
    model = attached(tuned("gpt2"), METHODS["prefix"]()).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    reference, inputs = fastprefix.ReferenceModel(model).train(trained), models.batch()  # which sets the seed
    assert torch.equal(logits(reference, **inputs), logits(reference, **inputs)) is not trained
    assert model.training
