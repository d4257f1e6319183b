"""The stages of a run, each in a process of its own under one deadline."""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .log import Log, environment
from .memory_check import sanitizer
from .parity import parity
from .speed import decoding, flex, speed
from .tuning import tiles
from .workers import Job

SECONDS = {"parity": 110, "sanitizer": 60, "tiles": 100, "decoding": 30, "speed": 140, "flex": 40}
LIMIT = 520  # of all stages with the starts of their processes; 20 more for what comes before ``main``
GRACE = 15  # beyond its seconds, for a stage's start and its last step
STAGES = {
    "parity": parity,
    "sanitizer": sanitizer,
    "tiles": tiles,
    "decoding": decoding,
    "speed": speed,
    "flex": flex,
}


def run_stage(name: str, path: Path, seconds: float) -> None:
    log = Log(path)
    if "environment" not in log.results:
        log.results["environment"] = environment()
    start = time.monotonic()
    try:
        STAGES[name](log, seconds)
    except Exception:  # the stages that follow are worth having all the same
        log.add("failures", {"stage": name, "error": traceback.format_exc()})
        print(f"stage {name} failed:\n{traceback.format_exc()}", flush=True)
    log.results.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
    log.save()


def _in_own_group(function: Callable[..., object], *arguments: Any) -> None:
    os.setsid()
    function(*arguments)


def supervised(job: Job, seconds: float) -> str | None:
    """Run a job in a process of its own, and end it with all that it started. Returns why it did not end by itself."""
    process = multiprocessing.get_context("spawn").Process(target=_in_own_group, args=job)
    process.start()
    assert process.pid is not None
    process.join(seconds)
    code = process.exitcode
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        return f"ended after {seconds:.0f} s"
    return None if code == 0 else f"its process died, exit code {code}"


def run_stages(names: Sequence[str], path: Path) -> int:
    """One after the other, as far as there is time; exit status 1 if any failed."""
    end = time.monotonic() + LIMIT
    path.unlink(missing_ok=True)
    for name in names:
        left = end - time.monotonic()
        failure: str | None = f"left out, with {left:.0f} s left"
        if left > GRACE:
            seconds = min(SECONDS[name], left - GRACE)
            failure = supervised((run_stage, name, path, seconds), seconds + GRACE)
        if failure is not None:
            Log(path).add("failures", {"stage": name, "error": failure})
            print(f"stage {name}: {failure}", flush=True)
    found = Log(path).results
    print("seconds:", found.get("seconds"), flush=True)
    return int("failures" in found)
