"""Files of tensors, opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: it cannot be read, and why.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # a damaged file fails in its own way, when it is opened or when a tensor is read
        raise ValueError(f"{path} takes a safetensors file, and cannot be read: {error}") from error
