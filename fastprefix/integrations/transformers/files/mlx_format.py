"""Write a prefix as a prompt cache of MLX-LM, which reads a list of arrays from a safetensors file.

Both layouts store the keys of layer i as ``i.0`` and the values as ``i.1``, each ``[1, Hkv, m, D]``. Since version 0.32
the number of tokens follows as ``i.2``. The file's metadata contain the caller's metadata, the class of each layer's
cache, and the arrays that represent numbers. Before 0.32 they contained the state of each cache, the caller's metadata
and the classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.attention import Prefix
from .replacing import replace_file

FORMATS = ("mlx", "mlx-0.31")
_CLASS = "KVCache"
_NUMBER = "scalar"


def write_prompt_cache(path: Path, pairs: Sequence[Prefix], format: str, about: Mapping[str, str]) -> None:
    """Write keys and values of all layers, ``[1, Hkv, m, D]``, for MLX-LM since 0.32 ("mlx") or before ("mlx-0.31").

    MLX-LM returns ``about`` as the file's metadata.
    """
    arrays: dict[str, Tensor] = {}
    for layer, (key, value) in enumerate(pairs):
        arrays[f"{layer}.0"], arrays[f"{layer}.1"] = key.cpu().contiguous(), value.cpu().contiguous()
    layers = range(len(pairs))
    if format == "mlx":
        arrays |= {f"{layer}.2": torch.tensor(pairs[layer][0].shape[2], dtype=torch.int32) for layer in layers}
        metadata = {f"0.{name}": text for name, text in about.items()}
        metadata |= {f"1.{layer}": _CLASS for layer in layers}
        metadata["2.0"] = ""  # MLX-LM drops empty lists, so the list begins with an empty string
        for layer in layers:
            metadata |= {f"2.{layer + 1}.0": f"{layer}.2", f"2.{layer + 1}.1": _NUMBER}
    else:
        metadata = {f"0.{layer}": "" for layer in layers}
        metadata |= {f"1.{name}": text for name, text in about.items()}
        metadata |= {f"2.{layer}": _CLASS for layer in layers}
    replace_file(path, lambda place: save_file(arrays, place, metadata=metadata))
