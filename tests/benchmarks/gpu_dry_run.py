"""Run the whole GPU benchmark on a driver without a device: every kernel is compiled and launched, nothing is computed.

    python -m tests.benchmarks.gpu_dry_run

Sizes are small, tensors are the CPU's, and the results of kernels are whatever memory held, so that their differences
are computed and not judged. Kernels are compiled in this process, for minutes.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import attention, embedding, gpu, models
from benchmarks.__main__ import main as run_benchmarks
from benchmarks.gpu import device, jobs, kernels, methods, parity, problems, speed, tiles
from fastprefix.ops import backends, prefix_attention, prompt_embedding
from fastprefix.ops.prefix_attention import composed_backend
from tests.ops.launching.driver import run_with_driver
from tests.ops.launching.program import H100, pretend

CPU = torch.device("cpu")
SHAPES = (attention.Shape(2, 4, 2, 40, 40, 64, 20), attention.Shape(2, 4, 2, 1, 300, 64, 300))
LONG = 36_000.0  # seconds: nothing is left out
GATES = ("none", "row", "segments", "query", "separate")


def time_once(call: Callable[[], object], on: torch.device) -> list[float]:
    """Return meaningless seconds."""
    call()
    return [1e-3]


def launch_and_check(check_case: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return a check that launches the kernels of a case, and judges the eager backend."""

    def check(case: Any, dtype: str) -> dict[str, Any]:
        parity.run_case(case, getattr(torch, dtype), "cpu", "triton")
        return check_case(case, dtype, "cpu", "eager")

    return check


def run_on_driver(folder: str) -> None:
    """Let CPU tensors run on the Triton and composed backends, on the driver in a folder."""
    pretend(folder)
    target = H100()
    for operation in (prefix_attention, prompt_embedding):
        operation.triton_backend.launch.find_target = lambda device: target
    backends.BACKENDS["composed"] = backends.Backend("composed", None, lambda device: None)
    composed_backend._DTYPES["cpu"] = (torch.float16, torch.bfloat16)
    attention.BACKENDS["cpu"] = "triton"
    torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.max_memory_allocated = lambda *_: 0
    device.CUDA = CPU


def prepare(folder: str) -> None:
    """Run on the driver in a folder, and make everything small."""
    run_on_driver(folder)
    device.COPIED, device.WIDTH, device.time_with_triton = 64, 8, time_once
    kinds = [(shape, gate, shape.N > 1) for shape in SHAPES for gate in GATES if shape.N > 1 or gate == "none"]
    speed.LIMIT, speed.WALL_SECONDS, speed.list_problems = math.inf, 0.0, lambda: iter(kinds)
    tiles.LIMIT = methods.LIMIT = math.inf
    tiles.CANDIDATES = dict.fromkeys(tiles.CANDIDATES, (tiles.AttentionTile(64, 64, 64, 4, 2),))
    problems.EMBEDDINGS = (embedding.QUICK,)
    gpu.FIRST_CASES = (parity.FIRST[1], *parity.FIRST[-2:])
    gpu.FIRST, gpu.LONGEST = kinds[:1], kinds[1]
    methods.SIZE = models.Size(layers=2, width=96, heads=3, vocabulary=64, rows=2, length=8)
    methods.SETTINGS = (("PromptTuningConfig", 4), ("PrefixTuningConfig", 3))
    gpu.STAGES["tests"] = (partial(parity.run_tests, selection=("tests/ops/test_random.py",)), 0)
    gpu.STAGES["kernels"] = (partial(kernels.measure_kernels, kinds=kinds[:1]), 0)
    gpu.STAGES["tiles"] = (partial(tiles.measure_tiles, kinds=kinds[:1]), 0)
    gpu.SECONDS = LONG
    gpu.STAGES |= {name: (stage, int(LONG)) for name, (stage, _) in gpu.STAGES.items()}


def main() -> int:
    """Build the driver, and run in a process that finds it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="keep the file of results")
    parser.add_argument("--stages", nargs="+", default=list(gpu.DEFAULT))
    parser.add_argument("--driver", help=argparse.SUPPRESS)  # the folder of one that is built
    options = parser.parse_args()
    if options.driver is None:
        return run_with_driver(__spec__.name, sys.argv[1:])
    prepare(options.driver)
    with (
        mock.patch.object(jobs, "run_jobs", lambda wanted, seconds: [jobs.run_job(*job) for job in wanted]),
        mock.patch.object(parity, "check_case", launch_and_check(parity.check_case)),
    ):
        out = options.out or Path(options.driver, "gpu.json")
        return run_benchmarks(["gpu", "--out", str(out), "--stages", *options.stages])


if __name__ == "__main__":
    sys.exit(main())
