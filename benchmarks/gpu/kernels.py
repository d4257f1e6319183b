"""Measure the time of each kernel on the device, with PyTorch's profiler."""

import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch.profiler import profile

from ..attention import Shape
from ..measure import Add, Row, Work, figure_row, keep_going
from .jobs import limit_time
from .problems import DECODING, SHAPES, Kind, build_embeddings, build_problem

CALLS = 10
PEERS = ("fused", "composed, flash", "tokens, flash", "concat, flash", "pt", "dept", "adept", "lookup")
KINDS: tuple[Kind, ...] = (
    *((Shape(*shape, 128), "none", True) for shape in SHAPES),
    (Shape(*SHAPES[2], 2048), "none", True),
    (Shape(*SHAPES[2], 128), "row", True),
    (Shape(*SHAPES[2], 128), "query", True),
    (Shape(*DECODING[2], 128), "none", False),
    (Shape(*DECODING[3], 2048), "none", False),
)


def profile_call(call: Callable[[], object]) -> list[Any]:
    """Return the profiler's averages of each kernel of ``CALLS`` calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile() as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]


def profile_work(case: Row, peer: str, work: Work) -> list[Row]:
    """Return the seconds per call that each kernel takes on the device, and how often a call launches it."""
    rows = []
    for direction, call in work.calls.items():
        for event in profile_call(call):
            seconds, launches = event.self_device_time_total / CALLS / 1e6, event.count / CALLS
            about = (case | {"kernel": event.key[:100]}, peer, work.role, direction)
            rows.append(figure_row(*about, "kernel seconds", seconds, launches=launches))
    return rows


def measure_kernels(add: Add, seconds: float, kinds: Sequence[Kind] = KINDS) -> None:
    """Profile as many problems as the time allows."""
    end = time.monotonic() + seconds
    problems = chain((build_problem(*kind, flex=False) for kind in kinds), build_embeddings())
    for problem in limit_time("kernels", end, problems):
        for peer, work in problem.works.items():
            if peer in PEERS:
                with keep_going(add, problem.case, peer, "kernels"):
                    add(profile_work(problem.case, peer, work), [])
