"""The competitors, each behind the same small interface: the frozen floor, fastprefix's methods, PEFT's."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

import fastprefix

from .models import head_parameters
from .tasks import TaskKind

FLOOR = "frozen floor"
PROMPT_TOKENS = 100
SHORT_PROMPT_TOKENS = 60  # DePT and ADePT: the same budget as 100 prompt tokens at a width of 768
DEPT_RANK = 30
ADEPT_WIDTH = 19
PREFIX_TOKENS = 100
PROMPT_RATE = 0.3  # usual for prompt tables; what goes beside them needs rates of its own
OFFSET_RATE = 1e-3
PREFIX_RATE = 1e-2
HEAD_RATE = 1e-3


@dataclass(frozen=True)
class Prepared:
    """A model ready to train, and its parameters as an optimizer takes them."""

    model: nn.Module
    groups: list[dict[str, Any]]

    def trainable(self) -> int:
        """How many numbers are trained, a classifier's head among them."""
        return sum(p.numel() for group in self.groups for p in group["params"])


@dataclass(frozen=True)
class Method:
    """A competitor: ``prepare(model, task, length)`` changes the model it is given and returns it ready to train."""

    name: str
    source: Literal["floor", "fastprefix", "peft"]
    prepare: Callable[[PreTrainedModel, TaskKind, int], Prepared]


def all_methods() -> list[Method]:
    """Floor, package and, where ``peft`` is installed, its peers; in the order of the table."""
    ours = [
        Method(f"PT ({PROMPT_TOKENS})", "fastprefix", _prompt_tuning),
        Method(f"DePT ({SHORT_PROMPT_TOKENS}, r={DEPT_RANK})", "fastprefix", _dept),
        Method(f"ADePT ({SHORT_PROMPT_TOKENS}, r={ADEPT_WIDTH})", "fastprefix", _adept),
        Method(f"prefix tuning ({PREFIX_TOKENS})", "fastprefix", _prefix_tuning),
        Method(f"APT ({PREFIX_TOKENS})", "fastprefix", _apt),
    ]
    peers = [
        Method(f"PEFT prompt tuning ({PROMPT_TOKENS})", "peft", _peft_prompt_tuning),
        Method(f"PEFT prefix tuning ({PREFIX_TOKENS})", "peft", _peft_prefix_tuning),
    ]
    return [Method(FLOOR, "floor", _floor), *ours, *(peers if importlib.util.find_spec("peft") else [])]


def _floor(model: PreTrainedModel, task: TaskKind, length: int) -> Prepared:
    return Prepared(frozen(model), group_of(head_parameters(model), HEAD_RATE))


def frozen(model: PreTrainedModel) -> nn.Module:
    """The floor: no prompt and no prefix; forward + backward still goes down to the embeddings' output.

    Every method trains something in or below the first layer, so every one of them has to bring the gradient down
    there. A floor whose backward stopped at the head would be one that no method of this kind can reach.
    """
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    for parameter in head_parameters(model):
        parameter.requires_grad_(True)
    return model


def group_of(parameters: list[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """The parameters as an optimizer takes them: a group, or none where there are none."""
    return [{"params": parameters, "lr": rate}] if parameters else []


def _prompt_tuning(model: PreTrainedModel, task: TaskKind, length: int) -> Prepared:
    return attached(model, fastprefix.PromptTuningConfig(PROMPT_TOKENS), OFFSET_RATE)


def _dept(model: PreTrainedModel, task: TaskKind, length: int) -> Prepared:
    return attached(model, fastprefix.DePTConfig(SHORT_PROMPT_TOKENS, rank=DEPT_RANK, max_length=length), OFFSET_RATE)


def _adept(model: PreTrainedModel, task: TaskKind, length: int) -> Prepared:
    return attached(model, fastprefix.ADePTConfig(SHORT_PROMPT_TOKENS, bottleneck_dim=ADEPT_WIDTH), OFFSET_RATE)


def _prefix_tuning(model: PreTrainedModel, task: TaskKind, length: int) -> Prepared:
    return attached(model, fastprefix.PrefixTuningConfig(PREFIX_TOKENS), PREFIX_RATE)


def _apt(model: PreTrainedModel, task: TaskKind, length: int) -> Prepared:
    return attached(model, fastprefix.APTConfig(PREFIX_TOKENS), PREFIX_RATE)


def attached(
    model: PreTrainedModel,
    config: fastprefix.methods.MethodConfig,
    rate: float,
    prompt_rate: float = PROMPT_RATE,
    head_rate: float = HEAD_RATE,
    gate_rate: float | None = None,
) -> Prepared:
    """A method of the package on a model, with rates of their own for prompt, head, gates (None: the rest's), rest."""
    fastprefix.attach(model, config)
    head = head_parameters(model)
    groups = fastprefix.parameter_groups(model, prompt_lr=prompt_rate, gate_lr=gate_rate, lr=rate)
    without_head = [{**group, "params": [p for p in group["params"] if p not in set(head)]} for group in groups]
    return Prepared(model, [group for group in without_head if group["params"]] + group_of(head, head_rate))


def _peft_prompt_tuning(model: PreTrainedModel, task: TaskKind, length: int) -> Prepared:
    return _peft(with_peft("PromptTuningConfig", task, PROMPT_TOKENS, model), PROMPT_RATE)


def _peft_prefix_tuning(model: PreTrainedModel, task: TaskKind, length: int) -> Prepared:
    return _peft(with_peft("PrefixTuningConfig", task, PREFIX_TOKENS, model), PREFIX_RATE)


def with_peft(config: str, task: TaskKind, P: int, model: PreTrainedModel) -> nn.Module:
    """A model with P virtual tokens of PEFT's, of the configuration that is named."""
    import peft

    kind = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS"}[task]
    wrapped: nn.Module = peft.get_peft_model(model, getattr(peft, config)(task_type=kind, num_virtual_tokens=P))
    return wrapped


def _peft(wrapped: nn.Module, rate: float) -> Prepared:
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    prompt = [p for name, p in trainable.items() if name.startswith("prompt_encoder")]
    head = [p for name, p in trainable.items() if not name.startswith("prompt_encoder")]
    return Prepared(wrapped, group_of(prompt, rate) + group_of(head, HEAD_RATE))
