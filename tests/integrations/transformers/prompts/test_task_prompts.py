"""Test the prompts of several tasks, run once for the batch, against the same prompts in every row."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

import fastprefix
from fastprefix.integrations.transformers.prompts import shared_prompt

from .... import models
from ....float64 import Float64
from ..test_attach import assert_same, loss_and_gradients
from .test_shared_prompt import EAGER, GROUPED, SHARING, WINDOWED

TASKS = torch.tensor([1, 0, 1])
LONG = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    **{name: SHARING[name] for name in ("qwen2", "roberta", "gpt2")},
    **{f"window-{name}": WINDOWED[name] for name in ("mistral", "gemma3")},
    "dynamic": lambda: LlamaConfig(**GROUPED, rope_parameters=LONG, max_position_embeddings=9),
}


def on_path(make: Callable[[], PretrainedConfig], shared: bool | None = None, tasks: int = 2) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make(), **EAGER).double().eval()
    config = fastprefix.MultitaskPromptConfig(5, num_tasks=tasks, rank=2, shared_prompt=shared)
    fastprefix.attach(model, config, check=False)
    models.randomize(model, 1.0)
    return model


@pytest.fixture
def float64() -> Iterator[None]:
    """Round nothing to float32."""
    with Float64():
        yield


def paths(make: Callable[[], PretrainedConfig] = SHARING["qwen2"]) -> tuple[Any, Any]:
    """Return the same model and prompts, shared and in every row."""
    return on_path(make), on_path(make, False)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.usefixtures("float64")
def test_sharing_is_the_default_and_changes_nothing(family: str, padding: str) -> None:
    inputs = {**models.batch(padding), "task_ids": TASKS}
    rows = inputs["attention_mask"].bool()
    shared, textbook = paths(CONFIGS[family])
    assert_same(*(loss_and_gradients(model, inputs, rows) for model in (shared, textbook)))
    assert shared.fastprefix.prompt_path == "shared"
    assert textbook.fastprefix.prompt_path == "textbook: shared_prompt=False"


def test_the_check_agrees() -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.MultitaskPromptConfig(5, num_tasks=3))
    assert model.fastprefix.prompt_path == "shared"


def generated(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(3)
    defaults = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens: Tensor = model.generate(**models.batch("left"), task_ids=TASKS, **{**defaults, **options})
    return tokens


@pytest.mark.parametrize("family", ["qwen2", "window-gemma3"])
@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_generation_is_the_textbooks(family: str) -> None:
    """Greedy, sampled and beam search, with growing, static and no caches."""
    shared, textbook = paths(CONFIGS[family])
    for search in ({}, {"do_sample": True}, {"num_beams": 3}):
        expected = generated(textbook, **search)
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(generated(shared, **search, **cache), expected), (search, cache)


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_the_tasks_belong_to_the_cache() -> None:
    shared, textbook = paths()
    ids = models.batch()["input_ids"]
    expected = textbook(input_ids=ids, task_ids=TASKS, use_cache=False).logits
    cache = shared(input_ids=ids[:, :4], task_ids=TASKS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"`task_ids` must be the tasks of `past_key_values`, \[1, 0, 1\], but are"):
        shared(input_ids=ids[:, 4:], past_key_values=cache, task_ids=torch.ones_like(TASKS))
    copied = copy.deepcopy(cache)
    copied.reorder_cache(torch.tensor([1, 0, 2]))
    logits = shared(input_ids=ids[[1, 0, 2], 4:], past_key_values=copied).logits
    torch.testing.assert_close(logits, expected[[1, 0, 2], 4:], rtol=1e-10, atol=1e-10)
    logits = shared(input_ids=ids[:, 4:], past_key_values=cache, task_ids=TASKS).logits
    torch.testing.assert_close(logits, expected[:, 4:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_have_the_tasks_of_their_own_call(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        config, inputs = fastprefix.MultitaskPromptConfig(5, num_tasks=2, rank=2), models.batch()
        model = fastprefix.attach(models.decoder(), config, check=False).train()
        models.randomize(model, 1.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        losses = [model(**inputs, task_ids=tasks).logits.square().mean() for tasks in (TASKS, 1 - TASKS)]
        (losses[0] + 3.0 * losses[1]).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        fastprefix.detach(model)
        assert not any(hasattr(module, "_fastprefix_watched") for module in model.modules())
    assert_same(*found)


def test_prompts_run_once_and_are_kept_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, rows = on_path(SHARING["qwen2"], tasks=2), models.batch(), []
    run_alone = shared_prompt.SharedPromptHooks.run_alone

    def count(hooks: Any, prompt: Tensor, **arguments: Any) -> Any:
        rows.append(tuple(prompt.shape[:2]))
        return run_alone(hooks, prompt, **arguments)

    monkeypatch.setattr(shared_prompt.SharedPromptHooks, "run_alone", count)
    with torch.no_grad():
        first = model(**inputs, task_ids=TASKS).logits
        other = model(**inputs, task_ids=1 - TASKS).logits
        assert rows == [(2, 5)]
        model.fastprefix.columns.data.mul_(2.0)
        assert not torch.allclose(model(**inputs, task_ids=TASKS).logits, first)
        assert not torch.allclose(first, other)
    assert rows == [(2, 5)] * 2


def test_more_tasks_than_rows_are_trained_in_every_row() -> None:
    model, inputs = on_path(SHARING["qwen2"], tasks=4), models.batch()
    model(**inputs, task_ids=TASKS)
    assert model.fastprefix.prompt_path == "textbook: the batch has fewer rows than tasks"
    with torch.no_grad():
        model(**inputs, task_ids=TASKS)
    assert model.fastprefix.prompt_path == "shared"
    required = on_path(SHARING["qwen2"], True, tasks=4)
    required(**inputs, task_ids=TASKS).logits.sum().backward()
    assert required.fastprefix.prompt_path == "shared"


def test_compiles_without_graph_breaks() -> None:
    model, inputs = on_path(WINDOWED["gemma3"]), {**models.batch("left"), "task_ids": TASKS}
    rows = inputs["attention_mask"].bool()
    expected = loss_and_gradients(model, inputs, rows)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert_same(loss_and_gradients(model, inputs, rows), expected)


def test_copies_have_their_own() -> None:
    model, inputs = on_path(SHARING["qwen2"]), models.batch()
    expected = model(**inputs, task_ids=TASKS).logits
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.fastprefix.shared.zero_()
    assert torch.equal(copied(**inputs, task_ids=TASKS).logits, expected)


def test_not_beside_others_in_a_batch_and_not_merged() -> None:
    model = on_path(SHARING["qwen2"])
    with pytest.raises(ValueError, match="it has a prompt for each of several tasks"):
        model(**models.batch(), adapter_names=["default", "__base__", "default"])
    with pytest.raises(ValueError, match="`num_tasks` must be 1 to merge the prompt, but is 2"):
        fastprefix.merge(model)


@torch.no_grad()
def test_exported() -> None:
    model = fastprefix.attach(models.decoder(), fastprefix.MultitaskPromptConfig(5, num_tasks=2, rank=2), check=False)
    models.randomize(model, 1.0)
    inputs = {**models.batch("left"), "task_ids": TASKS, "use_cache": False}
    program = torch.export.export(model, (), inputs, strict=False)
    other = {**inputs, "task_ids": 1 - TASKS}
    torch.testing.assert_close(program.module()(**other).logits, model(**other).logits)
