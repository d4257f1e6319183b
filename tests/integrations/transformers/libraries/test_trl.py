"""Test TRL's trainers on a model with an adapter: losses computed by hand, and the reference of DPO."""

import copy
import importlib.util
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

import fastprefix

from .... import models
from ..test_attach import METHODS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
BETA = 0.1
ROWS = [[5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23, 24], [31, 32, 33, 34, 35, 36]]


def model(method: str, lora: bool = False) -> Any:
    """Return a model in float64 with a random adapter."""
    base: Any = models.decoder()
    if lora:
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        base = peft.get_peft_model(base, config).double()
    fastprefix.attach(base, METHODS[method](), check=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in base.fastprefix.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return base.eval()


def options(folder: Path, **others: Any) -> dict[str, Any]:
    found = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 2, "report_to": []}
    found |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "bf16": False, "logging_steps": 1}
    return {**found, "gradient_checkpointing": False, **others}


def log_probabilities(of: Any, row: list[int]) -> Tensor:
    """Return the log-probabilities of all tokens of a row except the first."""
    logits = of(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(row[1:])[:, None])[:, 0]


@pytest.mark.parametrize("packing", [False, True], ids=["completion only", "packed"])
@pytest.mark.parametrize("method", ["prefix", "prompt_tuning", "adept"])
def test_sft(method: str, packing: bool, tmp_path: Path) -> None:
    """Every sequence of a packed batch attends only to the prefix and to itself."""
    from trl import SFTConfig, SFTTrainer

    of = model(method)
    rows: list[dict[str, Any]] = [{"input_ids": row} for row in ROWS]
    if not packing:
        rows = [{"input_ids": row, "completion_mask": [0] * (len(row) - 2) + [1, 1]} for row in ROWS]
    config = SFTConfig(
        **options(tmp_path), packing=packing, max_length=32, completion_only_loss=not packing, padding_free=packing
    )
    trainer = SFTTrainer(of, args=config, train_dataset=Dataset.from_list(rows), processing_class=models.tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("position_ids" in batch) == packing
    assert len(batch["input_ids"]) == (1 if packing else 4)
    loss = trainer.compute_loss(of, dict(batch), num_items_in_batch=None)
    expected = torch.cat([log_probabilities(of, row)[slice(None) if packing else slice(-2, None)] for row in ROWS])
    torch.testing.assert_close(loss.double(), -expected.mean(), rtol=1e-5, atol=1e-6)  # TRL adds in float32


@pytest.mark.parametrize("lora", [False, True], ids=["alone", "with LoRA"])
@pytest.mark.parametrize("method", ["prefix", "prompt_tuning"])
def test_dpo_against_the_model_without_its_adapters(method: str, lora: bool, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    plain = copy.deepcopy(models.decoder())
    of = model(method, lora)
    before = {name for name, p in of.named_parameters() if p.requires_grad}
    reference = fastprefix.ReferenceModel(of)
    assert not list(reference.parameters())
    rows = [{"prompt": "w5", "chosen": " w6", "rejected": " w7"}, {"prompt": "w8", "chosen": " w9", "rejected": " w10"}]
    config = DPOConfig(**options(tmp_path), beta=BETA)
    trainer = DPOTrainer(
        of, reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=models.tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(of, dict(batch))
    assert {name for name, p in of.named_parameters() if p.requires_grad} == before
    losses = []
    for prompt, chosen, rejected in ((5, 6, 7), (8, 9, 10)):
        ratios = [
            (log_probabilities(of, [prompt, answer, 2]) - log_probabilities(plain, [prompt, answer, 2])).sum()
            for answer in (chosen, rejected)
        ]
        losses.append(-F.logsigmoid(BETA * (ratios[0] - ratios[1])))
    torch.testing.assert_close(loss.double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    trainer.train()


@pytest.mark.parametrize("method", ["prefix", "apt", "prompt_tuning"])
def test_grpo_generates_while_it_trains(method: str, tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    of = model(method).float()
    base = {name: p.clone() for name, p in of.named_parameters() if not p.requires_grad}
    own = {name: p.clone() for name, p in of.named_parameters() if p.requires_grad}
    seen: list[str] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [float(sum(map(ord, completion)) % 7) for completion in completions]

    config = GRPOConfig(**options(tmp_path), num_generations=4, max_completion_length=3, beta=0.0, learning_rate=0.1)
    rows = Dataset.from_list([{"prompt": f"w{i}"} for i in range(5, 13)])
    trainer = GRPOTrainer(of, args=config, train_dataset=rows, processing_class=models.tokenizer(), reward_funcs=reward)
    trainer.train()
    assert len(seen) == 8
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    named = dict(of.named_parameters())
    assert all(torch.equal(p, named[name]) for name, p in base.items())
    assert not all(torch.equal(p, named[name]) for name, p in own.items())
