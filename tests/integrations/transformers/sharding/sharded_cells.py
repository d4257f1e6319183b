"""Run adapters on models that are spread over processes, and compare all of it with one process.

``test_sharding`` runs ``python -m tests.integrations.transformers.sharding.sharded_cells FILE LAYOUT:METHOD ...`` in
all processes of ``torchrun``. The first process writes the largest error of each cell, or its failure, to FILE.
"""

import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import fastprefix
from fastprefix.integrations.transformers.checking.conformance import Float64

from .... import models
from .sharded_scenarios import SCENARIOS, gather

STEPS, ROWS, TOKENS, NEW = 3, 4, 7, 4
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}

METHODS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: fastprefix.PrefixTuningConfig(5),
    "cartridge": lambda: fastprefix.PrefixTuningConfig(
        5, num_frozen_tokens=2, key_bias=True, prefix_position="shift", train="both"
    ),
    "prefix-mlp": lambda: fastprefix.PrefixTuningConfig(5, reparameterization="mlp", hidden_dim=16),
    "own-softmax": lambda: fastprefix.PrefixTuningConfig(5, softmax="own"),
    "apt": lambda: fastprefix.APTConfig(5),
    "apt-cls": lambda: fastprefix.APTConfig(5, pooling="cls"),
    "llama-adapter": lambda: fastprefix.LlamaAdapterConfig(5),
    "residual": lambda: fastprefix.ResidualPrefixConfig(5, bottleneck_dim=8, hidden_dim=16),
    "prompt": lambda: fastprefix.PromptTuningConfig(5, shared_prompt=True),
    "prompt-in-every-row": lambda: fastprefix.PromptTuningConfig(5, shared_prompt=False),
    "dept": lambda: fastprefix.DePTConfig(5, rank=3, max_length=32),
    "adept": lambda: fastprefix.ADePTConfig(5, bottleneck_dim=3),
    "accept": lambda: fastprefix.ACCEPTConfig(
        5, prompt_block=8, prompt_codewords=3, offset_block=8, offset_codewords=2, max_length=32
    ),
    "ulpt": lambda: fastprefix.ULPTConfig(5, rank=2),
    "p-tuning": lambda: fastprefix.PTuningConfig(5, encoder_hidden_dim=8),
    "mpt": lambda: fastprefix.MultitaskPromptConfig(5, num_tasks=1),
}


def load(folder: str, **options: int) -> Any:
    """Load the model, spread over the processes according to the options."""
    spread = {"distributed_config": DistributedConfig(**options)} if options else {}
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, **spread)
    model.generation_config.eos_token_id = None
    return (model if "fsdp_size" in options else models.replace_norms(model)).eval()


def shard(model: Any, **options: Any) -> Any:
    """Shard the layers one by one with FSDP2, and the embedding separately."""
    for module in (*model.model.layers, model.get_input_embeddings()):
        fully_shard(module, **options)
    return fully_shard(model, **options)


def make_plain(folder: str, adapter: str) -> Any:
    return fastprefix.load_adapter(load(folder), adapter)


class Layout:
    """A way to spread a model over processes."""

    def __init__(
        self,
        make_bare: Callable[[str], Any],
        count_batches: Callable[[int], int],
        attach_first: Callable[[Any], Any] | None = None,
    ) -> None:
        self.make_bare = make_bare
        self.count_batches = count_batches
        """How many of the processes have batches of their own."""
        self.attach_first = attach_first

    def make(self, folder: str, adapter: str) -> Any:
        """Return the model with an adapter."""
        if self.attach_first is not None:
            return self.attach_first(make_plain(folder, adapter))
        return fastprefix.load_adapter(self.make_bare(folder), adapter)


def offload(model: Any) -> Any:
    """Keep layers on the CPU and on disk. accelerate loads them when they run."""
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tempfile.mkdtemp())


def count_one(size: int) -> int:
    return 1


def count_all(size: int) -> int:
    return size


LAYOUTS = {
    "offload": Layout(lambda folder: offload(load(folder)), count_one),
    "ddp": Layout(load, count_all, DistributedDataParallel),
    "tp": Layout(lambda folder: load(folder, tp_size=distributed.get_world_size()), count_one),
    "fsdp2-attach-before": Layout(load, count_all, shard),
    "fsdp2-attach-after": Layout(lambda folder: shard(load(folder)), count_all),
    "fsdp2-cpu-offload": Layout(
        lambda folder: shard(load(folder), offload_policy=CPUOffloadPolicy(pin_memory=False)), count_all
    ),
    "fsdp2-loaded": Layout(lambda folder: load(folder, fsdp_size=distributed.get_world_size()), count_all),
    "fsdp2-tp": Layout(
        lambda folder: load(folder, fsdp_size=2, tp_size=distributed.get_world_size() // 2), lambda size: 2
    ),
}


def run(model: Any, wrapped: nn.Module, batches: int, batch: int, out: str) -> dict[str, Tensor]:
    """Train on one of several batches, save and generate. Return all results as full tensors."""
    optimizer = torch.optim.AdamW(fastprefix.parameter_groups(model, lr=0.01, prompt_lr=0.1))
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        ids = torch.randint(3, models.VOCABULARY, (ROWS, TOKENS), generator=generator)
        mask = (torch.arange(TOKENS) >= torch.tensor([0, 2, 1, 0])[:, None]).long()
        weights = torch.randn(ROWS, TOKENS, models.VOCABULARY, generator=generator, dtype=torch.float64)
        parts = [tensor.chunk(batches)[batch] for tensor in (ids, mask, weights)]
        loss = (wrapped(input_ids=parts[0], attention_mask=parts[1]).logits * parts[2]).sum() * batches
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found |= {f"gradient {n}": gather(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        total = loss.detach().clone()
        if batches > 1:
            distributed.all_reduce(total, op=distributed.ReduceOp.AVG)
        found[f"loss {step}"] = total
    fastprefix.save_adapter(model, out)
    found |= {f"trained {n}": gather(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
    model.eval()
    ids, mask = ids[:2], mask[:2]
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    generated = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **options)
    found["generated"] = generated.sequences
    found |= {f"logits {step}": logits for step, logits in enumerate(generated.logits)}
    return found


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error, relative to the largest value of each tensor. NaN counts as infinite."""
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    errors = {
        name: (actual[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-30)
        for name, value in expected.items()
    }
    largest = {name: math.inf if error.isnan() else float(error) for name, error in errors.items()}
    worst = max(largest, key=lambda name: largest[name])
    print(f"largest error: {largest[worst]:.1e} of {worst}", file=sys.stderr)
    return largest[worst]


def run_scenario(layout: Layout, name: str, folder: Path) -> float | None:
    """Return the largest error of a scenario in the first process."""
    first, base = distributed.get_rank() == 0, str(folder / "model")
    work = folder / f"{name}-{id(layout)}"
    names = [str(work)]
    distributed.broadcast_object_list(names)
    options = {} if layout.attach_first is None else {"wrap": layout.attach_first}
    actual = SCENARIOS[name](layout.make_bare(base), Path(names[0]), **options)
    distributed.barrier()
    return compare(actual, SCENARIOS[name](load(base), folder / f"{name}-alone")) if first else None


def run_cell(layout: Layout, method: str, folder: Path) -> float | None:
    """Return the largest error of a cell in the first process."""
    first = distributed.get_rank() == 0
    base, adapter = str(folder / "model"), str(folder / f"{method}")
    if first and not Path(adapter).exists():
        plain = fastprefix.attach(load(base), METHODS[method]())
        models.randomize(plain)
        fastprefix.save_adapter(plain, adapter)
    distributed.barrier()
    batches = layout.count_batches(distributed.get_world_size())
    model = layout.make(base, adapter)
    batch = distributed.get_rank() * batches // distributed.get_world_size()
    actual = run(getattr(model, "module", model), model, batches, batch, f"{adapter}-{id(layout)}")
    actual |= {"logits of all": logits(getattr(model, "module", model))}
    distributed.barrier()
    if not first:
        return None
    plain = make_plain(base, adapter)
    expected = run(plain, plain, 1, 0, f"{adapter}-alone") | {"logits of all": logits(plain)}
    expected |= {"logits after loading": expected["logits of all"]}
    actual |= {"logits after loading": logits(make_plain(base, f"{adapter}-{id(layout)}"))}
    return compare(actual, expected)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return the logits of a few tokens."""
    result: Tensor = model(input_ids=torch.arange(3, 9)[None]).logits
    return result


def main(file: str, *cells: str) -> None:
    """Run cells."""
    distributed.init_process_group("gloo")
    first = distributed.get_rank() == 0
    names: list[Any] = [tempfile.mkdtemp() if first else None]
    distributed.broadcast_object_list(names)
    folder = Path(names[0])
    results: dict[str, Any] = {}
    with Float64():
        if first:
            models.decoder(**HEADS).save_pretrained(folder / "model")
        distributed.barrier()
        for cell in cells:
            layout, _, method = cell.partition(":")
            try:
                run_one = run_scenario if method in SCENARIOS else run_cell
                results[cell] = run_one(LAYOUTS[layout], method, folder)
            except Exception:
                results[cell] = traceback.format_exc()
                print(distributed.get_rank(), results[cell], file=sys.stderr)
                break  # the processes may be at different places
    if first:
        Path(file).write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
