"""Test PEFT's multitask prompts: accelerated, and as files in both directions."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastprefix

from ... import models, peft_support
from .test_accelerate import LENGTH, assert_same, evaluated
from .test_adapters import assert_close

pytestmark = pytest.mark.peft
TASKS = {"mixed": torch.tensor([2, 0, 2]), "one": torch.tensor([1, 1, 1])}


def tuned() -> Any:
    torch.manual_seed(0)
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_tasks=3, num_ranks=2
    )
    model = peft.get_peft_model(models.decoder(), config).double().eval()
    models.randomize(model, 1.0)
    return model


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_accelerated_multitask_prompts_are_pefts(tasks: str, padding: str) -> None:
    inputs = {**models.batch(padding), "task_ids": TASKS[tasks]}
    model = tuned()
    expected = evaluated(model, inputs)
    fastprefix.accelerate(model)
    assert model.fastprefix.prompt_path == "shared"
    assert_same(evaluated(model, inputs), expected)
    fastprefix.decelerate(model)
    fastprefix.accelerate(model, check=False)
    assert_same(evaluated(model, inputs), expected)


@pytest.mark.parametrize("tasks", TASKS)
def test_accelerated_generation_is_pefts(tasks: str) -> None:
    peft_support.require(peft_support.generation)
    model, options = tuned(), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    inputs = {**models.batch("left"), "task_ids": TASKS[tasks]}
    expected = model.generate(**inputs, **options)
    assert torch.equal(fastprefix.accelerate(model, check=False).generate(**inputs, **options), expected)


def test_files_in_both_directions(tmp_path: Path) -> None:
    inputs, theirs = {**models.batch("right"), "task_ids": TASKS["mixed"]}, tuned()
    theirs.save_pretrained(tmp_path / "peft")
    expected = theirs(**inputs).logits[:, LENGTH:]
    model = fastprefix.load_adapter(models.decoder(), tmp_path / "peft")
    assert (model.fastprefix.config.num_tasks, model.fastprefix.config.rank) == (3, 2)
    assert_close(model(**inputs).logits, expected)
    fastprefix.save_adapter(model, tmp_path / "own", format="peft")
    loaded = peft.PeftModel.from_pretrained(models.decoder(), tmp_path / "own").double().eval()
    assert_close(loaded(**inputs).logits[:, LENGTH:], expected)
    config = fastprefix.MultitaskPromptConfig(LENGTH, num_tasks=1, rank=2, source=str(tmp_path / "peft"))
    average = fastprefix.attach(models.decoder(), config, check=False).fastprefix
    assert_close(average.columns[0], theirs.prompt_encoder["default"].prefix_task_cols.mean(0))


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "prefix_task_cols": tensors["prefix_task_cols"][:2].contiguous()}, path)
    with pytest.raises(ValueError, match="must have matching shapes"):
        fastprefix.load_adapter(models.decoder(), tmp_path)
