"""Read the clocks of the device, measure its peak rates, and time calls on it."""

import subprocess
import time
from collections.abc import Callable

import torch

CUDA = torch.device("cuda")
COPIED = 2**31  # bytes, several times the largest cache
WIDTH = 8192  # of the matrices in the measured product
_CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


def is_usable() -> bool:
    """Return True if the device still works in this process. After an illegal access, every later call fails."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def read_clocks() -> str | None:
    """Return the clocks, temperature and power of the device, or None if they cannot be read."""
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def time_with_triton(call: Callable[[], object], device: torch.device) -> list[float]:
    """Return the device time in seconds of each of several calls, at least one (a timer for ``measure``).

    The time includes gaps in which the device waits for the host.
    """
    from triton.testing import do_bench

    return [ms / 1e3 for ms in do_bench(call, warmup=1, rep=2, return_mode="all")]


def time_by_the_wall(call: Callable[[], object], seconds: float) -> float:
    """Return the wall time of a call in seconds, the mean of the calls that fit into ``seconds``."""
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        call()
        count += 1
        if count % 8 == 0:  # otherwise the host can be far ahead of the device
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def measure_ceilings() -> dict[str, float]:
    """Return the bytes per second that a copy reads and writes, and the operations per second of a bfloat16 product."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=CUDA).random_(0, 255)
    target = torch.empty_like(source)
    x, y = (torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16, device=CUDA) for _ in range(2))
    copying = sorted(time_with_triton(lambda: target.copy_(source), CUDA))
    multiplying = sorted(time_with_triton(lambda: x @ y, CUDA))
    return {
        "copied bytes in a second": 2 * COPIED / copying[len(copying) // 2],
        "bfloat16 operations in a second": 2 * WIDTH**3 / multiplying[len(multiplying) // 2],
    }
