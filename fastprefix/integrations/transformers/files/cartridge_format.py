"""Read cartridges in the format of the authors' code (arXiv 2506.06266), without running code from the file.

A file of ``torch.save`` contains ``trainable_keys`` and ``trainable_values``. Frozen tokens are stored as
``frozen_keys`` and ``frozen_values`` (``fixed_keys`` and ``fixed_values`` in older files). Each is an
``nn.ParameterList`` with a tensor ``[1, Hkv, tokens, D]`` per layer. Without frozen tokens these lists are empty. The
positions of the tokens follow those of the cartridge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....methods import PrefixTuningConfig
from ..models.discovery import find_layers

NAMES = ("cache_last.pt", "kv_cache.torch")
"""The names of the files with the final cartridge in the authors' code."""


def find_cartridge(path: Path) -> Path | None:
    """Return the path of a cartridge: the path itself if it is a file, or a known file in the folder, or None."""
    if path.is_file():
        return path
    return next((path / name for name in NAMES if (path / name).is_file()), None)


def read_cartridge(path: Path, model: PreTrainedModel) -> tuple[PrefixTuningConfig, dict[str, Tensor]]:
    """Read a cartridge as a configuration and parameters under this package's names.

    Raises:
        ValueError: if the file cannot be read as a cartridge without running its code, or belongs to another model.
    """
    lists = _read_lists(path)
    layers = find_layers(model)
    shapes = [(layer.shape.kv_heads, layer.shape.key_size, layer.shape.value_size) for layer in layers]
    lengths = set()
    parameters: dict[str, Tensor] = {}
    for name, tensors in lists.items():
        which, frozen = name.rpartition("_")[2], not name.startswith("trainable")
        if frozen and not any(tensor.numel() for tensor in tensors):
            continue
        if frozen and f"prefix.frozen_{which}.0" in parameters:
            raise ValueError(f"The cartridge {path} must have frozen or fixed tokens, but has both.")
        if len(tensors) != len(layers):
            raise ValueError(f"{name!r} in {path} must have {len(layers)} layers for `model`, but has {len(tensors)}.")
        for i, (tensor, (heads, *sizes)) in enumerate(zip(tensors, shapes, strict=True)):
            size = sizes[which == "values"]
            if tensor.ndim != 4 or tensor.shape[:2] != (1, heads) or tensor.shape[3] != size:
                raise ValueError(
                    f"{name!r} in {path} must have [1, {heads}, tokens, {size}] in layer {i} for `model`, but has "
                    f"{list(tensor.shape)}."
                )
            lengths.add((frozen, tensor.shape[2]))
            parameters[f"prefix.{'frozen_' * frozen}{which}.{i}"] = tensor[0]
    counts = dict(lengths)
    if len(counts) != len(lengths):
        raise ValueError(f"The cartridge {path} must have the same number of tokens in every layer, but does not.")
    length = sum(counts.values())
    config = PrefixTuningConfig(length, prefix_position="shift", num_frozen_tokens=counts.get(True, 0))
    return config, parameters


def _read_lists(path: Path) -> dict[str, list[Tensor]]:
    """Read the lists of tensors in a file by name."""
    try:
        with torch.serialization.safe_globals([nn.ParameterList]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file, or one that would run code
        raise ValueError(f"The cartridge {path} cannot be read: {error}") from error
    required = ("trainable_keys", "trainable_values")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), nn.ParameterList) for name in required):
        raise ValueError(f"The cartridge {path} must contain the parameter lists {' and '.join(required)}.")
    names = (*required, *(f"{kind}_{which}" for kind in ("frozen", "fixed") for which in ("keys", "values")))
    return {name: [tensor.detach() for tensor in content[name]] for name in names if content.get(name) is not None}
