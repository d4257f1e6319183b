"""Save and load an adapter with the checkpoints of its PEFT model, which contain only PEFT's own parameters.

A model of ``transformers`` with layers from ``add_adapter`` saves like a PEFT model. Its checkpoints are not loaded.

``save_pretrained`` of the PEFT model, which ``Trainer`` calls, also writes the adapter into a subfolder that PEFT
ignores, and removes the files of adapters that were detached. ``load_adapter`` of the PEFT model, with which
``Trainer`` resumes and returns to the best checkpoint, also reads it. It reads only PEFT's files in directories that
are not checkpoints of ``Trainer``, and if the PEFT adapter is not in use already, since it is then an addition to the
model.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..models.tuners import find_base_model
from ..sharding.tensor_parallel import is_sharded
from .saving import read_carried, write_carried

_TRAINER = "trainer_state.json"
"""The file that identifies a checkpoint of ``Trainer``."""


def carry_in_checkpoints(peft_model: nn.Module) -> None:
    """Make a PEFT model also save and load the adapter in use on its base model.

    This outlasts ``detach``, after which ``save_pretrained`` removes the files of adapters from a directory.
    """
    vars(peft_model)["save_pretrained"] = functools.partial(save_with_adapter, peft_model)
    vars(peft_model)["load_adapter"] = functools.partial(_load, peft_model)


def save_with_adapter(peft_model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """Save PEFT's parameters and the adapter in use, as ``save_pretrained`` of this model."""
    base, write = find_base_model(peft_model), None
    if kwargs.get("is_main_process", True) or is_sharded(base):
        write = write_carried(base, Path(save_directory))  # before PEFT writes its files
    result = type(peft_model).save_pretrained(peft_model, save_directory, *args, **kwargs)
    if write is not None:
        write()
    return result


def _load(peft_model: Any, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    path = Path(model_id)
    checkpoint = next((folder for folder in (path, path.parent) if (folder / _TRAINER).is_file()), None)
    load = None
    if checkpoint is not None and adapter_name in peft_model.active_adapters:
        load = read_carried(find_base_model(peft_model), checkpoint)  # before PEFT changes the model
    result = type(peft_model).load_adapter(peft_model, model_id, adapter_name, *args, **kwargs)
    if load is not None:
        load()
    return result
