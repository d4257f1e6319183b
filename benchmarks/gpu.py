"""Prefix attention on a CUDA device, in one run of under nine minutes: parity, memory checks, tiles, speed.

    PYTHONPATH=. python benchmarks/gpu.py --out result.json

Every stage has a time of its own; one that fails or runs out of it is reported, and the others go on. The raw figures
are written after each step. Kernels are compiled by worker processes beforehand: nothing compiles while a clock runs.
"""

import argparse
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

import fastprefix
from fastprefix.parity import DTYPES, AttentionCase, Case, EmbeddingCase, attention_cases, embedding_cases, measure

Call = Callable[[], Tensor]
Shape = tuple[int, int, int, int, int]  # B, Hq, Hkv, N, D

SHAPES: tuple[Shape, ...] = (
    (32, 12, 12, 128, 64),
    (16, 16, 16, 512, 64),
    (8, 32, 8, 1024, 128),
    (4, 32, 8, 2048, 128),
    (2, 32, 8, 8192, 128),
)
PREFIXES = (128, 16, 100, 2048)
GATES = ("none", "row", "query", "separate")
SECONDS = {"parity": 110, "sanitizer": 60, "tiles": 120, "decoding": 30, "speed": 150, "flex": 40}
PEERS = {
    "concat + flash": SDPBackend.FLASH_ATTENTION,
    "concat + cudnn": SDPBackend.CUDNN_ATTENTION,
    "concat + efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Log:
    """The results so far, on disk after every step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: dict[str, Any] = {"environment": environment()}

    def add(self, stage: str, row: dict[str, Any]) -> None:
        self.results.setdefault(stage, []).append(row)
        self.save()

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.results, indent=1, default=str))


def environment() -> dict[str, Any]:
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "fastprefix": fastprefix.__version__,
    }


# Inputs


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def attention_inputs(
    shape: Shape, P: int, gate: str, causal: bool, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    B, Hq, Hkv, N, D = shape
    x: dict[str, Any] = {
        "query": randn(B, Hq, N, D, dtype=dtype),
        "key": randn(B, Hkv, N, D, dtype=dtype),
        "value": randn(B, Hkv, N, D, dtype=dtype),
        "prefix_key": randn(Hkv, P, D, dtype=dtype),
        "prefix_value": randn(Hkv, P, D, dtype=dtype),
        "is_causal": causal,
    }
    if gate == "row":
        x["prefix_gate"] = randn(B, Hkv, P, dtype=dtype)
    if gate == "query":
        x["prefix_gate"] = randn(B, Hq, N, P, dtype=dtype)
    if gate == "separate":
        x["output_gate"] = randn(B, Hq, dtype=dtype)
    return {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in x.items()}


# Parity


def parity_cases() -> list[Case]:
    """The grid of ``python -m fastprefix parity``, and shapes that only a GPU runs in good time."""
    large = [
        *(AttentionCase(N=n, M=m, P=77, D=D, Hq=4) for n, m in ((113, 203), (239, 1)) for D in (64, 128)),
        *(AttentionCase(N=257, M=257, P=77, D=D, Hq=4, options={"is_causal": True}) for D in (64, 80, 128, 256)),
        AttentionCase(N=150, M=170, P=77, D=64, Hq=4, gate="BHNP", bias="HNP", mask="float"),
        AttentionCase(N=150, M=170, P=77, D=64, Hq=4, gate="P", output_gate="BH", sinks=True),
        AttentionCase(N=150, M=170, P=77, D=128, Hq=4, mask="padding", options={"dropout_p": 0.1}),
        AttentionCase(B=8, N=150, M=170, P=1000, D=64, Hq=4, gate="B1P"),
        AttentionCase(B=4, Hq=8, N=1, M=3000, P=600, D=128, options={"is_causal": True}),
        AttentionCase(
            Hq=4, N=4, M=1000, P=300, D=64, output_gate="BH", options={"is_causal": True, "window_size": 700}
        ),
    ]
    return [*large, *attention_cases(66), *embedding_cases()]


def results(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of the Triton backend."""
    inputs = case.build(dtype, "cuda")
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.tensors.items() if tensor.is_floating_point()}
    torch.manual_seed(5)
    output = case.operation(**inputs.tensors, **inputs.options, backend="triton")
    return [output, *torch.autograd.grad(output, list(tensors.values()), torch.ones_like(output), allow_unused=True)]


def check_parity(case: Case, dtype_name: str) -> dict[str, Any]:
    """Parity by the package's own rule, and the same bits from a second run. Uninitialised memory is NaN."""
    dtype = DTYPES[dtype_name]
    torch.use_deterministic_algorithms(True)
    first, second = results(case, dtype), results(case, dtype)
    same = all(x is y or torch.equal(x, y) for x, y in zip(first, second, strict=True))
    torch.use_deterministic_algorithms(False)
    report = measure(case, dtype, "triton", "cuda")
    row = {"case": str(case), "dtype": dtype_name, "passed": same and report.ok, "deterministic": same}
    return row | {"of bound": {row.name: row.ratio for row in report.rows}}


def in_workers(jobs: Sequence[tuple[Any, ...]], seconds: float) -> Iterator[Any]:
    """Run ``function, *arguments`` in worker processes; yield results, exceptions among them, until time is up."""
    context = multiprocessing.get_context("spawn")
    end = time.monotonic() + seconds
    pool = ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=context)
    futures = {pool.submit(*job): job for job in jobs}
    try:
        for future in as_completed(futures, timeout=seconds):
            error = future.exception()
            yield future.result() if error is None else {"job": futures[future][1:], "error": repr(error)}
    except TimeoutError:
        yield {"error": f"not finished within {seconds:.0f} s"}
    finally:
        workers = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=time.monotonic() < end - 1, cancel_futures=True)
        for worker in workers:
            worker.kill()


def parity(log: Log, seconds: float) -> None:
    jobs = [(check_parity, case, dtype) for dtype in DTYPES for case in parity_cases()]
    passed = 0
    for row in in_workers(jobs, seconds):
        log.add("parity", row)
        passed += bool(row.get("passed"))
        if not row.get("passed"):
            print("PARITY", json.dumps(row, default=str)[:600], flush=True)
    print(f"parity: {passed} of {len(jobs)} passed", flush=True)


def sanitizer(log: Log, seconds: float) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        log.add("sanitizer", {"skipped": "compute-sanitizer is not installed"})
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__, "--small"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    tail = (done.stdout + done.stderr)[-1500:]
    log.add("sanitizer", {"exit status": done.returncode, "output": tail})
    print(f"sanitizer: exit status {done.returncode}\n{tail[-400:]}", flush=True)


def small_cases() -> None:
    """What the memory checker watches."""
    for case in (
        AttentionCase(Hq=4, N=150, M=170, P=77, D=64, gate="BhP", options={"is_causal": True}),
        AttentionCase(Hq=4, N=3, M=400, P=77, D=40, options={"is_causal": True}),
        AttentionCase(Hq=4, N=113, M=203, P=19, D=80, gate="BHNP", output_gate="BH", sinks=True),
        EmbeddingCase(B=3, N=113, S=100, d=129, r=19, V=211, offset="ffn"),
        EmbeddingCase(B=3, N=113, S=7, d=129, r=19, V=211, offset="low_rank"),
    ):
        results(case, torch.bfloat16)
    torch.cuda.synchronize()


# Timing


def ours(**arguments: Any) -> Tensor:
    return fastprefix.prefix_attention(**arguments, backend="triton")


def time_calls(calls: dict[str, Call], repeats: int = 12) -> dict[str, float]:
    """Median milliseconds of each, by CUDA events; the order rotates, and the cache is swept before each."""
    sweep = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    for call in calls.values():
        call()
        call()
    names = list(calls)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            sweep.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(s.elapsed_time(e) for s, e in pairs) for name, pairs in events.items()}


def peak_memory(call: Call) -> int:
    """Bytes that a call allocates at its peak, over what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def trained(function: Callable[[], Tensor], x: dict[str, Any]) -> Call:
    """Forward and backward, every gradient."""
    leaves = [v for v in x.values() if isinstance(v, Tensor) and v.requires_grad]
    grad_output = randn(*x["query"].shape[:3], x["value"].shape[3])

    def call() -> Tensor:
        first: Tensor = torch.autograd.grad(function(), leaves, grad_output, allow_unused=True)[0]
        return first

    return call


def inferred(function: Callable[[], Tensor]) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return function()

    return call


# Peers


def concatenated(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prefix and tokens as one, the gate folded in: what a user without these kernels writes."""
    B = x["query"].shape[0]
    pk, pv = (x[name].expand(B, -1, -1, -1) for name in ("prefix_key", "prefix_value"))
    if "prefix_gate" in x:
        pk, pv = pk * x["prefix_gate"][..., None], pv * x["prefix_gate"][..., None]
    return torch.cat([pk, x["key"]], 2), torch.cat([pv, x["value"]], 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and backend is SDPBackend.EFFICIENT_ATTENTION:  # it has no grouped heads
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        grouped = False
    same = q.shape[2] == k.shape[2]
    mask: Any = causal_lower_right(q.shape[2], k.shape[2]) if causal and not same else None
    if mask is not None and backend is SDPBackend.CUDNN_ATTENTION:  # which aligns to the upper left alone
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    with sdpa_kernel(backend):
        output: Tensor = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and same, enable_gqa=grouped
        )
    return output


def peer_calls(x: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """Those that can do this at all: a gate for each query fits no concatenation."""
    q, k, v, causal = x["query"], x["key"], x["value"], x["is_causal"]
    calls: dict[str, Callable[[], Tensor]] = {"fastprefix": lambda: ours(**x)}
    calls |= {
        f"floor, tokens alone: {name.split()[-1]}": functools.partial(sdpa, q, k, v, causal, backend)
        for name, backend in PEERS.items()
        if name != "concat + efficient"
    }
    if "output_gate" in x:
        B, og = q.shape[0], x["output_gate"][..., None, None]

        def two(backend: SDPBackend) -> Tensor:
            pk, pv = (x[name].expand(B, -1, -1, -1) for name in ("prefix_key", "prefix_value"))
            both: Tensor = sdpa(q, k, v, causal, backend) + og * sdpa(q, pk, pv, False, backend)
            return both

        return calls | {name: functools.partial(two, backend) for name, backend in PEERS.items()}
    if "prefix_gate" in x and x["prefix_gate"].ndim == 4:
        return calls

    def one(backend: SDPBackend) -> Tensor:
        return sdpa(q, *concatenated(x), causal, backend)

    return calls | {name: functools.partial(one, backend) for name, backend in PEERS.items()}


def working(
    calls: dict[str, Callable[[], Tensor]], prepare: Callable[[Any], Call]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that run here, and why the others do not."""
    good: dict[str, Call] = {}
    bad: dict[str, str] = {}
    for name, call in calls.items():
        try:
            prepare(call)()
            torch.cuda.synchronize()
            good[name] = prepare(call)
        except Exception as error:  # a peer that cannot is a result too
            bad[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return good, bad


# Speed


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


def compile_cell(shape: Shape, gate: str, causal: bool) -> dict[str, Any]:
    """Have the kernels of a cell compiled; they land in the cache on disk."""
    x = attention_inputs((1, *shape[1:3], 256, shape[4]), 128, gate, causal)
    trained(lambda: ours(**x), x)()
    inferred(lambda: ours(**x))()
    torch.cuda.synchronize()
    return {}


def speed(log: Log, seconds: float) -> None:
    end = time.monotonic() + seconds
    kinds = {(shape[1:3], shape[4], gate, causal): (shape, gate, causal) for shape, _, gate, causal in cells()}
    list(in_workers([(compile_cell, *kind) for kind in kinds.values()], seconds / 3))
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
    compiled = torch.compile(flex_attention, dynamic=False)
    P = 128
    for shape in (SHAPES[3], SHAPES[2], SHAPES[1], SHAPES[0], SHAPES[4]):
        if time.monotonic() > end:
            log.add("flex", {"left out": shape})
            continue
        row = compare_flex(shape, P, compiled, create_block_mask)
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


# Tiles


CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "forward": (
        (128, 64, 64, 4, 3),
        (128, 64, 64, 8, 3),
        (128, 128, 64, 8, 2),
        (64, 64, 64, 4, 3),
        (64, 128, 64, 4, 2),
        (128, 64, 64, 8, 2),
    ),
    "dq": ((64, 64, 64, 4, 2), (128, 64, 64, 8, 2), (128, 64, 64, 8, 3), (64, 64, 32, 8, 2), (64, 128, 64, 8, 2)),
    "dkv": ((32, 64, 64, 8, 2), (64, 64, 64, 4, 2), (32, 128, 64, 8, 2), (64, 128, 64, 8, 2), (64, 64, 64, 8, 2)),
    "dprefix": ((32, 64, 64, 4, 2), (64, 64, 64, 4, 2), (64, 64, 64, 8, 2), (32, 64, 64, 8, 2), (32, 64, 128, 8, 2)),
}
"""(BM, BN, BP, warps, stages), tried for heads of 64 and 128 in bfloat16."""


def set_tile(kernel: str, width: int, values: tuple[int, ...]) -> None:
    from fastprefix.ops.prefix_attention.triton import tiles
    from fastprefix.ops.targets import architecture

    table = tiles.ARCHITECTURES[architecture(torch.cuda.get_device_capability())]
    table[kernel][(width, tiles.HALF)] = tiles.Tile(*values)  # type: ignore[arg-type]


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
    tile_case(kernel, width, values, 256)()
    torch.cuda.synchronize()
    return {}


def tiles_stage(log: Log, seconds: float) -> None:
    """The fastest tile of each kernel; the table in the package is left as it is for the stages that follow."""
    from fastprefix.ops.prefix_attention.triton import tiles
    from fastprefix.ops.targets import architecture

    end = time.monotonic() + seconds
    jobs = [(kernel, width, values) for width in (128, 64) for kernel in CANDIDATES for values in CANDIDATES[kernel]]
    list(in_workers([(compile_tile, *job) for job in jobs], seconds * 0.6))
    table = tiles.ARCHITECTURES[architecture(torch.cuda.get_device_capability())]
    for width, kernel in itertools.product((128, 64), CANDIDATES):
        own = tuple(table[kernel][(width, tiles.HALF)])
        found: dict[str, float] = {}
        for values in dict.fromkeys((own[:5], *CANDIDATES[kernel])):
            if time.monotonic() > end:
                break
            try:
                found[str(values)] = time_calls({"": tile_case(kernel, width, values, 2048)}, repeats=8)[""]  # type: ignore[arg-type]
            except Exception as error:  # too much shared memory, say
                log.add("tiles", {"kernel": kernel, "width": width, "tile": values, "error": str(error)[:200]})
        set_tile(kernel, width, own)  # type: ignore[arg-type]
        if found:
            best = min(found, key=lambda tile: found[tile])
            log.add("tiles", {"kernel": kernel, "width": width, "ms": found, "best": best, "own": str(own[:5])})
            print(f"tiles {kernel} D {width}: best {best} {found[best]:.3f} ms, own {own[:5]}; {found}", flush=True)


STAGES = {
    "parity": parity,
    "sanitizer": sanitizer,
    "tiles": tiles_stage,
    "decoding": decoding,
    "speed": speed,
    "flex": flex,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the raw figures go")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--small", action="store_true", help="only what the memory checker is to watch")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        return 2
    if options.small:
        small_cases()
        return 0
    log = Log(options.out)
    for name in options.stages:
        start = time.monotonic()
        try:
            STAGES[name](log, SECONDS[name])
        except Exception:  # the other stages go on
            log.add("failures", {"stage": name, "traceback": traceback.format_exc()})
            print(f"stage {name} failed:\n{traceback.format_exc()}", flush=True)
        log.results.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        log.save()
        torch.cuda.empty_cache()
    print("seconds:", log.results["seconds"], flush=True)
    return int("failures" in log.results)


if __name__ == "__main__":
    sys.exit(main())
