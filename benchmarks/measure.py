"""Measure peers side by side: interleaved rounds in rotating order, added peak memory, and the environment.

Every figure is a row: a plain dictionary with the values of its case, the peer and its role, what was measured, the
quantiles and the samples. Only PyTorch is needed, so that other environments can measure too.
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

from fastprefix._native import instruction_set

ROOT = Path(__file__).parent.parent
PACKAGES = ("fastprefix", "torch", "transformers", "triton", "peft", "adapters", "datasets", "tokenizers")
LOWERING = ("ATEN_CPU_CAPABILITY", "FASTPREFIX_CPU", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""Environment variables that keep PyTorch, this package or PyTorch's libraries from instructions of the CPU."""
BUSY = 0.5
"""Times are not trusted above this load per core, averaged over the minute before a run."""

Role = Literal["floor", "ours", "theirs"]
Row = dict[str, Any]


class BenchmarkError(Exception):
    """Report a mistake that the user can correct. It is shown without a traceback."""


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def explain(option: str) -> Iterator[None]:
    """Report any error inside, in one line, as a mistake in an option."""
    try:
        yield
    except Exception as error:  # readers of files and the network raise errors of many types
        raise BenchmarkError(f"{option}: {first_line(error)}") from error


def fault(case: Row, peer: str, stage: str, error: Exception) -> Row:
    """Describe the failure of a peer."""
    text = "".join(traceback.format_exception(error))
    return {**case, "peer": peer, "stage": stage, "message": first_line(error), "traceback": text}


def time_call(work: Callable[[], object], device: torch.device) -> list[float]:
    """Return the seconds that a call takes until the device has done all of its work.

    A call that returns a number has timed itself: these are its seconds.
    """
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else bool
    synchronize()
    start = time.perf_counter()
    own = work()
    synchronize()
    return [own if isinstance(own, float) else time.perf_counter() - start]


def count_until(seconds: float, *, least: int, warmup: int) -> Iterator[int]:
    """Yield the numbers of ``warmup`` rounds, of those that begin within ``seconds``, and of ``least`` in any case."""
    yield from range(warmup)
    end = time.perf_counter() + seconds
    for i in itertools.count():
        if i >= least and time.perf_counter() >= end:
            return
        yield warmup + i


def interleave(
    jobs: Mapping[str, Callable[[], list[float]]], rounds: Iterable[int], warmup: int = 0
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Run every job once per round. Each round begins with another job, so that drift affects all of them alike.

    Rounds numbered below ``warmup`` are run and not kept. A job that raises an error is left out of later rounds.
    Return the seconds of the jobs that succeeded and the errors of the others.
    """
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    errors: dict[str, Exception] = {}
    for i in rounds:
        names = [name for name in jobs if name not in errors]
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            try:
                seconds = jobs[name]()
            except Exception as error:  # the failure of one peer must not lose the results of the others
                errors[name] = error
                del samples[name]
                continue
            if i >= warmup:
                samples[name] += seconds
    return samples, errors


def timed_row(case: Row, peer: str, role: Role, direction: str, samples: Sequence[float]) -> Row:
    """Summarize the seconds of all rounds."""
    seconds = torch.tensor(samples, dtype=torch.float64)
    p50, p20, p80 = (seconds.quantile(percent / 100).item() for percent in (50, 20, 80))
    counts = {"rounds": len(samples), "samples": [round(sample, 9) for sample in samples]}
    return figure_row(case, peer, role, direction, "seconds", p50, p20=p20, p80=p80, **counts)


def figure_row(case: Row, peer: str, role: Role, direction: str, quantity: str, p50: float, **more: Any) -> Row:
    """Return the row of one measured figure."""
    return {**case, "peer": peer, "role": role, "direction": direction, "quantity": quantity, "p50": p50, **more}


class Work(NamedTuple):
    """Hold what a peer does in a case: the calls to be measured, by direction."""

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
    """Time all peers of a case in turns, then measure the memory of each. Return rows and faults.

    A peer that failed in one direction is left out of the others.
    """
    rows, faults = list[Row](), list[Row]()
    for direction in dict.fromkeys(direction for work in works.values() for direction in work.calls):
        failed = {of["peer"] for of in faults}
        calls = {n: work.calls[direction] for n, work in works.items() if direction in work.calls and n not in failed}
        jobs = {name: partial(timer, call, device) for name, call in calls.items()}
        samples, errors = interleave(jobs, rounds(), warmup)
        for name, seconds in samples.items():
            about = (case, name, works[name].role, direction)
            rows.append(timed_row(*about, seconds))
            try:
                rows.append(figure_row(*about, "bytes", added_peak(calls[name], device)))
            except Exception as error:  # an error in the pass for memory must not lose the times of the others
                errors[name] = error
        faults += [fault(case, name, direction, error) for name, error in errors.items()]
    return rows, faults


def freeze_heap() -> None:
    """Keep what exists out of later garbage collections. Each measurement of memory begins with one."""
    gc.collect()
    gc.freeze()


def added_peak(work: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that ``work()`` needs at its peak in addition to what is held before it.

    The caching allocator of a GPU counts them. A CPU has no counter, but the profiler records when the storage of every
    tensor is allocated and freed; the resident set of the process varies by 5 to 10 %.
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
    """Return what a result depends on besides the code of its suite."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": run_git("rev-parse", "HEAD"),
        "dirty": bool(run_git("status", "--porcelain")),
        **{name: find_version(name) for name in PACKAGES},
        "device": str(device),
        "device_name": find_device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bfloat16_products": bool(torch.cpu._is_avx512_bf16_supported()),
        "kernels": instruction_set(),
        "lowered": {name: os.environ[name] for name in LOWERING if name in os.environ},
        "cpu_count": os.cpu_count(),
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
    """Return what git prints about this checkout, or None where there is no checkout or no git."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def find_device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*: (.*)$", facts, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()
