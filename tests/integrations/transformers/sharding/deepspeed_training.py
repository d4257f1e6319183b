"""Train, save and generate with DeepSpeed in all processes of ``torchrun``, and compare with one process.

``test_deepspeed`` runs ``python -m tests.integrations.transformers.sharding.deepspeed_training FILE``. The first
process writes the largest differences of each case to FILE.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import fastprefix

from .... import models
from .sharded_cells import METHODS

CASES = [
    *[(3, method, "") for method in METHODS],
    *[(3, method, "checkpointing") for method in ("prefix-mlp", "prompt")],
    *[(3, method, "loaded") for method in ("prefix", "llama-adapter", "prompt", "adept")],
    *[(2, method, "") for method in ("prefix", "prompt")],
]
"""The stage of ZeRO, the method, and "checkpointing", or "loaded" for a model that was partitioned at load."""
ZERO = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
STEPS, ROWS, TOKENS, RATE, DECAY = 3, 4, 7, 1e-2, 0.01


def make(method: str, folder: Path | None = None) -> Any:
    """Return a model in float32 with the same adapter on all ranks. With a folder, the model is loaded partitioned."""
    model = models.decoder().float() if folder is None else load_partitioned(folder)
    torch.manual_seed(distributed.get_rank())
    fastprefix.attach(model, METHODS[method]())
    if folder is not None:
        check_start(model)
    models.randomize(model)
    return model


def load_partitioned(folder: Path) -> Any:
    """Return a model that is partitioned while it is loaded."""
    config = HfDeepSpeedConfig(ZERO)
    assert config.is_zero3()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def change(model: Any, folder: Path) -> dict[str, Tensor]:
    """Return the parameters of adapters that are composed, merged and loaded before an engine exists."""
    torch.manual_seed(0)
    for name in ("a", "b"):
        fastprefix.attach(model, fastprefix.CartridgeConfig(4, init="normal", init_text=None), name=name)
    fastprefix.compose(model, ["a", "b"], name="ab")
    found = {f"composed {name}": each.detach() for name, each in model.fastprefix.named_parameters()}
    fastprefix.attach(model, fastprefix.PromptTuningConfig(4), name="prompt")
    fastprefix.save_adapter(model, folder)
    fastprefix.merge(model)
    found |= {f"merged {name}": each.detach() for name, each in model.fastprefix.named_parameters()}
    fastprefix.load_adapter(model, folder, name="loaded")
    return found | {f"loaded {name}": each.detach() for name, each in model.fastprefix.named_parameters()}


def check_start(model: Any) -> None:
    """Check that an adapter starts from the same values on all ranks."""
    for name, parameter in model.fastprefix.named_parameters():
        first = parameter.detach().clone()
        distributed.broadcast(first, 0)
        assert torch.equal(first, parameter), name


def run_case(stage: int, method: str, kind: str, folder: Path) -> dict[str, float]:
    """Return the differences of losses, files and generated tokens from those of one process."""
    size, rank = distributed.get_world_size(), distributed.get_rank()
    plain, model = make(method), make(method, folder.parent / "model" if kind == "loaded" else None)
    if kind == "checkpointing":
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
        "loss": find_largest(torch.tensor(error) for error in errors),
        "saved": find_largest(saved[name] - state[name] for name in saved),
        "generated": float((generated != plain.eval().generate(ids[:2], **options)).sum()),
    }


def find_largest(errors: Iterable[Tensor]) -> float:
    """Return the largest absolute error, or NaN if any error is NaN."""
    return float(torch.stack([error.abs().max() for error in errors]).max())


def describe_refusal(action: Callable[[], Any]) -> str:
    """Return the error of changing an adapter of a model in an engine, or "nothing"."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing"


def main(file: str) -> None:
    """Run all cases."""
    deepspeed.init_distributed(dist_backend="gloo")
    names: list[Any] = [tempfile.mkdtemp() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(names)
    if distributed.get_rank() == 0:
        models.decoder().float().save_pretrained(Path(names[0]) / "model")
    distributed.barrier()
    results: dict[str, Any] = {}
    for number, case in enumerate(CASES):
        results[" ".join(map(str, case)).strip()] = run_case(*case, Path(names[0]) / str(number))
    alone, partitioned = models.decoder().float(), load_partitioned(Path(names[0]) / "model")
    expected, actual = change(alone, Path(names[0]) / "alone"), change(partitioned, Path(names[0]) / "partitioned")
    results["changed"] = find_largest(actual[name] - tensor for name, tensor in expected.items())
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
    results["refused"] = [
        describe_refusal(lambda: fastprefix.detach(engine.module)),
        describe_refusal(lambda: fastprefix.swap_prefix(engine.module, [])),
    ]
    if distributed.get_rank() == 0:
        Path(file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
