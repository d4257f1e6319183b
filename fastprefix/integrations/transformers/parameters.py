"""Count the trainable parameters of a model with a method, and arrange them in groups for an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...methods import PromptMethod
from ...methods.base import LearningRates
from .adapter import MODULE, TOGETHER, Adapter, Attachment, Method
from .attachment import get_attachment
from .models.tuners import find_base_model, has_tuner_layers

PEFT = "peft"
"""The name of the group of the parameters that PEFT trains."""


@dataclass(frozen=True)
class ParameterCount:
    """The numbers of all parameters and of the trained parameters of a model. ``print`` shows them in one line.

    ``groups`` has the number of trained parameters of the method (key "fastprefix"), of each module that stays
    trainable (key: its name), of adapters that are trained together with it (key "fastprefix_together"), of PEFT's
    layers, such as LoRA (key "peft"), and of other parts that the caller has made trainable (key "other parts").
    """

    total: int
    groups: dict[str, int]

    @property
    def trainable(self) -> int:
        """Return the number of trained parameters."""
        return sum(self.groups.values())

    @property
    def share(self) -> float:
        """Return the fraction of the parameters that is trained."""
        return self.trainable / self.total

    def __str__(self) -> str:
        groups = ", ".join(f"{name} {count:,}" for name, count in self.groups.items()) or "nothing"
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.share:.4%}): {groups}"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model with a method, including the adapter in use.

    Args:
        model: a model with a method attached.

    Returns:
        The total number of parameters and the numbers of trained ones. A merged adapter has no trained parameters.

    Raises:
        ValueError: if the model has no method attached, or no adapter in use.
    """
    attachment, base = get_attachment(model), find_base_model(model)
    adapter = attachment.adapter
    together = [TOGETHER] if hasattr(base, TOGETHER) else []
    modules = [] if adapter.merged else [MODULE, *adapter.saved_modules, *together]
    groups, seen = {}, set[nn.Parameter]()
    for name in modules:
        trained = {p for p in base.get_submodule(name).parameters() if p.requires_grad} - seen
        groups[name] = sum(p.numel() for p in trained)
        seen |= trained
    others = _list_trained_beside(model, attachment)
    if not has_tuner_layers(base):
        others = [p for p in base.parameters() if p.requires_grad and p not in seen]
    if others:
        groups[PEFT if has_tuner_layers(base) else "other parts"] = sum(p.numel() for p in others)
    return ParameterCount(base.num_parameters(), groups)


def _list_trained_beside(model: nn.Module, attachment: Attachment) -> list[nn.Parameter]:
    """Return the parameters that PEFT trains beside the adapters, if the model has PEFT layers."""
    base = find_base_model(model)
    if not has_tuner_layers(base):
        return []
    modules = [base.get_submodule(name) for name in attachment.adapter.saved_modules]
    own = _list_of_methods(attachment) | {p for module in modules for p in module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p not in own]


def _list_of_methods(attachment: Attachment) -> set[nn.Parameter]:
    """Return the parameters of the methods of all adapters, in use or not."""
    return {p for each in attachment.adapters.values() for p in each.method.parameters()}


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
    """Return parameter groups with suitable learning rates, for any PyTorch optimizer.

    The default rates are the ``learning_rates`` of the method's configuration. They are meant for Adam.

    Args:
        model: a model with a method attached.
        lr: the rate of prefixes, offsets and the modules that stay trainable. None uses the method's default.
        prompt_lr: the rate of the soft prompt, or of the parameters that it is computed from. None uses ``lr``. If
            ``lr`` is also None, the method's default is used, which is 0.3 for most methods. Methods without a prompt
            ignore it.
        gate_lr: the rate of gates. None uses ``lr``, or the method's default if ``lr`` is also None. Methods without
            gates ignore it. APT's gates are projections of a whole hidden state. At the rate of the prefix, they would
            all saturate at 1 within some tens of steps of Adam.
        peft_lr: the rate of the parameters that PEFT trains. The default 2e-4 is the rate of the LoRA paper.
        weight_decay: the weight decay of all groups, except of key biases. Those of padded keys are -inf, and some
            optimizers would turn them into NaN.
        adapter_names: the adapters that are trained together, in batches whose rows name their adapters. They become
            parts of the model, so that Trainer, DistributedDataParallel and checkpoints include all of them. None
            selects the adapter in use.

    Returns:
        Dictionaries with the keys "params", "lr" and "weight_decay", one for each nonempty group.

    Raises:
        TypeError: if a rate is not a number.
        ValueError: if a rate is negative, if the model has no method attached or none in use, or if an adapter cannot
            be trained. That is the case if the adapter is merged, or PEFT has frozen it or has added layers to it.
    """
    rates: dict[str, Any] = {"lr": lr, "prompt_lr": prompt_lr, "gate_lr": gate_lr, "peft_lr": peft_lr}
    for name, rate in rates.items():
        if rate is not None and not isinstance(rate, Real | torch.Tensor):
            raise TypeError(f"`{name}` must be a number, got {rate!r}.")
        if rate is not None and not 0 <= float(rate) < float("inf"):
            raise ValueError(f"`{name}` must be a finite number of at least 0, got {rate}.")
    if isinstance(adapter_names, str) or (adapter_names is not None and not adapter_names):
        raise ValueError(f"`adapter_names` must be a list with at least one name, got {adapter_names!r}.")
    attachment, base = get_attachment(model), find_base_model(model)
    adapters = [attachment.adapter]
    if adapter_names is not None:
        adapters = [attachment.adapters[attachment.check_known(name)] for name in dict.fromkeys(adapter_names)]
    beside = _list_trained_beside(model, attachment)
    others = set(beside) | _list_of_methods(attachment)
    rest = [p for p in model.parameters() if p.requires_grad and p not in others]
    groups: list[tuple[list[nn.Parameter], float | None]] = []
    for adapter in adapters:
        _check_trained(base, adapter)
        method: Method = adapter.method
        usual = method.config.learning_rates if lr is None else LearningRates(lr, lr, None)
        gate_rate = usual.gates if gate_lr is None else gate_lr
        named = {name: p for name, p in method.named_parameters() if p.requires_grad}
        prompt = method.list_prompt_parameters() if isinstance(method, PromptMethod) else []
        gates = [] if gate_rate is None else [p for name, p in named.items() if "gate" in name]
        apart = {*prompt, *gates}
        rest += [p for p in named.values() if p not in apart]
        groups += [(prompt, usual.prompt if prompt_lr is None else prompt_lr), (gates, gate_rate), (rest, usual.rest)]
        rest = []
    biases = set[nn.Parameter]()
    if weight_decay != 0.0:
        biases = {p for adapter in adapters for name, p in adapter.method.named_parameters() if "key_biases" in name}
    options, seen = list[dict[str, Any]](), set[nn.Parameter]()
    for parameters, rate in (*groups, (beside, peft_lr)):
        if fresh := [p for p in parameters if p not in seen]:  # a composition shares the parameters of its parts
            for of, decay in (
                ([p for p in fresh if p not in biases], weight_decay),
                ([p for p in fresh if p in biases], 0.0),
            ):
                if of:
                    options.append({"params": of, "lr": rate, "weight_decay": decay})
            seen.update(fresh)
    attachment.together = set(adapter_names or ())
    attachment.register_together(base)
    return options


def _check_trained(base: PreTrainedModel, adapter: Adapter) -> None:
    if adapter.merged:
        raise ValueError(
            "`model` has a merged adapter, which cannot be trained. Detach it, then attach or load it again."
        )
    adapter.check_untouched(base)
    frozen = not any(p.requires_grad for p in adapter.method.parameters())
    if has_tuner_layers(base) and adapter.trained and frozen:
        raise ValueError(
            "`model` must have an adapter with trainable parameters, but all of them are frozen. PEFT freezes them "
            "when it adds its layers. Call fastprefix.set_adapter afterwards."
        )
