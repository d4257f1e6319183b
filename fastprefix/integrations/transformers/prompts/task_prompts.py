"""Run the prompts of several tasks once for the whole batch.

The keys and values of all tasks' prompts are concatenated in each layer, and each row attends to the span of its own
task. The tasks of a sequence are stored on its key/value cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ....methods import MultitaskPrompt
from ..models.attention import Prefix
from ..models.discovery import Layer
from ..models.hooks import count_past, find_cache
from ..prefixes.gates import hold_by_row, select_rows
from .multitask import selecting_tasks
from .shared_prompt import PromptCall, SharedPrompt, SharedPromptHooks

_TASKS = "fastprefix_tasks"
"""The attribute of a key/value cache that holds the tasks of its rows."""


class HeldTasks:
    """The tasks of a cache's rows, int64 ``[B]``."""

    def __init__(self, tasks: Tensor) -> None:
        self.tasks = tasks

    def select_rows(self, name: str, rows: Any) -> HeldTasks:
        """Return the tasks of the rows that the cache method ``name`` selects when it is called with ``rows``."""
        return HeldTasks(select_rows(self.tasks, name, rows))


class TaskPromptHooks(SharedPromptHooks):
    """A multitask prompt on a decoder. The prompts of all tasks run in one batch."""

    method: MultitaskPrompt

    def __init__(self, model: PreTrainedModel, method: MultitaskPrompt, layers: list[Layer], required: bool) -> None:
        super().__init__(model, method, layers, required)
        self.count = method.config.num_tasks
        self.tasks: Tensor | None = None  # the task of each row of the call in progress

    def find_reason_against(self, arguments: dict[str, Any]) -> str | None:
        """Return the reason why a call must run the prompt in every row, or None."""
        tokens = next(each for each in self.read_tokens(arguments) if each is not None)
        trains = torch.is_grad_enabled() and count_past(arguments) == 0 and not self.required
        if trains and len(tokens) < self.method.config.num_tasks:
            return "the batch has fewer rows than tasks"
        return super().find_reason_against(arguments)

    def compute_prompts(self) -> Tensor:
        """Compute the prompts of all tasks, ``[K, m, d]``."""
        return self.method.compute_prompts()

    def run_prompt(self, call: PromptCall | None = None) -> dict[int, Prefix]:
        """Compute the keys and values of all prompts in every layer, concatenated along the tokens."""
        every = torch.arange(self.method.config.num_tasks, device=self.method.shared.device)
        with selecting_tasks(self.method, every):
            return super().run_prompt(call)

    def find_spans(self, batch: int, arguments: dict[str, Any], past: int) -> Tensor:
        """Return the span of each row's task, int64 ``[B, 2]``. Calls that continue a cache use its tasks.

        Raises:
            ValueError: if ``task_ids`` is missing, does not fit the rows, or differs from the tasks of the cache.
        """
        held = None
        if past > 0 and not torch.compiler.is_compiling():
            held = getattr(find_cache(arguments), _TASKS, None)
        if held is None:
            self.tasks = self.method.find_tasks(batch)
        else:
            self.tasks = held.tasks
            given = self.method.task_ids
            if isinstance(given, Tensor) and given.device.type == "cpu" and given.tolist() != held.tasks.tolist():
                raise ValueError(
                    f"`task_ids` must be the tasks of `past_key_values`, {held.tasks.tolist()}, but are "
                    f"{given.tolist()}. Omit `task_ids` when you continue a cache."
                )
        length = self.method.config.num_virtual_tokens
        return torch.stack([self.tasks * length, torch.full_like(self.tasks, length)], dim=1)

    def remember(self, cache: Any, shared: SharedPrompt) -> None:
        """Also store the tasks of the rows on a cache that this call began."""
        super().remember(cache, shared)
        if shared.past == 0 or not hasattr(cache, _TASKS):
            assert self.tasks is not None
            hold_by_row(cache, _TASKS, HeldTasks(self.tasks))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out state that exists only while a model runs."""
        return {**super().__getstate__(), "tasks": None}
