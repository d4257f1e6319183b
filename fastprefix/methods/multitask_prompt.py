"""Multitask prompt tuning (Wang et al., "Multitask prompt tuning enables parameter-efficient transfer learning", ICLR
2023).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.prompt_embedding import prompt_embedding
from .base import check_choice, check_count, check_positive, register
from .budget import find_largest, read_embedding_width
from .computed_prompt import ComputedPrompt
from .prompt_tuning import PromptTuning, PromptTuningConfig


@dataclass(kw_only=True)
class MultitaskPromptConfig(PromptTuningConfig):
    """A prompt for each task k, ``P_k = P* * (u_k v_k)``: a shared prompt times a low-rank matrix (elementwise).

    ``init`` specifies the initial values of ``P* [m, d]``. ``u_k [m, q]`` and ``v_k [q, d]`` start at normal(0, 0.02),
    as in the authors' code. Pass ``task_ids``, int64 ``[B]``, to the model to select the task of each row. With a
    single task, ``task_ids`` is optional.

    Args:
        num_tasks: the number of tasks.
        rank: rank ``q`` of the matrix of each task.
        source: directory of an adapter to start from. It must have been trained with this method or with PEFT's
            MULTITASK_PROMPT_TUNING. It is not saved.
        source_init: the values to copy from ``source``. "average" copies the shared prompt and the average ``u`` and
            ``v`` of its tasks. "task" copies the shared prompt and the ``u`` and ``v`` of one of its tasks. "shared"
            copies only the shared prompt.
        source_task: the task of the source for ``source_init="task"``.
    """

    num_tasks: int
    rank: int = 1
    source: str | None = field(default=None, repr=False)
    source_init: Literal["average", "task", "shared"] = "average"
    source_task: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("num_tasks", self.num_tasks)
        check_positive("rank", self.rank)
        check_choice("source_init", self.source_init, ("average", "task", "shared"))
        check_count("source_task", self.source_task)
        if self.source is None and (self.source_init, self.source_task) != ("average", 0):
            raise ValueError("`source_init` and `source_task` must be left out without `source`, which they describe")
        if self.source is not None and self.init != "random":
            raise ValueError(
                f'`init` must be "random" with `source`, because the prompt starts from the source, got "{self.init}"'
            )

    @classmethod
    def for_budget(
        cls, model: nn.Module, *, trainable: int, num_virtual_tokens: int, num_tasks: int, **options: Any
    ) -> "MultitaskPromptConfig":
        """Return the configuration with the largest ``q`` for which ``m d + K q (m + d) <= trainable`` (K tasks)."""
        d = read_embedding_width(model)
        each = num_tasks * (num_virtual_tokens + d)
        rank = find_largest("trainable", trainable, fixed=num_virtual_tokens * d, each=each)
        return cls(num_virtual_tokens, num_tasks=num_tasks, rank=rank, **options)


class MultitaskPrompt(PromptTuning, ComputedPrompt):
    """A shared prompt, and two factors for each task."""

    config: MultitaskPromptConfig

    def _make_prompt(self) -> None:
        """Create the shared prompt and the factors of each task."""
        of, d = self.config, self.shape.width
        self.shared = nn.Parameter(torch.empty(of.num_virtual_tokens, d))
        self.columns = nn.Parameter(torch.empty(of.num_tasks, of.num_virtual_tokens, of.rank))
        self.rows = nn.Parameter(torch.empty(of.num_tasks, of.rank, d))
        self.task_ids: Tensor | None = None
        """The task of each row of the call in progress, ``[B]``."""

    def reset_parameters(self, table: Tensor, init_ids: Tensor | None) -> None:
        """Initialize ``P*`` as specified by ``init``, and draw ``u`` and ``v`` from normal(0, 0.02)."""
        self._reset_prompt(self.shared, table, init_ids)
        nn.init.normal_(self.columns, std=0.02)
        nn.init.normal_(self.rows, std=0.02)

    def start_from(self, shared: Tensor, columns: Tensor, rows: Tensor) -> None:
        """Start from the shared prompt ``[m, d]`` and the factors ``[K, m, q]`` and ``[K, q, d]`` of source tasks.

        Raises:
            ValueError: the shapes do not match, or the source does not have the task ``source_task``.
        """
        of = self.config
        expected = [tuple(own.shape[-2:]) for own in (self.shared, self.columns, self.rows)]
        found = [tuple(given.shape[-2:]) for given in (shared, columns, rows)]
        if found != expected:
            raise ValueError(f"`source` must have a shared prompt and factors of shapes {expected}, but has {found}")
        if of.source_init == "task" and of.source_task >= len(columns):
            raise ValueError(
                f"`source_task` must be below the {len(columns)} tasks of the source, got {of.source_task}"
            )
        with torch.no_grad():
            self.shared.copy_(shared)
            for own, given in ((self.columns, columns), (self.rows, rows)):
                if of.source_init != "shared":
                    own.copy_(given.mean(0) if of.source_init == "average" else given[of.source_task])

    def compute_prompts(self) -> Tensor:
        """Compute the prompts of all tasks, ``[K, m, d]``."""
        return self.shared * (self.columns @ self.rows)

    def compute_prompt(self) -> Tensor:
        """Compute the prompt of the only task.

        Raises:
            ValueError: the configuration has several tasks.
        """
        if self.config.num_tasks > 1:
            raise ValueError(f"`num_tasks` must be 1 to get a single prompt, but is {self.config.num_tasks}")
        return self.compute_prompts()[0]

    def find_tasks(self, batch: int) -> Tensor:
        """Return the task of each row of the call in progress, ``[B]``.

        Raises:
            TypeError: ``task_ids`` is not an integer tensor.
            ValueError: ``task_ids`` is missing, has a wrong shape, or contains an id out of range.
        """
        ids = self.task_ids
        if ids is None:
            if self.config.num_tasks > 1:
                raise ValueError(
                    f"`task_ids` must be given. It selects one of {self.config.num_tasks} tasks for each row. If it is "
                    "given to a PEFT model, call fastprefix.set_adapter with that model first."
                )
            return torch.zeros(batch, dtype=torch.long, device=self.shared.device)
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"`task_ids` must be an int64 or int32 tensor, got {getattr(ids, 'dtype', type(ids))}.")
        if ids.shape != (batch,):
            raise ValueError(f"`task_ids` must be [{batch}], one for each row, but is {list(ids.shape)}.")
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and batch:
            least, most = int(ids.min()), int(ids.max())
            if least < 0 or most >= self.config.num_tasks:
                raise ValueError(
                    f"`task_ids` must be from 0 to {self.config.num_tasks - 1}, but has {least if least < 0 else most}."
                )
        return ids.to(self.shared.device)

    def repeat_prompt(self, batch: int) -> Tensor:
        """Return the prompt of each row's task, ``[B, m, d]``."""
        return self.compute_prompts()[self.find_tasks(batch)]

    def embed(self, input_ids: Tensor, table: Tensor, first_position: int, with_prompt: bool) -> Tensor:
        """Return the embeddings of each row's prompt and tokens. Prompts are spans of a store with all prompts."""
        if not with_prompt:
            return super().embed(input_ids, table, first_position, with_prompt)
        length = self.config.num_virtual_tokens
        start = self.find_tasks(len(input_ids)) * length
        spans = torch.stack([start, torch.full_like(start, length)], dim=1)
        store = self.compute_prompts().flatten(0, 1).to(table.dtype)
        return prompt_embedding(input_ids, table, store, prompt_spans=spans, prompt_length=length)


register("multitask_prompt", MultitaskPromptConfig, MultitaskPrompt)
