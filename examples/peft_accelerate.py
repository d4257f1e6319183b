"""Accelerate a PEFT script with one line: prefix tuning of a small decoder, with gradient checkpointing.

Run it with ``python examples/peft_accelerate.py``. The script builds a tiny random model, and works the same with a
pretrained model. The model learns a fixed sentence, first with PEFT alone, then accelerated.
"""

import time
from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fastprefix


def tuned() -> Any:
    """Return a frozen decoder with a trainable prefix of PEFT."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, vocab_size=1000
    )
    return get_peft_model(LlamaForCausalLM(config), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=100))


def train(model: Any, ids: torch.Tensor, steps: int = 10) -> tuple[float, float]:
    """Train the model, and return the last loss and the time in seconds."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    start = time.perf_counter()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), time.perf_counter() - start


def main() -> None:
    """Train the same model in three ways."""
    ids = torch.randint(0, 1000, (1, 64), generator=torch.Generator().manual_seed(1)).expand(16, -1)
    print("PEFT alone:                  loss {:.4f} after {:.2f} s".format(*train(tuned(), ids)))

    model = tuned()
    fastprefix.accelerate(model)  # the one line
    print("accelerated:                 loss {:.4f} after {:.2f} s".format(*train(model, ids)))

    model = fastprefix.accelerate(tuned())
    model.gradient_checkpointing_enable()  # PEFT alone raises an error here
    print("accelerated, checkpointing:  loss {:.4f} after {:.2f} s".format(*train(model.train(), ids)))


if __name__ == "__main__":
    main()
