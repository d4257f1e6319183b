"""The trainable parameters of a model with a method: counted, and as an optimiser takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...methods import PromptMethod
from ...methods.base import LearningRates
from .adapter import MODULE, Adapter, Method
from .attachment import get_attachment
from .models.tuners import find_base_model, has_tuner_layers

PEFT = "peft"
"""The name of the group of the parameters that PEFT trains."""


@dataclass(frozen=True)
class ParameterCount:
    """The numbers of a model's parameters, in all and trained. ``print`` shows them in a line.

    ``groups`` has the trained ones by what they belong to: the method (under "fastprefix"), the modules that stay
    trainable, each under its name, and what PEFT trains, such as LoRA (under "peft").
    """

    total: int
    groups: dict[str, int]

    @property
    def trainable(self) -> int:
        """Return how many parameters are trained."""
        return sum(self.groups.values())

    @property
    def share(self) -> float:
        """Return the share of the parameters that is trained."""
        return self.trainable / self.total

    def __str__(self) -> str:
        groups = ", ".join(f"{name} {count:,}" for name, count in self.groups.items()) or "nothing"
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.share:.4%}): {groups}"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model with a method, those of the adapter in use among them; merged, none is trained.

    Raises:
        ValueError: the model has no method attached, or none in use.
    """
    adapter, base = get_attachment(model).adapter, find_base_model(model)
    modules = () if adapter.merged else (MODULE, *adapter.saved_modules)
    groups = {
        name: sum(p.numel() for p in base.get_submodule(name).parameters() if p.requires_grad) for name in modules
    }
    if beside := _list_trained_beside(model, adapter):
        groups[PEFT] = sum(p.numel() for p in beside)
    return ParameterCount(base.num_parameters(), groups)


def _list_trained_beside(model: nn.Module, adapter: Adapter) -> list[nn.Parameter]:
    """Return what is trained beside an adapter in a model with layers of PEFT's: all of that is PEFT's choice."""
    base = find_base_model(model)
    if not has_tuner_layers(base):
        return []
    modules = [adapter.method, *(base.get_submodule(name) for name in adapter.saved_modules)]
    own = {p for module in modules for p in module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p not in own]


def parameter_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    prompt_lr: float | None = None,
    gate_lr: float | None = None,
    peft_lr: float = 2e-4,
    weight_decay: float = 0.0,
    adapter_names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups with the learning rates that methods are trained with.

    Args:
        model: a model with a method attached.
        lr: for everything else: prefixes, offsets, and the modules that stay trainable. None: the method's usual rate.
        prompt_lr: for the soft prompt, or what it is computed from. None: ``lr``, and if that is None too, the method's
            usual rate, 0.3 for most.
        gate_lr: for gates. None: ``lr``, and if that is None too, the method's usual rate. APT's gates are projections
            of a whole hidden state: at a rate that is right for the prefix, they are all at 1 within some tens of steps
            of Adam.
        peft_lr: for what PEFT trains, such as LoRA; 2e-4 is the rate of LoRA's paper.
        weight_decay: for all groups.
        adapter_names: of the adapters that are trained together, in batches whose rows name them. None: the one in use.

    The usual rates are the ``learning_rates`` of a method's configuration. They are meant for Adam.

    Raises:
        ValueError: the model has no method attached, none in use, or one that cannot be trained: it was merged, or PEFT
            has frozen it or put its layers into it.
    """
    attachment, base = get_attachment(model), find_base_model(model)
    adapters = [attachment.adapter]
    if adapter_names is not None:
        adapters = [attachment.adapters[attachment.check_known(name)] for name in dict.fromkeys(adapter_names)]
    beside = _list_trained_beside(model, adapters[0])
    others = set(beside) | {p for each in attachment.adapters.values() for p in each.method.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and p not in others]
    groups: list[tuple[list[nn.Parameter], float | None]] = []
    for adapter in adapters:
        _check_trained(base, adapter)
        method: Method = adapter.method
        usual = method.config.learning_rates if lr is None else LearningRates(lr, lr, None)
        gate_rate = usual.gates if gate_lr is None else gate_lr
        prompt = method.list_prompt_parameters() if isinstance(method, PromptMethod) else []
        gates = [] if gate_rate is None else [p for name, p in method.named_parameters() if "gate" in name]
        apart = {*prompt, *gates}
        rest += [p for p in method.parameters() if p.requires_grad and p not in apart]
        groups += [(prompt, usual.prompt if prompt_lr is None else prompt_lr), (gates, gate_rate), (rest, usual.rest)]
        rest = []
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay}
        for parameters, rate in (*groups, (beside, peft_lr))
        if parameters
    ]


def _check_trained(base: PreTrainedModel, adapter: Adapter) -> None:
    if adapter.merged:
        raise ValueError("`model` must have an adapter that is not merged, which cannot be trained: detach it first.")
    adapter.check_untouched(base)
    frozen = not any(p.requires_grad for p in adapter.method.parameters())
    if has_tuner_layers(base) and adapter.trained and frozen:
        raise ValueError(
            "`model` must have an adapter that is trained, but all of its parameters are frozen. PEFT freezes them "
            "when it adds its layers: call fastprefix.set_adapter afterwards."
        )
