"""Memory that must not be touched: a few small cases under ``compute-sanitizer``."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastprefix.parity import AttentionCase, Case, EmbeddingCase

from ..environment import ROOT
from .log import Log
from .parity import results
from .workers import compiled

SMALL: tuple[Case, ...] = (
    AttentionCase(Hq=4, N=150, M=170, P=77, D=64, gate="BhP", options={"is_causal": True}),
    AttentionCase(Hq=4, N=3, M=400, P=77, D=40, options={"is_causal": True}),
    AttentionCase(Hq=4, N=113, M=203, P=19, D=80, gate="BHNP", output_gate="BH", sinks=True),
    EmbeddingCase(B=3, N=113, S=100, d=129, r=19, V=211, offset="ffn"),
    EmbeddingCase(B=3, N=113, S=7, d=129, r=19, V=211, offset="low_rank"),
)
"""What the memory checker watches."""


def small_case(case: Case) -> dict[str, Any]:
    results(case, torch.bfloat16)
    torch.cuda.synchronize()
    return {}


def sanitizer(log: Log, seconds: float) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        log.add("sanitizer", {"skipped": "compute-sanitizer is not installed"})
        return
    end = time.monotonic() + seconds
    compiled(log, [(small_case, case) for case in SMALL], seconds / 2)
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu", "--small"]
    uncached = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    left = end - time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=uncached, capture_output=True, text=True, timeout=left, check=False)
    tail = (done.stdout + done.stderr)[-1500:]
    log.add("sanitizer", {"exit status": done.returncode, "output": tail})
    print(f"sanitizer: exit status {done.returncode}\n{tail[-400:]}", flush=True)
