"""An adapter out of a checkpoint of the whole model, as Trainer and ``save_pretrained`` write it of an attached model.

The adapter's options stand in the model's configuration meanwhile, its parameters among the model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...methods import MethodConfig
from .adapters import MODULE, OPTIONS
from .heads import trainable_modules
from .tensor_files import opened


def read_whole(folder: Path, model: PreTrainedModel) -> tuple[MethodConfig, dict[str, Tensor]] | None:
    """The method and its parameters under the names of an adapter file; None: there is no such checkpoint.

    Raises:
        ValueError: it is of another model, or damaged.
    """
    path = folder / CONFIG_NAME
    files = _files(folder)
    if not path.is_file() or not files:
        return None
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if OPTIONS not in description:
        return None
    if description.get("model_type") != model.config.model_type:
        raise ValueError(f"{path} is of a {description.get('model_type')} model, got a {model.config.model_type} model")
    config = MethodConfig.from_dict(description[OPTIONS])
    renamed = {f"{MODULE}.": ""}
    renamed |= {f"{name}.": f"modules_to_save.{name}." for name in trainable_modules(model, config.modules_to_save)}
    tensors: dict[str, Tensor] = {}
    for path in files:
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                for begin, instead in renamed.items():
                    if key.startswith(begin):
                        tensors[instead + key.removeprefix(begin)] = file.get_tensor(key)
    return config, tensors


def _files(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return [folder / SAFE_WEIGHTS_NAME] if (folder / SAFE_WEIGHTS_NAME).is_file() else []
