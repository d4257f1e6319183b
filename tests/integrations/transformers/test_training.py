"""Test training with Trainer, accelerate, autocast, compiled models and quantized bases."""

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fastprefix
from fastprefix.integrations.transformers.attachment import get_method

from ... import models
from .test_attach import FAMILIES, METHODS, assert_same, attached, loss_and_gradients

CHECKPOINTING = next(  # what transformers calls it
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in inspect.signature(TrainingArguments).parameters
)
SOME = ["prefix-mlp", "apt", "llama-adapter", "adept"]


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Reset ``accelerate``, which keeps the precision of the first run for all later runs of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def dataset(family: str, rows: int = 12) -> list[dict[str, Tensor]]:
    """Return rows of seven tokens, some of them padded, with labels."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, models.VOCABULARY, (rows, 7), generator=generator)
    mask = (torch.arange(7) < torch.randint(3, 8, (rows, 1), generator=generator)).long()
    labels = (
        torch.randint(0, 2, (rows,), generator=generator) if family == "encoder" else ids.masked_fill(mask == 0, -100)
    )
    return [{"input_ids": ids[i], "attention_mask": mask[i], "labels": labels[i]} for i in range(rows)]


def trainer(model: Any, family: str, folder: Path, **options: Any) -> Trainer:
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 0.01,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    rows = dataset(family)
    return Trainer(model, TrainingArguments(str(folder), **arguments), train_dataset=rows, eval_dataset=rows)


def fresh(family: str, method: str) -> Any:
    torch.manual_seed(0)
    return fastprefix.attach(FAMILIES[family]().float(), METHODS[method]())


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(of: Trainer) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


class Stop(TrainerCallback):
    """A callback that ends the training after three steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("method", SOME)
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_trains_saves_and_resumes(family: str, method: str, tmp_path: Path) -> None:
    """Resumed training ends like uninterrupted training, and the frozen model does not change."""
    whole = trainer(fresh(family, method), family, tmp_path / "whole")
    before = {name: p.clone() for name, p in whole.model.named_parameters() if not p.requires_grad}
    whole.train()
    assert len(losses(whole)) == 6
    named = dict(whole.model.named_parameters())
    assert all(torch.equal(p, named[name]) for name, p in before.items())
    stopped = trainer(fresh(family, method), family, tmp_path / "parts")
    stopped.add_callback(Stop())
    stopped.train()
    resumed = trainer(fresh(family, method), family, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert_same(trained(resumed.model), trained(whole.model))
    assert losses(resumed) == losses(whole)


@pytest.mark.sampled(every=3)
# Accumulation is tried on a decoder: classifiers ignore the number of items that Trainer gives to their loss.
@pytest.mark.parametrize("method", SOME)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("encoder", {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}),
        ("encoder", {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}),
        ("decoder", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ],
    ids=["checkpointing", "reentrant", "accumulation"],
)
def test_trainer_options_change_nothing(family: str, options: dict[str, Any], method: str, tmp_path: Path) -> None:
    results = []
    for more in ({}, options):
        of = trainer(fresh(family, method), family, tmp_path, save_strategy="no", **more)
        of.train()
        results.append(trained(of.model))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", SOME)
def test_trainer_with_bf16(method: str, tmp_path: Path) -> None:
    model = fresh("decoder", method)
    of = trainer(model, "decoder", tmp_path, save_strategy="no", bf16=True, max_steps=15, learning_rate=0.03)
    of.train()
    assert sum(losses(of)[-3:]) < sum(losses(of)[:3])  # an epoch is three steps
    assert {p.dtype for p in get_method(model).parameters()} == {torch.float32}


@pytest.mark.parametrize("method", SOME)
def test_accelerate_loop(method: str) -> None:
    """A user's own training loop has the same result with and without ``accelerate``."""
    results = []
    for accelerates in (False, True):
        model = fresh("encoder", method)
        optimizer = torch.optim.AdamW(fastprefix.parameter_groups(model, lr=0.01, prompt_lr=0.3))
        loader = DataLoader(dataset("encoder"), batch_size=4)
        backward: Callable[[Tensor], None] = torch.Tensor.backward
        if accelerates:
            accelerator = Accelerator(cpu=True)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            backward = accelerator.backward
        for inputs in loader:
            optimizer.zero_grad()
            backward(model(**inputs).loss)
            optimizer.step()
        results.append(trained(model))
    assert_same(results[1], results[0])


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str, method: str, dtype: torch.dtype) -> None:
    """Parameters and gradients remain float32, and values are close."""
    model, inputs = attached(family, method).float(), models.batch("right")
    exact = model(**inputs).logits
    with torch.autocast("cpu", dtype=dtype):
        logits = model(**inputs).logits
    assert logits.dtype is dtype
    logits.float().sum().backward()
    for parameter in get_method(model).parameters():
        assert parameter.dtype is torch.float32
        assert parameter.grad.dtype is torch.float32
        assert parameter.grad.isfinite().all()
    assert (logits - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("encoder", "prefix-mlp"),
        ("encoder", "adept"),
        ("decoder", "apt"),
        ("decoder", "apt-cls"),
        ("decoder", "llama-adapter"),
        ("decoder", "adept"),
    ],
)
def test_compiled_as_a_whole(family: str, method: str) -> None:
    """One graph gives the same values and gradients."""
    model, inputs = attached(family, method, layers=1), models.batch("right")
    rows = inputs["attention_mask"].bool()
    expected = loss_and_gradients(model, inputs, rows)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert_same(loss_and_gradients(model, inputs, rows), expected)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", SOME)
def test_quantized_base(method: str, bits: int, tmp_path: Path) -> None:
    """A base of 4 or 8 bits does not change, and the adapter learns."""
    wide = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=models.VOCABULARY
    )
    LlamaForCausalLM(wide).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    for module in model.modules():  # on some CPUs, what was once evaluated is packed for inference and cannot train
        module.support_avx512bf16_for_cpu = False
    fastprefix.attach(model, METHODS[method]())
    models.randomize(model)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    of = trainer(model, "decoder", tmp_path, save_strategy="no", max_steps=9, learning_rate=0.03)
    of.train()
    assert sum(losses(of)[-3:]) < sum(losses(of)[:3])
    named = dict(model.named_parameters())
    assert all(torch.equal(p, named[name]) for name, p in before.items())
    assert fastprefix.detach(model).is_quantized
