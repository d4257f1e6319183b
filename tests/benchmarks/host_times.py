"""Measure what a call costs on the host: Python, PyTorch and Triton's launcher, on a driver without a device.

    python -m tests.benchmarks.host_times

Prints medians and 5th percentiles of warm calls, the processor's time, and how many functions of Python are called,
which does not depend on how busy the machine is. ``--out FILE`` also writes them as results of a benchmark. Tensors are
on the CPU, and nothing is computed. On a GPU, the time of the driver and of the allocator is added.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from benchmarks.measure import figure_row, timed_row
from benchmarks.results import Record
from fastprefix.ops import prefix_attention
from tests.ops.launching.driver import run_with_driver
from tests.ops.launching.program import H100, pretend

WARMUP = 50
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Tell the C library to keep freed memory, as the allocator of a GPU does: mapping the pages of a result takes longer
than a launch.
"""


def list_calls() -> dict[str, Callable[[], object]]:
    """Return the calls that are measured."""
    target = H100()
    prefix_attention.triton_backend.launch.find_target = lambda device: target

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)

    def draw_tensors(N: int, M: int) -> list[torch.Tensor]:
        return [draw(2, 12, N, 64), *(draw(2, 12, M, 64) for _ in range(2)), *(draw(12, 128, 64) for _ in range(2))]

    tensors, decoding, gate, grad = (
        draw_tensors(128, 128),
        draw_tensors(1, 1024),
        draw(2, 12, 128),
        draw(2, 12, 128, 64),
    )

    def run_forward(tensors: list[torch.Tensor]) -> None:
        with torch.no_grad():
            prefix_attention.prefix_attention(*tensors, backend="triton")

    def run_both(gate: torch.Tensor | None) -> None:
        output = prefix_attention.prefix_attention(*tensors, prefix_gate=gate, backend="triton")
        torch.autograd.grad(output, tensors if gate is None else [*tensors, gate], grad)

    return {
        "forward": lambda: run_forward(tensors),
        "decoding": lambda: run_forward(decoding),
        "forward + backward": lambda: run_both(None),
        "forward + backward, gate of keys": lambda: run_both(gate),
    }


def measure(call: Callable[[], object], calls: int) -> tuple[list[float], float]:
    """Return the times of warm calls in ascending order, and the processor's mean time of a call, in seconds."""
    for _ in range(WARMUP):
        call()
    times, start = [], time.process_time()
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    processor = (time.process_time() - start) / calls
    return sorted(times), processor


def count_functions(call: Callable[[], object]) -> int:
    """Return how many functions written in Python a call runs."""
    counted = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal counted
        counted += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return counted


def main() -> int:
    """Build the driver, and measure in a process that finds it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON file for the results")
    parser.add_argument("--driver", help=argparse.SUPPRESS)  # the folder of one that is built
    options = parser.parse_args()
    if options.driver is None:
        return run_with_driver(__spec__.name, sys.argv[1:], OMP_NUM_THREADS="1", **KEEP_MEMORY)
    pretend(options.driver)
    record = Record.start("host-times", torch.device("cpu"), quick=False)
    print(f"{'call':33} {'median':>8} {'5th pc.':>8} {'CPU':>8} us  {'functions':>9}")
    for name, call in list_calls().items():
        times, processor = measure(call, options.calls)
        functions = count_functions(call)
        shown = (times[options.calls // 2], times[options.calls // 20], processor)
        print(f"{name:33} {' '.join(f'{1e6 * value:8.1f}' for value in shown)}     {functions:9}", flush=True)
        about = ({}, "fused", "ours", name)
        row = timed_row(*about, times)
        del row["samples"]
        record.rows += [row, figure_row(*about, "functions", functions)]
    if options.out is not None:
        record.write(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
