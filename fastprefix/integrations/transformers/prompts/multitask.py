"""Add ``task_ids`` to the calls of a model, and read the adapter that a multitask prompt starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ....methods import MultitaskPrompt, PromptMethod
from ..adapter import MODULE
from ..models.hooks import Forward, Interception
from ..models.tuners import find_base_model

NAME = "task_ids"
PEFT_NAMES = {"shared": "prompt_embeddings", "columns": "prefix_task_cols", "rows": "prefix_task_rows"}
"""The parameters of a multitask prompt, and their names in PEFT's files."""


@contextmanager
def selecting_tasks(method: MultitaskPrompt, task_ids: Tensor | None) -> Iterator[None]:
    """Use the prompts of these tasks in this context."""
    former, method.task_ids = method.task_ids, task_ids
    try:
        yield
    finally:
        method.task_ids = former


class TaskIds(Interception):
    """Remove ``task_ids`` from the calls of a module, and pass them to the method while the call runs."""

    keyword = NAME

    def __init__(self, module: nn.Module, method: MultitaskPrompt) -> None:
        super().__init__(module, self.run)
        self.method = method

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call without its ``task_ids``. A call inside another call uses those of the outer call."""
        if NAME not in kwargs and self.method.task_ids is not None:
            return forward(*args, **kwargs)
        with selecting_tasks(self.method, kwargs.pop(NAME, None)):
            return forward(*args, **kwargs)


class TaskIdsOfPeft(Interception):
    """Pass ``task_ids`` from the calls of a PEFT model to the multitask prompt in use on its base model.

    PEFT's own forward drops this argument. The interception outlasts ``detach``, and then changes nothing.
    """

    def __init__(self, peft_model: nn.Module) -> None:
        super().__init__(peft_model, self.run)

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call with the method's ``task_ids`` set, if a multitask prompt is in use."""
        method = getattr(find_base_model(self.module), MODULE, None)
        if not isinstance(method, MultitaskPrompt) or kwargs.get(NAME) is None:
            return forward(*args, **kwargs)
        with selecting_tasks(method, kwargs.pop(NAME)):
            return forward(*args, **kwargs)


def pass_task_ids(peft_model: nn.Module) -> None:
    """Make the calls of a PEFT model pass their ``task_ids`` to a multitask prompt."""
    if not isinstance(vars(peft_model).get("forward"), TaskIdsOfPeft):
        TaskIdsOfPeft(peft_model)


def list_task_handles(method: PromptMethod, *modules: nn.Module) -> list[Interception]:
    """Return interceptions that remove ``task_ids`` from the calls of modules, or no interceptions without tasks."""
    if not isinstance(method, MultitaskPrompt):
        return []
    return [TaskIds(module, method) for module in dict.fromkeys(modules)]


def count_tasks(method: object) -> int:
    """Return the number of tasks of a method whose calls accept ``task_ids``, or 0."""
    return method.config.num_tasks if isinstance(method, MultitaskPrompt) else 0


def read_source(directory: str) -> tuple[Tensor, Tensor, Tensor]:
    """Read the shared prompt ``[m, d]`` and the factors ``[K, m, q]`` and ``[K, q, d]`` of a saved adapter.

    Raises:
        FileNotFoundError: if the directory has no adapter.
        ValueError: if the adapter is damaged, or is not a multitask prompt of this package or of PEFT.
    """
    from ..files.saving import WEIGHTS_FILE, open_safetensors  # imported here to avoid a cycle

    path = Path(directory) / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"`source` must be an adapter directory, but '{directory}' has no {WEIGHTS_FILE}.")
    with open_safetensors(path) as file:
        found = set(file.keys())
        for names in (dict(zip(PEFT_NAMES, PEFT_NAMES, strict=True)), PEFT_NAMES):
            if found >= set(names.values()):
                shared, columns, rows = (file.get_tensor(name) for name in names.values())
                return shared, columns, rows
    raise ValueError(f"`source` must be a directory with a multitask prompt, but {path} does not contain one.")
