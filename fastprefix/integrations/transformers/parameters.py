"""The trainable parameters of a model with a method, as an optimiser takes them."""

from typing import Any

from torch import nn

from ...methods import PromptMethod
from .attachment import method_of


def parameter_groups(
    model: nn.Module, *, lr: float, prompt_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups with the two learning rates that prompt methods are trained with.

    Args:
        model: a model with a method attached.
        lr: for everything but a soft prompt: prefixes, offsets, gates, and the modules that stay trainable.
        prompt_lr: for the soft prompt; None: ``lr``.
        weight_decay: for all groups.
    """
    method = method_of(model)
    prompt = {method.prompt} if isinstance(method, PromptMethod) else set()
    rest = [p for p in model.parameters() if p.requires_grad and p not in prompt]
    groups: list[dict[str, Any]] = []
    if prompt:
        groups.append({"params": list(prompt), "lr": lr if prompt_lr is None else prompt_lr})
    if rest:
        groups.append({"params": rest, "lr": lr})
    return [{**group, "weight_decay": weight_decay} for group in groups]
