"""Saved adapters: ``adapter_model.safetensors`` with the parameters, ``adapter_config.json`` with the options.

The options stand in the header of the tensor file too, and that copy is the one that counts: a file is replaced in one
step, two files are not, so a save that is interrupted leaves either the old adapter or the new one, whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..._version import __version__
from ...methods import MethodConfig
from .attachment import MODULE, Model, attach_empty, attachment_of, detach

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_HEADER = "fastprefix"


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of a model into a directory, which is made if need be.

    Raises:
        ValueError: the model has no method attached, or one that was merged into the model's own weights.
    """
    attachment = attachment_of(model)
    if attachment.outside is not None:
        raise ValueError(
            f"model takes one whose adapter is whole; merged, {attachment.outside}: save it before merging"
        )
    assert isinstance(model, PreTrainedModel)
    description = {
        **attachment.config.to_dict(),
        "base_model_type": model.config.model_type,
        "base_model_class": type(model).__name__,
        "base_model_name_or_path": model.name_or_path,
        "fastprefix_version": __version__,
    }
    text = json.dumps(description, indent=2) + "\n"
    tensors = {name: p.detach().cpu().contiguous() for name, p in _parameters(model).items()}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={_HEADER: text}))
    _replace(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def load_adapter(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Attach the method that was saved in a directory, with its parameters; returns the model.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the adapter is damaged or of another model; the model is left as it was.
    """
    path = Path(directory) / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"directory takes a folder with {WEIGHTS_FILE}, got {directory}")
    config, tensors = _read(path, model)
    attach_empty(model, config)
    try:
        _fill(_parameters(model), tensors)
    except ValueError:
        detach(model)
        raise
    return model


def _parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What an adapter consists of: the method's parameters and those of the modules that stay trainable."""
    parameters = dict(model.get_submodule(MODULE).named_parameters())
    for name in attachment_of(model).saved_modules:
        for key, parameter in model.get_submodule(name).named_parameters():
            parameters[f"modules_to_save.{name}.{key}"] = parameter
    return parameters


def _read(path: Path, model: PreTrainedModel) -> tuple[MethodConfig, dict[str, Tensor]]:
    """Options and tensors of an adapter, checked against the model's type."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except Exception as error:
        raise ValueError(f"{path} takes a safetensors file, and cannot be read: {error}") from error
    if header is None:
        raise ValueError(f"{path} was not written by fastprefix.save_adapter: its header has no {_HEADER!r}")
    description: dict[str, Any] = json.loads(header)
    base = description.pop("base_model_type")
    for name in ("base_model_class", "base_model_name_or_path", "fastprefix_version"):
        description.pop(name)
    if base != model.config.model_type:
        raise ValueError(f"{path} is an adapter of a {base} model, got a {model.config.model_type} model")
    return MethodConfig.from_dict(description), tensors


def _fill(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copy tensors into parameters, all or, where names or shapes differ, none."""
    if names := sorted(parameters.keys() ^ tensors.keys()):
        raise ValueError(f"the adapter does not fit this model: {', '.join(names)} on one side only")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            got, takes = tuple(tensors[name].shape), tuple(parameter.shape)
            raise ValueError(f"the adapter does not fit this model: {name} takes {takes}, got {got}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then move it there in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
