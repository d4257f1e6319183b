"""Times against peers: training and inference on a grid, decoding, FlexAttention."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .clock import inferred, peak_memory, time_calls, trained
from .inputs import Shape, attention_inputs, randn
from .log import Log
from .peers import concatenated, ours, peer_calls, working
from .workers import Job, compiled

SHAPES: tuple[Shape, ...] = (
    (32, 12, 12, 128, 64),
    (16, 16, 16, 512, 64),
    (8, 32, 8, 1024, 128),
    (4, 32, 8, 2048, 128),
    (2, 32, 8, 8192, 128),
)
PREFIXES = (128, 16, 100, 2048)
GATES = ("none", "row", "query", "separate")


def flop(shape: Shape, P: int, causal: bool) -> float:
    B, Hq, _, N, D = shape
    return 4.0 * B * Hq * D * N * (P + (N / 2 if causal else N))


def time_shape(shape: Shape, P: int, gate: str, causal: bool) -> dict[str, Any]:
    x = attention_inputs(shape, P, gate, causal)
    row: dict[str, Any] = {"shape": shape, "P": P, "gate": gate, "causal": causal}
    calls = peer_calls(x)
    for what, prepare, factor in (
        ("forward", inferred, 1.0),
        ("forward + backward", lambda call: trained(call, x), 3.5),
    ):
        good, bad = working(calls, prepare)
        times = time_calls(good, repeats=10)
        peers = {name: t for name, t in times.items() if name.startswith("concat")}
        floors = [t for name, t in times.items() if name.startswith("floor")]
        mine = times.get("fastprefix", float("nan"))
        row[what] = {
            "ms": times,
            "failed": bad,
            "TFLOP/s": factor * flop(shape, P, causal) / mine / 1e9,
            "over best peer": min(peers.values()) / mine if peers else None,
            "over floor": mine / min(floors) if floors else None,
            "peak bytes": {name: peak_memory(call) for name, call in good.items()},
        }
    return row


def show(row: dict[str, Any]) -> None:
    parts = [f"{row['shape']} P {row['P']:<4} {row['gate']:8} {'causal' if row['causal'] else 'full':6}"]
    for what in ("forward", "forward + backward"):
        r = row[what]
        peer = f"{r['over best peer']:.2f}x best peer" if r["over best peer"] else "no peer"
        floor = f"{r['over floor']:.2f} of floor" if r["over floor"] else "no floor"
        parts.append(f"{r['ms'].get('fastprefix', float('nan')):.3f} ms {r['TFLOP/s']:.0f} TFLOP/s {peer} {floor}")
    print(" | ".join(parts), flush=True)


def cells() -> Iterator[tuple[Shape, int, str, bool]]:
    """The most telling first, should time run out."""
    for P, gate in itertools.product(PREFIXES, GATES):
        for shape, causal in itertools.product(SHAPES, (True, False)):
            if gate in ("none", "row") or P in (16, 128):
                yield shape, P, gate, causal


def compile_jobs() -> list[Job]:
    """One for each specialisation of the kernels that the cells have: that of a batch, whatever its length."""
    kinds = {(shape[1:3], shape[4], P, gate, causal): (shape, P, gate, causal) for shape, P, gate, causal in cells()}
    return [(compile_cell, *kind) for kind in kinds.values()]


def compile_cell(shape: Shape, P: int, gate: str, causal: bool) -> dict[str, Any]:
    """Run the kernels of a cell on short inputs."""
    x = attention_inputs((*shape[:3], 256, shape[4]), P, gate, causal)
    trained(lambda: ours(**x), x)()
    inferred(lambda: ours(**x))()
    torch.cuda.synchronize()
    return {}


def speed(log: Log, seconds: float) -> None:
    end = time.monotonic() + seconds
    compiled(log, compile_jobs(), seconds / 3)
    left = 0
    for cell in cells():
        if time.monotonic() > end:
            left += 1
            continue
        row = time_shape(*cell)
        log.add("speed", row)
        show(row)
    print(f"speed: {left} cells left out for want of time", flush=True)
    log.add("speed", {"left out": left})


def decoding(log: Log, seconds: float) -> None:
    end = time.monotonic() + seconds
    for B, M, P in itertools.product((1, 16, 128), (1024, 8192), (128, 2048)):
        if time.monotonic() > end:
            log.add("decoding", {"left out": (B, M, P)})
            continue
        x: dict[str, Any] = {
            "query": randn(B, 32, 1, 128),
            "key": randn(B, 8, M, 128),
            "value": randn(B, 8, M, 128),
            "prefix_key": randn(8, P, 128),
            "prefix_value": randn(8, P, 128),
            "is_causal": False,
        }
        good, bad = working(peer_calls(x), inferred)
        times = time_calls(good)
        log.add("decoding", {"B": B, "M": M, "P": P, "ms": times, "failed": bad})
        print(f"decoding B {B} M {M} P {P}: " + ", ".join(f"{n} {t:.3f} ms" for n, t in times.items()), flush=True)


def flex(log: Log, seconds: float) -> None:
    """Concatenation and compiled FlexAttention, on as many shapes as time allows: each compiles anew."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    end = time.monotonic() + seconds
    P = 128
    for shape in (SHAPES[3], SHAPES[2], SHAPES[1], SHAPES[0], SHAPES[4]):
        if time.monotonic() > end:
            log.add("flex", {"left out": shape})
            continue
        torch._dynamo.reset()  # past its limit of recompilations it would refuse
        row = compare_flex(shape, P, torch.compile(flex_attention, dynamic=False, fullgraph=True), create_block_mask)
        log.add("flex", row)
        print("flex", json.dumps(row), flush=True)


def compare_flex(
    shape: Shape, P: int, compiled: Callable[..., Tensor], block_mask: Callable[..., Any]
) -> dict[str, Any]:
    x = attention_inputs(shape, P, "none", True)
    mask = block_mask(lambda b, h, i, j: j <= i + P, None, None, shape[3], shape[3] + P)

    def flexible() -> Tensor:
        return compiled(x["query"], *concatenated(x), block_mask=mask, enable_gqa=True)

    calls: dict[str, Callable[[], Tensor]] = {"fastprefix": lambda: ours(**x), "concat + flex": flexible}
    row: dict[str, Any] = {"shape": shape, "P": P, "causal": True}
    for what, prepare in (("forward", inferred), ("forward + backward", lambda call: trained(call, x))):
        good, bad = working(calls, prepare)
        row[what] = {"ms": time_calls(good), "failed": bad}
    return row
