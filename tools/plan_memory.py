"""Compute the memory of each rank for training an adapter on a model that is sharded over devices.

    python -m tools.plan_memory --model llama-3-70b --devices 8 --method prefix --tokens 2048

Nothing is allocated. The model is built on PyTorch's meta device. ``transformers`` and FSDP2 shard it for a fake
process group, and the bytes of the first rank are counted. The bytes of the weights are also computed from the
configuration, and the command fails if the two numbers differ. Activations that are saved for the backward pass are
counted by running layers on the meta device.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from fastprefix import PrefixTuningConfig, PromptTuningConfig
from fastprefix.integrations.transformers.models.attention import NAME, CarriedBindings, GivenPrefix, carrying
from fastprefix.integrations.transformers.sharding.fully_sharded import shard_like
from fastprefix.integrations.transformers.sharding.tensor_parallel import HeadSplit, TensorParallelHeads
from fastprefix.methods import AttentionShape, EmbeddingShape, PrefixTuning, PromptTuning

SHAPES = Path(__file__).parent / "shapes"
GIB = 2**30
_TWO = 2  # layers whose activations are counted. The input of the second one needs a gradient.


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan for each layout of the devices."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    shapes = ", ".join(sorted(path.stem for path in SHAPES.glob("*.json")))
    parser.add_argument("--model", default="llama-3-70b", help=f"a folder or file with a Llama config, or {shapes}")
    parser.add_argument("--devices", type=int, default=8, help="number of devices")
    parser.add_argument("--method", choices=("prefix", "prompt"), default="prefix")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the prefix or the prompt")
    parser.add_argument("--rows", type=int, default=1, help="rows per batch of each data-parallel rank")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--memory", type=float, default=80.0, help="memory of a device in GiB")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model {options.model}: {error}")
    plans = {}
    with simulating(options.devices):
        for tp in list_sizes(config, options.devices):
            layout = Layout(tp, options.devices // tp)
            plan = make_plan(config, layout, options.method, options.tokens, options.rows, options.length)
            expected = count_weights(config, layout)
            if plan.weights != expected:
                raise RuntimeError(
                    f"{layout}: the simulated model has {plan.weights} bytes of weights, but expected {expected}"
                )
            plans[layout] = plan
    print(f"{options.model}: {options.method} of {options.tokens} tokens, {options.rows} x {options.length} tokens\n")
    print(format_table(plans, options.memory))
    return 0


@dataclass(frozen=True)
class Layout:
    """The number of tensor-parallel ranks, and the number of ranks that FSDP2 shards over."""

    tp: int
    fsdp: int

    def __str__(self) -> str:
        return " x ".join([f"TP {self.tp}"] * (self.tp > 1) + [f"FSDP2 {self.fsdp}"] * (self.fsdp > 1)) or "one device"


@dataclass(frozen=True)
class Plan:
    """The memory of a rank in bytes."""

    weights: int
    gathered: int  # peak of the frozen weights that FSDP2 gathers, including one prefetched layer
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int  # activations with gradient checkpointing
    logits: int

    @property
    def total(self) -> int:
        """Return the total without gradient checkpointing."""
        return self.fixed + self.activations + self.logits

    @property
    def checkpointed_total(self) -> int:
        """Return the total with gradient checkpointing."""
        return self.fixed + self.checkpointed + self.logits

    @property
    def fixed(self) -> int:
        """Return the bytes that do not depend on the batch."""
        return self.weights + self.gathered + self.adapter + self.gradients + self.optimizer


def read_config(name: str) -> Any:
    """Return the configuration of a Llama-shaped model.

    Raises:
        OSError: the file does not exist.
        ValueError: the model is not a Llama model.
    """
    path = SHAPES / f"{name}.json"
    config = AutoConfig.from_pretrained(path if path.is_file() else name)
    if config.model_type != "llama":
        raise ValueError(f"must be a Llama-shaped model, got a {config.model_type} model")
    return config


def list_sizes(config: Any, devices: int) -> list[int]:
    """Return the possible sizes of tensor parallelism, which divide the devices and the key/value heads."""
    return [tp for tp in range(1, devices + 1) if devices % tp == 0 and config.num_key_value_heads % tp == 0]


@contextmanager
def simulating(devices: int) -> Iterator[None]:
    """Simulate the first rank of a process group that does not communicate."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def make_plan(config: Any, layout: Layout, method: str, tokens: int, rows: int, length: int) -> Plan:
    """Compute the memory of the first rank."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    gathered = count_gathered(model, layout)
    spread, _, meshes = LlamaForCausalLM.prepare_distribute_model(
        DistributedConfig(tp_size=layout.tp, fsdp_size=layout.fsdp)
    )
    model = LlamaForCausalLM.maybe_distribute_model(model, spread, meshes)
    adapter = count_bytes(make_adapter(config, model, layout, method, tokens))
    layer, one = count_saved(config, layout, method, tokens, rows, length)
    hidden = rows * length * config.hidden_size * 2
    prompts = 0 if method == "prefix" else count_saved(config, layout, "none", 0, 1, tokens)[0]
    layers = config.num_hidden_layers
    return Plan(
        weights=count_bytes(model),
        gathered=gathered,
        adapter=adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        activations=layers * (layer + prompts),
        checkpointed=layers * (hidden + prompts) + one,
        logits=rows * length * config.vocab_size * (2 + 4 + 4),  # bfloat16, the loss's float32, and its gradient
    )


def count_bytes(module: nn.Module) -> int:
    """Return the bytes of this rank's part of a module's parameters."""
    own: Iterator[Tensor] = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return sum(int(tensor.nbytes) for tensor in own)


def count_weights(config: Any, layout: Layout) -> int:
    """Compute the bytes of a rank's weights in bfloat16 from the configuration."""
    d, heads, kv, wide = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
    )
    matrices = d * config.head_dim * (2 * heads + 2 * kv) + 3 * d * wide
    spread = config.num_hidden_layers * matrices + 2 * config.vocab_size * d
    norms = (2 * config.num_hidden_layers + 1) * d
    return int(2 * (spread // (layout.tp * layout.fsdp) + norms // layout.fsdp))


def count_gathered(model: Any, layout: Layout) -> int:
    """Return the peak bytes that FSDP2 gathers: two layers, the embeddings and the head."""
    if layout.fsdp == 1:
        return 0
    layers = model.model.layers
    layer = int(sum(p.nbytes for p in layers[0].parameters()))
    outside = int(sum(p.nbytes for p in model.parameters())) - layer * len(layers)
    return math.ceil((2 * layer + outside) / layout.tp)


def make_adapter(config: Any, model: Any, layout: Layout, method: str, tokens: int) -> nn.Module:
    """Return an adapter of the model, sharded as ``attach`` shards it."""
    adapter: nn.Module
    with torch.device("meta"):
        if method == "prompt":
            adapter = PromptTuning(PromptTuningConfig(tokens), EmbeddingShape(config.vocab_size, config.hidden_size))
        else:
            shape = AttentionShape(
                heads=config.num_attention_heads,
                kv_heads=config.num_key_value_heads,
                key_size=config.head_dim,
                value_size=config.head_dim,
                width=config.hidden_size,
                causal=True,
                role="decoder",
            )
            adapter = PrefixTuning(PrefixTuningConfig(tokens), [shape] * config.num_hidden_layers)
            if layout.tp > 1:
                splits = [HeadSplit(shape, queries=True, keys=True)] * config.num_hidden_layers
                TensorParallelHeads(model._device_mesh["tp"], splits).distribute(adapter)
    shard_like(model, adapter)
    return adapter


def count_saved(config: Any, layout: Layout, method: str, tokens: int, rows: int, length: int) -> tuple[int, int]:
    """Return the bytes that a layer saves for its backward pass, and those of one recomputed layer, which are equal."""
    options = config.to_dict() | {"num_hidden_layers": _TWO, "head_dim": config.head_dim}
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        options[name] //= layout.tp
    small = type(config)(**options)
    small._attn_implementation_internal = NAME
    with torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(small, dtype=torch.bfloat16).model.requires_grad_(False)
        # A prompt gets its gradient from the tokens' layers through its keys and values, like a prefix.
        shape = (small.num_key_value_heads, tokens, small.head_dim)
        key, value = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        embeds = torch.empty(rows, length, small.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        causal = torch.ones((), dtype=torch.bool).expand(rows, 1, 1, length)  # means causal
    bindings = {} if not tokens else {layer.self_attn: GivenPrefix(key, value) for layer in model.layers}
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), key, value)}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            saved.setdefault(storage, tensor)
        return tensor

    with carrying(CarriedBindings(bindings)), saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=embeds, attention_mask=causal, use_cache=False)
    each = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) // _TWO
    return each, each


def format_table(plans: dict[Layout, Plan], memory: float) -> str:
    """Return a table in Markdown with the GiB of a rank for each layout."""
    rows: dict[str, Callable[[Plan], int]] = {
        "weights (bfloat16)": lambda plan: plan.weights,
        "gathered by FSDP2": lambda plan: plan.gathered,
        "adapter (float32)": lambda plan: plan.adapter,
        "its gradients": lambda plan: plan.gradients,
        "Adam's two moments": lambda plan: plan.optimizer,
        "activations": lambda plan: plan.activations,
        "activations, checkpointed": lambda plan: plan.checkpointed,
        "logits and their loss": lambda plan: plan.logits,
        "total": lambda plan: plan.total,
        "total, checkpointed": lambda plan: plan.checkpointed_total,
    }
    lines = ["| GiB of a rank | " + " | ".join(map(str, plans)) + " |", "|---|" + "---:|" * len(plans)]
    lines += [
        f"| {name} | " + " | ".join(f"{of(p) / GIB:.2f}" for p in plans.values()) + " |" for name, of in rows.items()
    ]
    fits = ["yes" if plan.checkpointed_total < memory * GIB else "no" for plan in plans.values()]
    lines.append(f"| fits {memory:.0f} GiB, checkpointed | " + " | ".join(fits) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
