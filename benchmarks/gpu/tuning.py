"""The fastest tile of each kernel."""

import itertools
import time
from typing import Any

import torch
from torch import Tensor

from .clock import inferred, time_calls
from .inputs import Call, attention_inputs
from .log import Log
from .peers import ours
from .workers import compiled, usable

CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "forward": (
        (128, 128, 64, 8, 2),
        (128, 64, 64, 8, 3),
        (128, 64, 64, 4, 3),
        (128, 128, 64, 4, 3),
        (64, 64, 64, 4, 3),
        (64, 128, 64, 4, 2),
    ),
    "dq": ((128, 128, 64, 8, 2), (128, 64, 64, 8, 2), (128, 64, 64, 8, 3), (64, 64, 64, 4, 2), (64, 64, 64, 4, 3)),
    "dkv": ((32, 128, 64, 8, 2), (64, 128, 64, 8, 2), (64, 64, 64, 4, 2), (32, 64, 64, 4, 2), (64, 64, 64, 8, 2)),
    "dprefix": ((32, 64, 64, 4, 2), (64, 64, 64, 4, 2), (32, 64, 128, 8, 2), (64, 64, 128, 8, 2), (64, 64, 64, 8, 2)),
}
"""(BM, BN, BP, warps, stages), tried for heads of 64 and 128 in bfloat16."""


def rows_of(kernel: str) -> Any:
    """The tile table's for this device: by width and dtype."""
    from fastprefix.ops.prefix_attention.triton import tiles
    from fastprefix.ops.targets import architecture

    return tiles.ARCHITECTURES[architecture(torch.cuda.get_device_capability())][kernel]


def own_tile(kernel: str, width: int) -> tuple[Any, ...]:
    from fastprefix.ops.prefix_attention.triton import tiles

    return tuple(rows_of(kernel)[(width, tiles.HALF)])


def set_tile(kernel: str, width: int, values: tuple[Any, ...]) -> None:
    from fastprefix.ops.prefix_attention.triton import tiles

    rows_of(kernel)[(width, tiles.HALF)] = tiles.Tile(*values)


def tile_case(kernel: str, width: int, values: tuple[int, ...], N: int) -> Call:
    """A call whose time is that of one kernel, but for small change."""
    set_tile(kernel, width, values)
    P = 2048 if kernel == "dprefix" else 128
    x = attention_inputs((4, 16, 8, N, width), P, "none", kernel != "dprefix")
    if kernel == "forward":
        return inferred(lambda: ours(**x))
    names = {"dq": ("query",), "dkv": ("key", "value"), "dprefix": ("prefix_key", "prefix_value")}[kernel]
    for name in x:
        if isinstance(x[name], Tensor):
            x[name].requires_grad_(name in names)
    output = ours(**x)
    grad_output = torch.randn_like(output)
    leaves = [x[name] for name in names]

    def call() -> Tensor:
        first: Tensor = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)[0]
        return first

    return call


def compile_tile(kernel: str, width: int, values: tuple[int, ...]) -> dict[str, Any]:
    own = own_tile(kernel, width)
    try:
        tile_case(kernel, width, values, 256)()
        torch.cuda.synchronize()
    finally:
        set_tile(kernel, width, own)
    return {}


def tiles(log: Log, seconds: float) -> None:
    """The fastest tile of each kernel; the stages that follow have the package's own."""
    end = time.monotonic() + seconds
    jobs = [
        (compile_tile, kernel, width, values)
        for width in (128, 64)
        for kernel in CANDIDATES
        for values in CANDIDATES[kernel]
    ]
    compiled(log, jobs, seconds * 0.6)
    for width, kernel in itertools.product((128, 64), CANDIDATES):
        own = own_tile(kernel, width)
        found: dict[str, float] = {}
        for values in dict.fromkeys((own[:5], *CANDIDATES[kernel])):
            if time.monotonic() > end:
                break
            try:
                found[str(values)] = time_calls({"": tile_case(kernel, width, values, 2048)}, repeats=8)[""]
            except Exception as error:  # too much shared memory, say
                log.add("tiles", {"kernel": kernel, "width": width, "tile": values, "error": str(error)[:200]})
                if not usable():
                    raise
        set_tile(kernel, width, own)
        if found:
            best = min(found, key=lambda tile: found[tile])
            log.add("tiles", {"kernel": kernel, "width": width, "ms": found, "best": best, "own": str(own[:5])})
            print(f"tiles {kernel} D {width}: best {best} {found[best]:.3f} ms, own {own[:5]}; {found}", flush=True)
