"""What a run writes: results after every step, and the machine that they are of."""

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastprefix

from .clock import TIMING


class Log:
    """The results so far, on disk after every step; a stage goes on where the last one ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, stage: str, row: dict[str, Any]) -> None:
        self.results.setdefault(stage, []).append(row)
        self.save()

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._path.with_name(self._path.name + ".new")  # a stage may be ended while it writes
        whole.write_text(json.dumps(self.results, indent=1, default=str))
        whole.replace(self._path)


def environment() -> dict[str, Any]:
    import triton

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "driver": driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "fastprefix": fastprefix.__version__,
        "timing": TIMING,
    }


def driver() -> str | None:
    """Its version, where ``nvidia-smi`` is there to say."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return None
