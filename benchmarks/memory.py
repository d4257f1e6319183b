"""Peak memory that a piece of work adds to what was resident before it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size to the present one


def added_peak(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that ``work()`` needs at its peak beyond what is held before it; None where that cannot be measured.

    On a GPU the allocator says it. On a CPU it is the resident set, after the C library has given its free pages back
    to the system: without that, memory that earlier work had freed would be used again unseen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _return_free_pages():
        return None
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _return_free_pages() -> bool:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _CLEAR.write_text(_RESET_PEAK)
    except (OSError, AttributeError):  # not Linux, not glibc, or a container that forbids it
        return False
    return True


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {name}")
