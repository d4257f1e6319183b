"""Train, save and generate with DeepSpeed in all processes of ``torchrun``, and compare with one process.

``test_deepspeed`` runs ``python -m tests.integrations.transformers.deepspeed_training FILE``. The first process writes
the largest differences of each case to FILE.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file
from torch import distributed

import fastprefix

from ... import models
from .sharded_cells import METHODS

CASES = [
    *[(3, method, "") for method in ("prefix", "prefix-mlp", "apt", "llama-adapter", "prompt", "adept")],
    *[(3, method, "checkpointing") for method in ("prefix-mlp", "prompt")],
    *[(2, method, "") for method in ("prefix", "prompt")],
]
"""The stage of ZeRO, the method, and the kind of gradient checkpointing."""
STEPS, ROWS, TOKENS, RATE, DECAY = 3, 4, 7, 1e-2, 0.01


def make(method: str) -> Any:
    """A model in float32 with an adapter, the same everywhere."""
    model = fastprefix.attach(models.decoder().float(), METHODS[method]())
    models.randomize(model)
    return model


def run_case(stage: int, method: str, kind: str, folder: Path) -> dict[str, float]:
    """Return how far losses, files and generated tokens are from those of one process."""
    size, rank = distributed.get_world_size(), distributed.get_rank()
    plain, model = make(method), make(method)
    if kind:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": ROWS // size,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": DECAY, "torch_adam": True}},
        },
    )[0]
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    errors = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, models.VOCABULARY, (ROWS, TOKENS), generator=generator)
        weights = torch.randn(*ids.shape, models.VOCABULARY, generator=generator)
        loss = (engine(input_ids=ids.chunk(size)[rank]).logits * weights.chunk(size)[rank]).mean()
        engine.backward(loss)
        engine.step()
        expected = (plain(input_ids=ids).logits * weights).mean()
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        errors.append(abs(float(total) / size - float(expected.detach())))
    fastprefix.save_adapter(model, folder)
    distributed.barrier()
    saved = load_file(folder / "adapter_model.safetensors")
    state = plain.fastprefix.state_dict()
    assert saved.keys() == state.keys()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    generated = engine.module.eval().generate(ids[:2], synced_gpus=stage == 3, **options)
    return {
        "loss": max(errors),
        "saved": max(float((saved[name] - state[name]).abs().max()) for name in saved),
        "generated": float((generated != plain.eval().generate(ids[:2], **options)).sum()),
    }


def main(file: str) -> None:
    """Run all cases."""
    deepspeed.init_distributed(dist_backend="gloo")
    names: list[Any] = [tempfile.mkdtemp() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(names)
    results = {}
    for number, case in enumerate(CASES):
        results[" ".join(map(str, case)).strip()] = run_case(*case, Path(names[0]) / str(number))
    refused = make("prefix")
    engine = deepspeed.initialize(
        model=refused,
        model_parameters=refused.fastprefix.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        },
    )[0]
    try:
        fastprefix.detach(engine.module)
    except ValueError as error:
        results["refused"] = str(error)
    if distributed.get_rank() == 0:
        Path(file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
