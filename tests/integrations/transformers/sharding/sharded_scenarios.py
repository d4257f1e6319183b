"""Use adapters in further ways on models that are spread over processes. ``sharded_cells`` runs these scenarios.

Each scenario is a function that all processes run. It returns tensors that must be the same as those that the same
function returns for a model in one process.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import fastprefix
from fastprefix.integrations.transformers.attachment import get_attachment
from fastprefix.integrations.transformers.sharding.fully_sharded import is_fully_sharded
from fastprefix.integrations.transformers.sharding.tensor_parallel import is_tensor_parallel, write_whole

from .... import models

Found = dict[str, Tensor]


def gather(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def list_parameters(model: Any) -> Found:
    """Return the full parameters of the adapter in use."""
    return {name: gather(p.detach()) for name, p in model.fastprefix.named_parameters()}


@torch.no_grad()
def list_logits(model: Any) -> Tensor:
    """Return the logits of a few tokens."""
    result: Tensor = model.eval()(**models.batch("left")).logits
    return result


class Tokenizer:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}


def start(model: Any, folder: Path) -> Found:
    """Start adapters from the same values with different random states of the processes."""
    found: Found = {}
    configs = {
        "normal": fastprefix.PrefixTuningConfig(4),
        "mlp": fastprefix.PrefixTuningConfig(4, reparameterization="mlp", hidden_dim=8),
        "text": fastprefix.PrefixTuningConfig(4, init="text", init_text="a text", prefix_position="shift"),
        "vocab": fastprefix.PromptTuningConfig(4, init="vocab"),
        "random": fastprefix.ADePTConfig(4, bottleneck_dim=3),
        "words": fastprefix.PromptTuningConfig(4, init="text", init_text="words"),
    }
    for name, config in configs.items():
        torch.manual_seed(5 + distributed.get_rank())
        fastprefix.attach(model, config, tokenizer=Tokenizer(), name=name)
        found |= {f"{name} {key}": value for key, value in list_parameters(model).items()}
        found[f"{name} logits"] = list_logits(model)
    return found


def cache(model: Any, folder: Path) -> Found:
    """Start a prefix from a cache of all heads, export it with this rank's heads, and save it as PEFT's."""
    generator = torch.Generator().manual_seed(3)
    pairs = [tuple(torch.randn(1, 4, 3, 4, generator=generator).double() for _ in "kv") for _ in range(2)]
    config = fastprefix.PrefixTuningConfig(3, init="cache", prefix_position="shift")
    fastprefix.attach(model, config, past_key_values=pairs)
    found = list_parameters(model) | {"logits": list_logits(model)}
    fastprefix.save_adapter(model, folder / "peft", format="peft")
    fastprefix.load_adapter(model, folder / "peft", name="saved")
    found["saved"] = list_logits(model)
    fastprefix.set_adapter(model, "default")
    exported = fastprefix.export_cache(model, batch_size=3)
    fastprefix.detach(model)
    batch = models.batch()
    mask = torch.ones(3, 3 + 7, dtype=torch.long)
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=mask, past_key_values=exported)
    return found | {"through the cache": output.logits}


def merge(model: Any, folder: Path) -> Found:
    """Merge adapters without changing results, and restore the model by detaching."""
    found = {"bare": list_logits(model)}
    for name, config in {
        "mlp": fastprefix.PrefixTuningConfig(4, reparameterization="mlp", hidden_dim=8),
        "apt": fastprefix.APTConfig(4, token_gate=False),
        "residual": fastprefix.ResidualPrefixConfig(4, bottleneck_dim=8, hidden_dim=8),
        "prompt": fastprefix.PromptTuningConfig(4),
        "dept": fastprefix.DePTConfig(4, rank=3, max_length=32),
        "adept": fastprefix.ADePTConfig(4, bottleneck_dim=3),
        "adept in every row": fastprefix.ADePTConfig(4, bottleneck_dim=3, shared_prompt=False),
        "ulpt in every row": fastprefix.ULPTConfig(4, rank=2, shared_prompt=False),
    }.items():
        torch.manual_seed(1)
        fastprefix.attach(model, config)
        found[name] = list_logits(model)
        fastprefix.merge(model)
        found[f"{name} merged"] = list_logits(model)
        ids = models.batch()["input_ids"]
        found[f"{name} generated"] = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        if name in ("mlp", "prompt"):
            fastprefix.save_adapter(model, folder / f"merged-{name}")
            fastprefix.detach(model)
            fastprefix.load_adapter(model, folder / f"merged-{name}")
            found[f"{name} saved merged"] = list_logits(model)
        fastprefix.detach(model)
        found[f"{name} detached"] = list_logits(model)
    return found


def switch(model: Any, folder: Path) -> Found:
    """Switch between several adapters of a model."""
    torch.manual_seed(2)
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(4), name="a")
    fastprefix.attach(model, fastprefix.APTConfig(3), name="b")
    fastprefix.attach(model, fastprefix.PromptTuningConfig(3), name="c")
    found: Found = {}
    for name in ("a", "b", "c", "a"):
        fastprefix.set_adapter(model, name)
        found[name] = list_logits(model)
        with fastprefix.disable_adapter(model):
            found[f"without {name}"] = list_logits(model)
    model.train()
    loss = model(**models.batch()).logits.square().sum()
    loss.backward()
    found |= {f"gradient {name}": gather(p.grad) for name, p in model.fastprefix.named_parameters()}
    fastprefix.save_adapter(model, folder / "b", name="b")
    fastprefix.detach(model, "b")
    fastprefix.load_adapter(model, folder / "b", name="d")
    found["d"] = list_logits(model)
    fastprefix.detach(model)
    found["none"] = list_logits(model)
    return found


def compose(model: Any, folder: Path) -> Found:
    """Compose prefixes, train, save and merge them, and replace their parts."""
    torch.manual_seed(2)
    fastprefix.attach(model, fastprefix.CartridgeConfig(4, init="normal", init_text=None), name="a")
    fastprefix.save_adapter(model, folder / "part")
    fastprefix.attach(model, fastprefix.CartridgeConfig(3, init="normal", init_text=None, key_bias=True), name="b")
    fastprefix.save_adapter(model, folder / "biased")
    fastprefix.compose(model, ["a", "b"], name="ab")
    found = train_composed(model, "both")
    fastprefix.save_adapter(model, folder / "composed")
    fastprefix.set_adapter(model, "a")
    found["part"] = list_logits(model)
    fastprefix.compose(model, ["b", "a"], name="ba", trainable=["a"])
    found |= train_composed(model, "one")
    fastprefix.set_adapter(model, "ab")
    fastprefix.swap_prefix(model, folder / "part", name="a")
    found["swapped"] = list_logits(model)
    fastprefix.swap_prefix(model, folder / "biased", name="b")
    found["swapped both"] = list_logits(model)
    fastprefix.attach(model, fastprefix.CartridgeConfig(7, init="normal", init_text=None, key_bias=True), name="c")
    fastprefix.swap_prefix(model, [folder / "biased", folder / "part"])
    found["swapped one behind the other"] = list_logits(model)
    fastprefix.load_adapter(model, folder / "composed", name="d")
    found["loaded"] = list_logits(model)
    fastprefix.merge(model)
    found["merged"] = list_logits(model)
    return found


def compose_attached(model: Any, folder: Path, wrap: Callable[[Any], Any] = lambda model: model) -> Found:
    """Compose and replace prefixes that were attached before the model was sharded."""
    torch.manual_seed(2)
    for name, length in (("a", 4), ("b", 3)):
        fastprefix.attach(model, fastprefix.CartridgeConfig(length, init="normal", init_text=None), name=name)
        fastprefix.save_adapter(model, folder / name)
    fastprefix.set_adapter(model, "a")
    wrap(model)
    found = {"part": list_logits(model)}
    fastprefix.compose(model, ["b", "a"], name="ba", trainable=["b"])
    found |= train_composed(model, "one")
    fastprefix.compose(model, ["a", "b"], name="ab")
    found |= train_composed(model, "both")
    for name in ("a", "b"):
        fastprefix.swap_prefix(model, folder / name, name=name)
        found[f"swapped {name}"] = list_logits(model)
    return found


def train_composed(model: Any, name: str) -> Found:
    """Return the gradients of an adapter, and its results after a step."""
    trained = [(key, parameter) for key, parameter in model.fastprefix.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD([parameter for _, parameter in trained], lr=0.01)
    found = {f"composed of {name}": list_logits(model)}
    model.train()(**models.batch()).logits.square().sum().backward()
    found |= {f"gradient {name} {key}": gather(parameter.grad) for key, parameter in trained}
    optimizer.step()
    optimizer.zero_grad()
    return found | {f"trained {name}": list_logits(model)}


MIXED = {
    "a": lambda: fastprefix.PrefixTuningConfig(4),
    "mlp": lambda: fastprefix.PrefixTuningConfig(3, reparameterization="mlp", hidden_dim=8),
    "biased": lambda: fastprefix.PrefixTuningConfig(2, key_bias=True),
    "apt": lambda: fastprefix.APTConfig(4),
    "prompt": lambda: fastprefix.PromptTuningConfig(4),
    "adept": lambda: fastprefix.ADePTConfig(3, bottleneck_dim=3),
    "dept": lambda: fastprefix.DePTConfig(3, rank=3, max_length=32),
    "own": lambda: fastprefix.PrefixTuningConfig(3, softmax="own"),
    "llama": lambda: fastprefix.LlamaAdapterConfig(3),
}
BATCHES = {
    "prefixes": ["a", "mlp", "__base__"],
    "biases": ["biased", "a", "a"],
    "gates": ["apt", "mlp", "apt"],
    "prompts": ["prompt", "adept", "dept"],
    "own softmax": ["own", "__base__", "own"],
    "projected": ["llama", "llama", "__base__"],
}


def mixed(model: Any, folder: Path, wrap: Callable[[Any], Any] = lambda model: model, trains: bool = False) -> Found:
    """Run rows with different adapters, attached or in a store, in one batch."""
    torch.manual_seed(2)
    for name, config in MIXED.items():
        fastprefix.attach(model, config(), name=name)
        randomize(model)
        fastprefix.save_adapter(model, folder / name)
    wrap(model)
    found = run_batches(model, "attached")
    if trains:
        found |= train_batches(model)
    fastprefix.detach(model)
    store = fastprefix.AdapterStore(model)
    for name in MIXED:
        store.load(name, folder / name)
    found |= run_batches(model, "stored")
    store.drop("a")
    store.load("a", fastprefix.read_prefix(model, folder / "biased"))
    return found | run_batches(model, "exchanged")


def mixed_training(model: Any, folder: Path) -> Found:
    """Run the same batches with gradients of all their adapters."""
    return mixed(model, folder, trains=True)


def randomize(model: Any) -> None:
    """Set random values for the adapter in use, because an initial zero would hide errors."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.fastprefix.parameters():
            write_whole(parameter, 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def train_batches(model: Any) -> Found:
    """Return the gradients of all adapters in batches with several adapters."""
    found: Found = {}
    model.train()
    for batch, names in BATCHES.items():
        model(**models.batch("left"), adapter_names=names).logits.square().sum().backward()
        for name in sorted(set(names) - {"__base__"}):  # in one order on all ranks
            for key, parameter in get_attachment(model).adapters[name].method.named_parameters():
                found[f"gradient {batch} {name} {key}"] = gather(parameter.grad)
                parameter.grad = None
    return found


def run_batches(model: Any, kind: str) -> Found:
    """Run and generate rows with different adapters. Ranks of FSDP2 use different names."""
    found: Found = {}
    model.eval()
    others = distributed.get_rank() if is_fully_sharded(model) and not is_tensor_parallel(model) else 0
    for place, batch in enumerate(BATCHES):
        names = list(BATCHES.values())[(place + others) % len(BATCHES)]
        with torch.no_grad():
            found[f"{kind} {batch}"] = model(**models.batch("left"), adapter_names=names).logits
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "adapter_names": names}
        found[f"{kind} {batch} generated"] = model.generate(**models.batch("left"), **options)
    return found


def checkpoint(model: Any, folder: Path) -> Found:
    """Run both kinds of gradient checkpointing."""
    found: Found = {}
    for name, config in {
        "mlp": fastprefix.PrefixTuningConfig(4, reparameterization="mlp", hidden_dim=8),
        "apt": fastprefix.APTConfig(4),
        "prompt": fastprefix.PromptTuningConfig(4),
    }.items():
        torch.manual_seed(1)
        fastprefix.attach(model, config)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.train()(**models.batch()).logits.square().sum().backward()
            for key, parameter in model.fastprefix.named_parameters():
                found[f"{name} {reentrant} {key}"] = gather(parameter.grad)
            model.zero_grad()
        model.gradient_checkpointing_disable()
        fastprefix.detach(model)
    return found


def whole(model: Any, folder: Path) -> Found:
    """Read the adapter from a checkpoint of the whole model."""
    torch.manual_seed(1)
    fastprefix.attach(model, fastprefix.PrefixTuningConfig(4))
    found = {"before": list_logits(model)}
    model.save_pretrained(folder / "whole")
    fastprefix.detach(model)
    fastprefix.load_adapter(model, folder / "whole")
    return found | {"after": list_logits(model)}


def accelerate(model: Any, folder: Path) -> Found:
    """Run PEFT's adapters on these kernels. PEFT itself does not support a prefix on such a model."""
    found: Found = {}
    for name, config in {
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "network": peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
        ),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "adaption": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
    }.items():
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, config).double()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        fastprefix.accelerate(wrapped)
        logits = wrapped(**models.batch("left")).logits
        found[f"{name} logits"] = logits.detach()
        logits[..., :50].sum().backward()
        trained = ((n, p) for n, p in wrapped.named_parameters() if p.requires_grad)
        found |= {f"{name} {key}": gather(parameter.grad) for key, parameter in trained}
        fastprefix.decelerate(wrapped)
        model = wrapped.get_base_model()  # the adaption prompt is the last one, which stays on it
    return found


def one_key_head(model: Any, folder: Path) -> Found:
    """Run a model whose only key head is on all ranks, with different query heads on each rank."""
    options: dict[str, Any] = {}
    base = models.decoder(num_attention_heads=8, num_key_value_heads=1)
    if is_tensor_parallel(model):
        plan = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "kv"}
        options["distributed_config"] = DistributedConfig(tp_size=distributed.get_world_size(), tp_plan=plan)
        if distributed.get_rank() == 0:
            base.save_pretrained(folder)
        distributed.barrier()
        base = models.replace_norms(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, **options))
    found: Found = {}
    for name, config in {
        "prefix": fastprefix.PrefixTuningConfig(3),
        "apt": fastprefix.APTConfig(3),
        "prompt": fastprefix.PromptTuningConfig(3),
        "llama-adapter": fastprefix.LlamaAdapterConfig(3),
    }.items():
        torch.manual_seed(1)
        fastprefix.attach(base, config)
        with torch.no_grad():
            for key, parameter in base.fastprefix.named_parameters():
                if "gates" in key:
                    parameter.add_(0.5)
        base(**models.batch()).logits.square().sum().backward()
        found |= {f"{name} {key}": gather(parameter.grad) for key, parameter in base.fastprefix.named_parameters()}
        found[f"{name} logits"] = list_logits(base)
        fastprefix.detach(base)
    if is_tensor_parallel(model):  # the model's own attention would take a rank's gradients of keys for complete
        with pytest.raises(ValueError, match="key head"):
            fastprefix.attach(base, fastprefix.PromptTuningConfig(3, shared_prompt=False))
    return found


FUNCTIONS: tuple[Callable[..., Found], ...] = (
    start,
    cache,
    merge,
    switch,
    compose,
    compose_attached,
    mixed,
    mixed_training,
    checkpoint,
    whole,
    accelerate,
    one_key_head,
)
SCENARIOS = {function.__name__: function for function in FUNCTIONS}
