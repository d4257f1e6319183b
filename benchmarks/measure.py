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
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "triton", "peft", "datasets", "tokenizers")
BUSY = 0.5
"""The load per core, averaged over the minute before a run, above which its times are not trusted."""

Role = Literal["floor", "ours", "theirs"]
Row = dict[str, Any]
Job = Callable[[int], float]
"""Do the work of a round and return the seconds that its timed part took."""


class BenchmarkError(Exception):
    """Report a mistake that the user can correct. It is shown without a traceback."""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def fault(case: Row, peer: str, stage: str, error: Exception) -> Row:
    text = "".join(traceback.format_exception(error))
    return {**case, "peer": peer, "stage": stage, "message": first_line(error), "traceback": text}


class Clock:
    """Measure seconds of work on a device: wall time on a CPU, events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            return self._count_with_events(work)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _count_with_events(self, work: Callable[[], object]) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def count_until(seconds: float, *, least: int, warmup: int) -> Iterator[int]:
    """Number the rounds: ``warmup`` of them, those that begin within ``seconds``, and ``least`` in any case."""
    yield from range(warmup)
    end = time.perf_counter() + seconds
    for i in itertools.count():
        if i >= least and time.perf_counter() >= end:
            return
        yield warmup + i


def interleave(
    jobs: Mapping[str, Job], rounds: Iterable[int], *, warmup: int = 0, tick: Callable[[str], object] = lambda _: None
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Run every job once per round. Each round begins with another job, so that drift affects all of them alike.

    Rounds numbered below ``warmup`` are run and not kept. A job that raises an error is left out of later rounds.
    Return the seconds of the jobs that succeeded and the errors of the others.
    """
    names = list(jobs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    errors: dict[str, Exception] = {}
    for i in rounds:
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            if name not in errors:
                try:
                    seconds = jobs[name](i)
                except Exception as error:  # the failure of one peer must not lose the results of the others
                    errors[name] = error
                else:
                    samples[name] += [seconds] * (i >= warmup)
            tick(name)
    return {name: samples[name] for name in names if name not in errors}, errors


def find_percentile(samples: Sequence[float], percent: int) -> float:
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]


def timed_row(case: Row, peer: str, role: Role, direction: str, samples: Sequence[float]) -> Row:
    """Summarize the seconds of all rounds."""
    quantiles = {f"p{percent}": find_percentile(samples, percent) for percent in (50, 20, 80)}
    counts = {"rounds": len(samples), "samples": [round(seconds, 9) for seconds in samples]}
    return figure_row(case, peer, role, direction, "seconds", quantiles.pop("p50"), **quantiles, **counts)


def figure_row(case: Row, peer: str, role: Role, direction: str, quantity: str, p50: float, **more: Any) -> Row:
    return {**case, "peer": peer, "role": role, "direction": direction, "quantity": quantity, "p50": p50, **more}


def measure(
    case: Row,
    direction: str,
    calls: Mapping[str, Callable[[], object]],
    roles: Mapping[str, Role],
    device: torch.device,
    rounds: Iterable[int],
    *,
    warmup: int = 1,
    clock: Callable[[Callable[[], Any]], float] | None = None,
    memory: bool = True,
) -> tuple[list[Row], list[Row]]:
    """Time all peers in turns, then measure the memory of each, unless ``memory`` is False. Return rows and faults.

    ``clock`` returns the seconds of a call. By default it times the call.
    """
    time_call = clock or Clock(device)
    jobs: dict[str, Job] = {name: (lambda _, call=call: time_call(call)) for name, call in calls.items()}  # type: ignore[misc]
    samples, errors = interleave(jobs, rounds, warmup=warmup)
    rows = []
    for name, seconds in samples.items():
        rows.append(timed_row(case, name, roles[name], direction, seconds))
        if memory:
            peak = added_peak(calls[name], device)
            rows.append(figure_row(case, name, roles[name], direction, "bytes", peak))
    return rows, [fault(case, name, direction, error) for name, error in errors.items()]


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
        "fastprefix": find_version("fastprefix"),
        "commit": run_git("rev-parse", "HEAD"),
        "dirty": run_git("status", "--porcelain") not in (None, ""),
        **{name: find_version(name) for name in PACKAGES},
        "device": str(device),
        "device_name": find_device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bfloat16_products": bool(torch.cpu._is_avx512_bf16_supported()),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cuda": torch.version.cuda,
    }


def find_busyness(facts: Mapping[str, Any]) -> str | None:
    """Return a warning if other programs used the machine before a run."""
    load, cores = facts.get("load_average"), facts.get("cpu_count")
    if not load or not cores or load <= BUSY * cores:
        return None
    return f"the machine was busy (load {load:.1f} on {cores} cores)"


def find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_git(*arguments: str) -> str | None:
    """Return what git prints about this checkout, or None where there is no checkout or no git."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def find_device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
