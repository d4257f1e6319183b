"""Measure peers in interleaved rounds with rotating order, their added peak memory, and the environment.

Every figure is a row, a dictionary with its case, the peer and its role, the measured quantity, the quantiles and the
samples. This module only requires PyTorch, so that it also runs in other environments.
"""

import gc
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from fastprefix._native import find_instruction_set

ROOT = Path(__file__).parent.parent
PACKAGES = ("fastprefix", "torch", "transformers", "triton", "peft", "adapters", "datasets", "tokenizers")
LOWERING = ("ATEN_CPU_CAPABILITY", "FASTPREFIX_CPU", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""Environment variables that restrict the CPU instructions of PyTorch, this package or PyTorch's libraries."""
BUSY = 0.5
"""The highest average load per core, in the minute before a run, at which times are trusted."""

Role = Literal["floor", "ours", "theirs"]
Row = dict[str, Any]
Add = Callable[[list[Row], list[Row]], None]
"""A function that adds rows and faults to the results."""


class BenchmarkError(Exception):
    """An error that the user can correct. It is shown without a traceback."""


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def explain(option: str) -> Iterator[None]:
    """Convert errors inside the context to a ``BenchmarkError`` about an option, with a message of one line."""
    try:
        yield
    except Exception as error:  # readers of files and the network raise errors of many types
        raise BenchmarkError(f"{option}: {first_line(error)}") from error


def fault(case: Row, peer: str, stage: str, error: Exception) -> Row:
    """Describe the failure of a peer."""
    text = "".join(traceback.format_exception(error)).replace(f"{ROOT}{os.sep}", "")  # results are committed
    return {**case, "peer": peer, "stage": stage, "message": first_line(error), "traceback": text}


@contextmanager
def keep_going(add: Add, case: Row, peer: str, stage: str) -> Iterator[None]:
    """Add an error inside the context as a fault. The failure of one peer must not lose the results of the others."""
    try:
        yield
    except Exception as error:  # a peer can fail with any error
        add([], [fault(case, peer, stage, error)])


def time_call(work: Callable[[], object], device: torch.device) -> list[float]:
    """Return the seconds until a call is finished on the device.

    If the call returns a float, this number replaces the measured seconds.
    """
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else bool
    synchronize()
    start = time.perf_counter()
    own = work()
    synchronize()
    return [own if isinstance(own, float) else time.perf_counter() - start]


def count_until(seconds: float, *, least: int, warmup: int) -> Iterator[int]:
    """Yield the numbers of ``warmup`` rounds, then of at least ``least`` rounds until ``seconds`` have passed."""
    yield from range(warmup)
    end = time.perf_counter() + seconds
    for i in itertools.count():
        if i >= least and time.perf_counter() >= end:
            return
        yield warmup + i


def timed_row(case: Row, peer: str, role: Role, direction: str, samples: Sequence[float]) -> Row:
    """Return the row of the measured seconds of all rounds."""
    seconds = torch.tensor(samples, dtype=torch.float64)
    p50, p20, p80 = (seconds.quantile(percent / 100).item() for percent in (50, 20, 80))
    counts = {"rounds": len(samples), "samples": [round(sample, 9) for sample in samples]}
    return figure_row(case, peer, role, direction, "seconds", p50, p20=p20, p80=p80, **counts)


def figure_row(case: Row, peer: str, role: Role, direction: str, quantity: str, p50: float, **more: Any) -> Row:
    """Return the row of one measured figure."""
    return {**case, "peer": peer, "role": role, "direction": direction, "quantity": quantity, "p50": p50, **more}


class Work(NamedTuple):
    """The calls of a peer that are measured in a case, by direction."""

    role: Role
    calls: Mapping[str, Callable[[], object]]


def measure(
    case: Row,
    works: Mapping[str, Work],
    device: torch.device,
    rounds: Callable[[], Iterable[int]],
    *,
    warmup: int = 1,
    timer: Callable[[Callable[[], object], torch.device], list[float]] = time_call,
) -> tuple[list[Row], list[Row]]:
    """Time all peers of a case in interleaved rounds, then measure the memory of each. Return rows and faults.

    Each round begins with a different peer, so that drift affects all of them equally. Times of rounds below ``warmup``
    are discarded. A peer that fails is left out of the remaining rounds and directions.
    """
    rows, faults = list[Row](), list[Row]()

    def add(_: list[Row], found: list[Row]) -> None:
        faults.extend(found)

    def list_working(direction: str) -> list[str]:
        failed = {of["peer"] for of in faults}
        return [name for name, work in works.items() if direction in work.calls and name not in failed]

    for direction in dict.fromkeys(direction for work in works.values() for direction in work.calls):
        samples = {name: list[float]() for name in list_working(direction)}
        for i in rounds():
            names = list_working(direction)
            first = i % max(1, len(names))
            for name in names[first:] + names[:first]:
                with keep_going(add, case, name, direction):
                    seconds = timer(works[name].calls[direction], device)
                    samples[name] += seconds if i >= warmup else []
        for name in list_working(direction):
            about = (case, name, works[name].role, direction)
            rows.append(timed_row(*about, samples[name]))
            with keep_going(add, case, name, direction):
                rows.append(figure_row(*about, "bytes", added_peak(works[name].calls[direction], device)))
    return rows, faults


def freeze_heap() -> None:
    """Exclude existing objects from later garbage collections, which run before each measurement of memory."""
    gc.collect()
    gc.freeze()


def added_peak(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of ``work()`` in bytes, in addition to the memory that is allocated before it.

    On a GPU, the caching allocator counts the bytes. On a CPU, the profiler records when the storage of each tensor is
    allocated and freed. The resident set size of the process is not used, because it varies by 5 to 10 %.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate((int(change) for _, change in changes), initial=0))


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return the facts about the machine and the software on which a result depends."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": run_git("rev-parse", "HEAD"),
        "dirty": None if (changes := run_git("status", "--porcelain")) is None else bool(changes),
        **{name: find_version(name) for name in PACKAGES},
        "device": str(device),
        "device_name": find_device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bfloat16_products": bool(torch.cpu._is_avx512_bf16_supported()),
        "kernels": find_instruction_set(),
        "lowered": {name: os.environ[name] for name in LOWERING if name in os.environ},
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cuda": torch.version.cuda,
    }


def find_busyness(facts: Mapping[str, Any]) -> str | None:
    """Return a warning if other programs used the machine before a run."""
    load, cores = facts.get("load_average") or 0.0, facts.get("cpu_count") or 1
    return f"the machine was busy (load {load:.1f} on {cores} cores)" if load > BUSY * cores else None


def find_version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_git(*arguments: str) -> str | None:
    """Return the output of a git command in this checkout, or None without a checkout or git."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def find_device_name(device: torch.device) -> str:
    """Return the name of the GPU or the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*: (.*)$", facts, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()
