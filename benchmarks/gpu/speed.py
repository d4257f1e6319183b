"""Measure the device time and the wall time of peers whose results agree."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..measure import Add, BenchmarkError, Work, fault, figure_row, measure
from ..results import describe_times
from . import device, jobs
from .problems import FIRST, Kind, Problem, build_embeddings, build_problem, list_compilations, list_problems

LIMIT = 0.03
"""The largest difference of results in bfloat16, relative to their norm."""
ROUNDS, WALL_SECONDS = 10, 0.02


def find_difference(
    work: Work, results: dict[str, list[Tensor]], narrow: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list
) -> float:
    """Return the largest relative difference of the output and of the gradients from the results of a reference."""
    worst = 0.0
    for direction in results.keys() & work.calls.keys():
        found = list_results(work.calls[direction]())
        for x, y in zip(narrow(found), narrow(results[direction]), strict=True):
            if x is not None and y is not None:
                difference = torch.linalg.vector_norm(x.float() - y.float()) / torch.linalg.vector_norm(y.float())
                worst = max(worst, math.inf if difference.isnan() else difference.item())
    return worst


def list_results(results: object) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)  # type: ignore[call-overload]


def check_problem(add: Add, problem: Problem) -> dict[str, Work]:
    """Compare every peer with a reference before anything is timed, and store the differences.

    Return the peers whose results agree, and the peers without a prefix, which are not compared. If a reference cannot
    run, the next one is used.
    """
    case, works, references, narrow = problem
    for name, reference in references.items():
        try:
            results = {direction: list_results(call()) for direction, call in reference.calls.items()}
        except Exception as error:  # not every kernel supports every case
            add([], [fault(case, name, "check", error)])
            works = {of: work for of, work in works.items() if of != name}
            continue
        break
    else:
        raise BenchmarkError(f"nothing to compare the results of {case} with")
    kept = dict[str, Work]()
    for peer, work in works.items():
        if work.role == "floor" or peer == name:
            kept[peer] = work
            continue
        try:
            difference = find_difference(work, results, narrow)
        except Exception as error:  # not every peer supports every case
            add([], [fault(case, peer, "check", error)])
            continue
        add([figure_row(case, peer, work.role, "check", "relative difference", difference)], [])
        if difference <= LIMIT:
            kept[peer] = work
        else:
            wrong = RuntimeError(f"its results differ from those of {name} by {difference:.1e}, more than {LIMIT}")
            add([], [fault(case, peer, "check", wrong)])
    return kept


def measure_problem(add: Add, problem: Problem) -> None:
    """Check the peers of a problem, measure their device time and wall time, and store the clocks."""
    works = check_problem(add, problem)
    rows, faults = measure(
        problem.case, works, device.CUDA, partial(range, ROUNDS), warmup=0, timer=device.time_with_triton
    )
    failed = {of["peer"] for of in faults}
    for peer, work in works.items():
        if peer not in failed:
            for direction, call in work.calls.items():
                seconds = device.time_by_the_wall(call, WALL_SECONDS)
                rows.append(figure_row(problem.case, peer, work.role, direction, "wall seconds", seconds))
    clocks = device.read_clocks()
    add([row | {"clocks": clocks} for row in rows], faults)
    print(describe_times(rows), flush=True)
    if not device.is_usable():
        raise RuntimeError("the device is lost")


def measure_problems(add: Add, seconds: float, kinds: Sequence[Kind], compiling: float = 0.35) -> None:
    """Compile the kernels of problems in worker processes, then measure as many problems as the time allows."""
    end = time.monotonic() + seconds
    compilations = list_compilations(kinds)
    for job, answer in zip(compilations, jobs.run_jobs(compilations, seconds * compiling), strict=True):
        if "error" in answer:
            print(f"not compiled in advance: {job[0].__name__}{job[1:]}: {answer['error']}", flush=True)
    for kind in jobs.limit_time("speed", end, kinds):
        measure_problem(add, build_problem(*kind))


def measure_speed(add: Add, seconds: float, measured: Sequence[Kind] = FIRST) -> None:
    """Measure embeddings, then as many cases of attention as the time allows, without those measured before."""
    end = time.monotonic() + seconds
    for problem in build_embeddings():
        measure_problem(add, problem)
    measure_problems(add, end - time.monotonic(), [kind for kind in list_problems() if kind not in measured])
