"""Peak memory that a piece of work adds to what was held before it, as PyTorch's allocators count it."""

import gc
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def added_peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``work()`` needs at its peak beyond what is held before it.

    On a GPU the caching allocator keeps count. On a CPU nothing does, but the profiler sees every tensor's storage come
    and go; the resident set of the process would say the same within some 5 to 10 %, and differently each time.
    """
    gc.collect()
    return _on_gpu(work, device) if device.type == "cuda" else _on_cpu(work)


def _on_gpu(work: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _on_cpu(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = itertools.accumulate((int(change) for _, change in changes), initial=0)
    return max(held)
