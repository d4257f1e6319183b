"""Test LoRA and an adapter of this package on bases of 4 and 8 bits, which PEFT trains and merges."""

import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import fastprefix

from ... import models
from ..transformers.test_training import trained, trainer
from .test_lora import METHODS
from .test_lora_state import lora

pytestmark = [
    pytest.mark.peft,
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
]


def quantized(folder: Path, bits: int, **options: Any) -> Any:
    """Return a PEFT model with a quantized base."""
    torch.manual_seed(0)
    wide = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=models.VOCABULARY
    )
    LlamaForCausalLM(wide).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    for module in base.modules():  # on some CPUs, what was once evaluated is packed for inference and cannot train
        module.support_avx512bf16_for_cpu = False
    return peft.get_peft_model(base, lora(**options))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**models.batch("right")).logits
    return output


@pytest.mark.parametrize(("bits", "dora"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize("method", ["prefix", "adept"])
def test_both_are_trained(method: str, bits: int, dora: bool, tmp_path: Path) -> None:
    """PEFT itself does not train DoRA on a base of 8 bits."""
    model = quantized(tmp_path, bits, use_dora=dora, init_lora_weights=True)
    fastprefix.attach(model, METHODS[method](), check=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    of = trainer(model, "decoder", tmp_path, save_strategy="no", max_steps=9, learning_rate=0.03)
    of.train()
    losses = [entry["loss"] for entry in of.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained(model).keys()
    assert {"lora" in name for name in changed} == {True, False}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("merged", [False, True], ids=["kept", "merged"])
def test_a_prompt_that_is_kept_notices_that_lora_is_merged(merged: bool, bits: int, tmp_path: Path) -> None:
    model = quantized(tmp_path, bits).eval()
    fastprefix.attach(model, fastprefix.PromptTuningConfig(4), freeze_peft=True, check=False)
    every_row = fastprefix.PromptTuningConfig(4, shared_prompt=False)
    fastprefix.attach(model, every_row, name="every row", freeze_peft=True, check=False)
    prompt = model.fastprefix.prompt.detach().clone()
    fastprefix.set_adapter(model, "default")
    with torch.no_grad():
        model.fastprefix.prompt.copy_(prompt)
    if merged:
        fastprefix.merge(model)
    former = logits(model)
    model.merge_adapter()
    actual = logits(model)
    assert not torch.equal(actual, former)
    fastprefix.set_adapter(model, "every row")
    torch.testing.assert_close(actual, logits(model), rtol=1e-3, atol=1e-4)
