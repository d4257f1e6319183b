"""Test that the conformance check finds every planted fault, and nothing in a correct integration."""

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

import fastprefix
from fastprefix.integrations.transformers import attachment
from fastprefix.integrations.transformers.attachment import attach
from fastprefix.integrations.transformers.checking import conformance
from fastprefix.integrations.transformers.checking.conformance import ConformanceReport, check
from fastprefix.integrations.transformers.models.discovery import make_small_copy
from fastprefix.integrations.transformers.models.hooks import find_cache, name_arguments, read_parameter_names
from fastprefix.integrations.transformers.models.switching import evaluating, seed_generators
from fastprefix.integrations.transformers.prompts import shared_prompt

unchecked = functools.partial(attach, check=False)
PROMPT, PREFIX = fastprefix.PromptTuningConfig(5), fastprefix.PrefixTuningConfig(5)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Forget all results before the next planted fault."""
    conformance.forget_reports()
    yield
    conformance.forget_reports()


@functools.cache
def built(family: str, class_name: str) -> PreTrainedModel:
    options: dict[str, Any] = {}
    if family == "phi3":
        rope = {"short_factor": [1.0] * 48, "long_factor": [8.0] * 48, "rope_type": "longrope", "rope_theta": 1e4}
        options = {"rope_parameters": rope, "original_max_position_embeddings": 4096}
    return make_small_copy(AutoConfig.for_model(family, **options), getattr(transformers, class_name))


def llama() -> PreTrainedModel:
    return built("llama", "LlamaForCausalLM")


def bert() -> PreTrainedModel:
    return built("bert", "BertModel")


def planted(model: PreTrainedModel, config: Any, fault: Any, *names: str) -> set[str]:
    """Return the situations in which the check fails after ``fault`` has changed the attached method."""

    def attach_faulty(small: Any, small_config: Any) -> Any:
        unchecked(small, small_config)
        fault(small)
        return small

    report = check(model, config, attach_faulty, names or None)
    return {finding.situation for finding in report.wrong}


def change_arguments(module: nn.Module, change: Any) -> None:
    """Change the arguments of a module by name, after all other hooks."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = name_arguments(read_parameter_names(module), args, kwargs)
        change(arguments)
        return (), arguments

    module.register_forward_pre_hook(hook, with_kwargs=True)


def change_attention(model: Any, change: Any) -> None:
    """Change the keyword arguments of every attention module."""
    for name, module in model.named_modules():
        if name.endswith(("self_attn", "attention.self", ".attn")):
            change_arguments(module, change)


def test_what_is_right_agrees() -> None:
    for model, config in ((llama(), PREFIX), (bert(), PREFIX)):
        report = check(model, config, unchecked, ["ids", "left padding", "a row alone", "inputs_embeds"])
        assert report.agrees, str(report)
        assert {finding.verdict for finding in report.findings} == {"ok"}


def test_a_report_is_remembered_by_class_configuration_and_method() -> None:
    calls = []

    def counted(model: Any, config: Any) -> Any:
        calls.append(config)
        raise ValueError("not this one")

    first = check(bert(), PREFIX, counted)
    assert check(bert(), fastprefix.PrefixTuningConfig(90), counted) is first
    assert len(calls) == 1
    check(bert(), fastprefix.PrefixTuningConfig(5, prefix_position="shift"), counted)
    check(built("bert", "BertForMaskedLM"), PREFIX, counted)
    assert len(calls) == 3


def test_the_sentence_names_family_situation_and_alternative() -> None:
    finding = conformance.Finding("left padding", "differs", 0.25, "values")
    report = ConformanceReport("LlamaForCausalLM", "PromptTuningConfig", (finding,))
    assert report.describe("Use a prefix method.") == (
        "PromptTuningConfig on LlamaForCausalLM: with left padding, its values or gradients differ from the textbook "
        "by 2.5e-01 (values). Use a prefix method."
    )
    assert not report.agrees


def test_the_model_is_left_alone() -> None:
    model = bert()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    check(model, PREFIX, unchecked, ["ids"])
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_random_generators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` would seed the generators of all devices."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    model = llama()
    state = torch.get_rng_state()
    seeds.clear()
    check(model, fastprefix.PromptTuningConfig(3), unchecked, names=["ids", "gradient checkpointing"])
    assert not seeds
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluating_restores_the_generators_of_the_model_s_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = tuple(torch.Generator().manual_seed(5) for _ in range(2))
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    model = torch.nn.Linear(2, 2)
    place = SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr(model, "parameters", lambda: iter([place]))
    before = [generator.get_state() for generator in (*generators, torch.default_generator)]
    with evaluating(model):
        seed_generators(model)
        torch.rand(2, generator=generators[1])
        torch.rand(2)
        assert torch.equal(generators[0].get_state(), before[0])
        assert generators[1].initial_seed() == 0
    after = [generator.get_state() for generator in (*generators, torch.default_generator)]
    assert all(map(torch.equal, after, before))


def test_own_errors_are_told_from_crashes() -> None:
    def refuse(model: Any, config: Any) -> Any:
        return fastprefix.attach(model, 3)  # type: ignore[arg-type]

    def crash(model: Any, config: Any) -> Any:
        return model.nothing_of_the_kind

    assert check(llama(), PREFIX, refuse).findings[0].verdict == "refused"
    conformance.forget_reports()
    assert check(llama(), PREFIX, crash).findings[0].verdict == "fails"


@pytest.mark.parametrize("place", range(2))
@pytest.mark.parametrize("kind", ["values", "gradients"])
@pytest.mark.parametrize("side", ["actual", "expected"])
def test_nan_in_any_tensor_is_an_error(side: str, kind: str, place: int) -> None:
    def make(which: str) -> Any:
        numbers = conformance._Numbers(*([torch.ones(2), torch.ones(3)] for _ in range(2)))
        if which == side:
            getattr(numbers, kind)[place][1] = torch.nan
        return numbers

    assert conformance._compare(make("actual"), make("expected")) == (torch.inf, kind)


def test_a_textbook_that_overflows_excuses_no_error_of_rounding() -> None:
    lost = conformance.Compared(torch.inf, "values")
    assert not conformance._is_close([(lost, lost)])


# Planted faults: of values and gradients


def test_hooks_that_forward_bypasses() -> None:
    def bypass(model: Any) -> None:
        def bare(*args: Any, **kwargs: Any) -> Any:
            with fastprefix.disable_adapter(model):
                return type(model).forward(model, *args, **kwargs)

        vars(model)["forward"] = bare

    assert "forward called directly" in planted(bert(), PREFIX, bypass, "forward called directly")


def test_a_prompt_that_is_lost_in_some_calls() -> None:
    def lose(model: Any) -> None:
        change_arguments(model, lambda given: given.pop("token_type_ids", None))

    assert planted(bert(), PROMPT, lose, "ids", "token types") == {"token types"}


def test_boxes_that_are_lost() -> None:
    model = built("layoutlm", "LayoutLMModel")

    def lose(model: Any) -> None:
        change_arguments(model, lambda given: given.pop("bbox", None))

    assert "boxes" in planted(model, PREFIX, lose, "boxes")


def test_a_cache_whose_length_is_wrong() -> None:
    def lengthen(model: Any) -> None:
        def longer(given: dict[str, Any]) -> None:
            cache: Any = find_cache(given)
            if cache is not None and cache.get_seq_length() > 0:
                past, tokens = int(cache.get_seq_length()), given["input_ids"].shape[1]
                given["position_ids"] = torch.arange(past, past + tokens)[None] + 1

        change_arguments(model, longer)

    names = ("ids", "a cached continuation", "a static cache", "a copied cache", "a second turn of generation")
    assert planted(llama(), PREFIX, lengthen, *names) == set(names) - {"ids"}


def test_a_cache_that_loses_what_it_carries_when_copied() -> None:
    def keep_by_identity(model: Any) -> None:
        known: set[int] = set()

        def forget_copies(given: dict[str, Any]) -> None:
            cache: Any = find_cache(given)
            if cache is None or cache.get_seq_length() == 0:
                return
            if id(cache) not in known:
                for layer in cache.layers:
                    layer.keys = layer.keys * 0.5

        def remember(module: nn.Module, args: Any, output: Any) -> None:
            known.add(id(output.get("past_key_values", output.get("cache"))))

        change_arguments(model, forget_copies)
        model.register_forward_hook(remember)

    names = ("a cached continuation", "a copied cache")
    assert planted(llama(), PREFIX, keep_by_identity, *names) == {"a copied cache"}


def test_gates_that_are_pooled_from_the_last_row_of_the_mask() -> None:
    def see_a_window(model: Any) -> None:
        def cut(given: dict[str, Any]) -> None:
            mask = given.get("attention_mask")
            if mask is not None:
                given["attention_mask"] = mask & torch.ones_like(mask).triu(-2).tril(2)

        change_attention(model, cut)

    config = fastprefix.APTConfig(5, pooling="cls")
    assert planted(bert(), config, see_a_window, "left padding") == {"left padding"}


def test_a_prompt_that_is_rotated_by_the_short_factors() -> None:
    model = built("phi3", "Phi3ForCausalLM")

    def forget_length(model: Any) -> None:
        rotary = model.model.rotary_emb
        own = type(rotary).forward
        vars(rotary)["forward"] = lambda x, position_ids: own(rotary, x, position_ids[:, :1] * 0 + position_ids % 16)

    assert "long inputs" in planted(model, PROMPT, forget_length, "long inputs")
    assert "ids" not in planted(model, PROMPT, forget_length, "ids")


def test_a_window_that_does_not_cut_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("mistral", "MistralForCausalLM")
    monkeypatch.setattr(shared_prompt.SharedBinding, "get_bias", lambda self, query: None)
    monkeypatch.setattr(attachment, "find_reason_not_shareable", lambda model: None)
    wrong = {finding.situation for finding in check(model, PROMPT, unchecked, ["ids", "long inputs"]).wrong}
    assert wrong == {"ids", "long inputs"}


def test_checkpointing_that_loses_gradients() -> None:
    def cut_off(model: Any) -> None:
        def detach(given: dict[str, Any]) -> None:
            if model.training:
                given["hidden_states"] = given["hidden_states"].detach()

        change_attention(model, detach)

    names = ("gradient checkpointing", "reentrant gradient checkpointing")
    assert planted(llama(), PREFIX, cut_off, "ids", *names) == set(names)


def test_embeddings_that_get_no_prompt() -> None:
    def lose(model: Any) -> None:
        own = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("inputs_embeds") is None:
                return own(*args, **kwargs)
            with fastprefix.disable_adapter(model):
                return own(*args, **kwargs)

        vars(model)["forward"] = forward

    assert planted(llama(), PROMPT, lose, "ids", "inputs_embeds") == {"inputs_embeds"}


def test_positions_in_time_and_space_that_are_lost() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    config = AutoConfig.for_model("qwen2_vl")
    config.text_config.rope_parameters = rope
    model = make_small_copy(config, transformers.Qwen2VLForConditionalGeneration)

    def flatten(model: Any) -> None:
        def flat(given: dict[str, Any]) -> None:
            if given.get("position_ids") is not None:
                given["position_ids"] = given["position_ids"][..., :1, :, :].expand(3, -1, -1)

        change_arguments(model.model.language_model, flat)

    assert planted(model, PREFIX, flatten, "ids", "three-dimensional positions") == {"three-dimensional positions"}


def test_hidden_states_that_keep_the_prompts_rows() -> None:
    def keep(model: Any) -> None:
        def more(module: nn.Module, args: Any, output: Any) -> Any:
            if getattr(output, "hidden_states", None):
                output["hidden_states"] = tuple(nn.functional.pad(h, (0, 0, 5, 0)) for h in output["hidden_states"])
            return output

        model.register_forward_hook(more)

    assert planted(bert(), PREFIX, keep, "ids", "hidden states") == {"hidden states"}


def test_a_pooler_that_pools_the_prompt() -> None:
    def pool(model: Any) -> None:
        model.pooler.register_forward_pre_hook(lambda module, args: (args[0].roll(1, dims=1), *args[1:]))

    assert planted(bert(), PREFIX, pool, "ids") == {"ids"}


def test_autocast_that_is_left_out() -> None:
    def double_states(model: Any) -> None:
        def double(given: dict[str, Any]) -> None:
            if torch.is_autocast_enabled("cpu"):
                given["hidden_states"] = given["hidden_states"] * 2

        change_attention(model, double)

    assert planted(bert(), PREFIX, double_states, "ids", "autocast") == {"autocast"}


def test_beams_that_are_not_reordered() -> None:
    def stay(model: Any) -> None:
        def keep_order(given: dict[str, Any]) -> None:
            cache: Any = find_cache(given)
            if cache is not None:
                vars(cache)["reorder_cache"] = lambda beam_idx: None

        change_arguments(model, keep_order)

    assert planted(llama(), PREFIX, stay, "beam search") == {"beam search"}
