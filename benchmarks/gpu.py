"""Prefix attention on a CUDA device, in one run of under nine minutes: parity, memory checks, tiles, speed.

    PYTHONPATH=. python benchmarks/gpu.py --out result.json

Every stage has a time and a process of its own; one that fails, hangs or loses the device is reported, and the others
go on. The raw figures are written after each step. Kernels are compiled by worker processes beforehand: nothing
compiles while a clock runs.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
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
Job = tuple[Any, ...]  # a function and its arguments
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
SECONDS = {"parity": 110, "sanitizer": 60, "tiles": 100, "decoding": 30, "speed": 140, "flex": 40}
LIMIT = 520  # of all stages with the starts of their processes; 20 more for what comes before ``main``
GRACE = 15  # beyond its seconds, for a stage's start and its last step
CYCLES = 2e9  # a second; hardly any device has more
TIMING = (
    "device time by CUDA events; the device spins until a call's launches are queued, so Python's time is not in it"
)
PEERS = {
    "concat + flash": SDPBackend.FLASH_ATTENTION,
    "concat + cudnn": SDPBackend.CUDNN_ATTENTION,
    "concat + efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Log:
    """The results so far, on disk after every step; a stage goes on where the last one ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, stage: str, row: dict[str, Any]) -> None:
        self.results.setdefault(stage, []).append(row)
        self.save()

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._path.with_name(self._path.name + ".new")  # a stage may be ended while it writes
        whole.write_text(json.dumps(self.results, indent=1, default=str))
        whole.replace(self._path)


def environment() -> dict[str, Any]:
    import triton

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "driver": driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "fastprefix": fastprefix.__version__,
        "timing": TIMING,
    }


def driver() -> str | None:
    """Its version, where ``nvidia-smi`` is there to say."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return None


def usable() -> bool:
    """Whether the device still works for this process: after an illegal access, every later call fails as well."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


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


def results(case: Case, dtype: torch.dtype, device: str = "cuda", backend: str = "triton") -> list[Tensor]:
    """Output and gradients."""
    inputs = case.build(dtype, device)
    values = (value if isinstance(value, tuple) else (value,) for value in inputs.tensors.values())
    leaves = [tensor.requires_grad_() for tensor in itertools.chain(*values) if tensor.is_floating_point()]
    torch.manual_seed(5)
    output = case.operation(**inputs.tensors, **inputs.options, backend=backend)
    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)]


def check_parity(case: Case, dtype_name: str) -> dict[str, Any]:
    """Parity by the package's own rule, and the same bits from a second run. Uninitialised memory is NaN."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses; it is read when CUDA starts
    dtype = DTYPES[dtype_name]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = results(case, dtype), results(case, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    same = all(x is y or torch.equal(x, y) for x, y in zip(first, second, strict=True))
    report = measure(case, dtype, "triton", "cuda")
    row = {"case": str(case), "dtype": dtype_name, "passed": same and report.ok, "deterministic": same}
    return row | {"of bound": {result.name: result.ratio for result in report.rows}}


# Worker processes


def work(connection: Connection) -> None:
    """A worker: a job after the other, until one leaves the device unusable."""
    while True:
        function, *arguments = connection.recv()
        try:
            answer = function(*arguments)
        except Exception as error:  # a row of the report
            answer = {"job": arguments, "error": repr(error)}
        go_on = usable()
        connection.send((answer, go_on))
        if not go_on:
            return


def in_workers(jobs: Sequence[Job], seconds: float, most: int = 14) -> Iterator[Any]:
    """Run ``function, *arguments`` in worker processes; yield results, errors among them, until time is up.

    A worker that died or lost the device is replaced, so what one job did is no other's error.
    """
    context = multiprocessing.get_context("spawn")
    end = time.monotonic() + seconds
    waiting = deque(jobs)
    workers: dict[Connection, tuple[Any, Job]] = {}

    def give(connection: Connection, process: Any) -> None:
        if waiting:
            workers[connection] = process, waiting.popleft()
            connection.send(workers[connection][1])
        else:
            process.kill()

    def start() -> None:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there,), daemon=True)
        process.start()
        there.close()  # so that the end of the process is the end of the pipe
        give(here, process)

    try:
        for _ in range(min(most, os.cpu_count() or 1, len(jobs))):
            start()
        while workers:
            ready = wait(list(workers), max(0.0, end - time.monotonic()))
            if not ready:
                yield {"error": f"not finished within {seconds:.0f} s", "left out": len(workers) + len(waiting)}
                return
            for connection in ready:
                assert isinstance(connection, Connection)
                process, job = workers.pop(connection)
                try:
                    answer, go_on = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    answer, go_on = {"job": job[1:], "error": f"its process died, exit code {process.exitcode}"}, False
                if go_on:
                    give(connection, process)
                elif waiting:
                    start()
                yield answer
    finally:
        for process, _ in workers.values():
            process.kill()


def compiled(log: Log, jobs: Sequence[Job], seconds: float) -> None:
    """Have kernels compiled side by side; they land in the cache on disk."""
    for row in in_workers(jobs, seconds):
        if "error" in row:
            log.add("compilation", row)


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
    end = time.monotonic() + seconds
    compiled(log, [(small_case, case) for case in SMALL], seconds / 2)
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__, "--small"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    left = end - time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left, check=False)
    tail = (done.stdout + done.stderr)[-1500:]
    log.add("sanitizer", {"exit status": done.returncode, "output": tail})
    print(f"sanitizer: exit status {done.returncode}\n{tail[-400:]}", flush=True)


SMALL: tuple[Case, ...] = (
    AttentionCase(Hq=4, N=150, M=170, P=77, D=64, gate="BhP", options={"is_causal": True}),
    AttentionCase(Hq=4, N=3, M=400, P=77, D=40, options={"is_causal": True}),
    AttentionCase(Hq=4, N=113, M=203, P=19, D=80, gate="BHNP", output_gate="BH", sinks=True),
    EmbeddingCase(B=3, N=113, S=100, d=129, r=19, V=211, offset="ffn"),
    EmbeddingCase(B=3, N=113, S=7, d=129, r=19, V=211, offset="low_rank"),
)
"""What the memory checker watches."""


def small_case(case: Case) -> dict[str, Any]:
    results(case, torch.bfloat16)
    torch.cuda.synchronize()
    return {}


# Timing


def ours(**arguments: Any) -> Tensor:
    return fastprefix.prefix_attention(**arguments, backend="triton")


def launch_cycles(call: Call) -> int:
    """Cycles that a device must spin for a call to be queued whole meanwhile: twice what Python took, at most 25 ms."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return int(min(0.025, 2 * (time.perf_counter() - start)) * CYCLES)


def time_calls(calls: dict[str, Call], repeats: int = 12) -> dict[str, float]:
    """Median milliseconds of each (see ``TIMING``); the order rotates, and the cache is swept before each."""
    if not calls:
        return {}
    sweep = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    cycles = {name: launch_cycles(call) for name, call in calls.items()}
    names = list(calls)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            sweep.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles[name])
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

    dense = causal and x["prefix_key"].shape[-2] > 0
    return calls | {
        name + (", dense mask" if dense and backend is SDPBackend.CUDNN_ATTENTION else ""): functools.partial(
            one, backend
        )
        for name, backend in PEERS.items()
    }


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
            bad[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"
            if not usable():
                raise
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


def tiles_stage(log: Log, seconds: float) -> None:
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


STAGES = {
    "parity": parity,
    "sanitizer": sanitizer,
    "tiles": tiles_stage,
    "decoding": decoding,
    "speed": speed,
    "flex": flex,
}


def run_stage(name: str, path: Path, seconds: float) -> None:
    log = Log(path)
    if "environment" not in log.results:
        log.results["environment"] = environment()
    start = time.monotonic()
    try:
        STAGES[name](log, seconds)
    except Exception:
        log.add("failures", {"stage": name, "error": traceback.format_exc()})
        print(f"stage {name} failed:\n{traceback.format_exc()}", flush=True)
    log.results.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
    log.save()


def _in_own_group(function: Callable[..., object], *arguments: Any) -> None:
    os.setsid()
    function(*arguments)


def supervised(job: Job, seconds: float) -> str | None:
    """Run a job in a process of its own, and end it with all that it started. Returns why it did not end by itself."""
    process = multiprocessing.get_context("spawn").Process(target=_in_own_group, args=job)
    process.start()
    assert process.pid is not None
    process.join(seconds)
    code = process.exitcode
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        return f"ended after {seconds:.0f} s"
    return None if code == 0 else f"its process died, exit code {code}"


def main() -> int:
    end = time.monotonic() + LIMIT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the raw figures go")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--small", action="store_true", help="only what the memory checker is to watch")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        return 2
    if options.small:
        for case in SMALL:
            small_case(case)
        return 0
    options.out.unlink(missing_ok=True)
    for name in options.stages:
        left = end - time.monotonic()
        failure: str | None = f"left out, with {left:.0f} s left"
        if left > GRACE:
            seconds = min(SECONDS[name], left - GRACE)
            failure = supervised((run_stage, name, options.out, seconds), seconds + GRACE)
        if failure is not None:
            Log(options.out).add("failures", {"stage": name, "error": failure})
            print(f"stage {name}: {failure}", flush=True)
    found = Log(options.out).results
    print("seconds:", found.get("seconds"), flush=True)
    return int("failures" in found)


if __name__ == "__main__":
    sys.exit(main())
