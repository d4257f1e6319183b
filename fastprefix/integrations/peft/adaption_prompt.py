"""Run PEFT's adaption prompts (LLaMA-Adapter) as one call of ``prefix_attention`` with an output gate.

PEFT runs an attention module and then computes its queries again for a second attention to the adaption prompt. It
projects the second output and adds it to the first.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..transformers.models.attention import (
    BINDING,
    CarriedBindings,
    GivenPrefix,
    carrying,
    get_carried_bindings,
    make_two_adapters_error,
)
from ..transformers.models.discovery import Layer
from ..transformers.models.hooks import Forward, Interception
from ..transformers.models.switching import runs_with_adapter
from ..transformers.sharding.tensor_parallel import TensorParallelHeads
from .prefix import CachedPrefix


class AdaptionPromptAcceleration(CachedPrefix):
    """The acceleration of adaption prompts: each adapted attention passes its prompt to the attention inside it.

    It covers all adapters of the PEFT model. Adapters that are added later run on PEFT's own code, with equal results.
    """

    def __init__(self, peft_model: Any, layers: list[Layer]) -> None:
        model: PreTrainedModel = peft_model.get_base_model()
        adapted = list(find_adapted_attentions(peft_model))
        self.adapter_model = peft_model.base_model
        self.heads = TensorParallelHeads.find(model, layers)
        super().__init__(model, [layer.module for layer in layers])  # last, since it changes the model
        self.handles += [Interception(m, functools.partial(self.run_adapted, m), (model,)) for m in adapted]

    def carry_without_prefix(self) -> CarriedBindings | None:
        """Return the bindings of a call whose adapted attentions provide their own prompts."""
        if not self.adapter_model._enabled:
            return super().carry_without_prefix()
        if runs_with_adapter(self.backbone) and any(hasattr(module, BINDING) for module in self.modules.values()):
            raise make_two_adapters_error()
        former = get_carried_bindings()
        return CarriedBindings({}) if former is None else former

    def run_adapted(
        self, adapted: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Compute what ``AdaptedAttention.forward`` computes."""
        attention = adapted.model
        key, value = (
            project(adapted.adaption_prompt)[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for project in (attention.k_proj, attention.v_proj)
        )
        gate = adapted.adaption_gate.reshape(1, 1)
        binding = GivenPrefix(key, value, output_gate=gate if self.heads is None else self.heads.share(gate))
        with carrying(CarriedBindings({attention: binding})):
            output, weights = attention(*args, **kwargs)
        return output, weights


def find_adapted_attentions(peft_model: Any) -> set[Any]:
    """Return PEFT's adapted attention modules of all adapters, active or not."""
    waiting = peft_model.base_model._cached_adapters.values()
    active = (module for module in peft_model.modules() if hasattr(module, "adaption_gate"))
    return {*active, *(module for modules in waiting for module in modules)}


def find_reason_not_fusable(module: nn.Module) -> str | None:
    """Return the reason why an adapted attention cannot be computed in one call, or None if it can."""
    attention: Any = module.model
    if not hasattr(attention, "o_proj"):
        return "PEFT adds this model's adaption prompts after the output projection"
    if attention.o_proj.bias is not None:
        return "its output projection has a bias, which PEFT adds twice"
    return None
