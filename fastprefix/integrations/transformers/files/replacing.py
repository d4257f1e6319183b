"""Replace files atomically, so that an interrupted write leaves the former file."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file in the same directory, then replace the file atomically."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # other threads and machines may write it too
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
