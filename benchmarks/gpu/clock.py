"""Device time and memory of calls, by turns."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .inputs import Call, randn

CYCLES = 2e9  # a second; hardly any device has more
TIMING = (
    "device time by CUDA events; the device spins until a call's launches are queued, so Python's time is not in it"
)


def launch_cycles(call: Call) -> int:
    """Cycles that a device must spin for a call to be queued whole meanwhile: twice what Python took, at most 25 ms."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return int(min(0.025, 2 * (time.perf_counter() - start)) * CYCLES)


def time_calls(calls: dict[str, Call], repeats: int = 12) -> dict[str, float]:
    """Median milliseconds of each (see ``TIMING``); the order rotates, and the cache is swept before each."""
    if not calls:
        return {}
    sweep = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    cycles = {name: launch_cycles(call) for name, call in calls.items()}
    names = list(calls)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            sweep.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles[name])
            start.record()
            calls[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(s.elapsed_time(e) for s, e in pairs) for name, pairs in events.items()}


def peak_memory(call: Call) -> int:
    """Bytes that a call allocates at its peak, over what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def trained(function: Callable[[], Tensor], x: dict[str, Any]) -> Call:
    """Forward and backward, every gradient."""
    leaves = [v for v in x.values() if isinstance(v, Tensor) and v.requires_grad]
    grad_output = randn(*x["query"].shape[:3], x["value"].shape[3])

    def call() -> Tensor:
        first: Tensor = torch.autograd.grad(function(), leaves, grad_output, allow_unused=True)[0]
        return first

    return call


def inferred(function: Callable[[], Tensor]) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return function()

    return call
