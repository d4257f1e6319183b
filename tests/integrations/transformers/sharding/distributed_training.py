"""Train a few steps in all processes of ``torchrun``, with each wrapper, and in the first process alone.

``test_distributed`` runs ``python -m tests.integrations.transformers.sharding.distributed_training FILE``. The first
process writes the results of all cases to FILE: those of each wrapper, and those of one process.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastprefix
from fastprefix.integrations.transformers.sharding.tensor_parallel import gather_full_tensor

from .... import models
from ..test_attach import METHODS, attached

STEPS, ROWS = 3, 4
CASES = [
    *[("encoder", method, "") for method in METHODS],
    *[("decoder", method, "") for method in ("prefix-mlp", "apt", "llama-adapter", "adept")],
    *[("encoder", "prefix-mlp", kind) for kind in ("checkpointing", "reentrant")],
]
"""Family, method, and the kind of gradient checkpointing."""


def shard(model: Any) -> nn.Module:
    """Shard the layers one by one with FSDP2, and the embedding separately."""
    layers = model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers
    for module in (*layers, model.get_input_embeddings()):
        fully_shard(module)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[Any], Any]] = {"ddp": DistributedDataParallel, "fsdp2": shard}


def train(family: str, method: str, kind: str, wrap: Callable[[Any], Any] | None) -> dict[str, Tensor]:
    """Return the losses, the trained parameters and the saved adapter. None trains on all rows in this process."""
    model = attached(family, method).train()
    if kind:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
    wrapped = model if wrap is None else wrap(model)
    processes, rank = (1, 0) if wrap is None else (distributed.get_world_size(), distributed.get_rank())
    optimizer = torch.optim.AdamW(fastprefix.parameter_groups(model, lr=0.01, prompt_lr=0.1))
    generator, losses = torch.Generator().manual_seed(7), []
    for _ in range(STEPS):
        ids = torch.randint(3, models.VOCABULARY, (ROWS, 7), generator=generator)
        mask = (torch.arange(7) < torch.tensor([7, 5, 6, 7])[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2 if family == "encoder" else ids}
        loss = wrapped(**{name: tensor.chunk(processes)[rank] for name, tensor in inputs.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if wrap is not None:
            distributed.all_reduce(total)
        losses.append(total / processes)
    parameters = {name: gather_full_tensor(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        fastprefix.save_adapter(model, folder)
        file = Path(folder) / "adapter_model.safetensors"  # of a sharded model, the first process writes
        saved = load_file(file) if file.exists() else {}
    return {"losses": torch.stack(losses), **parameters, **{f"saved {name}": tensor for name, tensor in saved.items()}}


def main(file: str) -> None:
    """Train all cases."""
    distributed.init_process_group("gloo")
    results = {mode: {case: train(*case, wrap) for case in CASES} for mode, wrap in WRAPPERS.items()}
    if distributed.get_rank() == 0:
        alone = {case: train(*case, None) for case in CASES}
        torch.save((results, alone), file)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
