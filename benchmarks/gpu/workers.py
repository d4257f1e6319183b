"""Jobs side by side in processes of their own, which are replaced when they die or lose the device."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from .log import Log

Job = tuple[Any, ...]  # a function and its arguments


def usable() -> bool:
    """Whether the device still works for this process: after an illegal access, every later call fails as well."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def work(connection: Connection) -> None:
    """A worker: a job after the other, until one leaves the device unusable."""
    while True:
        function, *arguments = connection.recv()
        try:
            answer = function(*arguments)
        except Exception as error:  # a row of the report
            answer = {"job": arguments, "error": repr(error)}
        go_on = usable()
        connection.send((answer, go_on))
        if not go_on:
            return


def in_workers(jobs: Sequence[Job], seconds: float, most: int = 14) -> Iterator[Any]:
    """Run ``function, *arguments`` in worker processes; yield results, errors among them, until time is up.

    A worker that died or lost the device is replaced, so what one job did is no other's error.
    """
    context = multiprocessing.get_context("spawn")
    end = time.monotonic() + seconds
    waiting = deque(jobs)
    workers: dict[Connection, tuple[Any, Job]] = {}

    def give(connection: Connection, process: Any) -> None:
        if waiting:
            workers[connection] = process, waiting.popleft()
            connection.send(workers[connection][1])
        else:
            process.kill()

    def start() -> None:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there,), daemon=True)
        process.start()
        there.close()  # so that the end of the process is the end of the pipe
        give(here, process)

    try:
        for _ in range(min(most, os.cpu_count() or 1, len(jobs))):
            start()
        while workers:
            ready = wait(list(workers), max(0.0, end - time.monotonic()))
            if not ready:
                yield {"error": f"not finished within {seconds:.0f} s", "left out": len(workers) + len(waiting)}
                return
            for connection in ready:
                assert isinstance(connection, Connection)
                process, job = workers.pop(connection)
                try:
                    answer, go_on = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    answer, go_on = {"job": job[1:], "error": f"its process died, exit code {process.exitcode}"}, False
                if go_on:
                    give(connection, process)
                elif waiting:
                    start()
                yield answer
    finally:
        for process, _ in workers.values():
            process.kill()


def compiled(log: Log, jobs: Sequence[Job], seconds: float) -> None:
    """Have kernels compiled side by side; they land in the cache on disk."""
    for row in in_workers(jobs, seconds):
        if "error" in row:
            log.add("compilation", row)
