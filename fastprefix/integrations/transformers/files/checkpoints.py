"""Save and load an adapter with the checkpoints of its PEFT model, which contain only PEFT's own parameters.

``save_pretrained`` of the PEFT model, which ``Trainer`` calls, also writes the adapter into a subfolder that PEFT
ignores. ``load_adapter`` of the PEFT model, with which ``Trainer`` resumes and returns to the best checkpoint, also
reads it. In directories that are not checkpoints of ``Trainer`` it reads only PEFT's files.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..attachment import get_active_name
from ..models.tuners import find_base_model
from ..sharding.tensor_parallel import is_sharded
from .saving import read_carried, write_carried

_TRAINER = "trainer_state.json"
"""The file that identifies a checkpoint of ``Trainer``."""


def carry_in_checkpoints(peft_model: nn.Module) -> None:
    """Make a PEFT model also save and load the adapter in use on its base model."""
    attributes: dict[str, Any] = vars(peft_model)
    attributes["save_pretrained"] = functools.partial(_save, peft_model)
    attributes["load_adapter"] = functools.partial(_load, peft_model)


def leave_checkpoints(peft_model: nn.Module) -> None:
    """Undo ``carry_in_checkpoints``."""
    for name in ("save_pretrained", "load_adapter"):
        vars(peft_model).pop(name, None)


def _save(peft_model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    result = type(peft_model).save_pretrained(peft_model, save_directory, *args, **kwargs)
    base = find_base_model(peft_model)
    if kwargs.get("is_main_process", True) or is_sharded(base):
        write_carried(base, Path(save_directory))
    return result


def _load(peft_model: Any, model_id: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    result = type(peft_model).load_adapter(peft_model, model_id, *args, **kwargs)
    path = Path(model_id)
    checkpoint = next((folder for folder in (path, path.parent) if (folder / _TRAINER).is_file()), None)
    base = find_base_model(peft_model)
    if checkpoint is not None and get_active_name(base) is not None:
        read_carried(base, checkpoint)
    return result
