"""Run jobs in worker processes, so that a job that fails, hangs or loses the device does not affect the others."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from ..measure import first_line
from . import device

WORKERS = 16
Item = TypeVar("Item")
Job = tuple[Any, ...]
"""A function, followed by its arguments."""


def limit_time(what: str, end: float, items: Iterable[Item]) -> Iterator[Item]:
    """Yield items until the time is over, and print how many there were."""
    for number, item in enumerate(items):
        if time.monotonic() > end:
            print(f"{what}: {number} measured, the remaining ones are skipped for lack of time", flush=True)
            return
        yield item


def run_job(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run a job in this worker process, and return its answer or its error."""
    if not device.is_usable():
        return {"error": "skipped, because an earlier job of this process lost the device"}
    try:
        return function(*arguments)
    except Exception as error:  # the failure of one job must not lose the results of the others
        return {"error": first_line(error)}


def _work(pipe: Connection) -> None:
    while (job := pipe.recv()) is not None:
        pipe.send(run_job(*job))


class _Workers:
    """The busy processes, with the pipe to each and the number of its job."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._busy: dict[Connection, tuple[BaseProcess, int]] = {}

    def start(self, job: Job, number: int) -> None:
        """Start a process with a job."""
        pipe, other = self._context.Pipe()
        process = self._context.Process(target=_work, args=(other,), daemon=True)
        process.start()
        other.close()  # then the pipe closes when the process ends
        self._give(pipe, process, job, number)

    def _give(self, pipe: Connection, process: BaseProcess, job: Job, number: int) -> None:
        with contextlib.suppress(OSError):  # the process has died, which collect notices
            pipe.send(job)
        self._busy[pipe] = (process, number)

    def __bool__(self) -> bool:
        return bool(self._busy)

    def collect(self, seconds: float, jobs: list[tuple[int, Job]]) -> list[tuple[int, dict[str, Any]]]:
        """Return the answers that arrive within ``seconds``, and give their processes the next jobs."""
        answers = []
        for pipe in wait(list(self._busy), seconds):
            assert isinstance(pipe, Connection)
            process, number = self._busy.pop(pipe)
            try:
                answers.append((number, pipe.recv()))
            except (EOFError, OSError):
                answers.append((number, {"error": "the process died"}))
                if jobs:
                    of, job = jobs.pop()
                    self.start(job, of)
                continue
            if jobs:
                of, job = jobs.pop()
                self._give(pipe, process, job, of)
            else:
                pipe.send(None)
        return answers

    def stop(self) -> None:
        """End the processes that still have a job."""
        for process, _ in self._busy.values():
            process.terminate()


def run_jobs(jobs: Sequence[Job], seconds: float, workers: int = WORKERS) -> list[dict[str, Any]]:
    """Run jobs in worker processes, and return their answers. A process that dies is replaced by a new one."""
    end = time.monotonic() + seconds
    answers: list[dict[str, Any]] = [{"error": "no answer in time"} for _ in jobs]
    left, pool = list(enumerate(jobs))[::-1], _Workers()
    try:
        for _ in range(min(workers, os.cpu_count() or 1, len(jobs))):
            number, job = left.pop()
            pool.start(job, number)
        while pool and time.monotonic() < end:
            for number, answer in pool.collect(max(0.0, end - time.monotonic()), left):
                answers[number] = answer
    finally:
        pool.stop()
    return answers
