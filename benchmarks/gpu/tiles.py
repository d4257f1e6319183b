"""Measure tiles of the Triton kernels, changing one kernel at a time, with PyTorch's profiler."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from fastprefix.ops import targets
from fastprefix.ops.prefix_attention.triton_backend import launch, tiles
from fastprefix.ops.prefix_attention.triton_backend.tiles import AttentionTile
from fastprefix.ops.replay import Replays

from ..attention import Inputs, Shape
from ..measure import Add, Row, Work, figure_row, keep_going
from ..suite import build_kernel_work
from . import device, jobs
from .kernels import profile_call
from .problems import BACKEND, Kind, run_plan
from .speed import LIMIT, find_difference, list_results

KINDS: tuple[Kind, ...] = (
    (Shape(64, 4, 4, 512, 512, 64, 128), "none", True),
    (Shape(16, 8, 2, 2048, 2048, 128, 128), "none", True),
)
_WARPS, _STAGES = (8, 4), (2, 3, 1)


def combine(*sizes: tuple[int, ...]) -> tuple[AttentionTile, ...]:
    """Return all combinations of block sizes, warps and stages."""
    return tuple(AttentionTile._make((*of, None)) for of in itertools.product(*sizes))


_OF_PREFIX = combine((64, 128), (64,), (32, 64, 128), _WARPS, _STAGES)
_OF_QUERIES = combine((64, 128), (32, 64, 128), (64,), _WARPS, (2, 3))
CANDIDATES: dict[str, tuple[AttentionTile, ...]] = {
    "forward": (
        *_OF_QUERIES,
        *combine((128,), (128,), (128,), (8,), (2, 3, 4)),
        *combine((128,), (64,), (128,), _WARPS, (3,)),
    ),
    "extend": _OF_PREFIX,
    "dq": (*_OF_QUERIES, *combine((128,), (64, 128), (128,), (8,), (2,))),
    "dq of prefix": _OF_PREFIX,
    "dkv": combine((32, 64), (32, 64, 128), (64,), _WARPS, _STAGES),
    "dprefix": combine((32, 64), (64,), (64, 128), _WARPS, _STAGES),
}
"""Candidates by kernel. Those that spill registers are compiled and left out."""


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


def build(kind: Kind, kernel: str) -> Work:
    """Return work that launches a kernel."""
    shape, gate, causal = kind
    inputs = Inputs(shape, torch.bfloat16, causal, device.CUDA, gate=gate)
    if kernel not in ("extend", "dq of prefix"):
        return build_kernel_work("ours", inputs.run_fused, inputs.leaves, inputs.grad)
    call = run_plan("flash")(partial(inputs.run_backend, BACKEND))
    return build_kernel_work("ours", call, inputs.leaves, inputs.grad)


def find_call(work: Work, kernel: str) -> Callable[[], object]:
    """Return the call that launches a kernel."""
    return work.calls["forward" if kernel in ("forward", "extend") else "forward+backward"]


def find_name(kernel: str) -> str:
    """Return the name of a kernel's function."""
    name: str = launch.load_kernels()[kernel.partition(" ")[0]].__name__
    return name


def compile_tile(kind: Kind, kernel: str, tile: AttentionTile) -> dict[str, Any]:
    """Compile a tile by running it on short inputs, and return how many registers it spills."""
    shape, gate, causal = kind
    compiled: dict[str, Any] = {}
    run = targets.Device.launch

    def launch_and_keep(self: Any, function: Any, *rest: Any) -> Any:
        compiled[function.__name__] = run(self, function, *rest)
        return compiled[function.__name__]

    with use_tile(kernel, tile), mock.patch.object(targets.Device, "launch", launch_and_keep):
        find_call(build((shape._replace(B=1, N=256, M=256), gate, causal), kernel), kernel)()
    torch.cuda.synchronize()
    return {"spills": getattr(compiled.get(find_name(kernel)), "n_spills", 0)}


def measure_tiles(add: Add, seconds: float, kinds: Sequence[Kind] = KINDS) -> None:
    """Compile all tiles in worker processes, then measure those without spills that give the results of the table."""
    end = time.monotonic() + seconds
    trials = [(kind, name, tile) for kind in kinds for name, candidates in CANDIDATES.items() for tile in candidates]
    answers = jobs.run_jobs([(compile_tile, *trial) for trial in trials], seconds * 0.5)
    for kind in kinds:
        shape, gate, causal = kind
        case = {**shape._asdict(), "gate": gate, "causal": causal, "stage": "tiles"}
        for kernel in CANDIDATES:
            work, name = build(kind, kernel), find_name(kernel)
            call = find_call(work, kernel)
            add(time_kernel(case, f"{kernel} table", call, name), [])
            for (of, named, tile), answer in zip(trials, answers, strict=True):
                if (of, named) != (kind, kernel) or answer.get("spills") or time.monotonic() > end:
                    continue
                with keep_going(add, case, describe(kernel, tile), "tiles"):  # not every tile fits
                    if "error" in answer:
                        raise RuntimeError(answer["error"])
                    with use_tile(kernel, tile):
                        check_tile(work)
                        add(time_kernel(case, describe(kernel, tile), call, name), [])


def time_kernel(case: Row, peer: str, call: Callable[[], object], name: str) -> list[Row]:
    """Return the seconds that a launch of the named kernel takes on the device."""
    return [
        figure_row(case, peer, "ours", name, "kernel seconds", event.self_device_time_total / event.count / 1e6)
        for event in profile_call(call)
        if event.key == name
    ]


def check_tile(work: Work) -> None:
    """Raise an error if the results of a tile differ from those of the table."""
    with mock.patch.object(launch, "find_tile", tiles.find_tile), mock.patch.object(launch, "_REPLAYS", Replays()):
        results = {direction: list_results(call()) for direction, call in work.calls.items()}
    difference = find_difference(work, results)
    if not difference <= LIMIT:
        raise RuntimeError(f"its results differ from the table's by {difference:.1e}, more than {LIMIT}")
