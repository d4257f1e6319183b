"""Test multitask prompts on models, where each row has the prompt of its task: calls, generation, training, files."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

import fastprefix

from .... import models
from ..test_attach import FAMILIES, assert_same, loss_and_gradients

TASKS = torch.tensor([1, 0, 1])
GENERATE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def attached(family: str = "decoder", tasks: int = 2, **options: Any) -> Any:
    config = fastprefix.MultitaskPromptConfig(4, num_tasks=tasks, rank=2, **options)
    model = fastprefix.attach(FAMILIES[family](), config)
    models.randomize(model, 1.0)
    return model


def set_plain_prompt(model: Any, task: int) -> Any:
    """Return the same model with one task's prompt as a plain prompt."""
    method = model.fastprefix
    prompt = method.shared * (method.columns[task] @ method.rows[task])
    plain = fastprefix.attach(FAMILIES["decoder"](), fastprefix.PromptTuningConfig(4), check=False)
    plain.fastprefix.prompt.data = prompt.detach()
    return plain


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_have_the_prompts_of_their_tasks(family: str, padding: str) -> None:
    """Values and gradients of a batch equal those of its rows alone."""
    model, inputs = attached(family), models.batch(padding)
    rows = inputs["attention_mask"].bool()
    actual = loss_and_gradients(model, {**inputs, "task_ids": TASKS}, rows)
    method, plain = model.fastprefix, FAMILIES[family]().requires_grad_(False)
    if family == "encoder":
        plain.classifier.load_state_dict(model.classifier.state_dict())
    prompts = torch.stack([method.shared * (method.columns[k] @ method.rows[k]) for k in TASKS.tolist()])
    embeds = torch.cat([prompts, plain.get_input_embeddings()(inputs["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(3, 4, dtype=torch.long), inputs["attention_mask"]], dim=1)
    hidden = plain.base_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, 4:]
    logits = plain.classifier(plain.base_model.pooler(hidden)) if family == "encoder" else plain.lm_head(hidden)[rows]
    weights = torch.arange(logits.numel(), dtype=logits.dtype).cos().reshape(logits.shape)
    names, tensors = zip(*method.named_parameters(), strict=True)
    gradients = torch.autograd.grad((logits * weights).sum(), tensors)
    expected = {f"fastprefix.{name}": g for name, g in zip(names, gradients, strict=True)}
    assert_same({n: actual[n] for n in expected} | {"logits": actual["logits"]}, expected | {"logits": logits.detach()})


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_keeps_the_task_of_each_row(beams: int) -> None:
    model, inputs = attached(), models.batch("left")
    tokens = model.generate(**inputs, task_ids=TASKS, num_beams=beams, **GENERATE)
    for row, task in enumerate(TASKS.tolist()):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        expected = set_plain_prompt(model, task).generate(**alone, num_beams=beams, **GENERATE)
        assert torch.equal(tokens[row : row + 1], expected)


def test_an_encoder_decoder_generates_by_task() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    model: Any = T5ForConditionalGeneration(config).double().eval()
    model.generation_config.eos_token_id = None
    fastprefix.attach(model, fastprefix.MultitaskPromptConfig(4, num_tasks=2, shared_prompt=False), check=False)
    models.randomize(model, 1.5)
    inputs = models.batch("right")

    def run(tasks: Tensor) -> Tensor:
        logits: Tensor = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :2], task_ids=tasks).logits
        return logits

    both = run(torch.zeros_like(TASKS)), run(torch.ones_like(TASKS))
    assert (both[0] - both[1]).abs().max() > 1e-3
    mixed = torch.stack([both[int(task)][row] for row, task in enumerate(TASKS)])
    torch.testing.assert_close(run(TASKS), mixed, rtol=1e-10, atol=1e-10)
    each = [model.generate(**inputs, task_ids=torch.full_like(TASKS, k), **GENERATE) for k in (0, 1)]
    expected = torch.stack([each[int(task)][row] for row, task in enumerate(TASKS)])
    assert torch.equal(model.generate(**inputs, task_ids=TASKS, **GENERATE), expected)


def test_calls_without_tasks_are_refused_and_leave_nothing_behind() -> None:
    model, inputs = attached(), models.batch()
    with pytest.raises(ValueError, match="`task_ids` must be given"):
        model(**inputs)
    with pytest.raises(ValueError, match="`task_ids` must be from 0 to 1"):
        model(**inputs, task_ids=TASKS + 1)
    assert model.fastprefix.task_ids is None
    assert "task_ids" in inspect.signature(model.forward).parameters
    assert "task_ids" not in inspect.signature(fastprefix.detach(model).forward).parameters
    one = attached(tasks=1)
    assert one.fastprefix.prompt_path == "shared"
    assert torch.equal(one(**inputs).logits, one(**inputs, task_ids=torch.zeros_like(TASKS)).logits)
    with pytest.raises(ValueError, match="`num_tasks` must be 1"):
        fastprefix.merge(attached())


def test_trainer_keeps_the_column_of_tasks(tmp_path: Path) -> None:
    model = attached().float()
    rows = [{"input_ids": list(range(3, 9)), "labels": list(range(3, 9)), "task_ids": i % 2} for i in range(4)]
    options = {"report_to": [], "save_strategy": "no", "max_steps": 2, "use_cpu": True, "disable_tqdm": True}

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}

    before = model.fastprefix.columns.detach().clone()
    Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows, data_collator=collate).train()
    assert (model.fastprefix.columns != before).flatten(1).any(1).all()


def test_a_target_task_starts_from_source_tasks(tmp_path: Path) -> None:
    source, inputs = attached(), models.batch()
    fastprefix.save_adapter(source, tmp_path)
    loaded = fastprefix.load_adapter(models.decoder(), tmp_path)
    assert torch.allclose(loaded(**inputs, task_ids=TASKS).logits, source(**inputs, task_ids=TASKS).logits, atol=1e-5)
    config = fastprefix.MultitaskPromptConfig(
        4, num_tasks=1, rank=2, source=str(tmp_path), source_init="task", source_task=1
    )
    model = fastprefix.attach(models.decoder(), config, check=False)
    expected = set_plain_prompt(source, 1)(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileNotFoundError, match="`source`"):
        fastprefix.attach(models.decoder(), fastprefix.MultitaskPromptConfig(4, num_tasks=1, source="nowhere"))
    fastprefix.save_adapter(fastprefix.attach(models.decoder(), fastprefix.ULPTConfig(4), check=False), tmp_path)
    with pytest.raises(ValueError, match="`source` must be a directory with a multitask prompt"):
        fastprefix.attach(models.decoder(), config)
