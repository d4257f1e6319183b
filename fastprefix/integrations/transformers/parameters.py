"""The trainable parameters of a model with a method: counted, and as an optimiser takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...methods import PromptMethod
from .adapter import MODULE
from .attachment import get_attachment, get_method


@dataclass(frozen=True)
class ParameterCount:
    """The numbers of a model's parameters, in all and trained. ``print`` shows them in a line.

    ``groups`` has the trained ones by what they belong to: the method (under "fastprefix") and the modules that stay
    trainable, each under its name.
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
    adapter = get_attachment(model).adapter
    modules = () if adapter.merged else (MODULE, *adapter.saved_modules)
    assert isinstance(model, PreTrainedModel)
    groups = {
        name: sum(p.numel() for p in model.get_submodule(name).parameters() if p.requires_grad) for name in modules
    }
    return ParameterCount(model.num_parameters(), groups)


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    prompt_lr: float | None = None,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return parameter groups with the learning rates that methods are trained with.

    Args:
        model: a model with a method attached.
        lr: for everything else: prefixes, offsets, and the modules that stay trainable.
        prompt_lr: for the soft prompt, or what it is computed from; None: ``lr``.
        gate_lr: for gates; None: ``lr``. APT's are projections of a whole hidden state: at a rate that is right for the
            prefix, they are all at 1 within some tens of steps of Adam.
        weight_decay: for all groups.

    Raises:
        ValueError: the model has no method attached, none in use, or one that was merged and cannot be trained.
    """
    if get_attachment(model).adapter.merged:
        raise ValueError("`model` must have an adapter that is not merged, which cannot be trained: detach it first.")
    method = get_method(model)
    prompt = method.list_prompt_parameters() if isinstance(method, PromptMethod) else []
    gates = [] if gate_lr is None else [p for name, p in method.named_parameters() if "gate" in name]
    apart = {*prompt, *gates}
    rest = [p for p in model.parameters() if p.requires_grad and p not in apart]
    groups = [(prompt, prompt_lr), (gates, gate_lr), (rest, None)]
    return [
        {"params": parameters, "lr": lr if own_lr is None else own_lr, "weight_decay": weight_decay}
        for parameters, own_lr in groups
        if parameters
    ]
