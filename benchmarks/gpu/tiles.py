"""Measure other tiles of the Triton kernels than those in the tables, changing one kernel at a time."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from fastprefix.ops.prefix_attention.triton_backend import launch, tiles
from fastprefix.ops.prefix_attention.triton_backend.tiles import AttentionTile
from fastprefix.ops.replay import Replays

from ..attention import Inputs, Shape
from ..measure import Work, fault, figure_row, measure
from ..suite import build_kernel_work
from . import device, jobs
from .parity import Add
from .problems import SHAPES, Kind
from .speed import LIMIT, find_difference

KINDS: tuple[Kind, ...] = tuple((Shape(*shape, 128), "none", True) for shape in (SHAPES[1], SHAPES[3]))
"""Cases with head dimensions 64 and 128."""
CANDIDATES: dict[int, dict[str, tuple[tuple[int, int, int, int, int], ...]]] = {
    64: {
        "forward": ((128, 64, 64, 8, 3), (128, 128, 64, 8, 2), (128, 128, 64, 4, 3)),
        "dq": ((128, 64, 64, 8, 3), (64, 128, 64, 4, 2), (128, 64, 64, 4, 2)),
        "dkv": ((64, 64, 64, 4, 2), (64, 128, 64, 8, 2), (64, 64, 64, 4, 3)),
        "dprefix": ((64, 64, 64, 4, 2), (64, 64, 128, 8, 2), (64, 64, 64, 4, 3)),
    },
    128: {
        "forward": ((128, 64, 64, 8, 3), (128, 64, 64, 4, 3), (128, 128, 64, 8, 3)),
        "dq": ((128, 64, 64, 8, 3), (64, 128, 64, 8, 2), (64, 64, 64, 4, 3)),
        "dkv": ((64, 64, 64, 8, 3), (64, 128, 64, 8, 2), (32, 128, 64, 8, 2)),
        "dprefix": ((64, 64, 64, 8, 3), (64, 64, 128, 8, 2), (32, 64, 128, 8, 2)),
    },
}
"""Candidates by head dimension: block sizes, warps and stages. With 64 queries per block, the products of dkv read half
as much from shared memory.
"""


@contextmanager
def use_tile(kernel: str, tile: AttentionTile) -> Iterator[None]:
    """Make one kernel use a tile that differs from the table."""

    def find(architecture: str, name: str, *rest: Any) -> AttentionTile:
        return tile if name == kernel else tiles.find_tile(architecture, name, *rest)

    with mock.patch.object(launch, "find_tile", find), mock.patch.object(launch, "_REPLAYS", Replays()):
        yield


def describe(kernel: str, tile: AttentionTile) -> str:
    """Return the name of the peer that uses a tile."""
    return f"{kernel} {'x'.join(map(str, tile[:3]))} w{tile.warps} s{tile.stages}"


def build(kind: Kind) -> Work:
    """Return the work of the Triton backend."""
    shape, gate, causal = kind
    inputs = Inputs(shape, torch.bfloat16, causal, device.CUDA, gate=gate)
    return build_kernel_work("ours", inputs.run_fused, inputs.leaves, inputs.grad)


def compile_tile(kind: Kind, kernel: str, tile: AttentionTile) -> dict[str, Any]:
    """Compile a tile by running it on short inputs."""
    shape, gate, causal = kind
    with use_tile(kernel, tile):
        for call in build((shape._replace(B=1, N=256, M=256), gate, causal)).calls.values():
            call()
    torch.cuda.synchronize()
    return {}


def measure_tiles(add: Add, seconds: float, kinds: Sequence[Kind] = KINDS) -> None:
    """Compile all tiles in worker processes, then measure those that compile and give the results of the table."""
    end = time.monotonic() + seconds
    trials = [
        (kind, kernel, AttentionTile(*sizes))
        for kind in kinds
        for kernel, candidates in CANDIDATES[kind[0].D].items()
        for sizes in candidates
    ]
    answers = jobs.run_jobs([(compile_tile, *trial) for trial in trials], seconds * 0.6)
    for kind in kinds:
        shape, gate, causal = kind
        case = {**shape._asdict(), "gate": gate, "causal": causal, "stage": "tiles"}
        work = build(kind)
        rows, faults = measure(case, {"table": work}, device.CUDA, partial(range, 2), timer=device.time_with_triton)
        add(rows, faults)
        for (of, kernel, tile), answer in zip(trials, answers, strict=True):
            if of != kind or time.monotonic() > end:
                continue
            name = describe(kernel, tile)
            try:
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                with use_tile(kernel, tile):
                    results = {direction: call() for direction, call in work.calls.items()}
                known = Work("ours", {direction: partial(_return, of) for direction, of in results.items()})
                difference = find_difference(known, work)
                add([figure_row(case, name, "ours", "check", "relative difference", difference)], [])
                if difference > LIMIT:
                    raise RuntimeError(f"its results differ from the table's by {difference:.1e}, more than {LIMIT}")
                with use_tile(kernel, tile):
                    rows, faults = measure(
                        case, {name: work}, device.CUDA, partial(range, 2), timer=device.time_with_triton
                    )
                add(rows, faults)
            except Exception as error:  # a tile that does not fit must not lose the others
                add([], [fault(case, name, "tiles", error)])


def _return(results: object) -> object:
    return results
