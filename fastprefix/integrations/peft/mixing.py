"""Run the rows of one batch with different adapters of an accelerated PEFT model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..transformers.mixed_batches.mixed_call import BASE, MixedCall, MixedRows, Part
from ..transformers.mixed_batches.mixing import MixtureHooks, check_rows
from ..transformers.mixed_batches.span_store import KeyedPrefix, SpanStore
from ..transformers.models.attention import make_two_adapters_error
from ..transformers.models.discovery import Layer
from ..transformers.models.switching import find_device, runs_with_adapter


class PeftMixture(MixtureHooks):
    """The hooks of a call of a PEFT model whose rows have different adapters."""

    def __init__(
        self,
        peft_model: Any,
        layers: Sequence[Layer],
        read: Callable[[], Mapping[nn.Module, KeyedPrefix]] | None,
    ) -> None:
        super().__init__(peft_model.base_model, layers, SpanStore())
        self.peft_model = peft_model
        self.read = read
        """Returns the active adapter's keys and values with gradients to its parameters. None if it has a prompt."""

    def run_with(self, names: tuple[str, ...], function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run the base model or its ``generate`` with one adapter per row."""
        check_rows(names, arguments)
        self._check_shared_parts()
        if runs_with_adapter(self.backbone):
            raise make_two_adapters_error()
        parts = [self._make_part(name) for name in dict.fromkeys(names) if name != BASE]
        rows = MixedRows(names, parts, find_device(self.model))
        self.install(parts)
        try:
            self.call = self.make_call(rows)
            if not torch.is_grad_enabled():
                self.call.set_prefixes(self.compute_prefixes(parts))
            return function(**arguments)
        finally:
            self.call = None
            self.remove()

    def _check_shared_parts(self) -> None:
        """Refuse adapters whose rows would need different modules of the base model, or different tasks."""
        if trained := self.peft_model.modules_to_save:
            raise ValueError(
                f"`adapter_names` must not be given to a PEFT model that trains modules of the base model "
                f"({', '.join(sorted(trained))}), since all rows would use those of the active adapter. Run each "
                "adapter in its own batch, with set_adapter."
            )
        if self.peft_model.peft_type == "MULTITASK_PROMPT_TUNING":
            raise ValueError(
                "`adapter_names` must not be given to a PEFT model with multitask prompts. Pass `task_ids` instead, "
                "which may differ between rows."
            )

    def _make_part(self, name: str) -> Part:
        configs = self.peft_model.peft_config
        if name not in configs:
            raise ValueError(f"`adapter_names` must contain names of adapters, {[*configs, BASE]}, but has {name!r}.")
        length = configs[name].num_virtual_tokens
        indices = {module: index for index, module in enumerate(self.layers)}
        return Part(name, length, length, indices, is_prompt=self.read is None)

    def compute_prefixes(self, parts: Sequence[Part]) -> list[dict[nn.Module, KeyedPrefix]]:
        """Return the keys and values of each adapter by attention module."""
        if self.read is not None:
            prefixes = []
            for part in parts:
                with self._active(part.name):
                    prefixes.append(dict(self.read()))
            return prefixes
        prompts = []
        for part in parts:
            with self._active(part.name):
                prompts.append(type(self.peft_model).get_prompt(self.peft_model, 1)[0])
        return self.run_prompts([SimpleNamespace(prompt=prompt) for prompt in prompts])

    def _arrange(self, arguments: dict[str, Any], call: MixedCall) -> dict[str, Any]:
        """Return the arguments with shifted positions. With prompts, PEFT counts positions including padding."""
        if self.read is None:
            arguments.pop("position_ids", None)
        return super()._arrange(arguments, call)

    @contextmanager
    def _active(self, name: str) -> Iterator[None]:
        """Make an adapter the active one of the PEFT model in this context."""
        former, self.peft_model.active_adapter = self.peft_model.active_adapter, name
        try:
            yield
        finally:
            self.peft_model.active_adapter = former
