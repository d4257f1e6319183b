"""Check and measure prefix attention on a CUDA device in one run of nine minutes.

    python -m benchmarks gpu --out result.json

The first stage checks eleven cases in two types and a long one, and times three shapes. If any of it fails, the run
ends. Otherwise the other stages follow: the tests of the repository, tiles, kernels, peers on many shapes, and PEFT's
settings. Every stage has a time limit, which it can exceed by a few seconds. A stage that fails does not affect the
results of other stages, and the file is written after each case. Worker processes compile the kernels first. Results
are compared with those of a peer before anything is timed. Times come from ``triton.testing.do_bench``, which clears
the cache before each call. The clock of the host is measured separately.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastprefix.parity import DTYPES, attention_cases, embedding_cases

from ..measure import Add, BenchmarkError, Row, figure_row, freeze_heap, keep_going
from ..report import tabulate_gpu
from ..results import Record, describe_fault
from ..suite import DEFAULT_OUT
from . import device
from .kernels import measure_kernels
from .parity import FIRST as FIRST_CASES
from .parity import SMALL, check_parity, run_tests
from .problems import FIRST, LONGEST, build_problem
from .speed import check_problem, measure_problems, measure_speed
from .tiles import measure_tiles

SECONDS = 525.0
"""The time limit of all stages together."""
OURS = ("stage", "triton", "fused", "composed", "pt", "dept", "adept", "tests", "accelerated", "fastprefix")
"""The peers of this package. If one of them fails, the run fails. Other peers may not support every case."""


def is_own(peer: str) -> bool:
    """Return True if a peer belongs to this package."""
    return peer.partition(",")[0] in OURS


def run_first(add: Add, seconds: float) -> None:
    """Check small cases in two dtypes and a long one, measure the peak rates of the device, and time three shapes."""
    end, failed = time.monotonic() + seconds, list[Row]()

    def add_and_keep(rows: list[Row], found: list[Row]) -> None:
        failed.extend(of for of in found if is_own(of["peer"]))
        add(rows, found)

    check_parity(add_and_keep, seconds * 0.7, FIRST_CASES, ("bfloat16", "float16"))
    check_problem(add_and_keep, build_problem(*LONGEST))
    if failed:
        raise RuntimeError(f"{len(failed)} of the first cases failed")
    for name, value in device.measure_ceilings().items():
        add([figure_row({"case": "ceiling"}, "PyTorch", "floor", "ceiling", name, value)], [])
    measure_problems(add_and_keep, max(10.0, end - time.monotonic()), FIRST)
    if failed:
        raise RuntimeError(f"{len(failed)} of the first shapes failed")


def run_methods(add: Add, seconds: float) -> None:
    """Measure training steps of a model. Only this stage requires transformers and PEFT."""
    from .methods import measure_methods

    measure_methods(add, seconds)


STAGES: dict[str, tuple[Callable[[Add, float], object], int]] = {
    "first": (run_first, 130),
    "kernels": (measure_kernels, 25),
    "tests": (run_tests, 90),
    "tiles": (measure_tiles, 60),
    "speed": (measure_speed, 140),
    "methods": (run_methods, 80),
    "small": (partial(check_parity, cases=SMALL, dtypes=tuple(DTYPES)), 120),
    "grid": (partial(check_parity, cases=(*attention_cases(66), *embedding_cases()), dtypes=tuple(DTYPES)), 120),
}
"""The stages and their time limits in seconds. The last two are not run by default."""
DEFAULT = ("first", "kernels", "tests", "tiles", "speed", "methods")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "gpu.json", help="file for the results")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(DEFAULT))
    parser.add_argument("--commit", help="the measured commit, if the files are a copy of a clean checkout of it")


def run(options: argparse.Namespace) -> int:
    """Run the stages. Return 0 for success, or 1 if a stage or a peer of this package failed."""
    if not torch.cuda.is_available():
        raise BenchmarkError("benchmarks.gpu requires a CUDA device, but PyTorch finds none")
    freeze_heap()
    capability = list(torch.cuda.get_device_capability())
    record = Record.start("gpu", device.CUDA, False, seconds=dict[str, float](), capability=capability)
    if options.commit is not None:
        record.environment |= {"commit": options.commit, "dirty": False}
    record.settings["clocks"] = {"start": device.read_clocks()}
    add, end = partial(record.add, path=options.out), time.monotonic() + SECONDS
    stage: Any
    for name in options.stages:
        (stage, seconds), start = STAGES[name], time.monotonic()
        if name == "speed" and "first" not in options.stages:
            stage = partial(stage, measured=())
        with keep_going(add, {}, "stage", name):  # only a failure of the first stage makes the following ones useless
            stage(add, min(seconds, end - start))
        record.settings["seconds"][name] = round(time.monotonic() - start, 1)
        record.settings["clocks"][name] = device.read_clocks()
        add([], [])
        if name == "first" and any(of["peer"] == "stage" for of in record.faults):
            print("the first stage failed, so the run ends here", flush=True)
            break
    failed = [of for of in record.faults if is_own(of["peer"])]
    print("\n".join([tabulate_gpu(record).markdown(), *map(describe_fault, failed), f"results in {options.out}"]))
    return int(bool(failed))
