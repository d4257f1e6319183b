"""Compile the kernels of the GPU benchmark on a machine without a GPU, so that a run on a GPU finds them in the cache.

    python -m tests.benchmarks.gpu_compile --cache FOLDER --part 0/2

Triton's cache contains absolute paths, and its keys depend on the versions of Triton and Python. So use the versions of
the machine with the GPU, copy the folder to the same path there, and set ``TRITON_CACHE_DIR`` to it. Kernels are
compiled for compute capability 9. Several processes with different parts can share the folder.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import gpu
from benchmarks.attention import Shape
from benchmarks.gpu import kernels, methods, parity, problems, tiles
from benchmarks.gpu.problems import Kind
from tests.benchmarks.gpu_dry_run import run_on_driver
from tests.ops.launching.driver import run_with_driver

Job = tuple[str, Callable[[], object]]


def list_methods() -> Iterator[Kind]:
    """Yield attention calls like those of the training steps."""
    size = methods.SIZE
    for _, tokens in methods.SETTINGS:
        heads, width = size.heads, size.width // size.heads
        yield Shape(size.rows, heads, heads // 3, size.length, size.length, width, tokens), "none", True


def list_jobs() -> Iterator[Job]:
    """Yield what to compile, in the order of the stages."""
    for dtype in ("bfloat16", "float16"):
        for case in gpu.FIRST_CASES:
            yield f"{dtype} {case}", lambda c=case, d=dtype: parity.run_case(c, getattr(torch, d), "cpu")
    kinds = [problems.LONGEST, *problems.FIRST, *kernels.KINDS, *problems.list_problems(), *list_methods()]
    for job in problems.list_compilations(kinds):
        if job[0] is problems.compile_problem:
            yield str(job[1:]), lambda j=job: j[0](*j[1:])
    yield "embeddings", compile_embeddings
    for kind in tiles.KINDS:
        for kernel, candidates in tiles.CANDIDATES.items():
            for tile in candidates:
                name = f"D {kind[0].D}, {tiles.describe(kernel, tile)}"
                yield name, lambda k=kind, n=kernel, t=tile: tiles.compile_tile(k, n, t)


def compile_embeddings() -> None:
    """Compile the kernels of the embeddings by running them."""
    for problem in problems.build_embeddings():
        for name, work in problem.works.items():
            if name in ("pt", "dept", "adept"):
                for call in work.calls.values():
                    call()


def main() -> int:
    """Build the driver, and compile in a process that finds it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="Triton's cache")
    parser.add_argument("--part", default="0/1", metavar="K/N", help="every N-th job, starting with the K-th")
    parser.add_argument("--driver", help=argparse.SUPPRESS)  # the folder of one that is built
    options = parser.parse_args()
    if options.driver is None:
        return run_with_driver(__spec__.name, sys.argv[1:], TRITON_CACHE_DIR=str(options.cache))
    run_on_driver(options.driver)
    first, parts = map(int, options.part.split("/"))
    failed = 0
    for number, (name, compile_job) in enumerate(list_jobs()):
        if number % parts != first:
            continue
        start, outcome = time.monotonic(), ""
        try:
            compile_job()
        except Exception as error:  # e.g. a tile that needs too much shared memory; the others must compile
            outcome, failed = f": {type(error).__name__}: {error}", failed + 1
        print(f"{number}: {name}, {time.monotonic() - start:.1f} s{outcome}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
