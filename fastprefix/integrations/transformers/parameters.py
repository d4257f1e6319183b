"""The trainable parameters of a model with a method: counted, and as an optimiser takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...methods import PromptMethod
from ...methods.base import LearningRates
from .adapter import MODULE, Adapter
from .attachment import get_attachment
from .tuners import find_base_model, has_tuner_layers

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
) -> list[dict[str, Any]]:
    """Return parameter groups with the learning rates that methods are trained with.

    Args:
        model: a model with a method attached.
        lr: for everything else: prefixes, offsets, and the modules that stay trainable. None: the method's usual rate.
        prompt_lr: for the soft prompt. None: ``lr``, and if that is None too, the method's usual rate, 0.3.
        gate_lr: for gates. None: ``lr``, and if that is None too, the method's usual rate. APT's gates are projections
            of a whole hidden state: at a rate that is right for the prefix, they are all at 1 within some tens of steps
            of Adam.
        peft_lr: for what PEFT trains, such as LoRA; 2e-4 is the rate of LoRA's paper.
        weight_decay: for all groups.

    The usual rates are the ``learning_rates`` of a method's configuration. They are meant for Adam.

    Raises:
        ValueError: the model has no method attached, none in use, or one that cannot be trained: it was merged, or PEFT
            has frozen it or put its layers into it.
    """
    adapter, base = get_attachment(model).adapter, find_base_model(model)
    if adapter.merged:
        raise ValueError("`model` must have an adapter that is not merged, which cannot be trained: detach it first.")
    adapter.check_untouched(base)
    method = adapter.method
    usual: LearningRates = method.config.learning_rates
    if has_tuner_layers(base) and adapter.trained and not any(p.requires_grad for p in method.parameters()):
        raise ValueError(
            "`model` must have an adapter that is trained, but all of its parameters are frozen. PEFT freezes them "
            "when it adds its layers: call fastprefix.set_adapter afterwards."
        )
    if lr is not None:
        usual = LearningRates(lr, lr, None)
    prompt = [method.prompt] if isinstance(method, PromptMethod) else []
    gate_rate = usual.gates if gate_lr is None else gate_lr
    gates = [] if gate_rate is None else [p for name, p in method.named_parameters() if "gate" in name]
    beside = _list_trained_beside(model, adapter)
    apart = {*prompt, *gates, *beside}
    rest = [p for p in model.parameters() if p.requires_grad and p not in apart]
    prompt_rate = usual.prompt if prompt_lr is None else prompt_lr
    groups = [(prompt, prompt_rate), (gates, gate_rate), (rest, usual.rest), (beside, peft_lr)]
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay} for parameters, rate in groups if parameters
    ]
