"""Peers that train a frozen model: the frozen floor, this package, the same methods in eager PyTorch, and PEFT."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import fastprefix
from fastprefix.methods import MethodConfig

from .embedding import EAGER
from .measure import Role, find_version
from .models import TaskKind

FLOOR = "frozen floor"
DEPT_RANK = 30
ADEPT_WIDTH = 19
PROMPT_RATE = 0.3  # the usual rate of prompts; other parameters need lower ones
OFFSET_RATE = 1e-3
PREFIX_RATE = 1e-2
PREFIX_SCALE = 0.02  # initial standard deviation of this package's prefixes
HEAD_RATE = 1e-3


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train, and the parameter groups of its optimizer."""

    model: nn.Module
    groups: list[dict[str, Any]] = field(default_factory=list)

    def count_trainable(self) -> int:
        """Return the number of trainable parameters, including the head of a classifier."""
        return sum(p.numel() for group in self.groups for p in group["params"])


Prepare = Callable[[PreTrainedModel], Prepared]


class ModelPeer(NamedTuple):
    """A named way to prepare a model for training. ``prepare`` may change the model."""

    name: str
    role: Role
    prepare: Prepare

    def copy_and_prepare(self, base: PreTrainedModel) -> nn.Module:
        """Return a prepared copy of a model."""
        return self.prepare(share_weights(base)).model


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model so that a method can change it. The copy shares all weights but the head of a classifier."""
    head = set(head_parameters(model))
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters() if p not in head})


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of a classifier's head, or an empty list for a language model, whose head stays frozen."""
    if model.get_output_embeddings() is not None:
        return []
    heads = [of for name, of in model.named_children() if name != "fastprefix" and of is not model.base_model]
    return [parameter for head in heads for parameter in head.parameters()]


def group(parameters: list[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    return [{"params": parameters, "lr": rate}] if parameters else []


def freeze(model: PreTrainedModel) -> Prepared:
    """Prepare the floor, which has no prompt or prefix but computes the gradient of the embeddings.

    Every method trains parameters in or below the first layer, so its backward pass must reach them. A floor whose
    backward pass stops at the head would be out of reach for all of them.
    """
    freeze_body(model)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    return Prepared(model, group(head_parameters(model), HEAD_RATE))


def freeze_body(model: PreTrainedModel) -> None:
    """Freeze all parameters except the head of a classifier."""
    model.requires_grad_(False)
    for parameter in head_parameters(model):
        parameter.requires_grad_(True)


def attach(
    model: PreTrainedModel,
    config: MethodConfig,
    main: float = OFFSET_RATE,
    prompt: float = PROMPT_RATE,
    head: float = HEAD_RATE,
    gate: float | None = None,
) -> Prepared:
    """Attach a method of this package, with separate rates for the prompt, the head, the gates, and the rest."""
    fastprefix.attach(model, config)
    of_head = head_parameters(model)
    groups = fastprefix.parameter_groups(model, prompt_lr=prompt, gate_lr=gate, lr=main)
    groups = [{**of, "params": [p for p in of["params"] if p not in set(of_head)]} for of in groups]
    return Prepared(model, [of for of in groups if of["params"]] + group(of_head, head))


def merge(model: PreTrainedModel, config: MethodConfig) -> Prepared:
    return Prepared(fastprefix.merge(fastprefix.attach(model, config)))


def wrap_with_peft(
    model: PreTrainedModel, kind: TaskKind, tokens: int, config: str, rate: float, accelerated: bool = False
) -> Prepared:
    """Wrap the model with a method of PEFT, named by its configuration. It starts like the method of this package."""
    import peft

    task = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS"}[kind]
    table: Any = model.get_input_embeddings().weight
    scale = float(table.std()) if config == "PromptTuningConfig" else PREFIX_SCALE
    wrapped: Any = peft.get_peft_model(model, getattr(peft, config)(task_type=task, num_virtual_tokens=tokens))
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    prompt = [p for name, p in trainable.items() if name.startswith("prompt_encoder")]
    head = [p for name, p in trainable.items() if not name.startswith("prompt_encoder")]
    for parameter in prompt:
        nn.init.normal_(parameter, std=scale)
    if accelerated:
        fastprefix.accelerate(wrapped)
    return Prepared(wrapped, group(prompt, rate) + group(head, HEAD_RATE))


def tune_with_adapters(model: Any, tokens: int) -> Prepared:
    """Add AdapterHub's prefix without a reparameterization to every layer."""
    import adapters

    adapters.init(model)
    model.add_adapter("tuned", config=adapters.PrefixTuningConfig(flat=True, prefix_length=tokens))
    model.train_adapter("tuned")
    return Prepared(model.to(model.device))


class EagerPrompt(nn.Module):
    """A model with PT, DePT or ADePT in eager PyTorch, which runs the prompt in every row."""

    def __init__(self, model: Any, method: str, tokens: int, length: int) -> None:
        super().__init__()
        self.model, self.embed, d = model, EAGER[method], model.config.hidden_size
        freeze_body(model)
        shapes: dict[str, list[Sequence[int]]] = {
            "PT": [],
            "DePT": [(length, DEPT_RANK), (DEPT_RANK, d)],
            "ADePT": [(d, ADEPT_WIDTH), (ADEPT_WIDTH,), (ADEPT_WIDTH, d), (d,)],
        }
        self.prompt = nn.Parameter(torch.randn(tokens, d))
        self.offset = nn.ParameterList([nn.Parameter(0.02 * torch.randn(*shape)) for shape in shapes[method]])
        self.to(device=model.device, dtype=model.dtype)

    @classmethod
    def prepare(cls, model: PreTrainedModel, **options: Any) -> Prepared:
        return Prepared(cls(model, **options))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        """Return the output of the model. Its loss is computed on the caller's tokens only."""
        rows = self.embed(input_ids, self.model.get_input_embeddings().weight, self.prompt, *self.offset)
        front = (len(self.prompt), 0)
        labels = F.pad(labels, front, value=-100) if labels.ndim == 2 else labels
        return self.model(inputs_embeds=rows, attention_mask=F.pad(attention_mask, front, value=1), labels=labels)


def list_peers(
    names: Iterable[str], kind: TaskKind, tokens: int, length: int, short: int | None = None
) -> list[ModelPeer]:
    """Return the named peers whose packages are installed. DePT and ADePT have ``short`` prompt tokens, if given."""
    prompts: dict[str, Callable[..., MethodConfig]] = {
        "PT": partial(fastprefix.PromptTuningConfig, tokens),
        "DePT": partial(fastprefix.DePTConfig, short or tokens, rank=DEPT_RANK, max_length=length),
        "ADePT": partial(fastprefix.ADePTConfig, short or tokens, bottleneck_dim=ADEPT_WIDTH),
    }
    cartridge = partial(fastprefix.CartridgeConfig, tokens, init="normal")
    ours: dict[str, Prepare] = {
        "PT textbook": partial(attach, config=prompts["PT"](shared_prompt=False)),
        "prefix tuning": partial(attach, config=fastprefix.PrefixTuningConfig(tokens), main=PREFIX_RATE),
        "APT": partial(attach, config=fastprefix.APTConfig(tokens), main=PREFIX_RATE),
        "cartridge": partial(attach, config=cartridge(), main=PREFIX_RATE),
        "cartridge, values": partial(attach, config=cartridge(train="values"), main=PREFIX_RATE),
    }
    theirs: dict[str, Prepare] = {}
    for name, make in prompts.items():
        ours |= {name: partial(attach, config=make()), f"{name} merged": partial(merge, config=make())}
        theirs[f"{name}, eager"] = partial(EagerPrompt.prepare, method=name, tokens=tokens, length=length)
    if find_version("peft"):
        wrap = partial(wrap_with_peft, kind=kind, tokens=tokens)
        rates = {
            "PT": ("PromptTuningConfig", PROMPT_RATE),
            "prefix tuning": ("PrefixTuningConfig", PREFIX_RATE),
            "cartridge": ("CartridgeConfig", PREFIX_RATE),
        }
        for name, (config, rate) in rates.items():
            theirs[f"PEFT {name}"] = partial(wrap, config=config, rate=rate)
            ours[f"PEFT {name}, accelerated"] = partial(wrap, config=config, rate=rate, accelerated=True)
    if find_version("adapters"):
        theirs["adapters prefix tuning"] = partial(tune_with_adapters, tokens=tokens)
    roles: dict[Role, dict[str, Prepare]] = {"floor": {FLOOR: freeze}, "ours": ours, "theirs": theirs}
    peers = {name: ModelPeer(name, role, how) for role, of in roles.items() for name, how in of.items()}
    return [peers[name] for name in names if name in peers]
