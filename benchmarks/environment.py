"""What a result depends on beside the code: versions, device, threads, date."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "triton", "peft", "datasets", "tokenizers")
BUSY = 0.5
"""The load a core, from the minute before the run, that is worth a warning."""


def describe(device: torch.device) -> dict[str, object]:
    """The facts to keep with every result."""
    import fastprefix

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "fastprefix": fastprefix.__version__,
        **checkout(),
        **{name: version(name) for name in PACKAGES},
        "device": str(device),
        "device_name": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bfloat16_products": bool(torch.cpu._is_avx512_bf16_supported()),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cuda": torch.version.cuda,
    }


def busy(facts: Mapping[str, Any]) -> str | None:
    """The warning that others used the machine before the run; None where they did not, or nobody knows."""
    load, cores = facts.get("load_average"), facts.get("cpu_count")
    if not load or not cores or load <= BUSY * cores:
        return None
    return f"the machine was busy (load {load:.1f} on {cores} cores): measure again before you believe this"


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def checkout() -> dict[str, object]:
    """The commit that the code is at and whether files differ from it; None where this is no checkout."""
    if not (ROOT / ".git").exists():
        return {"commit": None, "dirty": None}
    return {"commit": _git("rev-parse", "HEAD") or None, "dirty": bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or a tree that it does not trust
        return ""
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
